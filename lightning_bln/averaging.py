"""Keep the copies of the model that Lightning's averaging callbacks hold able to take its population statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_bln.layer import RUNNING
from lightning_bln.surgery import bln_layers

# By name: both namespaces, lightning.pytorch and pytorch_lightning, have these classes.
_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")


def is_averaging(callback: Any) -> bool:
    """Whether a callback averages weights (SWA, EMA)."""
    return _is_one_of(callback, _AVERAGING)


def needs_refresh(callback: Any) -> bool:
    """Whether a callback averages parameters only (SWA), so that statistics must be recomputed afterwards."""
    return _is_one_of(callback, ("StochasticWeightAveraging",))


def _is_one_of(callback: Any, names: tuple[str, ...]) -> bool:
    return any(cls.__name__ in names for cls in type(callback).__mro__)


def align_averaged_copies(callbacks: Iterable[Any], model: nn.Module) -> None:
    """Give the averaged copies the model's statistics' shapes, and its counts.

    The copies are made before the first batch, when the shapes are not known yet; an average of a tensor and an empty
    one is an error. Integer counts, averaged as floating-point numbers, come back one too small.

    Args:
        callbacks: The Trainer's.
        model: The model in training.
    """
    for callback in callbacks:
        # The copy has no public name.
        copy = getattr(callback, "_average_model", None) if is_averaging(callback) else None
        if not isinstance(copy, nn.Module):
            continue
        twins = bln_layers(copy)
        for name, layer in bln_layers(model).items():
            twin = twins.get(f"module.{name}", twins.get(name))
            if twin is None:
                continue
            for running in RUNNING:
                value, own = getattr(layer, running), getattr(twin, running)
                if own.shape != value.shape:
                    setattr(twin, running, value.detach().to(own).clone())
            with torch.no_grad():
                twin.num_samples.copy_(layer.num_samples)
                twin.nominal_batch_size.copy_(layer.nominal_batch_size)
            twin.epoch = layer.epoch
