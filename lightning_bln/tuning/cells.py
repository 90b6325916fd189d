"""What a study holds on each setting, in the words of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from lightning_bln.tuning.space import CHOICES, Setting, params_setting, setting_code
from lightning_bln.tuning.table import CellScore, ScoreTable

FLAG = CategoricalDistribution(CHOICES)
"""The distribution of every flag; the order of its choices is part of a study's schema."""

Score = Callable[..., ScoreTable]
"""`score_flags` with the model, the data and the loss filled in: called with (cells) and ``on_batch``."""


@dataclass
class Cell:
    """What a study holds on one setting.

    Attributes:
        setting: The flags.
        done: Trials that are COMPLETE or PRUNED.
        waiting: Trials that wait to be claimed.
        running: Trials that a living worker of this package is scoring.
        elsewhere: Trials that are RUNNING without a heartbeat: from ``optuna ask`` or other code.
        silent: Trials whose worker has died or fallen silent.
        errors: What the failed trials said, those left out that were given back.
        hopeless: Whether one failed in a way in which the next would fail too.
        attempts: Number of trials so far.
    """

    setting: Setting
    done: list[FrozenTrial] = field(default_factory=list)
    waiting: list[FrozenTrial] = field(default_factory=list)
    running: list[FrozenTrial] = field(default_factory=list)
    elsewhere: list[FrozenTrial] = field(default_factory=list)
    silent: list[FrozenTrial] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    hopeless: bool = False
    attempts: int = 0

    @property
    def live(self) -> bool:
        """Whether it is scored, or will be without a new trial."""
        return bool(self.done or self.waiting or self.running or self.elsewhere)

    def given_up(self, max_retries: int) -> bool:
        """Whether it failed more often than it is tried again."""
        return not self.live and bool(self.hopeless or len(self.errors) > max_retries)

    def missing(self, max_retries: int) -> bool:
        """Whether it needs a new trial."""
        return not self.live and not self.given_up(max_retries)


@dataclass(frozen=True)
class Claimed:
    """A trial that this worker scores."""

    number: int
    trial_id: int
    setting: Setting

    @property
    def code(self) -> str:
        """The setting in letters."""
        return setting_code(self.setting)


@dataclass(frozen=True)
class View:
    """What a study holds.

    Attributes:
        cells: Settings by their codes: those that are to be scored whatever happens first, then others.
        proposed: RUNNING trials of this package that have no setting yet, of living workers.
        abandoned: Such trials of workers that died in the middle of a proposal.
    """

    cells: dict[str, Cell]
    proposed: list[FrozenTrial] = field(default_factory=list)
    abandoned: list[FrozenTrial] = field(default_factory=list)


def value_of(score: CellScore, monitor: str) -> float | None:
    """What a trial is told, None for one that failed or was pruned."""
    return score.value(monitor) if score.complete else None


def score_of(trial: FrozenTrial, setting: Setting) -> CellScore:
    """The score that a trial's attributes hold; what ``optuna tell`` was told has none of them."""
    attrs: dict[str, Any] = {"loss": None, "metrics": {}, "samples": 0, "units": ()}
    attrs |= {name: trial.user_attrs[name] for name in attrs if name in trial.user_attrs}
    pruned = trial.state == TrialState.PRUNED
    return CellScore.from_dict({"setting": setting_code(setting), "error": None, "pruned": pruned, **attrs})


def scores_by_code(
    trials: Iterable[FrozenTrial], layers: Sequence[str] | None, monitor: str
) -> dict[str, tuple[FrozenTrial, CellScore]]:
    """Of each setting one trial and its score: the first, but rather one with all there is to know.

    Args:
        trials: COMPLETE ones, by number. Those whose parameters are no setting are left out.
        layers: The layers' names, None where all layers share one setting.
        monitor: "loss" or the name of a metric: what a trial that ``optuna tell`` was told has nothing but.
    """
    found: dict[str, tuple[FrozenTrial, CellScore]] = {}
    for trial in trials:
        setting = params_setting(trial.params, layers)
        if setting is None:
            continue
        score = score_of(trial, setting)
        value = math.nan if trial.value is None else float(trial.value)
        if monitor == "loss" and math.isnan(score.loss):
            score = replace(score, loss=value)
        elif monitor != "loss" and monitor not in score.metrics:
            score = replace(score, metrics={**score.metrics, monitor: value})
        if score.code not in found or (score.units and not found[score.code][1].units):
            found[score.code] = trial, score
    return found


def score_attrs(score: CellScore) -> dict[str, Any]:
    """A score as a trial's attributes."""
    state = score.to_dict()
    return {"setting": score.code} | {name: state[name] for name in ("loss", "metrics", "samples", "units")}
