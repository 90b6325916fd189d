"""Weights of a model's twin, which is the same network with other norms."""

from __future__ import annotations

import math

import torch
from torch import nn

from lightning_bln.surgery import bln_layers
from zoo._registry import create_model
from zoo._weights import get_weights

__all__ = ["load_twin_"]


@torch.no_grad()
def load_twin_(model: nn.Module, name: str) -> None:
    """Give a model the parameters of trained weights of the same network with other norms.

    What the affine part of a norm does to a normalised value stays the same: a BatchLayerNorm multiplies by
    weight / sqrt(C), so its weight becomes sqrt(C) times that of its twin. Statistics and flags are not taken over.

    Args:
        model: Changed in place, all of it or, if that fails, nothing.
        name: ``arch.tag``.

    Raises:
        ValueError: If there are no such weights, or their parameters are not those of this model.

    Example:
        >>> model = create_model("cnn_bln")
        >>> load_twin_(model, "cnn_bn.digits")
    """
    weights = get_weights(name)
    twin = create_model(weights.arch, weights=weights)
    theirs, ours = dict(twin.named_parameters()), dict(model.named_parameters())
    shapes = [{key: tuple(value.shape) for key, value in each.items()} for each in (theirs, ours)]
    if shapes[0] != shapes[1]:
        differing = sorted(key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key))
        raise ValueError(
            f"A twin must be the same network with other norms, got {name}, where {len(differing)} parameters are "
            f"missing, too many or of other shapes: {', '.join(differing[:3])}; make the model with the arguments of "
            f"its twin, zoo.get_weights({name!r}).metadata['arguments']."
        )
    ours_scaled, theirs_scaled = bln_layers(model), bln_layers(twin)
    for key, value in theirs.items():
        layer, _, kind = key.rpartition(".")
        power = (layer in ours_scaled) - (layer in theirs_scaled) if kind == "weight" else 0
        ours[key].copy_(value * math.sqrt(value.numel()) ** power)
