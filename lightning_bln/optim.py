"""Learning rates for the gains of BatchLayerNorm layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_bln.surgery import bln_layers

__all__ = ["matched_gain_groups"]


def matched_gain_groups(
    model: nn.Module,
    groups: Iterable[dict[str, Any]] | None = None,
    *,
    lr: float,
    adaptive: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, in which the gains of `BatchLayerNorm` layers learn as fast as BatchNorm's.

    The layer multiplies by the gain g = weight / sqrt(C). At one learning rate for all, g moves by

        SGD:        dg = -lr * (dL/dg) / C          BatchNorm's: -lr * dL/dg
        Adam:       dg ~ -lr / sqrt(C)              BatchNorm's: ~ -lr

    so the weights get a rate that is C times as large (``adaptive=True``: sqrt(C) times). That holds whatever they
    began with, 1 or sqrt(C).

    Args:
        model: With the layers; swap first. In a LightningModule's ``configure_optimizers`` `BLNSwap` has.
        groups: Parameter groups of an optimizer, ``{"params": [...], ...}``; each is split, and its other settings go
            with all its parts. Default None: one group of all parameters that require a gradient.
        lr: The learning rate of groups that have none of their own.
        adaptive: For optimizers whose steps do not depend on the gradient's size, such as Adam. Default False: for
            SGD, with or without momentum.

    Returns:
        New groups, each with an ``lr``, and none of them empty. Schedulers that scale each group's own rate keep the
        ratios; OneCycleLR needs ``max_lr=[group["lr"] for group in groups]``.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`, or if groups have none of its layers' weights.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), BatchLayerNorm(16))
        >>> [(len(group["params"]), group["lr"]) for group in matched_gain_groups(model, lr=0.1)]
        [(3, 0.1), (1, 1.6)]
    """
    if groups is None:
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    layers = bln_layers(model).values()
    features = {id(layer.weight): layer.weight.numel() for layer in layers if layer.weight is not None}
    result, found = [], False
    for group in groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        parts: dict[float, list[Any]] = {}
        for item in params:
            parameter = item[1] if isinstance(item, tuple) else item  # as of named_parameters()
            scale = features.get(id(parameter), 1)
            found = found or id(parameter) in features
            parts.setdefault(scale**0.5 if adaptive else scale, []).append(item)
        rate = group.get("lr", lr)
        result += [{**group, "params": part, "lr": scale * rate} for scale, part in parts.items()]
    if not found:
        raise ValueError(
            f"matched_gain_groups needs weights of BatchLayerNorm layers among the parameters, got {len(layers)} such "
            f"layers in a {type(model).__name__} and none of their weights; call swap_norms_(model) first, and give "
            f"groups of the same model's parameters."
        )
    return result
