"""What the report's plots have in common: margins, fonts, axes, labels."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_bln.flags import StatFlags

LOG_RATIO = 20.0
"""An axis is logarithmic when its largest value is more than so many times the smallest."""

ROW = 24  # pixels a row of a plot


def lay_out(figure: Any, *, rows: int, extra: int, row: int = ROW) -> None:
    """The look of every plot; its height is that of its rows and so many pixels more."""
    figure.update_layout(
        template="none",
        height=rows * row + extra,
        margin={"l": 8, "r": 12, "t": 44, "b": 52},
        font={"family": "var(--sans)", "size": 13, "color": "var(--ink)"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "var(--panel)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left"},
        showlegend=True,
        dragmode=False,
    )
    quiet = {"showgrid": False, "zeroline": False, "automargin": True, "gridcolor": "var(--grid)", "ticks": ""}
    title = {"title_font": {"size": 13}, "title_standoff": 10}
    figure.update_xaxes(quiet | title | {"ticklabelstandoff": 2})
    figure.update_yaxes(quiet | title | {"ticklabelstandoff": 6})


def row_axis(texts: Sequence[str]) -> dict[str, Any]:
    """The axis of a plot whose rows are labelled, the first on top."""
    return {"tickvals": list(range(len(texts))), "ticktext": list(texts), "range": [len(texts) - 0.4, -0.6]}


def value_axis(values: Iterable[float]) -> tuple[dict[str, Any], str]:
    """The axis for these values, logarithmic if they are far apart, and what its title says of it."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) <= LOG_RATIO * min(finite):
        return {"type": "linear"}, ""
    first, last = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    # plotly's own labels of a logarithmic axis are single digits between the powers of ten.
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}, ", logarithmic"


def short_flag(flag: str) -> str:
    """Without the word that all flags have: "batch mean"."""
    return flag.replace("_moving_", " ")


def parameter_labels(names: Iterable[str]) -> list[str]:
    """Short names of a study's parameters: flags without "moving", layers and others as `short_names`."""
    split = [name.rpartition(".") for name in names]
    parts = [(layer, flag) if flag in StatFlags.names() else ("", layer + dot + flag) for layer, dot, flag in split]
    layers = list(dict.fromkeys(layer for layer, _ in parts if layer))
    short = dict(zip(layers, short_names(layers, 18), strict=True)) | {"": ""}
    others = list(dict.fromkeys(flag for _, flag in parts if flag not in StatFlags.names()))
    short_flags = {flag: short_flag(flag) for flag in StatFlags.names()} | dict(
        zip(others, short_names(others), strict=True)
    )
    return [plain_text(f"{short[layer]} {short_flags[flag]}".strip()) for layer, flag in parts]


def short_names(names: Sequence[str], limit: int = 26) -> list[str]:
    """The names with the middle left out of the long ones, but never so much that two become the same.

    Example:
        >>> short_names(["encoder.stages.0.blocks.0.norm1", "encoder.stages.0.blocks.1.norm1"], 12)
        ['encode…0.norm1', 'encode…1.norm1']
    """
    # Layers differ at both ends, and further inside in deep models.
    for length in range(limit, max(map(len, names), default=0)):
        short = [n if len(n) <= length else f"{n[: length // 2 - 1]}…{n[-(length // 2) :]}" for n in names]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def plain_text(text: str) -> str:
    """The text as plotly.js shows it unchanged: it reads a few HTML tags, and entities."""
    return html.escape(text, quote=False)
