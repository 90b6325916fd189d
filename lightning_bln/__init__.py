"""Batch Layer Normalization (arXiv 2209.08898) for PyTorch and Lightning.

    from lightning_bln import BLNSwap
    trainer = Trainer(callbacks=[BLNSwap()])

`BatchLayerNorm` is the layer, `batch_layer_norm` the function, `StatFlags` the four inference flags, `swap_norms_` the
surgery that `BLNSwap` does for Lightning. `lightning_bln.tuning` chooses the flags of a trained model; the command line
is ``lightning-bln``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bln.callback import BLNSwap
    from lightning_bln.checkpoint import load_swapped_checkpoint
    from lightning_bln.flags import StatFlags
    from lightning_bln.layer import BatchLayerNorm
    from lightning_bln.ops import batch_layer_norm
    from lightning_bln.statistics import start_epoch, update_statistics
    from lightning_bln.surgery import set_flags_, swap_norms_

__version__ = "0.1.0"

# Name -> module; each is imported when it is first asked for: PyTorch takes a second or more to import and Lightning
# several, which neither `lightning-bln --help` nor users of one of the two should wait for.
_WHERE = {
    "BLNSwap": "callback",
    "BatchLayerNorm": "layer",
    "StatFlags": "flags",
    "batch_layer_norm": "ops",
    "load_swapped_checkpoint": "checkpoint",
    "set_flags_": "surgery",
    "start_epoch": "statistics",
    "swap_norms_": "surgery",
    "update_statistics": "statistics",
}

__all__ = [
    "BLNSwap",
    "BatchLayerNorm",
    "StatFlags",
    "batch_layer_norm",
    "load_swapped_checkpoint",
    "set_flags_",
    "start_epoch",
    "swap_norms_",
    "update_statistics",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = _submodule(name)
    # Next time it is found without this function.
    globals()[name] = value
    return value


def _submodule(name: str) -> Any:
    """A module of the package, so that ``lightning_bln.layer`` needs no import of its own."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":  # the module is there; something that it needs is not
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
