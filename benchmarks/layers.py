"""How fast the layer is beside nn.BatchNorm, nn.LayerNorm, its plain composition, and a copy of the tensor.

    python -m benchmarks.layers [--quick] [--only PATTERN] [--no-compile] [--device cuda]

Contenders, all in the same run: ``bln``, the module with everything that it does to its buffers; ``bn``, nn.BatchNorm1d
or 2d, for (N, T, C) sequences over x.transpose(1, 2); ``ln``, nn.LayerNorm over the features, for images with the
permutations of ConvNeXt's LayerNorm2d; ``plain``, the reference's PyTorch operations and autograd; ``compiled``,
torch.compile of them; ``copy``, the tensor copied once for each pass, which no kernel can beat.

Modes: ``forward`` in training with the graph recorded, ``backward`` for the input, the weight and the bias,
``forward_backward`` as one step, ``inference`` with default flags and a population.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from benchmarks import plots, summary, timing, verify
from benchmarks.timing import Contender, Mark, Timings
from lightning_bln import BatchLayerNorm
from lightning_bln.ops.reference import Population, normalize

BASELINES = {"vs_bn": ("bn",), "vs_ln": ("ln",), "vs_bn_ln": ("bn", "ln"), "vs_copy": ("copy",)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Line:
    """One input to the layers: whose it is, its shape, layout and dtype."""

    network: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"

    @property
    def kind(self) -> str:
        return {2: "dense", 3: "sequence", 4: "image"}[len(self.shape)]

    @property
    def feature_dim(self) -> int:
        return 1 if self.kind == "image" else -1

    @property
    def features(self) -> int:
        return self.shape[self.feature_dim]

    def input(self, device: str) -> Tensor:
        x = torch.randn(self.shape, device=device).to(DTYPES[self.dtype], memory_format=MEMORY_FORMATS[self.layout])
        return x.requires_grad_()

    def __str__(self) -> str:
        return f"{self.network} {'x'.join(map(str, self.shape))} {self.layout} {self.dtype}"


SHAPES = (
    ("ResNet-20", (128, 16, 32, 32)),
    ("ResNet-20", (128, 32, 16, 16)),
    ("ResNet-20", (128, 64, 8, 8)),
    ("ResNet-18", (32, 64, 112, 112)),
    ("ResNet-18", (32, 64, 56, 56)),
    ("ResNet-18", (32, 128, 28, 28)),
    ("ResNet-18", (32, 256, 14, 14)),
    ("ResNet-18", (32, 512, 7, 7)),
    ("ResNet-50", (32, 256, 56, 56)),
    ("ResNet-50", (32, 2048, 7, 7)),
    ("ConvNeXt-T", (32, 96, 56, 56)),
    ("ConvNeXt-T", (32, 768, 7, 7)),
    ("ViT-tiny", (32, 197, 192)),
    ("ViT-base", (32, 197, 768)),
    ("GRU", (64, 256, 128)),
    ("paper", (128, 32)),
    ("dense", (128, 512)),
    ("dense", (256, 1024)),
    ("dense", (512, 4096)),
)
LINES = tuple(
    Line(network, shape, layout, dtype)
    for network, shape in SHAPES
    for layout in (("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",))
    for dtype in DTYPES
)
QUICK = {(128, 64, 8, 8), (32, 128, 28, 28), (32, 197, 192), (128, 512)}


@dataclass
class Layer:
    """A contender that normalises: its two calls and what they learn or hold."""

    train: Callable[[Tensor], Tensor]
    infer: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]
    modules: tuple[nn.Module, ...] = ()


def layers(line: Line, device: str, compiled: bool) -> dict[str, Layer]:
    """The contenders but the copy, with a population from one batch like the line's input."""
    bln = BatchLayerNorm(line.features, feature_dim=line.feature_dim, device=device)
    bln(line.input(device).detach())
    found = {"bln": _layer(bln, bln), "bn": _batch_norm(line, device), "ln": _layer_norm(line, device)}
    found["plain"] = _composition(bln, line, _plain)
    if compiled:
        # One function object for each line: what is compiled for one must not be guarded against another.
        torch.compiler.reset()
        found["compiled"] = _composition(bln, line, torch.compile(_plain, dynamic=False))
    return found


def _layer(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Layer:
    return Layer(call, call, tuple(module.parameters()), (module,))


def _batch_norm(line: Line, device: str) -> Layer:
    if line.kind == "image":
        module: nn.Module = nn.BatchNorm2d(line.features, device=device)
        return _layer(module, module)
    module = nn.BatchNorm1d(line.features, device=device)
    if line.kind == "sequence":
        return _layer(module, lambda x: module(x.transpose(1, 2)).transpose(1, 2))
    return _layer(module, module)


def _layer_norm(line: Line, device: str) -> Layer:
    # With the input's dtype: not every device's LayerNorm takes bfloat16 with float32 parameters, as BatchNorm does.
    kind = LayerNorm2d if line.kind == "image" else nn.LayerNorm
    module = kind(line.features).to(device, DTYPES[line.dtype])
    return _layer(module, module)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    population: tuple[Tensor | None, ...],
    batch_size: Tensor | None,
    feature_dim: int,
    eps: float,
) -> Tensor:
    """The definition as a plain function: no op of ours, so no kernel of ours."""
    return normalize(x, weight, bias, Population(*population), batch_size, feature_dim, False, eps)[0]


def _composition(bln: BatchLayerNorm, line: Line, function: Callable[..., Tensor]) -> Layer:
    weight, bias = bln.get_parameter("weight"), bln.get_parameter("bias")
    axis = len(line.shape) - 1 if line.feature_dim == -1 else line.feature_dim
    population = (bln.running_batch_mean.clone(), bln.running_batch_var.clone(), None, None)
    batch_size = bln.nominal_batch_size.clone()
    return Layer(
        lambda x: function(x, weight, bias, (None,) * 4, None, axis, bln.eps),
        lambda x: function(x, weight, bias, population, batch_size, axis, bln.eps),
        (weight, bias),
        (bln,),
    )


def training(layer: Layer, x: Tensor, grad: Tensor) -> Contender:
    def step(mark: Callable[[], Mark]) -> dict[str, tuple[Mark, Mark]]:
        start = mark()
        y = layer.train(x)
        middle = mark()
        torch.autograd.grad(y, [x, *layer.parameters], grad)
        end = mark()
        return {"forward": (start, middle), "backward": (middle, end), "forward_backward": (start, end)}

    return step


def inference(layer: Layer, x: Tensor) -> Contender:
    @torch.no_grad()
    def call(mark: Callable[[], Mark]) -> dict[str, tuple[Mark, Mark]]:
        start = mark()
        layer.infer(x)
        return {"inference": (start, mark())}

    return call


def copies(x: Tensor, grad: Tensor) -> tuple[Contender, Contender]:
    """One copy a pass: for training and for inference."""
    y = torch.empty_like(x, requires_grad=False)

    @torch.no_grad()
    def step(mark: Callable[[], Mark]) -> dict[str, tuple[Mark, Mark]]:
        start = mark()
        y.copy_(x)
        middle = mark()
        y.copy_(grad)
        end = mark()
        return {"forward": (start, middle), "backward": (middle, end), "forward_backward": (start, end)}

    @torch.no_grad()
    def call(mark: Callable[[], Mark]) -> dict[str, tuple[Mark, Mark]]:
        start = mark()
        y.copy_(x)
        return {"inference": (start, mark())}

    return step, call


def measure_line(line: Line, device: str, rounds: int, seconds: float, compiled: bool, ratios: bool) -> list[dict]:
    """All rows of one line."""
    torch.manual_seed(0)
    x, clock = line.input(device), timing.Clock(device)
    grad = torch.randn_like(x, requires_grad=False)
    found = layers(line, device, compiled)
    copy_step, copy_call = copies(x, grad)

    steps = {name: training(layer, x, grad) for name, layer in found.items()}
    if compiled:
        # Compiles now, so that `measure` sees what a call takes.
        steps["compiled"](clock.mark)
    timings: Timings = timing.measure(steps | {"copy": copy_step}, clock, rounds, seconds)
    memory = {name: _memory(layer, x, grad, device) for name, layer in found.items()}

    for layer in found.values():
        for module in layer.modules:
            module.eval()
    calls = {name: inference(layer, x.detach()) for name, layer in found.items()}
    if compiled:
        calls["compiled"](clock.mark)
    timings |= timing.measure(calls | {"copy": copy_call}, clock, rounds, seconds / 3)

    described = {
        "kind": line.kind,
        "network": line.network,
        "shape": "x".join(map(str, line.shape)),
        "layout": line.layout,
        "dtype": line.dtype,
    }
    nothing = {"saved_bytes": None, "peak_bytes": None}
    return [
        described | row | (memory.get(name, nothing) if mode == "forward_backward" else nothing)
        for (name, mode), row in timing.timing_rows(timings, BASELINES, ratios).items()
    ]


def _memory(layer: Layer, x: Tensor, grad: Tensor, device: str) -> dict[str, int]:
    """What a training step keeps for its backward pass, and the most that it holds at one time."""

    def step() -> None:
        torch.autograd.grad(layer.train(x), [x, *layer.parameters], grad)

    held = [*layer.parameters, *timing.tensors_of(*layer.modules)]
    return {
        "saved_bytes": timing.saved_bytes(lambda: layer.train(x), held),
        "peak_bytes": timing.peak_bytes(step, device),
    }


def run(
    lines: Sequence[Line], device: str, rounds: int, seconds: float, compiled: bool, ratios: bool, console: Console
) -> list[dict[str, Any]]:
    """Measure line by line, and say how each went."""
    rows = []
    for i, line in enumerate(lines, start=1):
        measured = measure_line(line, device, rounds, seconds, compiled, ratios)
        console.print(f"[{i}/{len(lines)}] {line}: {_in_short(measured)}", markup=False, highlight=False)
        rows += [row | timing.environment(device) for row in measured]
    return rows


def _in_short(rows: list[dict[str, Any]]) -> str:
    steps = {row["contender"]: row for row in rows if row["mode"] == "forward_backward"}
    times = ", ".join(f"{name} {timing.milliseconds(row['seconds'])}" for name, row in steps.items())
    own = steps["bln"]
    if own["vs_bn"] is None:
        return f"step in ms: {times}"
    return f"step in ms: {times}; {own['vs_bn']:.2f} times bn ({own['vs_bn_q1']:.2f} to {own['vs_bn_q3']:.2f})"


def table(rows: list[dict[str, Any]], mode: str) -> Table:
    """Milliseconds of every contender, and the layer's ratios, for one mode."""
    ratios = [column for column in BASELINES if any(row[column] is not None for row in rows)]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    shown = Table(title=f"{mode}, milliseconds" + (", and bln's times the others'" if ratios else ""))
    shown.add_column("input")
    for name in (*names, *(column.replace("_", " ") for column in ratios)):
        shown.add_column(name, justify="right")
    by_line: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["mode"] == mode:
            key = " ".join(str(row[part]) for part in ("network", "shape", "layout", "dtype"))
            by_line.setdefault(key, {})[row["contender"]] = row
    for key, line in by_line.items():
        times = [timing.milliseconds(line[name]["seconds"]) for name in names]
        shown.add_row(key, *times, *(_times(line["bln"], column) for column in ratios))
    return shown


def _times(row: dict[str, Any], column: str) -> str:
    return f"{row[column]:.2f} ({row[f'{column}_q1']:.2f}-{row[f'{column}_q3']:.2f})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    timing.add_options(parser)
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile, which takes several seconds a line"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    lines = timing.chosen([line for line in LINES if not args.quick or line.shape in QUICK], args)
    if not args.unverified:
        verify.require_green(args.device)
    rounds, seconds = timing.effort(args, rounds=24, seconds=1.5)
    console = Console(width=None if Console().is_terminal else 200)
    rows = run(lines, args.device, rounds, seconds, not args.no_compile, not args.unverified, console)
    for mode in ("forward", "backward", "forward_backward", "inference"):
        console.print(table(rows, mode))
    if not args.unverified:
        console.print(summary.as_table(summary.layer_findings(rows)))
    folder = timing.out_folder(args)
    if folder is not None:
        stem = timing.result_name("layers", rows[0])
        timing.write_csv(folder / f"{stem}.csv", rows)
        plots.plot_layers(rows, folder / f"{stem}.png")
        console.print(f"written: {folder / stem}.csv, .png")


if __name__ == "__main__":
    main()
