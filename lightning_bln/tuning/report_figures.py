"""The report's plots as plotly figures; colours are names of the page's style sheet, so that they follow its scheme."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_bln.flags import StatFlags
from lightning_bln.tuning.report_data import digits
from lightning_bln.tuning.report_layout import (
    lay_out,
    parameter_labels,
    plain_text,
    row_axis,
    short_flag,
    short_names,
    value_axis,
)

if TYPE_CHECKING:
    from lightning_bln.tuning.report_data import Effect, LayerEffect, StudyData
    from lightning_bln.tuning.table import CellScore

MAX_DOTS = 40
"""So many settings are drawn at the most, the best ones; the page's table has all."""

MAX_BARS = 20
"""So many parameters are drawn at the most, the most important ones."""

SEQUENTIAL = [[0.0, "var(--seq-low)"], [0.5, "var(--seq-mid)"], [1.0, "var(--seq-high)"]]
DIVERGING = [[0.0, "var(--div-low)"], [0.5, "var(--div-mid)"], [1.0, "var(--div-high)"]]
MARKS = {
    "best": ("diamond", "var(--best)"),
    "tied": ("circle", "var(--best)"),
    "other": ("circle-open", "var(--other)"),
}


def figures(data: StudyData) -> dict[str, dict[str, Any]]:
    """All plots that the study has the data for, by the id of their place in the page, as plotly.js takes them."""
    found: dict[str, Any] = {"plot-convergence": convergence(data)}
    if data.table is not None:
        found["plot-settings"] = settings(data)
        if main := data.main_effects():
            found["plot-effects"] = effects(main)
        if at_best := data.effects_at_best():
            found["plot-effects-best"] = effects(at_best)
    if data.kind == "uniform":
        found["plot-heatmap"] = uniform_heatmap(data)
    elif data.kind == "per_layer":
        found["plot-heatmap"] = layer_heatmap(data.layer_effects(), data)
    importances, _ = data.importances()
    if importances:
        found["plot-importance"] = importance(importances)
    return {name: json.loads(figure.to_json()) for name, figure in found.items()}


def settings(data: StudyData) -> Any:
    """One dot a setting at its loss; the bar is the interval of its difference to the best, put on the best's loss."""
    import plotly.graph_objects as go

    table = data.table
    assert table is not None
    best = table.best
    monitor = data.plotted
    points: dict[str, list[tuple[float, float, float, float, str]]] = {role: [] for role in MARKS}
    shown = [s for s in table if math.isfinite(s.value(monitor))][:MAX_DOTS]
    labels = [s.code if data.kind == "uniform" else f"trial {data.numbers[s.code]}" for s in shown]
    edges = [s.value(monitor) for s in shown]
    for row, score in enumerate(shown):
        _, low, high = table.compared(score) if score is not best else (0.0, math.nan, math.nan)
        low, high = (best.loss + limit if math.isfinite(limit) else math.nan for limit in (low, high))
        edges += [limit for limit in (low, high) if math.isfinite(limit)]
        role = "best" if score is best else "tied" if table.tied(score) else "other"
        hover = f"{labels[row]}: {score.value(monitor):.6g}"
        if math.isfinite(low):
            hover += f"<br>best's {best.loss:.6g}; interval {low:.6g} to {high:.6g}"
        points[role].append((score.value(monitor), row, low, high, hover))
    figure = go.Figure()
    names = {"best": "best", "tied": "tied with the best", "other": "different" if data.has_intervals else "others"}
    for role, rows in points.items():
        if not rows:
            continue
        symbol, color = MARKS[role]
        figure.add_scatter(
            name=names[role],
            x=[x for x, *_ in rows],
            y=[y for _, y, *_ in rows],
            mode="markers",
            marker={"symbol": symbol, "size": 10, "color": color, "line": {"width": 1.5, "color": color}},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [_length(high, x) for x, _, _, high, _ in rows],
                "arrayminus": [_length(x, low) for x, _, low, _, _ in rows],
                "thickness": 1.5,
                "width": 3,
                "color": color,
            },
            text=[text for *_, text in rows],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_vline(x=best.value(monitor), line={"width": 1, "dash": "dot", "color": "var(--best)"}, layer="below")
    lay_out(figure, rows=len(shown), extra=104)
    figure.update_yaxes(**row_axis(labels), tickfont={"family": "var(--mono)"})
    axis, note = value_axis(edges)
    figure.update_xaxes(axis, title_text=f"{plain_text(_loss_name(data, monitor))}{note}", showgrid=True)
    return figure


def effects(found: Sequence[Effect]) -> Any:
    """Each flag's effect on the loss and its interval, beside 0."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(
        x=[effect.difference for effect in found],
        y=list(range(len(found))),
        mode="markers",
        marker={"symbol": "circle", "size": 10, "color": "var(--best)"},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_length(effect.high, effect.difference) for effect in found],
            "arrayminus": [_length(effect.difference, effect.low) for effect in found],
            "thickness": 1.5,
            "width": 4,
            "color": "var(--best)",
        },
        text=[f"{effect.flag}: {effect.difference:+.4g}" for effect in found],
        hovertemplate="%{text}<extra></extra>",
    )
    lay_out(figure, rows=len(found), extra=72, row=30)
    figure.update_layout(showlegend=False, margin={"t": 8})
    figure.update_yaxes(**row_axis([short_flag(effect.flag) for effect in found]))
    figure.update_xaxes(title_text="loss with True − loss with False", showgrid=True, nticks=6, rangemode="tozero")
    figure.update_xaxes(zeroline=True, zerolinecolor="var(--muted)", zerolinewidth=1)
    return figure


def uniform_heatmap(data: StudyData) -> Any:
    """The loss of the 16 settings: batch flags down, feature flags across."""
    import plotly.graph_objects as go

    table = data.table
    assert table is not None
    best = table.best
    monitor = data.plotted
    pairs = ["TT", "TF", "FT", "FF"]
    cells = [[data.uniform_scores.get(StatFlags.parse(down + across)) for across in pairs] for down in pairs]
    values = [[math.nan if cell is None else cell.value(monitor) for cell in row] for row in cells]
    known = [value for row in values for value in row if math.isfinite(value)]
    wide = "tickvals" in value_axis(known)[0]
    colors = [[math.log10(value) if wide else value for value in row] for row in values]
    places = digits(known)

    def text(score: CellScore | None) -> str:
        if score is None:
            return "not scored"
        return f"{score.value(monitor):.{places}f}" + ("<br><b>best</b>" if score is best else "")

    figure = go.Figure(
        go.Heatmap(
            z=_plain(colors),
            x=list(range(4)),
            y=list(range(4)),
            text=[[text(score) for score in row] for row in cells],
            texttemplate="%{text}",
            textfont={"color": "var(--ink)"},
            customdata=[[down + across for across in pairs] for down in pairs],
            hovertemplate="%{customdata}: %{text}<extra></extra>",
            hoverongaps=False,
            colorscale=SEQUENTIAL,
            xgap=2,
            ygap=2,
            showscale=False,
        )
    )
    lay_out(figure, rows=4, extra=70, row=52)
    axis = {"tickvals": list(range(4)), "ticktext": pairs, "tickfont": {"family": "var(--mono)"}}
    figure.update_layout(margin={"t": 8})
    figure.update_xaxes(**axis, title_text="feature flags: mean, variance")
    figure.update_yaxes(**axis, title_text="batch flags: mean, variance", autorange="reversed")
    return figure


def layer_heatmap(found: Sequence[LayerEffect], data: StudyData) -> Any:
    """Layers down, flags across: mean loss with True less with False; the letter is the best setting's value."""
    import plotly.graph_objects as go

    assert data.table is not None
    best = data.table.best.setting
    assert not isinstance(best, StatFlags)
    flags = StatFlags.names()
    rows = [list(found[i : i + len(flags)]) for i in range(0, len(found), len(flags))]
    limit = max((abs(effect.difference) for effect in found if math.isfinite(effect.difference)), default=0.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=_plain([[effect.difference for effect in row] for row in rows]),
            x=list(range(len(flags))),
            y=list(range(len(rows))),
            text=[["T" if getattr(best[effect.layer], effect.flag) else "F" for effect in row] for row in rows],
            texttemplate="%{text}",
            textfont={"color": "var(--ink)"},
            customdata=[[_described(effect) for effect in row] for row in rows],
            hovertemplate="%{customdata}: %{z:+.4g}<extra></extra>",
            hoverongaps=False,
            colorscale=DIVERGING,
            zmin=-limit,
            zmax=limit,
            xgap=2,
            ygap=2,
            colorbar={
                "orientation": "h",
                "thickness": 10,
                "y": 0,
                "yref": "container",
                "yanchor": "bottom",
                "xref": "paper",
                "tickvals": [-limit, 0, limit],
                "ticktext": [f"{-limit:.2g}".replace("-", "−"), "0", f"+{limit:.2g}"],
                "tickangle": 0,
                "outlinewidth": 0,
            },
        )
    )
    # A gap in z has no text of its own, but the best setting has a value there too.
    for y, row in enumerate(rows):
        for x, effect in enumerate(row):
            if not math.isfinite(effect.difference):
                letter = "T" if getattr(best[effect.layer], effect.flag) else "F"
                figure.add_annotation(x=x, y=y, text=letter, showarrow=False, font={"color": "var(--muted)"})
    lay_out(figure, rows=len(rows), extra=100)
    figure.update_layout(margin={"b": 52, "t": 48})
    names = [short_flag(flag).replace(" ", "<br>") for flag in flags]
    figure.update_xaxes(
        tickvals=list(range(len(flags))), ticktext=names, tickangle=0, side="top", tickfont={"size": 11}
    )
    figure.update_yaxes(
        **row_axis([plain_text(label) for label in short_names([layer or "(model)" for layer in data.layers])])
    )
    return figure


def convergence(data: StudyData) -> Any:
    """Value of each trial in the order in which they ended, and the best so far."""
    import plotly.graph_objects as go
    from optuna.trial import TrialState

    better = min if data.mode == "min" else max
    steps: list[tuple[int, float]] = []
    groups: dict[TrialState, list[tuple[int, float, str]]] = {
        TrialState.COMPLETE: [],
        TrialState.PRUNED: [],
        TrialState.FAIL: [],
    }
    for place, trial in enumerate(data.finished(), start=1):
        value = math.nan if trial.value is None else float(trial.value)
        groups[trial.state].append((place, value, f"trial {trial.number}"))
        if trial.state is TrialState.COMPLETE and math.isfinite(value):
            steps.append((place, better(value, steps[-1][1]) if steps else value))
    last = sum(map(len, groups.values()))
    steps.append((last, steps[-1][1]))
    figure = go.Figure()
    figure.add_scatter(
        name="best so far",
        x=[x for x, _ in steps],
        y=[y for _, y in steps],
        mode="lines",
        line={"shape": "hv", "width": 2, "color": "var(--best)"},
        hovertemplate="best so far: %{y:.6g}<extra></extra>",
    )
    looks = {
        TrialState.COMPLETE: ("complete", "circle-open", "var(--other)"),
        TrialState.PRUNED: ("pruned", "x-thin", "var(--pruned)"),
        TrialState.FAIL: ("failed", "triangle-up", "var(--failed)"),
    }
    for state, points in groups.items():
        name, symbol, color = looks[state]
        # Trials without a value stand on the lower edge of the plot, on an axis of their own.
        for axis, chosen in (("y", True), ("y2", False)):
            rows = [point for point in points if math.isfinite(point[1]) is chosen]
            if not rows:
                continue
            figure.add_scatter(
                name=name,
                x=[x for x, *_ in rows],
                y=[y if chosen else 0.03 for _, y, _ in rows],
                yaxis=axis,
                mode="markers",
                marker={"symbol": symbol, "size": 8, "color": color, "line": {"width": 2, "color": color}},
                text=[f"{text}: {y:.6g}" if chosen else f"{text}, {name}, no value" for _, y, text in rows],
                hovertemplate="%{text}<extra></extra>",
                legendgroup=name,
                showlegend=not (axis == "y2" and any(math.isfinite(y) for _, y, _ in points)),
            )
    scale, note = value_axis([y for points in groups.values() for _, y, _ in points])
    lay_out(figure, rows=0, extra=340)
    title = f"{plain_text(_loss_name(data, data.monitor))}{note}"
    figure.update_layout(yaxis=scale | {"title_text": title, "showgrid": True})
    figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})
    figure.update_xaxes(title_text="trials in the order in which they ended", range=[0.3, last + 0.7], tickformat="d")
    figure.update_xaxes({"dtick": 1} if last < 8 else {"nticks": 8})
    return figure


def importance(found: dict[str, float]) -> Any:
    """One bar a parameter, the most important on top."""
    import plotly.graph_objects as go

    shown = list(found.items())[:MAX_BARS]
    figure = go.Figure(
        go.Bar(
            x=[value for _, value in shown],
            y=list(range(len(shown))),
            orientation="h",
            marker={"color": "var(--best)"},
            text=[f"{value:.{2 if shown[0][1] >= 0.1 else 3}f}" for _, value in shown],
            textposition="outside",
            cliponaxis=False,
            customdata=[plain_text(name) for name, _ in shown],
            hovertemplate="%{customdata}: %{x:.3f}<extra></extra>",
        )
    )
    lay_out(figure, rows=len(shown), extra=16)
    figure.update_layout(bargap=0.35, showlegend=False, margin={"r": 40, "t": 8, "b": 8})
    figure.update_yaxes(**row_axis(parameter_labels(found)[: len(shown)]))
    figure.update_xaxes(visible=False, rangemode="tozero")  # each bar has its value beside it
    return figure


def _loss_name(data: StudyData, monitor: str) -> str:
    if monitor != data.monitor:  # the loss, where another value decides
        return f"{monitor} (lower is better)"
    return f"{monitor} ({'lower' if data.mode == 'min' else 'higher'} is better)"


def _length(high: float, low: float) -> float:
    # A bar of no length where there is no interval: plotly has no per-point switch.
    length = high - low
    return length if math.isfinite(length) else 0.0


def _plain(rows: Iterable[Iterable[float]]) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in rows]


def _described(effect: LayerEffect) -> str:
    where = f"{plain_text(effect.layer or '(model)')}, {effect.flag}"
    return f"{where}<br>{effect.on} trials with True, {effect.off} with False"
