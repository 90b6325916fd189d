"""The search for flags of each layer: the 16 uniform settings first, then proposals of a sampler, scored together.

Proposals are pruned by a paired comparison: the mean loss of each of at most `STEPS` blocks of batches is reported
under the block's number, the same batches for all trials, and the pruner compares it with the best trial's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_bln.tuning.about import check_same_data
from lightning_bln.tuning.cells import Claimed, Score, View, score_of, value_of
from lightning_bln.tuning.claims import POLL_SECONDS, Claims
from lightning_bln.tuning.space import CHOICES, parameter_names, setting_code
from lightning_bln.tuning.table import CellScore

log = logging.getLogger(__name__)

T = TypeVar("T")
_one_thread = threading.Lock()  # filters of warnings are the whole process's

STEPS = 32
"""How many intermediate values a trial has at the most: each is a row in the storage, and a test by the pruner."""


def default_sampler() -> BaseSampler:
    """TPE as Optuna 5 has it by default: all parameters together, and trials that others are running avoided."""
    return _quietly(lambda: TPESampler(multivariate=True, constant_liar=True))  # both experimental in Optuna 4


def default_pruner() -> BasePruner:
    """Wilcoxon's signed-rank test; p < 0.01 at each of up to `STEPS` looks is about p < 0.1 over all (Pocock)."""
    return _quietly(lambda: WilcoxonPruner(p_threshold=0.01))


def _quietly(make: Callable[[], T]) -> T:
    """Without Optuna's warning that something is experimental: it is our choice, not the user's."""
    with _one_thread, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return make()


def search(
    claims: Claims,
    score: Score,
    *,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    n_trials: int = 64,
    proposals: int = 8,
    workers: int = 1,
) -> None:
    """Score the uniform settings, then proposals until the study has ``n_trials`` of them, of all processes together.

    Args:
        claims: Of a study whose parameters are the flags of each layer.
        score: `score_flags` with the model, the data and the loss filled in.
        sampler: Default `default_sampler`.
        pruner: Default `default_pruner`.
        n_trials: Trials beyond the uniform settings that are COMPLETE, PRUNED or given up.
        proposals: How many are scored in one pass.
        workers: How many processes work on the study.
    """
    assert claims.layers is not None
    sampler = sampler or default_sampler()
    run = _Passes(claims, score, pruner or default_pruner())
    uniform = [setting_code(setting) for setting in claims.cells]
    for claimed in claims.shares(workers, uniform):
        run.score(claimed)
    run.complain_of_pruner(pruner)
    # With one layer the uniform settings are all there are.
    n_trials = min(n_trials, 16 ** len(claims.layers) - len(uniform))
    pause = 0.02
    while True:
        claimed = claims.claim(workers) or _propose(claims, sampler, n_trials, proposals)
        if claimed:
            pause = 0.02
            run.score(claimed)
            continue
        if claims.settled():
            return
        time.sleep(pause)
        pause = min(pause * 1.5, POLL_SECONDS)


def _propose(claims: Claims, sampler: BaseSampler, n_trials: int, proposals: int) -> list[Claimed]:
    """Up to ``proposals`` new trials of this worker, with the sampler's settings."""
    if _count(claims, claims.look()) >= n_trials:
        return []

    def make() -> None:
        left = n_trials - _count(claims, claims.reconcile())
        for _ in range(min(left, proposals)):
            claims.propose()

    claims.exclusively(make)
    claimed = []
    for number in claims.unsigned:
        # A study of its own for each, whose memory of the other trials is fresh: with this sampler, not the study's.
        study = optuna.load_study(study_name=claims.study.study_name, storage=claims.storage, sampler=sampler)
        trial = Trial(study, claims.trial_id(number))
        for name in parameter_names(claims.layers):
            trial.suggest_categorical(name, CHOICES)
        claimed.append(claims.sign(number))
    return claimed


def _count(claims: Claims, view: View) -> int:
    """Trials beyond the uniform settings that are done, under way, or given up."""
    uniform = {setting_code(setting) for setting in claims.cells}
    count = len(view.proposed)
    for code, cell in view.cells.items():
        trials = len(cell.done) + len(cell.waiting) + len(cell.running) + cell.given_up(claims.max_retries)
        count += max(trials - 1, 0) if code in uniform else trials
    return count


class _Passes:
    """Scores trials, those that have a known setting by copying, the others in one pass over the data."""

    def __init__(self, claims: Claims, score: Score, pruner: BasePruner) -> None:
        self.claims = claims
        self.score_settings = score
        self.pruner = pruner
        self.uniform = {setting_code(setting) for setting in claims.cells}

    def score(self, claimed: Sequence[Claimed]) -> None:
        """Score and finish trials of this worker."""
        known = {code: cell.done[0] for code, cell in self.claims.look().cells.items() if cell.done}
        new: dict[str, Claimed] = {}
        copies = []
        for one in claimed:
            if one.code in known or one.code in new:
                copies.append(one)
            else:
                new[one.code] = one
        if new:
            known |= self._score_new(list(new.values()))
        self._copy(copies, known)

    def complain_of_pruner(self, pruner: BasePruner | None) -> None:
        """Say so if the pruner cannot be used."""
        if not self._comparable() and not isinstance(self.pruner, NopPruner):
            level = logging.INFO if pruner is None else logging.WARNING
            log.log(
                level, "nothing is pruned: the monitored value is not a mean over batches that are known one by one"
            )

    def _score_new(self, claimed: list[Claimed]) -> dict[str, FrozenTrial]:
        log.info("scoring %d settings", len(claimed))
        watch = _Batches(self, claimed, self._block() if self._comparable() else None)
        started = time.monotonic()
        table = self.score_settings([one.setting for one in claimed], on_batch=watch)
        seconds = time.monotonic() - started
        check_same_data(self.claims.study, table)
        scores = {score.code: score for score in table}
        results = []
        for index, one in enumerate(claimed):
            score = scores[one.code]
            attrs = {"seconds": seconds} | ({"batches": watch.batches} if watch.batches else {})
            if score.complete:
                watch.report_the_rest(index)
            results.append((one, score, value_of(score, table.monitor) if score.complete else watch.last(index), attrs))
        self.claims.finish(results)
        return {code: cell.done[0] for code, cell in self.claims.look().cells.items() if cell.done}

    def _copy(self, copies: Sequence[Claimed], known: dict[str, FrozenTrial]) -> None:
        results = []
        for one in copies:
            trial = known.get(one.code)
            if trial is None:  # the first of this setting failed
                score, value, attrs = CellScore(one.setting, math.nan, error="failed in another trial"), None, {}
            else:
                attrs = {"copied_from": trial.number, "seconds": 0.0}
                attrs |= {name: trial.user_attrs[name] for name in ("batches",) if name in trial.user_attrs}
                value = trial.value
                score = score_of(trial, one.setting)
                # The pruner compares with the best trial, which this one may be.
                for step, mean in trial.intermediate_values.items():
                    self.report(one, step, mean)
            results.append((one, score, value, attrs))
        if results:
            self.claims.finish(results)

    def report(self, one: Claimed, step: int, value: float) -> bool:
        """Whether the trial is still this worker's."""
        try:
            self.claims.storage.set_trial_intermediate_value(one.trial_id, step, value)
        except UpdateFinishedTrialError:
            return False
        return True

    def should_prune(self, one: Claimed) -> bool:
        """What the pruner says."""
        study = self.claims.study
        return one.code not in self.uniform and self.pruner.prune(study, self.claims.storage.get_trial(one.trial_id))

    def _block(self) -> int | None:
        """Batches in a block: None before a setting was scored to the end."""
        trials = self._complete()
        return max((math.ceil(trial.user_attrs["batches"] / STEPS) for trial in trials), default=None)

    def _comparable(self) -> bool:
        """Whether the losses of batches make up the value that is compared."""
        trials = self._complete()
        for trial in trials:
            value, loss = trial.value, trial.user_attrs["loss"]
            if value is None or loss is None or not math.isclose(value, loss, rel_tol=1e-4, abs_tol=1e-6):
                return False
        return bool(trials)

    def _complete(self) -> list[FrozenTrial]:
        trials = self.claims.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [trial for trial in trials if "batches" in trial.user_attrs]


class _Batches:
    """`score_flags`' ``on_batch``: losses by block, reported as they come where the block's size is known."""

    def __init__(self, passes: _Passes, claimed: Sequence[Claimed], block: int | None) -> None:
        self.passes = passes
        self.claimed = claimed
        self.block = block
        self.batches = 0
        self._losses: list[list[tuple[int, float]]] = [[] for _ in claimed]
        self._means: list[dict[int, float]] = [{} for _ in claimed]

    def __call__(self, batch: int, losses: dict[int, tuple[int, float]]) -> Collection[int]:
        """Take in one batch, and say which settings to drop."""
        self.batches += 1  # not every batch need have the monitored value
        for index, pair in losses.items():
            self._losses[index].append(pair)
        if self.block is None or self.batches % self.block:
            return ()
        step = self.batches // self.block - 1
        return [index for index in losses if self._drop(index, step)]

    def _drop(self, index: int, step: int) -> bool:
        one = self.claimed[index]
        if not self._report(index, step):
            return True  # another worker has it now
        return self.passes.should_prune(one)

    def report_the_rest(self, index: int) -> None:
        """Report what the end of the pass left over: all of it, if the block's size was not known before."""
        if self.block is None:
            self.block = max(math.ceil(self.batches / STEPS), 1)
        for step in range(math.ceil(self.batches / self.block)):
            if step not in self._means[index]:
                self._report(index, step)

    def last(self, index: int) -> float | None:
        """The last value reported, which Optuna takes for that of a pruned trial."""
        means = self._means[index]
        return means[max(means)] if means else None

    def _report(self, index: int, step: int) -> bool:
        assert self.block is not None
        pairs = self._losses[index][step * self.block : (step + 1) * self.block]
        mean = math.fsum(total for _, total in pairs) / max(sum(n for n, _ in pairs), 1)
        self._means[index][step] = mean
        return self.passes.report(self.claimed[index], step, mean)
