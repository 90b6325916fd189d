"""All 16 settings of the flags in one pass, beside one plain evaluation and 16 separate ones.

    python -m benchmarks.flags --data cifar10-jpeg

The network is the paper's CNN, trained for a short while. Each evaluation takes loss and accuracy of 10,000 images from
a data loader. Without ``--data``, a folder with train/<class>/ and test/<class>/, images are drawn at random: times
hardly depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import timing
from benchmarks.timing import Clock, Contender, Mark
from lightning_bln import StatFlags, set_flags_, start_epoch
from lightning_bln.tuning import ScoreTable, score_flags
from zoo.paper import PaperCNN

BATCH_SIZES = (25, 100, 500)
"""The authors' own, and larger ones."""

PUBLISHED_SECONDS = 160
"""16 evaluations and 16 reloads as the authors' code makes them, measured on 2 cores; 34 in Keras' graph mode."""

Scores = dict[str, tuple[float, float]]


def images(folder: Path | None, part: str, count: int) -> TensorDataset:
    """As many images and classes, evenly from the folder's, in an order that mixes classes."""
    generator = torch.Generator().manual_seed(100)
    if folder is None:
        targets = torch.randint(0, 10, (count,), generator=generator)
        return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), targets)
    files = ImageFolder(str(folder / part))
    order = torch.randperm(len(files), generator=generator)[:count].tolist()
    pixels = torch.stack([pil_to_tensor(files[i][0]) for i in order]).float() / 255
    return TensorDataset(pixels, torch.tensor([files[i][1] for i in order]))


def standardised(train: TensorDataset, test: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """By pixel and channel, with the training images' mean and deviation, as the authors do."""
    deviation, mean = torch.std_mean(train.tensors[0], 0)
    scaled = [TensorDataset((x - mean) / (deviation + 1e-7), target) for x, target in (train.tensors, test.tensors)]
    return scaled[0], scaled[1]


def trained(data: TensorDataset, epochs: int, batch_size: int) -> PaperCNN:
    """The paper's CNN after some epochs of its recipe: Adam, learning rate 0.002, batches of 25."""
    torch.manual_seed(100)
    model = PaperCNN("bln")
    optimizer = torch.optim.Adam(model.parameters(), 0.002)
    for epoch in range(epochs):
        start_epoch(model, epoch)
        for x, target in DataLoader(data, batch_size, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()
    return model.eval()


def evaluate(model: nn.Module, loader: DataLoader[Any], accuracy: MulticlassAccuracy) -> tuple[float, float]:
    """The plain evaluation that everyone writes: loss and accuracy."""
    accuracy.reset()
    total = 0.0
    with torch.inference_mode():
        for x, target in loader:
            output: Tensor = model(x)
            total += cross_entropy(output, target).item() * len(target)
            accuracy.update(output, target)
    return total / len(loader.dataset), accuracy.compute().item()  # type: ignore[arg-type]


def separately(model: nn.Module, loader: DataLoader[Any], accuracy: MulticlassAccuracy) -> Scores:
    """One plain evaluation for each setting."""
    scores = {}
    for flags in StatFlags.all():
        set_flags_(model, flags)
        scores[flags.code] = evaluate(model, loader, accuracy)
    set_flags_(model, StatFlags())
    return scores


def largest_difference(table: ScoreTable, separate: Scores) -> float:
    """Of the losses of one setting, by either way."""
    return max(abs(score.loss - separate[score.code][0]) for score in table)


def contender(call: Callable[[], Any], kept: list[Any]) -> Contender:
    def run(mark: Callable[[], Mark]) -> Mapping[str, tuple[Mark, Mark]]:
        start = mark()
        kept[:] = [call()]
        return {"pass": (start, mark())}

    return run


def measure(model: nn.Module, data: TensorDataset, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Rows: a plain pass, all settings in one, 16 separate passes."""
    loader = DataLoader(data, batch_size)
    accuracy = MulticlassAccuracy(10, average="micro")
    calls: dict[str, Callable[[], Any]] = {
        "plain": partial(evaluate, model, loader, accuracy),
        "score_flags": partial(score_flags, model, loader, cross_entropy, accuracy, progress=False),
        "separate": partial(separately, model, loader, accuracy),
    }
    results: dict[str, list[Any]] = {name: [] for name in calls}
    contenders = {name: contender(call, results[name]) for name, call in calls.items()}
    timings = timing.measure(contenders, Clock("cpu"), rounds, seconds=1e9)
    difference = largest_difference(results["score_flags"][0], results["separate"][0])
    if difference > 1e-6:
        raise SystemExit(
            f"No times without equal results: settings differ from separate passes by {difference:.2g} at batch size "
            f"{batch_size}; run the tests in tests/tuning."
        )
    rows = []
    for name in calls:
        seconds = timing.spread(timings[name, "pass"].values())
        ratio = timing.ratio(timings, name, "pass", ["plain"])
        assert ratio is not None
        rows.append(
            {
                "batch_size": batch_size,
                "samples": len(data),
                "contender": name,
                "rounds": len(timings[name, "pass"]),
                "seconds": seconds.median,
                "seconds_q1": seconds.low,
                "seconds_q3": seconds.high,
                "vs_plain": ratio.median,
                "vs_plain_q1": ratio.low,
                "vs_plain_q3": ratio.high,
                "largest_loss_difference": difference,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="loss and accuracy of the paper's CNN, median (quartiles)")
    for name in ("batch", "evaluation", "seconds", "over a plain pass"):
        shown.add_column(name)
    for row in rows:
        shown.add_row(
            str(row["batch_size"]),
            row["contender"],
            f"{row['seconds']:.2f} ({row['seconds_q1']:.2f} to {row['seconds_q3']:.2f})",
            f"{row['vs_plain']:.2f} ({row['vs_plain_q1']:.2f} to {row['vs_plain_q3']:.2f})",
        )
    return shown


def in_short(rows: list[dict[str, Any]]) -> str:
    """What the targets are about."""
    own = [row for row in rows if row["contender"] == "score_flags"]
    worst, slowest = max(row["vs_plain"] for row in own), max(row["seconds"] for row in own)
    difference = max(row["largest_loss_difference"] for row in own)
    return (
        f"16 settings over a plain pass: at most {worst:.2f} (target 6, aim 4); as published {PUBLISHED_SECONDS} s, "
        f"{PUBLISHED_SECONDS / slowest:.0f} times faster (target 20); losses differ from separate passes by at most "
        f"{difference:.1e} (target 1e-6)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as train/<class>/*, test/<class>/*")
    parser.add_argument("--data-name", help='what the results call these images, such as "CIFAR-10 (JPEG)"')
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default 2")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    parser.add_argument("--samples", type=int, default=10_000, help="images; default 10000")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder for flags.csv")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    train, test = standardised(images(args.data, "train", 9_000), images(args.data, "test", args.samples))
    what = args.data_name or ("random images" if args.data is None else args.data.name)
    rows = []
    for batch_size in args.batch_sizes:
        # Population statistics belong to the batch size that they were taken with.
        model = trained(train, epochs=2, batch_size=batch_size)
        rows += measure(model, test, batch_size, args.repeats)
    rows = [row | {"data": what} | timing.environment("cpu") for row in rows]
    Console().print(table(rows))
    print(in_short(rows))
    timing.write_csv(args.out / "flags.csv", rows)
    print(f"written: {args.out / 'flags.csv'}")


if __name__ == "__main__":
    main()
