"""`tune_flags`: the search for the best inference flags as an Optuna study that several processes can share."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from torch import nn

from lightning_bln.flags import StatFlags
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.about import (
    ATTRIBUTE,
    CONFIDENCE,
    VERSION,
    check_same_data,
    check_space,
    fingerprint,
    open_study,
)
from lightning_bln.tuning.cells import Score, scores_by_code, value_of
from lightning_bln.tuning.claims import Claims
from lightning_bln.tuning.per_layer import search
from lightning_bln.tuning.scoring import OnBatch, score_flags
from lightning_bln.tuning.space import Setting, by_layer
from lightning_bln.tuning.storage import StorageLike, open_storage
from lightning_bln.tuning.table import ScoreTable, check_choices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneResult:
    """What `tune_flags` found.

    Attributes:
        study: The Optuna study, for its plots and for ``optuna`` on the command line.
        table: The scores of all COMPLETE trials, best first.
        given_up: Settings that failed again and again, with the last error.
        elsewhere: Settings that other code holds RUNNING, with the numbers of their trials; asked by ``optuna ask`` and
            not told yet, most likely.
    """

    study: optuna.Study
    table: ScoreTable
    given_up: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    @property
    def best(self) -> Setting:
        """The best setting; `set_flags_` takes it.

        Raises:
            ValueError: If no setting was scored with a finite value.
        """
        return self.table.best.setting

    def summary(self) -> str:
        """One line, and one for each setting that is not scored."""
        lines = [f"Study {self.study.study_name!r}: {self.table.summary()}"]
        lines += [f"{code} was given up after its last failure: {error}" for code, error in self.given_up.items()]
        lines += [
            f"{code} is still RUNNING elsewhere as trial {number}: tell its value, or call "
            f"`optuna tell --trial-number {number} --state fail` and tune again"
            for code, number in self.elsewhere.items()
        ]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self.table, *(Text(line) for line in self.summary().splitlines()[1:]))

    def __str__(self) -> str:
        return "\n".join([str(self.table), *self.summary().splitlines()[1:]])


def tune_flags(
    model: nn.Module,
    dataloader: Any = None,
    loss: Any = None,
    metrics: Any = None,
    *,
    storage: StorageLike = None,
    study_name: str = "lightning-bln",
    per_layer: bool = False,
    n_trials: int | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    proposals: int = 8,
    workers: int = 1,
    monitor: str = "loss",
    mode: str = "min",
    limit_batches: int | None = None,
    trainer: Any = None,
    heartbeat: float = 10.0,
    grace: float = 60.0,
    max_retries: int = 2,
    progress: bool = True,
) -> TuneResult:
    """Find the inference flags with which a trained model does best, in an Optuna study.

    All 16 settings of all layers together are scored, each exactly once, in one pass over the data; ``per_layer`` then
    goes on to settings of its own for each layer. Start the same call in as many processes as you like, on one machine
    or on many, with the same ``storage``: they share the settings (say in ``workers`` how many they are). A process
    that is killed loses nothing, another one, or the next call, does its part. ``optuna ask`` and ``tell`` work on the
    same study, and so does optuna-dashboard.

    Data, loss and metrics are those of `score_flags`; do not shuffle the data.

    Args:
        model: With `BatchLayerNorm` layers, trained. It is not changed: `set_flags_` sets the flags that were found.
        dataloader: As in `score_flags`. It must give the same batches each time, and in each process.
        loss: As in `score_flags`.
        metrics: As in `score_flags`.
        storage: As `open_storage` takes it. Default an SQLite file, lightning-bln.db, in the current folder.
        study_name: A study is of one model, and of one kind of search. Default "lightning-bln".
        per_layer: Search flags for each layer, 16^L settings: the 16 uniform ones first, then what ``sampler``
            proposes. Default False.
        n_trials: How many proposals beyond the 16, of all processes together. Default 64. Only for ``per_layer``.
        sampler: Default Optuna's TPESampler. Only for ``per_layer``.
        pruner: Drops proposals that are worse than the best setting on the batches so far. Default Optuna's
            WilcoxonPruner, a paired comparison. Only for ``per_layer``.
        proposals: How many proposals are scored in one pass; they share the layers in which they agree. Default 8. Only
            for ``per_layer``.
        workers: How many processes work on the study; each takes its share of the settings. Default 1.
        monitor: As in `score_flags`.
        mode: "min" (default) or "max".
        limit_batches: As in `score_flags`.
        trainer: As in `score_flags`.
        heartbeat: Seconds between this worker's signs of life. Default 10.
        grace: Seconds without one after which a worker is taken for dead. Default 60.
        max_retries: How often a setting that raised is tried again. Default 2.
        progress: Show progress bars in a terminal. Default True.

    Returns:
        A `TuneResult`, when every setting is scored, given up, or held by other code.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`, data, loss and monitored value do not fit each other, or the
            study in the storage is about something else. Nothing has been written then.
        RuntimeError: If every setting failed.

    Example:
        >>> from lightning_bln import BatchLayerNorm, set_flags_, update_statistics
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4), nn.Linear(4, 2))
        >>> data = DataLoader(TensorDataset(torch.randn(64, 3), torch.randint(2, (64,))), batch_size=16)
        >>> _ = update_statistics(model, data)
        >>> result = tune_flags(model, data, nn.CrossEntropyLoss(), storage=optuna.storages.InMemoryStorage())
        >>> len(result.table)
        16
        >>> set_flags_(model, result.best)["1"] == result.best
        True
    """
    _check_arguments(
        model, dataloader, per_layer, n_trials, sampler, pruner, proposals, workers, mode, heartbeat, grace
    )

    def score(cells: Sequence[Any], on_batch: OnBatch | None = None, **changes: Any) -> ScoreTable:
        settings = {
            "monitor": monitor, "mode": mode, "confidence": CONFIDENCE, "limit_batches": limit_batches,
            "trainer": trainer, "progress": progress, "errors": "keep",
        }  # fmt: skip
        return score_flags(model, dataloader, loss, metrics, cells, on_batch=on_batch, **(settings | changes))

    layers = list(bln_layers(model))
    # A LightningModule's only loss may have been found out.
    resolved = _try_out(score, 1 if limit_batches is None else min(limit_batches, 1))
    about = {
        "version": VERSION,
        "kind": "per_layer" if per_layer else "uniform",
        "layers": layers,
        "monitor": resolved,
        "mode": mode,
        "model": fingerprint(model),
        "limit_batches": limit_batches,
        "confidence": CONFIDENCE,
    }
    opened = optuna.storages.get_storage(open_storage(storage))
    study = open_study(opened, study_name, about, layers if per_layer else None)
    uniform = list(StatFlags.all())
    cells: list[Setting] = [by_layer(flags, layers) for flags in uniform] if per_layer else list(uniform)
    claims = Claims(
        study, opened, cells, layers if per_layer else None,
        once=not per_layer, heartbeat=heartbeat, grace=grace, max_retries=max_retries,
    )  # fmt: skip
    with claims.working():
        if per_layer:
            search(
                claims,
                partial(score, monitor=resolved),
                sampler=sampler,
                pruner=pruner,
                n_trials=64 if n_trials is None else n_trials,
                proposals=proposals,
                workers=workers,
            )
        else:
            score_cells(claims, partial(score, monitor=resolved), workers)
        claims.mutex.tidy()
    return _result(claims)


def score_cells(claims: Claims, score: Score, workers: int) -> None:
    """Score all settings, this process's share at a time, until none is left for it to do or to wait for."""
    for claimed in claims.shares(workers):
        log.info("scoring %s", ", ".join(one.code for one in claimed))
        started = time.monotonic()
        table = score([one.setting for one in claimed])
        seconds = time.monotonic() - started
        scores = {one.code: one for one in table}
        check_same_data(claims.study, table)
        claims.finish(
            (one, scores[one.code], value_of(scores[one.code], table.monitor), {"seconds": seconds}) for one in claimed
        )


def load_scores(study: optuna.Study) -> ScoreTable:
    """The scores of a study's COMPLETE trials, each setting once.

    Trials told by ``optuna tell`` have their value only: no interval can be had for them.

    Args:
        study: Made by `tune_flags`, or by ``optuna create-study`` with the search space of `search_space_json`.

    Returns:
        A `ScoreTable`, best first.

    Raises:
        ValueError: If the study is not about flags.
    """
    about = study.user_attrs.get(ATTRIBUTE, {})
    if about.get("kind", "uniform") not in ("uniform", "per_layer"):
        raise ValueError(
            f"Scores are those of a study of flags, got {study.study_name!r}, a study of kind {about['kind']!r}; its "
            f"trials are in study.trials_dataframe()."
        )
    if not about:
        check_space(study, None)
    layers = about["layers"] if about.get("kind") == "per_layer" else None
    monitor = about.get("monitor", "loss")
    mode = about.get("mode", "min" if study.direction == StudyDirection.MINIMIZE else "max")
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    scores = [score for _, score in scores_by_code(trials, layers, monitor).values()]
    return ScoreTable(scores, monitor=monitor, mode=mode, confidence=about.get("confidence", CONFIDENCE))


# ------------------------------------------------------------------------- helpers


def _check_arguments(
    model: nn.Module,
    dataloader: Any,
    per_layer: bool,
    n_trials: int | None,
    sampler: Any,
    pruner: Any,
    proposals: int,
    workers: int,
    mode: str,
    heartbeat: float,
    grace: float,
) -> None:
    if not bln_layers(model):
        raise ValueError(
            f"Flags are tuned on a model with BatchLayerNorm layers, got a {type(model).__name__} without any; train "
            f"it with BLNSwap() first, or load its checkpoint with load_swapped_checkpoint(...)."
        )
    if isinstance(dataloader, Iterator):
        raise ValueError(
            f"The data are gone through several times, got a {type(dataloader).__name__}, which gives them once; pass "
            f"a DataLoader or a list of batches."
        )
    if not per_layer and (n_trials is not None or sampler is not None or pruner is not None):
        given = "n_trials" if n_trials is not None else "sampler" if sampler is not None else "pruner"
        raise ValueError(
            f"The 16 settings of all layers together are all scored, got {given}, which is for a search by layer; call "
            f"tune_flags(..., per_layer=True)."
        )
    for name, value in (("n_trials", n_trials), ("proposals", proposals), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")
    check_choices(mode)
    if not 0 < heartbeat < grace:
        raise ValueError(
            f"heartbeat must be positive and shorter than grace, or living workers would be taken for dead, got "
            f"heartbeat={heartbeat!r} and grace={grace!r}; say heartbeat=10, grace=60."
        )


def _try_out(score: Score, limit_batches: int) -> str:
    """Score one batch before anything is written, so that data and loss that do not fit leave no trace.

    Returns:
        The monitored value's name; a LightningModule's may not be known before.
    """
    table = score([StatFlags(), StatFlags(False, False, False, False)], limit_batches=limit_batches, progress=False)
    if all(one.error for one in table):
        # Not a matter of one setting: raised as it came.
        table = score([StatFlags()], limit_batches=limit_batches, progress=False, errors="raise")
    return table.monitor


def _result(claims: Claims) -> TuneResult:
    view = claims.look()
    given_up = claims.given_up(view)
    elsewhere = {
        code: cell.elsewhere[0].number for code, cell in view.cells.items() if cell.elsewhere and not cell.done
    }
    result = TuneResult(claims.study, load_scores(claims.study), given_up, elsewhere)
    if given_up and not len(result.table):
        code, error = next(iter(given_up.items()))
        raise RuntimeError(f"No setting could be scored; {code}, for one, failed with {error}.")
    for line in result.summary().splitlines()[1:]:
        log.warning(line)
    return result
