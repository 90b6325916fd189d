"""What the command line is given by name: a study that exists, and one of Optuna's samplers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from lightning_bln.tuning.storage import DEFAULT_STORAGE, open_storage


def find_study(storage: str | None, study_name: str) -> optuna.Study:
    """Open a study that exists; a storage that does not exist is not made.

    Args:
        storage: As `open_storage` takes it.
        study_name: Its name.

    Raises:
        ValueError: If there is no such storage or study.
    """
    path = _file(storage or DEFAULT_STORAGE)
    if path is not None and not path.exists():
        raise ValueError(
            f"The storage of a study must exist, got {storage or DEFAULT_STORAGE!r}, and there is no such file; "
            f"name the one that `lightning-bln tune --storage` was given."
        )
    opened = open_storage(storage)
    names = optuna.get_all_study_names(opened)
    if study_name not in names:
        raise ValueError(
            f"The study must be in the storage, got {study_name!r}"
            + (f" where there are {', '.join(map(repr, names[:8]))}" if names else ", and the storage has none")
            + "; `lightning-bln tune --study_name NAME` makes one."
        )
    return optuna.load_study(study_name=study_name, storage=opened)


def make_sampler(name: str, arguments: Mapping[str, Any] | None = None) -> BaseSampler:
    """A sampler by its class's name in `optuna.samplers`.

    Args:
        name: Such as "TPESampler".
        arguments: Of its constructor.

    Raises:
        ValueError: If there is no such sampler, or it does not take these arguments.

    Example:
        >>> type(make_sampler("RandomSampler", {"seed": 1})).__name__
        'RandomSampler'
    """
    names = [n for n in optuna.samplers.__all__ if n.endswith("Sampler") and not n.startswith("Base")]
    if name not in names:
        raise ValueError(
            f"The sampler must be one of {', '.join(names)}, got {name!r}; write --sampler TPESampler, say."
        )
    sampler = getattr(optuna.samplers, name)
    try:
        inspect.signature(sampler).bind(**(arguments or {}))
    except TypeError as error:
        raise ValueError(
            f"{name} must get arguments that it knows, got {dict(arguments or {})!r}: {error}; it takes "
            f"{', '.join(inspect.signature(sampler).parameters) or 'none'}."
        ) from error
    return sampler(**(arguments or {}))


def _file(storage: str) -> Path | None:
    """The file of a storage in one, else None."""
    if storage.startswith("sqlite") and ":///" in storage:
        return Path(storage.split(":///", 1)[1].split("?")[0])
    return None if "://" in storage else Path(storage)
