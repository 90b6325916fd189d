"""What a whole training step costs with the layer: models swapped by `swap_norms_` against the same as they were.

    python -m benchmarks.models [--quick] [--only PATTERN] [--device cuda]

A step is the forward pass, cross-entropy, the backward pass and one step of SGD, over a fixed random batch.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer, resnet18

import zoo
from benchmarks import timing, verify
from benchmarks.layers import MEMORY_FORMATS
from benchmarks.timing import Contender, Mark
from lightning_bln import swap_norms_

CLASSES = 10
WORDS = 5000


class GRUClassifier(nn.Module):
    """Word indices (N, T) to class scores (N, CLASSES), with a norm over the features between two GRUs and after them.

    Args:
        norm: `nn.BatchNorm1d`, applied to x.transpose(1, 2) as its users do, or `nn.LayerNorm`.
        features: Of the embedding and both GRUs.
    """

    def __init__(self, norm: Callable[[int], nn.Module], features: int = 128) -> None:
        super().__init__()
        self.channels_first = norm is nn.BatchNorm1d
        self.embedding = nn.Embedding(WORDS, features)
        self.gru1, self.norm1 = nn.GRU(features, features, batch_first=True), norm(features)
        self.gru2, self.norm2 = nn.GRU(features, features, batch_first=True), norm(features)
        self.fc = nn.Linear(features, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self._normalized(self.norm1, self.gru1(self.embedding(words))[0])
        x = self._normalized(self.norm2, self.gru2(x)[0])
        return self.fc(x.mean(1))

    def _normalized(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2)).transpose(1, 2) if self.channels_first else norm(x)


@dataclass(frozen=True)
class Workload:
    """A model and a batch."""

    name: str
    build: Callable[[], nn.Module]
    batch: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"

    def input(self, device: str) -> Tensor:
        if len(self.batch) == 2:
            return torch.randint(WORDS, self.batch, device=device)
        return torch.randn(self.batch, device=device).to(memory_format=MEMORY_FORMATS[self.layout])

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.batch))} {self.layout} {self.dtype}"


def vit() -> VisionTransformer:
    """ViT-tiny's width with 4 of its 12 blocks."""
    return VisionTransformer(
        image_size=224, patch_size=16, num_layers=4, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=CLASSES
    )


MODELS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]], ...] = (
    ("ResNet-20", lambda: zoo.create_model("resnet20_bn"), (128, 3, 32, 32), ("contiguous", "channels_last")),
    ("ResNet-18", lambda: resnet18(num_classes=CLASSES), (32, 3, 64, 64), ("contiguous", "channels_last")),
    ("ViT-tiny of 4 blocks", vit, (32, 3, 224, 224), ("contiguous",)),
    ("GRU with BatchNorm1d", lambda: GRUClassifier(nn.BatchNorm1d), (64, 256), ("contiguous",)),
    ("GRU with LayerNorm", lambda: GRUClassifier(nn.LayerNorm), (64, 256), ("contiguous",)),
)
QUICK = {"ResNet-20", "GRU with LayerNorm"}


def workloads(device: str) -> list[Workload]:
    """On a GPU under bfloat16 autocast, too."""
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    return [
        Workload(name, build, batch, layout, dtype)
        for name, build, batch, layouts in MODELS
        for layout in layouts
        for dtype in dtypes
    ]


def training_step(model: nn.Module, x: Tensor, targets: Tensor, autocast: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
            loss = cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()

    return step


def contender(step: Callable[[], None]) -> Contender:
    def timed(mark: Callable[[], Mark]) -> dict[str, tuple[Mark, Mark]]:
        start = mark()
        step()
        return {"training_step": (start, mark())}

    return timed


def measure_workload(work: Workload, device: str, rounds: int, seconds: float, ratios: bool) -> list[dict[str, Any]]:
    """The rows of the model as it was and swapped."""
    torch.manual_seed(0)
    original = work.build().to(device, memory_format=MEMORY_FORMATS[work.layout])
    swapped = copy.deepcopy(original)
    replaced = len(swap_norms_(swapped).swapped)
    x, targets = work.input(device), torch.randint(CLASSES, work.batch[:1], device=device)
    models = {"original": original, "swapped": swapped}
    steps = {name: training_step(model, x, targets, work.dtype == "bfloat16") for name, model in models.items()}
    timed = {name: contender(step) for name, step in steps.items()}
    timings = timing.measure(timed, timing.Clock(device), rounds, seconds)
    peaks = {}
    for name, model in models.items():
        # A step begins by letting go of the gradients before it: memory that `peak_bytes` knows nothing of.
        model.zero_grad()
        peaks[name] = timing.peak_bytes(steps[name], device)
    described = {
        "model": work.name,
        "norms": replaced,
        "batch": "x".join(map(str, work.batch)),
        "layout": work.layout,
        "dtype": work.dtype,
    }
    return [
        described | row | {"peak_bytes": peaks[name]}
        for (name, _), row in timing.timing_rows(timings, {"vs_original": ("original",)}, ratios).items()
    ]


def run(works: Sequence[Workload], device: str, rounds: int, seconds: float, ratios: bool, console: Console) -> list:
    """Measure model by model, and say how each went."""
    rows = []
    for i, work in enumerate(works, start=1):
        measured = measure_workload(work, device, rounds, seconds, ratios)
        times = ", ".join(f"{row['contender']} {timing.milliseconds(row['seconds'])}" for row in measured)
        console.print(f"[{i}/{len(works)}] {work}: step in ms: {times}", markup=False, highlight=False)
        rows += [row | timing.environment(device) for row in measured]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds, megabytes and ratios."""
    shown = Table(title="a training step, swapped against original; target for ResNet-18: 1.03")
    for name in ("model", "norms", "original ms", "swapped ms", "ratio (quartiles)", "original MB", "swapped MB"):
        shown.add_column(name, justify="left" if name == "model" else "right")
    for original, swapped in zip(rows[::2], rows[1::2], strict=True):
        quartiles = ""
        if swapped["vs_original"] is not None:
            low, high = swapped["vs_original_q1"], swapped["vs_original_q3"]
            quartiles = f"{swapped['vs_original']:.3f} ({low:.3f} to {high:.3f})"
        shown.add_row(
            " ".join(original[name] for name in ("model", "batch", "layout", "dtype")),
            str(original["norms"]),
            *(timing.milliseconds(row["seconds"]) for row in (original, swapped)),
            quartiles,
            *(f"{row['peak_bytes'] / 1e6:.1f}" for row in (original, swapped)),
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    timing.add_options(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    works = timing.chosen([w for w in workloads(args.device) if not args.quick or w.name in QUICK], args)
    if not args.unverified:
        verify.require_green(args.device)
    rounds, seconds = timing.effort(args, rounds=15, seconds=25)
    console = Console(width=None if Console().is_terminal else 200)
    rows = run(works, args.device, rounds, seconds, not args.unverified, console)
    console.print(table(rows))
    folder = timing.out_folder(args)
    if folder is not None:
        path = folder / f"{timing.result_name('models', rows[0])}.csv"
        timing.write_csv(path, rows)
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
