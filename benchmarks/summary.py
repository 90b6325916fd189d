"""What the measured rows say about the targets: geometric means and worst cases, for the terminal and README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Ratios over several inputs."""

    mean: float
    worst: float
    where: str
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} (at most {self.worst:.2f}: {self.where})"


@dataclass(frozen=True)
class Finding:
    """One comparison by dtype, and the ratio that it should not exceed."""

    what: str
    against: str
    target: float | None
    cells: dict[str, Cell]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _finding(
    what: str, against: str, target: float | None, rows: Iterable[Row], ratio: Callable[[Row], float | None]
) -> Finding | None:
    ratios: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        value = ratio(row)
        if value is not None:
            ratios.setdefault(row["dtype"], []).append((value, row["shape"]))
    cells = {
        dtype: Cell(geometric_mean([value for value, _ in pairs]), *max(pairs), len(pairs))
        for dtype, pairs in ratios.items()
    }
    return Finding(what, against, target, cells) if cells else None


def layer_findings(rows: Sequence[Row]) -> list[Finding]:
    """The layer's ratios, by kind of input and layout; none where the rows hold no ratios."""
    own = [row for row in rows if row["contender"] == "bln"]
    steps = [row for row in own if row["mode"] == "forward_backward"]
    calls = [row for row in own if row["mode"] == "inference"]

    def of(rows: Sequence[Row], kind: str, layout: str | None = None) -> list[Row]:
        return [row for row in rows if row["kind"] == kind and layout in (None, row["layout"])]

    def column(name: str) -> Callable[[Row], float | None]:
        return lambda row: row[name]

    if all(row["vs_bn"] is None for row in own):
        return []
    layouts = ("contiguous", "channels_last")
    found = [
        *(
            _finding(f"images, {layout}: step", "BatchNorm2d", 1.0, of(steps, "image", layout), column("vs_bn"))
            for layout in layouts
        ),
        *(
            _finding(f"images, {layout}: inference", "BatchNorm2d", 1.3, of(calls, "image", layout), column("vs_bn"))
            for layout in layouts
        ),
    ]
    for kind, name in (("sequence", "sequences"), ("dense", "dense")):
        inputs = of(steps, kind)
        both = "BatchNorm1d + LayerNorm"
        found += [
            _finding(f"{name}: step", both, 1.0, inputs, column("vs_bn_ln")),
            _finding(f"{name}: step", "LayerNorm", None, inputs, column("vs_ln")),
            _finding(f"{name}: inference", both, None, of(calls, kind), column("vs_bn_ln")),
        ]
    for kind, name, norm in (
        ("image", "images", "BatchNorm2d"),
        ("sequence", "sequences", "BatchNorm1d"),
        ("dense", "dense", "BatchNorm1d"),
    ):
        target = 1.05 if kind == "image" else None
        inputs = of(steps, kind)
        found += [
            _finding(f"{name}: saved for backward", norm, target, inputs, _memory_ratio(rows, "saved_bytes")),
            _finding(f"{name}: peak memory of a step", norm, None, inputs, _memory_ratio(rows, "peak_bytes")),
        ]
    found.append(_finding("all: step", "a copy for each pass", None, steps, column("vs_copy")))
    return [finding for finding in found if finding is not None]


def _memory_ratio(rows: Sequence[Row], column: str) -> Callable[[Row], float | None]:
    def line(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("shape", "layout", "dtype", "mode"))

    batch_norm = {line(row): row[column] for row in rows if row["contender"] == "bn"}
    return lambda row: row[column] / batch_norm[line(row)]


def as_table(findings: Sequence[Finding]) -> Table:
    """For the terminal: everything, with the targets."""
    dtypes = _dtypes(findings)
    table = Table(title="BatchLayerNorm's time or memory over others': geometric mean, and the worst shape")
    for name in ("what", "over", "target", *dtypes):
        table.add_column(name, justify="right" if name == "target" else "left")
    for finding in findings:
        target = "" if finding.target is None else f"{finding.target:g}"
        table.add_row(finding.what, finding.against, target, *_cells(finding, dtypes))
    return table


def as_markdown(findings: Sequence[Finding]) -> list[str]:
    """For README.md: training steps, and whatever else has a target."""
    shown = [finding for finding in findings if finding.target is not None or finding.what.endswith(": step")]
    dtypes = _dtypes(shown)
    lines = [["what", "over", *dtypes], ["---"] * (2 + len(dtypes))]
    lines += [[finding.what, finding.against, *_cells(finding, dtypes)] for finding in shown]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _dtypes(findings: Sequence[Finding]) -> list[str]:
    return list(dict.fromkeys(dtype for finding in findings for dtype in finding.cells))


def _cells(finding: Finding, dtypes: Sequence[str]) -> list[str]:
    return [str(finding.cells.get(dtype, "")) for dtype in dtypes]
