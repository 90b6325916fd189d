"""torchvision's ResNets, made for ImageNet, with the zoo's choice of norms, and with a stem for small images.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, table 1; `torchvision.models.resnet`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from zoo._norms import NORMS, Norm, norm_layer
from zoo._registry import register

__all__ = ["resnet18", "resnet34", "resnet50"]

CLASSES = {"imagenet": 1000, "cifar": 10}
"""What there is to tell apart, by stem."""


def resnet18(
    norm: Norm = "bln",
    num_classes: int | None = None,
    in_channels: int = 3,
    stem: str = "imagenet",
    statistics: str = "per_position",
) -> nn.Module:
    """`torchvision.models.resnet18` with another norm: 11.7 million parameters.

    Shapes: (N, in_channels, H, W) to (N, num_classes), or to (N, 512) for ``num_classes=0``; H and W of 224 in the
    paper. The last layer is ``fc``.

    `BatchLayerNorm` keeps population statistics for each position: 5 million numbers at 224x224, which hold for images
    of that size. Statistics per channel take any size, as BatchNorm's do.

    Args:
        norm: "bln" (default), "bn", "ln", "gn", or a callable that takes the number of channels.
        num_classes: 0 for features: ``fc`` is then `nn.Identity`. Default None: 1000, with the stem for CIFAR 10.
        in_channels: Default 3.
        stem: "imagenet" (default), a 7x7 convolution of stride 2 and a max pool: 1/4 of the resolution; "cifar", a 3x3
            convolution of stride 1 and no pool.
        statistics: Of BLN: "per_position" (default, the paper) or "per_channel".

    Returns:
        A `torchvision.models.ResNet`.

    Raises:
        ValueError: If ``norm``, ``stem`` or ``statistics`` is not known.

    Example:
        >>> resnet18(stem="cifar")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return _resnet("resnet18", norm, num_classes, in_channels, stem, statistics)


def resnet34(
    norm: Norm = "bln",
    num_classes: int | None = None,
    in_channels: int = 3,
    stem: str = "imagenet",
    statistics: str = "per_position",
) -> nn.Module:
    """`torchvision.models.resnet34` with another norm: 21.8 million parameters; see `resnet18`."""
    return _resnet("resnet34", norm, num_classes, in_channels, stem, statistics)


def resnet50(
    norm: Norm = "bln",
    num_classes: int | None = None,
    in_channels: int = 3,
    stem: str = "imagenet",
    statistics: str = "per_position",
) -> nn.Module:
    """`torchvision.models.resnet50` with another norm: 25.6 million parameters, 2048 features; see `resnet18`."""
    return _resnet("resnet50", norm, num_classes, in_channels, stem, statistics)


def _resnet(name: str, norm: Norm, num_classes: int | None, in_channels: int, stem: str, statistics: str) -> nn.Module:
    from torchvision import models  # importing the zoo stays light

    if stem not in CLASSES:
        raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}.")
    if num_classes is None:
        num_classes = CLASSES[stem]
    builder: Any = getattr(models, name)
    model = builder(norm_layer=partial(norm_layer, norm, statistics=statistics), num_classes=num_classes or 1)
    model.classifier = "fc"
    if num_classes == 0:
        model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    if stem == "cifar" or in_channels != 3:
        # As torchvision starts its own.
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


for _builder in (resnet18, resnet34, resnet50):
    for _norm in NORMS:
        register(f"{_builder.__name__}_{_norm}", partial(_builder, norm=_norm))
        register(f"{_builder.__name__}_cifar_{_norm}", partial(_builder, norm=_norm, stem="cifar"))
