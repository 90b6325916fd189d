"""Learning rates for the gains of BatchLayerNorm layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_bln.norm_kinds import norm_features
from lightning_bln.surgery import bln_layers

__all__ = ["matched_gain_groups"]


def matched_gain_groups(
    model: nn.Module,
    groups: Iterable[Any] | None = None,
    *,
    lr: float,
    adaptive: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, in which the gains of `BatchLayerNorm` layers learn as fast as BatchNorm's.

    The layer multiplies by the gain g = weight / sqrt(C). At one learning rate for all, g moves by

        SGD:        dg = -lr * (dL/dg) / C          BatchNorm's: -lr * dL/dg
        Adam:       dg ~ -lr / sqrt(C)              BatchNorm's: ~ -lr

    so the weights get a rate that is C times as large (``adaptive=True``: sqrt(C) times). That holds whatever they
    began with, 1 or sqrt(C). A group's own weight decay is divided by the same factor for them, so that gains decay as
    BatchNorm's; without one they do not decay, whatever the optimizer's default.

    Args:
        model: With the layers; swap first. In a LightningModule's ``configure_optimizers`` `BLNSwap` has.
        groups: What an optimizer takes: parameters, or groups ``{"params": [...], ...}``, each of which is split, its
            other settings going with all its parts. Default None: all parameters that require a gradient.
        lr: The learning rate of groups that have none of their own.
        adaptive: For Adam, AdamW and RMSprop, whose steps do not depend on the gradient's size. Default False: for SGD,
            with or without momentum. Optimizers that scale steps by the parameter's size, such as LAMB, need neither.

    Returns:
        New groups, each with an ``lr``, and none of them empty. Schedulers that scale each group's own rate keep the
        ratios; OneCycleLR needs ``max_lr=[group["lr"] for group in groups]``. Lightning's ``Tuner.lr_find`` gives all
        groups one rate, so it cannot search these.

    Raises:
        ValueError: If the groups have no weight of a `BatchLayerNorm` of the model, or a lazy layer has no size yet.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), BatchLayerNorm(16))
        >>> [(len(group["params"]), group["lr"]) for group in matched_gain_groups(model, lr=0.1)]
        [(3, 0.1), (1, 1.6)]
    """
    if groups is None:
        groups = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = list(groups)
    if not all(isinstance(group, dict) for group in groups):
        groups = [{"params": groups}]
    features = _features(model)
    result, found = [], False
    for group in groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        parts: dict[int, list[Any]] = {}
        for item in params:
            parameter = item[1] if isinstance(item, tuple) else item  # as of named_parameters()
            parts.setdefault(features.get(id(parameter), 0), []).append(item)
        for size, part in parts.items():
            new = {**group, "params": part, "lr": group.get("lr", lr)}
            if size:
                found = True
                scale = size**0.5 if adaptive else size
                new |= {"lr": scale * new["lr"], "weight_decay": group.get("weight_decay", 0.0) / scale}
            result.append(new)
    if not found:
        raise ValueError(
            f"matched_gain_groups needs weights of BatchLayerNorm layers among the parameters, got none of those of "
            f"{len(bln_layers(model))} such layers in a {type(model).__name__}; swap first, with BLNSwap or "
            f"swap_norms_(model), and leave this out where the layers have no weight or it is frozen."
        )
    return result


def _features(model: nn.Module) -> dict[int, int]:
    """C of each layer's weight, by the weight's id. Not its number of elements: it may be sharded."""
    features = {}
    for name, layer in bln_layers(model).items():
        if layer.weight is None:
            continue
        if isinstance(layer.weight, UninitializedParameter):
            raise ValueError(
                f"matched_gain_groups needs the number of features of each layer, got {name}, a lazy layer that has "
                f"seen none; run one batch through the model first."
            )
        features[id(layer.weight)] = norm_features(layer)
    return features
