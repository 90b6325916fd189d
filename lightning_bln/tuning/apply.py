"""`apply_flags`: from a checkpoint and chosen flags to a checkpoint whose layers have these flags."""

from __future__ import annotations

import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.layer import is_extra_state
from lightning_bln.tuning.space import by_layer, parse_setting

_EXTRA_STATE = "_extra_state"


def apply_flags(
    checkpoint_path: str | PathLike[str],
    setting: FlagsLike | Mapping[str, FlagsLike],
    out: str | PathLike[str],
    *,
    overwrite: bool = False,
) -> dict[str, StatFlags]:
    """Write a copy of a swapped model's checkpoint in which every `BatchLayerNorm` has the chosen inference flags.

    Everything else is as it was, tensors bit for bit, the states of optimizers, loops and callbacks too, so that
    training resumes from the copy as from the original. The file is read with ``weights_only=True``, to the CPU. The
    copy appears under its name only when it is complete.

    A checkpoint of averaged weights (``EMAWeightAveraging``) holds the model twice; both get the flags.

    Args:
        checkpoint_path: Checkpoint of a Trainer with `BLNSwap`, or ``{"state_dict": ...}`` of a swapped model.
        setting: Flags of all layers together ("TTFF", `StatFlags`), or by layer (``{"net.1": "TTFF", ...}``,
            "net.1=TTFF,net.5=FFFF"); see `parse_setting`.
        out: The file to write.
        overwrite: Replace ``out`` if it exists, be it the checkpoint itself. Default False.

    Returns:
        The flags that each layer now has, by name.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no folder for ``out``.
        FileExistsError: If ``out`` exists and ``overwrite`` is False.
        ValueError: If the file is no readable checkpoint, holds no `BatchLayerNorm`, or the setting cannot be read or
            is for other layers. Nothing is written then.

    Example:
        >>> apply_flags("best.ckpt", "FFFF", "chosen.ckpt")  # doctest: +SKIP
        {'net.1': StatFlags('FFFF'), 'net.5': StatFlags('FFFF')}
    """
    _check_writable(out, overwrite)
    checkpoint = read_checkpoint(checkpoint_path)
    layers = checkpoint_flags(checkpoint, checkpoint_path)
    chosen = by_layer(parse_setting(setting, list(layers)), layers)
    for state_dict in _state_dicts(checkpoint):
        names = _first_names(state_dict)
        for name, first in names.items():
            if first in chosen:  # another model's, a teacher's say, is left alone
                key = f"{name}.{_EXTRA_STATE}" if name else _EXTRA_STATE
                state_dict[key]["config"]["flags"] = chosen[first].code
    _write(checkpoint, Path(out), overwrite)
    return chosen


def read_checkpoint(path: str | PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint's plain types and tensors, to the CPU, without running any code of it.

    Args:
        path: The file.
        mmap: Read tensors from the disk only when they are used, where the file's format allows it. Default False.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no complete checkpoint of plain types, or holds no state_dict.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"A checkpoint must be a file, got {str(path)!r}, which is none; check the path.")
    try:
        lazily = mmap and zipfile.is_zipfile(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # a damaged file can raise nearly anything (KeyError, EOFError, UnpicklingError, ...)
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
        reason = f"{type(error).__name__}: {text.splitlines()[0].split('. ')[0]}"
        raise ValueError(
            f"A checkpoint must be a complete file of plain types, got {path}, which cannot be read "
            f"({reason}); pass the path of a .ckpt file that a Trainer wrote."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), MutableMapping):
        raise ValueError(
            f"A checkpoint must hold a state_dict, got {path} with {type(checkpoint).__name__}"
            f"{sorted(map(str, checkpoint))[:8] if isinstance(checkpoint, dict) else ''}; pass a .ckpt file "
            f"that a Trainer wrote."
        )
    return checkpoint


def checkpoint_flags(checkpoint: Mapping[str, Any], path: str | PathLike[str] = "checkpoint") -> dict[str, StatFlags]:
    """The flags of each `BatchLayerNorm` of a checkpoint by name; a shared layer once, under its first name.

    Args:
        checkpoint: As `read_checkpoint` returns it.
        path: Its name in error messages.

    Raises:
        ValueError: If it holds none.
    """
    state_dict = checkpoint["state_dict"]
    layers = {
        _name(key): StatFlags.parse(state["config"]["flags"])
        for key, state in state_dict.items()
        if _is_layer(key, state)
    }
    if not layers:
        raise ValueError(
            f"Flags belong to BatchLayerNorm layers, got {path}, whose {len(state_dict)} entries hold none; pass the "
            f"checkpoint of a model that was trained with BLNSwap() (on the command line: fit --bln true)."
        )
    first = _first_names(state_dict)
    return {name: flags for name, flags in layers.items() if first[name] == name}


def _name(key: str) -> str:
    return key[: -len(_EXTRA_STATE)].rstrip(".")


def _is_layer(key: Any, state: Any) -> bool:
    return isinstance(key, str) and key.split(".")[-1] == _EXTRA_STATE and is_extra_state(state)


def _state_dicts(checkpoint: Mapping[str, Any]) -> Iterator[MutableMapping[str, Any]]:
    for value in checkpoint.values():
        if isinstance(value, MutableMapping) and any(_is_layer(key, state) for key, state in value.items()):
            yield value


def _first_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """For each layer's name the first one of the same layer: a shared layer is saved under all its names."""
    first: dict[int, str] = {}
    names = {}
    for key, state in state_dict.items():
        if not _is_layer(key, state):
            continue
        name = _name(key)
        # Its one buffer that is never empty; names that share it share the layer.
        counter = state_dict.get(f"{name}.num_samples" if name else "num_samples")
        same = counter.untyped_storage().data_ptr() if isinstance(counter, Tensor) else id(state)
        names[name] = first.setdefault(same, name)
    return names


def _check_writable(out: str | PathLike[str], overwrite: bool) -> None:
    path = Path(out)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder of {str(out)!r} must exist, got none; create {path.parent} first.")
    if path.is_dir():
        raise ValueError(
            f"The output must be a file, got the folder {str(out)!r}; write for example {path / 'chosen.ckpt'}."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"The output must be a new file, got {str(out)!r}, which exists; name another or pass overwrite=True."
        )


def _write(checkpoint: Mapping[str, Any], out: Path, overwrite: bool) -> None:
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        _check_writable(out, overwrite)  # it may have come into being meanwhile
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
