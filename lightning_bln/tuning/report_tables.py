"""The report's tables: settings or trials, effects of the flags, failed and pruned trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_bln.flags import StatFlags
from lightning_bln.tuning.report_data import Effect, StudyData, digits

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

MINUS = "−"  # as wide as a plus sign, so that columns of differences line up


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what it is sorted by, and its style."""

    text: str
    key: float | str = ""
    style: str = ""
    changes: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Grid:
    """A table: names of the columns with their style, rows of cells, classes of the rows."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]
    classes: Sequence[str] = field(default_factory=tuple)


def settings_grid(data: StudyData) -> Grid:
    """All settings, best first, with their difference to the best."""
    table = data.table
    assert table is not None
    best = table.best
    loss_known = any(math.isfinite(score.loss) for score in table)
    # A LightningModule's monitored loss is also among its logged values: once is enough.
    same = [n for n in table.metric_names if loss_known and all(s.metrics.get(n) == s.loss for s in table)]
    loss_name = data.monitor if data.monitor in same else "loss"
    metrics = [name for name in table.metric_names if name not in same]
    compared = {score.code: table.compared(score) for score in table}
    metric_digits = {name: digits([s.metrics.get(name, math.nan) for s in table]) for name in metrics}
    loss_digits = digits([score.loss for score in table])
    differences = digits([high - low for _, low, high in compared.values()])
    columns = [("rank", "number"), ("setting", "code")]
    columns += [(loss_name, "number")] if loss_known else []
    columns += [(name, "number") for name in metrics]
    if data.has_intervals:
        percent = f"{data.confidence * 100:g} %"
        columns += [(f"{loss_name} − best's", "number"), (f"{percent} interval", "number"), ("against the best", "")]
    columns += [("trial", "number")]
    rows, classes = [], []
    for rank, score in enumerate(table, start=1):
        difference, low, high = compared[score.code]
        setting = Cell(score.code, score.code, "code")
        if not isinstance(score.setting, StatFlags):
            setting = _changes(score.setting, best.setting, data.numbers[score.code])
        row = [Cell(str(rank), rank, "number"), setting]
        row += [_number(score.loss, loss_digits)] if loss_known else []
        row += [_number(score.metrics.get(name, math.nan), metric_digits[name]) for name in metrics]
        if data.has_intervals:
            word = "best" if score is best else "tied" if table.tied(score) else "different"
            if math.isnan(low) and score is not best:
                word = "not known"
            first = score is best
            row += [
                Cell("", 0.0, "number") if first else _number(difference, differences, sign="+"),
                Cell("", 0.0, "number") if first or math.isnan(low) else _interval(low, high, differences),
                Cell(word, {"best": 0, "tied": 1, "different": 2, "not known": 3}[word], word.split()[0]),
            ]
        row.append(Cell(str(data.numbers[score.code]), data.numbers[score.code], "number"))
        rows.append(row)
        classes.append("is-best" if score is best else "is-tied" if table.tied(score) else "")
    return Grid(columns, rows, classes)


def training_grid(data: StudyData) -> Grid:
    """Complete trials of a search over any parameters, best first."""
    names = list(dict.fromkeys(name for trial in data.ranked for name in trial.params))
    places = digits([trial.value for trial in data.ranked if trial.value is not None])
    # A training's flags may be no parameter, but chosen after it.
    settings = {trial.number: str(trial.user_attrs.get("setting", "")) for trial in data.ranked}
    columns = [("rank", "number"), (data.monitor, "number"), *((name, "value") for name in names)]
    columns += [("flags", "code")] if any(settings.values()) else []
    columns += [("trial", "number")]
    rows = []
    for rank, trial in enumerate(data.ranked, start=1):
        value = math.nan if trial.value is None else trial.value
        params = [_value(trial.params.get(name)) for name in names]
        row = [Cell(str(rank), rank, "number"), _number(value, places), *params]
        row += [Cell(settings[trial.number], settings[trial.number], "code")] if any(settings.values()) else []
        row += [Cell(str(trial.number), trial.number, "number")]
        rows.append(row)
    return Grid(columns, rows, ["is-best", *("" for _ in rows[1:])])


def effects_grid(data: StudyData) -> Grid:
    """Effects of the flags, averaged and at the best setting."""
    main = data.main_effects()
    at_best = {effect.flag: effect for effect in data.effects_at_best()}
    places = digits([effect.high - effect.low for effect in (*main, *at_best.values())])
    interval = f"{data.confidence * 100:g} % interval"
    limits = [(interval, "number")] if data.has_intervals else []
    columns = [("flag", "code"), ("averaged", "number"), *limits, ("pairs", "number")]
    columns += [("at the best", "number"), *limits] if at_best else []
    rows = []
    for effect in main:
        row = [
            Cell(effect.flag, effect.flag, "code"),
            *_effect(effect, places, limits),
            Cell(str(effect.pairs), "", "number"),
        ]
        if at_best:
            known = effect.flag in at_best
            row += _effect(at_best[effect.flag], places, limits) if known else [Cell(""), *(Cell("") for _ in limits)]
        rows.append(row)
    return Grid(columns, rows)


def _effect(effect: Effect, places: int, limits: Sequence[Any]) -> list[Cell]:
    interval = [_interval(effect.low, effect.high, places)] if limits else []
    return [_number(effect.difference, places, sign="+"), *interval]


def unfinished_grid(data: StudyData) -> Grid:
    """Failed and pruned trials: how far they came, and why no further."""
    columns = [
        ("trial", "number"),
        ("ended as", ""),
        ("parameters" if data.table is None else "setting", "code"),
        ("reached", ""),
        ("why", ""),
    ]
    rows = []
    for trial in data.trials:
        if trial.state.name not in ("FAIL", "PRUNED"):
            continue
        failed = trial.state.name == "FAIL"
        attempt = trial.user_attrs.get("attempt", 1)
        word = ("failed" if failed else "pruned") + (f", attempt {attempt}" if attempt != 1 else "")
        rows.append(
            [
                Cell(str(trial.number), trial.number, "number"),
                Cell(word, word, "failed" if failed else "pruned"),
                _trial_setting(data, trial),
                Cell(_reached(trial)),
                Cell(_why(trial), "", "error"),
            ]
        )
    return Grid(columns, rows)


def _why(trial: FrozenTrial) -> str:
    if trial.user_attrs.get("error"):
        return str(trial.user_attrs["error"])
    if trial.user_attrs.get("diverged"):
        return "diverged: its value was never finite"
    return "no error was recorded" if trial.state.name == "FAIL" else "stopped by the pruner"


def _trial_setting(data: StudyData, trial: FrozenTrial) -> Cell:
    setting = None if data.table is None else data.setting(trial)
    if isinstance(setting, StatFlags):
        return Cell(setting.code, setting.code, "code")
    if setting is not None and data.table is not None:
        return _changes(setting, data.table.best.setting, trial.number)
    text = ", ".join(f"{name} = {shown(value)}" for name, value in trial.params.items())
    return Cell(text or "none was chosen", text, "code")


def _changes(setting: Any, best: Any, number: int) -> Cell:
    changes = [(layer or "(model)", best[layer].code, f.code) for layer, f in setting.items() if f != best[layer]]
    if not changes:
        return Cell("the best setting", 0.0, "code")
    count = f"{len(changes)} layer differs" if len(changes) == 1 else f"{len(changes)} layers differ"
    return Cell(count, len(changes), "code", changes)


def _reached(trial: FrozenTrial) -> str:
    parts = []
    samples = trial.user_attrs.get("samples")
    if samples:
        parts.append(f"{samples:,} samples")
    if trial.last_step is not None:
        parts.append(f"step {trial.last_step}")
        value = trial.intermediate_values[trial.last_step]
        parts.append(f"value {value:.4g}")
    return ", ".join(parts)


def _value(value: Any) -> Cell:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(shown(value), float(value) if number else shown(value), "number" if number else "value")


def shown(value: Any) -> str:
    """A parameter's value as text."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: float, places: int, sign: str = "") -> Cell:
    if not math.isfinite(value):
        return Cell("" if math.isnan(value) else str(value), math.inf if math.isnan(value) else value, "number")
    return Cell(_signed(value, places, sign), value, "number")


def _interval(low: float, high: float, places: int) -> Cell:
    if math.isnan(low):
        return Cell("", 0.0, "number")
    return Cell(f"{_signed(low, places, '+')} to {_signed(high, places, '+')}", low, "number")


def _signed(value: float, places: int, sign: str) -> str:
    return f"{value:{sign},.{places}f}".replace("-", MINUS)
