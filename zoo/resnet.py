"""ResNets for images of CIFAR's size.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo._norms import NORMS, Norm, norm_layer
from zoo._registry import register

__all__ = ["CifarResNet", "resnet20", "resnet32", "resnet44", "resnet56"]


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsampled, padded with zero channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return torch.relu(y + shortcut)


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers: 16, 32 and 64 channels at full, half and quarter resolution.

    Shapes: (N, in_channels, H, W) to (N, num_classes); H and W of 32 in the paper.

    Args:
        depth: 6n + 2, such as 20, 32, 44, 56.
        norm: "bln", "bn", "ln", "gn", or a callable that takes the number of channels. Default "bln".
        num_classes: Default 10; 0 for features (N, 64).
        in_channels: Default 3.
        statistics: Of BLN: "per_position" (default, the paper), for one image size; "per_channel", for any.

    Raises:
        ValueError: If ``depth`` is not 6n + 2, or ``norm`` or ``statistics`` is not known.
    """

    classifier: ClassVar[str] = "fc"

    def __init__(
        self,
        depth: int,
        norm: Norm = "bln",
        num_classes: int = 10,
        in_channels: int = 3,
        statistics: str = "per_position",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2, such as 20, 32, 44 or 56, got {depth!r}.")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        layer = partial(norm_layer, norm, statistics=statistics)
        self.norm1 = layer(16)
        blocks = (depth - 2) // 6
        self.stages = nn.Sequential()
        channels = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            stage = nn.Sequential()
            for index in range(blocks):
                stage.append(_Block(channels, width, stride if index == 0 else 1, layer))
                channels = width
            self.stages.append(stage)
        self.fc: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = torch.relu(self.norm1(self.conv1(x)))
        x = self.stages(x)
        return self.fc(x.mean((2, 3)))


def resnet20(
    norm: Norm = "bln", num_classes: int = 10, in_channels: int = 3, statistics: str = "per_position"
) -> CifarResNet:
    """`CifarResNet` of 20 layers, 0.27 million parameters."""
    return CifarResNet(20, norm, num_classes, in_channels, statistics)


def resnet32(
    norm: Norm = "bln", num_classes: int = 10, in_channels: int = 3, statistics: str = "per_position"
) -> CifarResNet:
    """`CifarResNet` of 32 layers, 0.46 million parameters."""
    return CifarResNet(32, norm, num_classes, in_channels, statistics)


def resnet44(
    norm: Norm = "bln", num_classes: int = 10, in_channels: int = 3, statistics: str = "per_position"
) -> CifarResNet:
    """`CifarResNet` of 44 layers, 0.66 million parameters."""
    return CifarResNet(44, norm, num_classes, in_channels, statistics)


def resnet56(
    norm: Norm = "bln", num_classes: int = 10, in_channels: int = 3, statistics: str = "per_position"
) -> CifarResNet:
    """`CifarResNet` of 56 layers, 0.85 million parameters."""
    return CifarResNet(56, norm, num_classes, in_channels, statistics)


for _builder in (resnet20, resnet32, resnet44, resnet56):
    for _norm in NORMS:
        register(f"{_builder.__name__}_{_norm}", partial(_builder, norm=_norm))
