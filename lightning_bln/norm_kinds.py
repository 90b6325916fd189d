"""Which layers are normalization layers, what surgery must know of each class, and of the modules around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FAMILIES = ("batch", "layer", "group", "instance", "rms")
"""The families of normalization layers that can be swapped; batch and layer are by default."""


@dataclass(frozen=True)
class NormKind:
    """A known class: its family, its feature axis, whether it is lazy, whether an activation follows inside it."""

    family: str
    feature_dim: int
    lazy: bool = False
    act: bool = False


def _kinds() -> dict[str, NormKind]:
    torch_bn, torch_norm = "torch.nn.modules.batchnorm", "torch.nn.modules.normalization"
    timm_norm, timm_act = "timm.layers.norm", "timm.layers.norm_act"
    kinds = {
        f"{torch_bn}.SyncBatchNorm": NormKind("batch", 1),
        "torchvision.ops.misc.FrozenBatchNorm2d": NormKind("batch", 1),
    }
    for n in (1, 2, 3):
        kinds[f"{torch_bn}.BatchNorm{n}d"] = NormKind("batch", 1)
        kinds[f"{torch_bn}.LazyBatchNorm{n}d"] = NormKind("batch", 1, lazy=True)
        kinds[f"torch.nn.modules.instancenorm.InstanceNorm{n}d"] = NormKind("instance", 1)
    kinds |= {
        f"{torch_norm}.LayerNorm": NormKind("layer", -1),
        f"{torch_norm}.RMSNorm": NormKind("rms", -1),
        f"{torch_norm}.GroupNorm": NormKind("group", 1),
        "torchvision.models.convnext.LayerNorm2d": NormKind("layer", 1),
        "zoo._norms.ChannelLayerNorm": NormKind("layer", 1),
        "zoo.gru._StepBatchNorm1d": NormKind("batch", 1),
        f"{timm_norm}.LayerNorm": NormKind("layer", -1),
        f"{timm_norm}.LayerNormFp32": NormKind("layer", -1),
        f"{timm_norm}.LayerNorm2d": NormKind("layer", 1),
        f"{timm_norm}.LayerNorm2dFp32": NormKind("layer", 1),
        f"{timm_norm}.RmsNorm": NormKind("rms", -1),
        f"{timm_norm}.RmsNorm2d": NormKind("rms", 1),
        f"{timm_norm}.GroupNorm": NormKind("group", 1),
        f"{timm_norm}.GroupNorm1": NormKind("group", 1),
    }
    for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"):
        kinds[f"{timm_act}.{name}"] = NormKind("batch", 1, act=True)
    for name, feature_dim in (
        ("LayerNormAct", -1),
        ("LayerNormActFp32", -1),
        ("LayerNormAct2d", 1),
        ("LayerNormAct2dFp32", 1),
    ):
        kinds[f"{timm_act}.{name}"] = NormKind("layer", feature_dim, act=True)
    for name in ("GroupNormAct", "GroupNorm1Act"):
        kinds[f"{timm_act}.{name}"] = NormKind("group", 1, act=True)
    return kinds


# By exact class: a subclass may do more than normalise (timm's BatchNormAct2d is an nn.BatchNorm2d with an activation
# inside). By name: torchvision and timm need not be importable.
KINDS = _kinds()
NORM_BASES = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def qualified_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def norm_shape(old: nn.Module) -> tuple[int, ...]:
    """Sizes of a normalization layer's feature axes."""
    for attribute in ("normalized_shape", "num_features", "num_channels"):
        value = getattr(old, attribute, None)
        if value is not None:
            return (value,) if isinstance(value, int) else tuple(value)
    running = getattr(old, "running_mean", None)
    if isinstance(running, Tensor):
        return tuple(running.shape)
    raise ValueError(f"A normalization layer must know its number of features, got {old!r}; exclude it by name.")


def norm_features(old: nn.Module) -> int:
    """C, the number of features of a normalization layer."""
    return math.prod(norm_shape(old))


def norm_eps(old: nn.Module) -> float:
    """A normalization layer's eps."""
    eps = getattr(old, "eps", None)
    if eps is None:  # nn.RMSNorm's default is the smallest step of its dtype
        weight = getattr(old, "weight", None)
        eps = torch.finfo(weight.dtype if isinstance(weight, Tensor) else torch.float32).eps
    return float(eps)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wraps, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def sample_dims_inside(model: nn.Module) -> dict[int, int]:
    """The sample axis of norms inside PyTorch's transformers that are not batch_first, by id."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            first = getattr(module.self_attn, "batch_first", True)
        elif isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(module.layers):
            first = getattr(getattr(module.layers[0], "self_attn", None), "batch_first", True)
        else:
            continue
        for child in module.children():
            if not first:
                found[id(uncompiled(child))] = 1
    return found


def layers_inside_metrics(model: nn.Module) -> set[int]:
    """Layers of torchmetrics' own networks, such as the Inception of a Frechet distance."""
    return {
        id(child)
        for module in model.modules()
        if any(qualified_name(cls) == "torchmetrics.metric.Metric" for cls in type(module).__mro__)
        for child in module.modules()
    }
