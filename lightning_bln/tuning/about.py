"""What a study is about: one model, one kind of search, one value; and whether a call fits what is in the storage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from torch import nn

from lightning_bln.tuning.cells import FLAG
from lightning_bln.tuning.mutex import Mutex
from lightning_bln.tuning.space import parameter_names
from lightning_bln.tuning.table import ScoreTable
from lightning_bln.tuning.workers import worker_name

ATTRIBUTE = "lightning_bln"
"""The study's user attribute that says what it is about."""

VERSION = 1
CONFIDENCE = 0.95


def open_study(
    storage: BaseStorage, study_name: str, about: Mapping[str, Any], layers: Sequence[str] | None
) -> optuna.Study:
    """The study of that name, made if there is none; one made by ``optuna create-study`` is taken over.

    Raises:
        ValueError: If it is about something else. It is unchanged then.
    """
    wanted = StudyDirection.MINIMIZE if about["mode"] == "min" else StudyDirection.MAXIMIZE
    direction = wanted.name.lower()
    if study_name not in optuna.get_all_study_names(storage):
        # Workers that start together may all come here.
        optuna.create_study(study_name=study_name, storage=storage, direction=wanted, load_if_exists=True)
    study = optuna.load_study(study_name=study_name, storage=storage)
    if study.directions != [wanted]:
        raise ValueError(
            f"A study with mode={about['mode']!r} must {direction} one value, got {study_name!r}, which has "
            f"{', '.join(one.name.lower() for one in study.directions)}; take another study_name, or "
            f"`optuna create-study --direction {direction}`."
        )
    known = study.user_attrs.get(ATTRIBUTE)
    if known is None:
        with Mutex(storage, study_name, worker_name()).hold():
            # Another worker may have been here first, with another model.
            known = study.user_attrs.get(ATTRIBUTE)
            if known is None:
                check_space(study, layers)
                study.set_user_attr(ATTRIBUTE, dict(about))
                return study
    for name, value in about.items():
        if known.get(name) != value and name != "confidence":
            raise ValueError(
                f"A study is of one model and one kind of search, got {study_name!r}, whose {_WORDS[name]} is "
                f"{_shown(known.get(name))} where this call has {_shown(value)}; take another study_name"
                + (f", say {study_name + '-per-layer'!r}." if name == "kind" and value == "per_layer" else ".")
            )
    check_space(study, layers)
    return study


_WORDS = {
    "version": "format",
    "kind": "kind",
    "layers": "list of BatchLayerNorm layers",
    "monitor": "monitored value",
    "mode": "mode",
    "model": "model (sha256 of its tensors)",
    "limit_batches": "limit_batches",
}


def check_space(study: optuna.Study, layers: Sequence[str] | None) -> None:
    """Make sure that the trials that a study has are of this search.

    Raises:
        ValueError: If one has other parameters, or other choices.
    """
    names = set(parameter_names(layers))
    for trial in study.get_trials(deepcopy=False):
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        unknown = sorted(set(given) - names)
        others = [name for name, distribution in trial.distributions.items() if name in names and distribution != FLAG]
        if unknown or others:
            raise ValueError(
                f"Trials of the study {study.study_name!r} must have this search's parameters "
                f"({', '.join(parameter_names(layers)[:4])}{', ...' if layers else ''}; each True or False in that "
                f"order), got trial {trial.number} with {', '.join(unknown or others)}"
                f"{'' if unknown else f': {trial.distributions[others[0]]}'}; take another study_name, or ask with the "
                f"search space that `lightning-bln space` prints."
            )


def check_same_data(study: optuna.Study, table: ScoreTable) -> None:
    """Make sure that scores are of the same batches as those that the study has.

    Raises:
        ValueError: If they are not.
    """
    ours = next((score for score in table if score.complete), None)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        theirs = trial.user_attrs.get("units")
        if ours is None or not theirs:
            continue
        if [n for n, _ in theirs] != [n for n, _ in ours.units]:
            raise ValueError(
                f"Settings of one study must be scored on the same batches, got {ours.samples} samples in "
                f"{len(ours.units)} parts where trial {trial.number} had {trial.user_attrs['samples']} in "
                f"{len(theirs)}; use the same data and batch size, or another study_name."
            )
        return


def fingerprint(model: nn.Module) -> str:
    """A sha256 of the model's parameters and buffers: names, types, shapes and values, wherever they are."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shown(value: Any) -> str:
    text = value[:12] + "..." if isinstance(value, str) and len(value) == 64 else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
