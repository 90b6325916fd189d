"""`ScoreTable`: what each setting scored, beside the best one, as data, as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_bln.flags import StatFlags
from lightning_bln.tuning.intervals import Units, paired_difference
from lightning_bln.tuning.space import Setting, parse_setting, setting_code

FORMAT = "lightning-bln score table 1"


@dataclass(frozen=True)
class CellScore:
    """The score of one setting.

    Attributes:
        setting: The flags, of all layers together or by layer.
        loss: Mean over the samples; NaN if the setting was not scored to the end.
        metrics: Other values by name.
        samples: How many samples the loss is over.
        units: (samples, summed loss) of each batch, or of small groups of samples, as intervals need them.
        error: Why it could not be scored, None if it could.
        pruned: Whether it was dropped before the last batch.
    """

    setting: Setting
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    units: Units = ()
    error: str | None = None
    pruned: bool = False

    @property
    def code(self) -> str:
        """The setting in letters, such as ``"TTFF"``."""
        return setting_code(self.setting)

    @property
    def complete(self) -> bool:
        """Whether it was scored on all the data."""
        return self.error is None and not self.pruned

    def value(self, monitor: str) -> float:
        """The loss or the metric of that name."""
        return self.loss if monitor == "loss" else self.metrics[monitor]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON holds them."""
        setting = self.setting
        flags = setting.code if isinstance(setting, StatFlags) else {name: f.code for name, f in setting.items()}
        return {
            "setting": flags,
            "loss": _finite(self.loss),
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "samples": self.samples,
            "units": [[n, _finite(total)] for n, total in self.units],
            "error": self.error,
            "pruned": self.pruned,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CellScore:
        """What `to_dict` wrote."""
        return cls(
            setting=parse_setting(state["setting"]),
            loss=_number(state["loss"]),
            metrics={name: _number(value) for name, value in state["metrics"].items()},
            samples=state["samples"],
            units=tuple((n, _number(total)) for n, total in state["units"]),
            error=state["error"],
            pruned=state["pruned"],
        )


class ScoreTable(Sequence[CellScore]):
    """Scores of several settings on the same data, best first; prints as a table.

    ``difference`` is the setting's loss less the best one's; its interval comes from losses paired by batch (see
    `intervals.paired_difference`) and holds for all settings of the table together. Where it contains 0 the setting is
    *tied* with the best: on these data the two cannot be told apart.

    Args:
        scores: In any order.
        monitor: What is to be best: "loss" (default) or the name of a metric.
        mode: "min" (default) or "max".
        confidence: Of the intervals. Default 0.95.

    Raises:
        ValueError: If ``mode`` is another word, or a setting has no value of that name.
    """

    def __init__(
        self, scores: Sequence[CellScore], *, monitor: str = "loss", mode: str = "min", confidence: float = 0.95
    ) -> None:
        check_choices(mode, confidence)
        for score in scores:
            if score.complete and monitor != "loss" and monitor not in score.metrics:
                raise ValueError(
                    f"monitor must be 'loss' or one of the metrics {', '.join(score.metrics) or '(none)'}, got "
                    f"{monitor!r}."
                )
        self.monitor = monitor
        self.mode = mode
        self.confidence = confidence
        sign = 1 if mode == "min" else -1

        def order(score: CellScore) -> tuple[bool, bool, float]:
            value = score.value(monitor) if score.complete else math.nan
            return not score.complete, math.isnan(value), 0.0 if math.isnan(value) else sign * value

        self.scores = tuple(sorted(scores, key=order))  # stable: canonical order among equals

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> Any:
        return self.scores[index]

    def __iter__(self) -> Iterator[CellScore]:
        return iter(self.scores)

    @property
    def best(self) -> CellScore:
        """The setting with the best value.

        Raises:
            ValueError: If no setting was scored with a finite value.
        """
        if not self.scores or not self.scores[0].complete or not math.isfinite(self.scores[0].value(self.monitor)):
            raise ValueError(
                "The best setting needs at least one that was scored with a finite value, got "
                + ("none at all." if not self.scores else "; ".join(f"{s.code}: {s.error or s.loss}" for s in self))
            )
        return self.scores[0]

    def compared(self, score: CellScore) -> tuple[float, float, float]:
        """The loss less the best setting's, and the limits of that difference; NaN where it is not known."""
        reference = self.scores[0]
        if not (score.complete and reference.complete and score.units and reference.units):
            return math.nan, math.nan, math.nan
        others = max(sum(other.complete for other in self.scores) - 1, 1)
        return paired_difference(score.units, reference.units, confidence=self.confidence, comparisons=others)

    def tied(self, score: CellScore) -> bool:
        """Whether the setting cannot be told apart from the best one on these data."""
        if score is self.scores[0]:
            return score.complete
        _, low, high = self.compared(score)
        return low <= 0 <= high  # False for NaN

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics in the order of their first appearance."""
        return list(dict.fromkeys(name for score in self.scores for name in score.metrics))

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict a setting, as CSV and data frames hold them."""
        rows = []
        for rank, score in enumerate(self.scores, start=1):
            difference, low, high = self.compared(score)
            rows.append(
                {
                    "rank": rank if score.complete else None,
                    "setting": score.code,
                    "loss": _finite(score.loss),
                    **{name: _finite(score.metrics.get(name, math.nan)) for name in self.metric_names},
                    "difference": _finite(difference),
                    "low": _finite(low),
                    "high": _finite(high),
                    "tied": self.tied(score),
                    "samples": score.samples,
                    "status": "complete" if score.complete else "failed" if score.error else "pruned",
                    "error": score.error,
                }
            )
        return rows

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` of `rows`; pandas must be installed."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def to_csv(self, path: str | PathLike[str] | None = None) -> str:
        """One line a setting; written to ``path`` if given.

        Returns:
            The text.
        """
        buffer = io.StringIO()
        rows = self.rows()
        writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["setting"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return _written(buffer.getvalue(), path)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """All there is, the units too, so that `from_json` gives the same table; written to ``path`` if given.

        Returns:
            The text.
        """
        state = {
            "format": FORMAT,
            "monitor": self.monitor,
            "mode": self.mode,
            "confidence": self.confidence,
            "scores": [score.to_dict() for score in self.scores],
        }
        return _written(json.dumps(state, allow_nan=False) + "\n", path)

    @classmethod
    def from_json(cls, source: str | PathLike[str]) -> ScoreTable:
        """Read what `to_json` wrote: its text, or the path of a file.

        Raises:
            ValueError: If it is something else.
        """
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text()
        try:
            state = json.loads(text)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']!r}")
            scores = [CellScore.from_dict(score) for score in state["scores"]]
            return cls(scores, monitor=state["monitor"], mode=state["mode"], confidence=state["confidence"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"A score table is what ScoreTable.to_json writes (format {FORMAT!r}), got {text[:60]!r}: {error}."
            ) from error

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        # A terminal has 80 columns: what is the same in two columns, or in all rows, is told once.
        complete = [score for score in self.scores if score.complete]
        metrics = [name for name in self.metric_names if any(s.metrics.get(name) != s.loss for s in complete)]
        loss = next((name for name in self.metric_names if name not in metrics), "loss")
        samples = {score.samples for score in complete}
        title = self.summary() + (f"; {samples.pop()} samples" if len(samples) == 1 else "")
        table = Table(title=escape(title), title_justify="left", title_style="", box=box.SIMPLE_HEAD)
        table.add_column("setting")
        for name in (loss, *metrics, "minus best", f"{self.confidence * 100:g} % interval"):
            table.add_column(escape(name), justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for score in self.scores:
            difference, low, high = self.compared(score)
            interval = "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
            if score is self.scores[0] and score.complete:
                difference, interval, note = math.nan, "", "best"
            elif not score.complete:
                note = "failed" if score.error else "pruned"
            else:
                note = "tied" if self.tied(score) else ""
            table.add_row(
                _letters(score.setting),
                _shown(score.loss),
                *(_shown(score.metrics.get(name, math.nan)) for name in metrics),
                "" if math.isnan(difference) else f"{difference:+.4f}",
                interval,
                note,
                style="bold" if note == "best" else None,
            )
        notes = [f"{score.code} failed: {score.error}" for score in self.scores if score.error]
        layers = next((list(s.setting) for s in self.scores if not isinstance(s.setting, StatFlags)), [])
        if layers:
            notes.insert(0, f"Layers, in the order of the letters: {', '.join(layers)}")
        if notes:
            table.caption, table.caption_justify, table.caption_style = escape("\n".join(notes)), "left", ""
        return table

    def summary(self) -> str:
        """One line: how many settings, which is best, how many are tied with it."""
        complete = [score for score in self.scores if score.complete]
        text = f"{len(self.scores)} settings" if len(self.scores) != 1 else "1 setting"
        for name, count in (
            ("failed", sum(score.error is not None for score in self.scores)),
            ("pruned", sum(score.pruned and score.error is None for score in self.scores)),
        ):
            text += f", {count} {name}" if count else ""
        if not complete:
            return text
        text += f"; best by {self.monitor}: {complete[0].code}"
        tied = sum(self.tied(score) for score in complete[1:])
        if tied:
            text += f", {tied} tied with it"
        return text

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __repr__(self) -> str:
        return f"ScoreTable({self.summary()})"


def check_choices(mode: str, confidence: float = 0.95) -> None:
    """Raise if a table cannot be made with these, before anything is scored."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, got {confidence!r}; say 0.95.")


def _finite(value: float) -> float | None:
    # JSON has no NaN, and an empty field is what spreadsheets understand.
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _letters(setting: Setting) -> str:
    """The letters alone; the layers' names stand below the table."""
    if isinstance(setting, StatFlags):
        return setting.code
    codes = [flags.code for flags in setting.values()]
    return f"all {codes[0]}" if len(set(codes)) == 1 else " ".join(codes)


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _written(text: str, path: str | PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text)
    return text
