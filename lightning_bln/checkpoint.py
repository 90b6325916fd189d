"""`load_swapped_checkpoint`: from a Lightning checkpoint of a swapped model back to that model."""

from __future__ import annotations

import inspect
import re
import warnings
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_bln.surgery import restore_swaps_

Module = TypeVar("Module", bound=nn.Module)


def load_swapped_checkpoint(lit_class: type[Module], path: str | PathLike[str], **kwargs: Any) -> Module:
    """Build a LightningModule from the checkpoint of a model that `BLNSwap` swapped.

    What ``lit_class.load_from_checkpoint(path, **kwargs)`` does for other models: builds the module from its saved
    hyper-parameters, swaps the layers that the checkpoint holds as `BatchLayerNorm`, with their settings and flags, and
    loads every value strictly. Full and weights-only checkpoints alike; the file is read with ``weights_only=True``.

    Args:
        lit_class: The LightningModule's class.
        path: The checkpoint file.
        kwargs: As of ``load_from_checkpoint``: ``map_location``, ``hparams_file``, and arguments of the class.

    Returns:
        The model, in train mode as ``load_from_checkpoint`` returns it; call ``.eval()`` before inference.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no readable checkpoint, or holds no `BatchLayerNorm`, or one of another model.

    Example:
        >>> model = load_swapped_checkpoint(LitModel, "best.ckpt")  # doctest: +SKIP
    """
    fixed = sorted({"strict", "weights_only"} & set(kwargs))
    if fixed:
        raise TypeError(
            f"load_swapped_checkpoint always loads strictly and plain types only, got {fixed}; leave it out."
        )
    state_dict = _read_state_dict(path, kwargs.get("map_location"))
    load: Any = lit_class.load_from_checkpoint  # type: ignore[attr-defined]
    if "weights_only" in inspect.signature(load).parameters:  # older Lightning would hand it to the class
        kwargs["weights_only"] = True
    try:
        with warnings.catch_warnings():
            # Not strict, so that the unswapped model takes what it knows; everything is loaded strictly below.
            warnings.filterwarnings("ignore", message="Found keys that are (not )?in the ")
            model: Module = load(path, strict=False, **kwargs)
        restore_swaps_(model, state_dict)
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f"The checkpoint must be of the same model, got {path} for {lit_class.__name__}: {error}"
        ) from error
    return model


def _read_state_dict(path: str | PathLike[str], map_location: Any) -> dict[str, Any]:
    right = "pass the path of a .ckpt file that a Trainer with BLNSwap() wrote"
    hyper = "hyper-parameters must be numbers, strings, lists and the like"
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything (KeyError, EOFError, UnpicklingError, ...)
        raise ValueError(
            f"A checkpoint must be a complete Lightning checkpoint of plain types, got {path}, which cannot be read "
            f"({_first_line(error)}); {right}, and whose {hyper}."
        ) from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"A checkpoint must hold a state_dict, got {path} with {type(checkpoint).__name__}"
            f"{sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, dict) else ''}; {right}."
        )
    return state_dict


def _first_line(error: Exception) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"
