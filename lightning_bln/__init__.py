"""Batch Layer Normalization (arXiv 2209.08898) for PyTorch and Lightning.

    from lightning_bln import BLNSwap
    trainer = Trainer(callbacks=[BLNSwap()])

`BatchLayerNorm` is the layer, `batch_layer_norm` the function, `StatFlags` the four inference flags, `swap_norms_` the
surgery that `BLNSwap` does for Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_bln.checkpoint import load_swapped_checkpoint
from lightning_bln.flags import StatFlags
from lightning_bln.layer import BatchLayerNorm
from lightning_bln.ops import batch_layer_norm
from lightning_bln.statistics import start_epoch, update_statistics
from lightning_bln.surgery import set_flags_, swap_norms_

if TYPE_CHECKING:
    from lightning_bln.callback import BLNSwap

__version__ = "0.1.0"

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
    # Lightning takes seconds to import; plain PyTorch users never wait for it.
    if name == "BLNSwap":
        from lightning_bln.callback import BLNSwap

        return BLNSwap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
