"""What a report says about a study, as plain data: scores, effects of the flags, progress, importance."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_bln.flags import StatFlags
from lightning_bln.tuning.intervals import Units, paired_difference
from lightning_bln.tuning.space import Setting, by_layer, parameter_names, params_setting
from lightning_bln.tuning.table import CellScore, ScoreTable

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

MIN_TRIALS = 4
"""With fewer complete trials the importance of parameters is not estimated."""

TOP_TRIALS = 5
"""Optuna's advice: at least as many trials should be among the best that PED-ANOVA looks at."""


@dataclass(frozen=True)
class Effect:
    """How much larger the loss is with a flag on (True) than off, all else the same.

    Attributes:
        flag: The flag's name.
        pairs: Over how many pairs of settings, that differ in this flag only, it is a mean.
        difference: The mean difference.
        low: Lower limit of its interval; NaN if not known.
        high: Upper limit.
    """

    flag: str
    pairs: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerEffect:
    """Mean loss of the complete trials with a layer's flag on, less that of those with it off; NaN without both."""

    layer: str
    flag: str
    difference: float
    on: int
    off: int


class StudyData:
    """A study as the report sees it.

    Args:
        study: With one objective and at least one complete trial; one not made by `tune_flags` will do.

    Attributes:
        kind: "uniform", "per_layer" or "training"; from the parameters' names if the study does not say it.
        layers: Names of the layers, in order; empty if not known.
        trials: All trials by number.
        table: Scores of the settings, None for "training".
        numbers: Setting's code -> number of the trial that the table holds.
        repeated: How many complete trials repeat a setting; one of each counts.
        foreign: How many complete trials of a search of flags have other parameters.
        unpaired: How many settings were scored on other batches than the best one and so have no interval.

    Raises:
        ValueError: If the study has several objectives, or no complete trial.
    """

    def __init__(self, study: optuna.Study) -> None:
        from optuna.trial import TrialState

        if len(study.directions) != 1:
            raise ValueError(
                f"A report is about a study with one objective, got {study.study_name!r} with {len(study.directions)}; "
                f"for several objectives call optuna.visualization.plot_pareto_front(study)."
            )
        self.study = study
        self.name = study.study_name
        self.trials = study.get_trials(deepcopy=False)
        self.counts = {state.name: sum(trial.state is state for trial in self.trials) for state in TrialState}
        self.complete = [trial for trial in self.trials if trial.state is TrialState.COMPLETE]
        if not any(math.isfinite(_value(trial)) for trial in self.complete):
            counts = ", ".join(f"{n} {state.lower()}" for state, n in self.counts.items() if n) or "no trial at all"
            raise ValueError(
                f"A report needs a study with at least one complete trial of a finite value, got {self.name!r} with "
                f"{counts}; run the search first, for example: "
                f"lightning-bln tune --study_name {shlex.quote(self.name)} ..."
            )
        info = study.user_attrs.get("lightning_bln", {})
        self.info: Mapping[str, Any] = info if isinstance(info, Mapping) else {}
        self.kind, self.layers = _kind(self.info, self.complete)
        self.mode = "max" if study.direction.name == "MAXIMIZE" else "min"
        self.monitor = str(self.info.get("monitor", "loss" if self.kind != "training" else "value"))
        self.confidence = float(self.info.get("confidence", 0.95))
        self.repeated = self.foreign = self.unpaired = 0
        self.numbers: dict[str, int] = {}
        self.table = None if self.kind == "training" else self._table()

    def setting(self, trial: FrozenTrial) -> Setting | None:
        """The setting that a trial's parameters are, or None."""
        return params_setting(trial.params, self._layers)

    @property
    def _layers(self) -> list[str] | None:
        return self.layers if self.kind == "per_layer" else None

    def _table(self) -> ScoreTable:
        from lightning_bln.tuning.cells import scores_by_code

        found = scores_by_code(self.complete, self._layers, self.monitor)
        self.foreign = sum(self.setting(trial) is None for trial in self.complete)
        self.repeated = len(self.complete) - self.foreign - len(found)
        self.numbers = {code: trial.number for code, (trial, _) in found.items()}
        scores = {code: score for code, (_, score) in found.items()}

        def table() -> ScoreTable:
            values = list(scores.values())
            return ScoreTable(values, monitor=self.monitor, mode=self.mode, confidence=self.confidence)

        best = table().scores[0]
        for code, score in scores.items():
            if score.units and best.units and _sizes(score.units) != _sizes(best.units):
                self.unpaired += 1
                scores[code] = replace(score, units=())
        return table()

    @property
    def best_trial(self) -> FrozenTrial:
        """The trial of the best setting, or with the best value."""
        if self.table is not None:
            return self.trials[self.numbers[self.table.best.code]]
        return self.ranked[0]

    @property
    def plotted(self) -> str:
        """What plots of settings show: the loss, which has the intervals; the monitored value where that is all."""
        return "loss" if self.table is not None and math.isfinite(self.table.best.loss) else self.monitor

    @cached_property
    def ranked(self) -> list[FrozenTrial]:
        """Complete trials, best value first."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.complete, key=lambda trial: (sign * _value(trial), trial.number))

    @cached_property
    def tied(self) -> list[CellScore]:
        """Settings that cannot be told apart from the best one, without it."""
        if self.table is None:
            return []
        return [score for score in self.table.scores[1:] if self.table.tied(score)]

    @cached_property
    def has_intervals(self) -> bool:
        """Whether any setting has an interval."""
        return self.table is not None and any(
            math.isfinite(self.table.compared(score)[1]) for score in self.table.scores[1:]
        )

    @cached_property
    def uniform_scores(self) -> dict[StatFlags, CellScore]:
        """Scores of the settings that give all layers the same flags, in a search by layer too."""
        found = {}
        for score in self.table or ():
            flags = {score.setting} if isinstance(score.setting, StatFlags) else set(score.setting.values())
            if len(flags) == 1:
                found[flags.pop()] = score
        return found

    def main_effects(self) -> list[Effect]:
        """Each flag's effect, averaged over the other flags' settings that were scored both ways."""
        return flag_effects(self.uniform_scores, StatFlags.all(), self.confidence)

    def effects_at_best(self) -> list[Effect]:
        """Each flag's effect where the other three are as in the best setting; none if that says nothing new."""
        best = self.table.best if self.table is not None else None
        at = [flags for flags, score in self.uniform_scores.items() if score is best]
        found = flag_effects(self.uniform_scores, at, self.confidence)
        return [] if found == self.main_effects() else found

    def layer_effects(self) -> list[LayerEffect]:
        """By layer and flag, over the complete trials of a search by layer."""
        losses = [(by_layer(s.setting, self.layers), s.loss) for s in self.table or () if math.isfinite(s.loss)]
        effects = []
        for layer in self.layers:
            for flag in StatFlags.names():
                on = [loss for setting, loss in losses if getattr(setting[layer], flag)]
                off = [loss for setting, loss in losses if not getattr(setting[layer], flag)]
                known = bool(on and off)
                difference = math.fsum(on) / len(on) - math.fsum(off) / len(off) if known else math.nan
                effects.append(LayerEffect(layer, flag, difference, len(on), len(off)))
        return effects

    def finished(self) -> list[FrozenTrial]:
        """Complete, pruned and failed trials in the order in which they ended."""
        ended = [trial for trial in self.trials if trial.state.is_finished()]
        return sorted(ended, key=lambda trial: (trial.datetime_complete is None, trial.datetime_complete, trial.number))

    def importances(self) -> tuple[dict[str, float], str]:
        """Importance of the parameters, largest first, summing to 1; or none and why.

        PED-ANOVA (Watanabe, Bansal and Hutter, arXiv 2304.10255): how far a parameter's distribution among the best
        trials is from that among all. It needs neither scikit-learn nor random numbers, as fANOVA would.
        """
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if len(self.complete) < MIN_TRIALS:
            return {}, f"It needs at least {MIN_TRIALS} complete trials, and this study has {len(self.complete)}."
        if len({_value(trial) for trial in self.complete}) == 1:
            return {}, "All complete trials have the same value, so no parameter can have made a difference."
        if not any(len(set(map(repr, _column(self.complete, name)))) > 1 for name in _parameters(self.complete)):
            return {}, "All complete trials have the same parameters."
        quantile = top_share(len(self.complete))
        with warnings.catch_warnings():
            # Experimental before Optuna 5; and what it says of too few trials is said below.
            warnings.simplefilter("ignore")
            evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
            found = get_param_importances(self.study, evaluator=evaluator, normalize=False)
        total = math.fsum(found.values())
        if not total > 0:
            return {}, "The best trials have the same parameters as all others, in the same shares."
        return {name: value / total for name, value in sorted(found.items(), key=lambda item: -item[1])}, ""


def digits(values: Iterable[float], least: int = 4, most: int = 8) -> int:
    """Digits after the point with which the smallest of these has two that count, but not fewer than ``least``.

    Values below a hundred-thousandth of the largest are rounding errors and do not count.
    """
    known = [abs(value) for value in values if math.isfinite(value) and value]
    known = [value for value in known if value > 1e-5 * max(known)]
    return min(max([least, *(1 - math.floor(math.log10(value)) for value in known)]), most)


def top_share(trials: int) -> float:
    """Which share of the trials counts as the best: a tenth, and more of few trials, but not above one half."""
    return max(0.1, min(0.5, TOP_TRIALS / trials))


def flag_effects(
    scores: Mapping[StatFlags, CellScore], at: Iterable[StatFlags], confidence: float = 0.95
) -> list[Effect]:
    """The loss with each flag on, less that with it off, averaged over pairs that differ in this flag only.

        d = 1/k * sum_pairs (loss_on - loss_off),   the interval as of `paired_difference` of the units' sums / k

    for the k pairs of which both settings were scored. The four intervals hold together with ``confidence``.

    Args:
        scores: By setting.
        at: Settings whose flags are turned one at a time; each pair counts once.
        confidence: Of the four intervals together. Default 0.95.

    Returns:
        One `Effect` a flag with at least one such pair, in canonical order; the limits are NaN without units.

    Example:
        >>> on, off = StatFlags.parse("TTFF"), StatFlags.parse("FTFF")
        >>> (effect,) = flag_effects({on: CellScore(on, 1.5), off: CellScore(off, 1.0)}, [on])
        >>> effect.flag, effect.pairs, effect.difference
        ('batch_moving_mean', 1, 0.5)
    """
    at = list(at)
    effects = []
    for flag in StatFlags.names():
        pairs = dict.fromkeys((_turned(flags, flag, True), _turned(flags, flag, False)) for flags in at)
        found = [(scores[on], scores[off]) for on, off in pairs if on in scores and off in scores]
        found = [(on, off) for on, off in found if math.isfinite(on.loss - off.loss)]
        if not found:
            continue
        difference = math.fsum(on.loss - off.loss for on, off in found) / len(found)
        low = high = math.nan
        first, second = (_averaged([pair[side].units for pair in found]) for side in (0, 1))
        if first and second and _sizes(first) == _sizes(second):
            difference, low, high = paired_difference(first, second, confidence=confidence, comparisons=4)
        effects.append(Effect(flag, len(found), difference, low, high))
    return effects


def _turned(flags: StatFlags, flag: str, value: bool) -> StatFlags:
    return replace(flags, **{flag: value})


def _averaged(many: Sequence[Units]) -> list[tuple[int, float]]:
    # Nothing unless all have the same units: a mean over some of the pairs would be another quantity.
    if not all(many) or len({_sizes(units) for units in many}) > 1:
        return []
    totals = (math.fsum(total for _, total in unit) / len(many) for unit in zip(*many, strict=True))
    return list(zip(_sizes(many[0]), totals, strict=True))


def _sizes(units: Units) -> tuple[int, ...]:
    return tuple(n for n, _ in units)


def _value(trial: FrozenTrial) -> float:
    return math.nan if trial.value is None else float(trial.value)


def _parameters(trials: Iterable[FrozenTrial]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in trial.params))


def _column(trials: Iterable[FrozenTrial], name: str) -> list[Any]:
    return [trial.params.get(name) for trial in trials]


def _kind(info: Mapping[str, Any], complete: Sequence[FrozenTrial]) -> tuple[str, list[str]]:
    layers = [str(name) for name in info.get("layers") or ()]
    kind = info.get("kind")
    if kind is None:  # not made by `tune_flags`: by the parameters' names
        first = complete[0].params
        suffix = "." + StatFlags.names()[0]
        found = [name.removesuffix(suffix) for name in first if name.endswith(suffix)]
        if set(first) == set(parameter_names()):
            kind = "uniform"
        elif found and set(first) == set(parameter_names(found)):
            kind, layers = (
                "per_layer",
                ["" if name == parameter_names([""])[0].removesuffix(suffix) else name for name in found],
            )
    if kind not in ("uniform", "per_layer"):
        return "training", layers
    names = layers if kind == "per_layer" else None
    if all(params_setting(trial.params, names) is None for trial in complete):
        return "training", layers
    return kind, layers
