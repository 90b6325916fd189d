"""The picture of layers.csv: every contender's training step over nn.BatchNorm's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Marker and colour of each contender; nn.BatchNorm is the line at 1.
STYLES = {
    "bln": ("o", "#d62728"),
    "ln": ("s", "#1f77b4"),
    "plain": ("^", "#7f7f7f"),
    "compiled": ("D", "#2ca02c"),
    "copy": ("|", "#000000"),
}
LABELS = {
    "bln": "BatchLayerNorm",
    "ln": "nn.LayerNorm",
    "plain": "plain composition",
    "compiled": "torch.compile of it",
    "copy": "a copy for each pass",
}


def plot_layers(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each layout and dtype, a row for each shape, times on a logarithmic axis.

    Draws nothing where the rows hold no ratios.
    """
    rows = [row for row in rows if row["mode"] == "forward_backward" and row["vs_bn"] is not None]
    if not rows:
        return
    groups = {
        "images, contiguous": [row for row in rows if row["kind"] == "image" and row["layout"] == "contiguous"],
        "images, channels_last": [row for row in rows if row["layout"] == "channels_last"],
        "sequences and dense": [row for row in rows if row["kind"] != "image"],
    }
    groups = {name: group for name, group in groups.items() if group}
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    shapes = {name: list(dict.fromkeys(_label(row) for row in group)) for name, group in groups.items()}
    figure = Figure(figsize=(5.5 * len(dtypes), 2.2 + 0.27 * sum(map(len, shapes.values()))), layout="constrained")
    axes = figure.subplots(
        len(groups),
        len(dtypes),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=[len(labels) + 1 for labels in shapes.values()],
    )
    for i, (name, group) in enumerate(groups.items()):
        for j, dtype in enumerate(dtypes):
            _panel(axes[i][j], [row for row in group if row["dtype"] == dtype], shapes[name])
            axes[i][j].set_title(f"{name}, {dtype}", fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("training step, times nn.BatchNorm's")
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    where = rows[0]
    figure.suptitle(
        f"Forward and backward pass: medians and quartiles of ratios within a round\n"
        f"{where['device_name']}, {where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"kernel: {where['kernel']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _label(row: dict[str, Any]) -> str:
    return f"{row['network']} {row['shape']}"


def _panel(axis: Axes, rows: Sequence[dict[str, Any]], labels: list[str]) -> None:
    for name, (marker, color) in STYLES.items():
        own = [row for row in rows if row["contender"] == name]
        if not own:
            continue
        middle = [row["vs_bn"] for row in own]
        errors = [[row["vs_bn"] - row["vs_bn_q1"] for row in own], [row["vs_bn_q3"] - row["vs_bn"] for row in own]]
        heights = [labels.index(_label(row)) for row in own]
        axis.errorbar(
            middle,
            heights,
            xerr=errors,
            fmt=marker,
            color=color,
            label=LABELS[name],
            markersize=9 if name == "copy" else 4.5,
            elinewidth=1,
        )
    axis.axvline(1, color="black", linewidth=0.8, label="nn.BatchNorm")
    axis.set_xscale("log")
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(axis="both", color="#dddddd", linewidth=0.5)
    axis.set_axisbelow(True)
