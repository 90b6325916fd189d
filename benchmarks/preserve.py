"""How close a trained BatchNorm network stays to itself when its norms are swapped with affine="preserve".

    python -m benchmarks.preserve

Networks are trained on real images with BatchNorm, from weights and biases of the norms that are drawn at random, so
that a short training ends with statistics and affine as far from 0 and 1 as a long one does. Then the norms are
swapped, and the outputs for the test images are compared before any further training.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from examples.digits import SmallCNN, digits
from lightning_bln import StatFlags, swap_norms_

RESULT = Path(__file__).parent / "results" / "preserve.json"
BATCH_SIZES = (32, 128, 512)
FLAGS = StatFlags()


def train_batchnorm(model: nn.Module, data: TensorDataset, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Train a BatchNorm network as usual."""
    images, labels = data.tensors
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(batch) for batch in images.split(100)])


def distance_from_start(model: nn.Module) -> dict[str, list[float]]:
    """5th and 95th percentile of what is 0, 1, 1 and 0 in a fresh BatchNorm."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    parts = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        values = torch.cat([getattr(norm, name).detach() for norm in norms])
        parts[name] = [significant(value) for value in values.quantile(torch.tensor([0.05, 0.95])).tolist()]
    return parts


def measure(build: Callable[[], nn.Module], size: int, channels: int, seed: int, **recipe: Any) -> dict[str, Any]:
    """Train one BatchNorm network, swap copies of it, and compare."""
    torch.manual_seed(seed)
    train, _, test = digits(size, channels)
    images, labels = test.tensors
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    train_batchnorm(model, train, **recipe)
    before = outputs(model, images)
    swapped = []
    for batch_size in BATCH_SIZES:
        other = copy.deepcopy(model)
        swap_norms_(other, affine="preserve", flags=FLAGS, batch_size=batch_size)
        after = outputs(other, images)
        swapped.append(
            {
                "batch_size": batch_size,
                "relative_difference": significant(((after - before).norm() / before.norm()).item()),
                "accuracy": accuracy(after, labels),
            }
        )
    return {
        "seed": seed,
        "batchnorm_accuracy": accuracy(before, labels),
        "batchnorm_percentiles_5_95": distance_from_start(model),
        "swapped": swapped,
    }


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).double().mean().item(), 4)


def significant(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


NETWORKS: dict[str, dict[str, Any]] = {
    "small CNN (3 norms)": {
        "build": SmallCNN,
        "size": 8,
        "channels": 1,
        "epochs": 20,
        "batch_size": 64,
        "learning_rate": 0.1,
    },
    "torchvision resnet18 (20 norms)": {
        "build": lambda: resnet18(weights=None, num_classes=10),
        "size": 32,
        "channels": 3,
        "epochs": 5,
        "batch_size": 64,
        "learning_rate": 0.05,
    },
}


def run(seeds: list[int], networks: dict[str, dict[str, Any]] = NETWORKS) -> dict[str, Any]:
    """All measurements as plain data."""
    results = []
    for name, network in networks.items():
        runs = []
        for seed in seeds:
            runs.append(measure(seed=seed, **network))
            print(name, json.dumps(runs[-1]))
        settings = {key: value for key, value in network.items() if key != "build"}
        results.append({"network": name, "settings": settings, "runs": runs})
    return {
        "benchmark": "preserve",
        "command": "python -m benchmarks.preserve",
        "data": "scikit-learn digits: 1197 training images, 300 test images",
        "swap": {"affine": "preserve", "flags": FLAGS.code, "statistics": "per_position"},
        "device": "cpu",
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "scikit-learn")},
        "results": results,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    result = run(args.seeds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
