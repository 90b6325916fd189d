"""A wide and shallow convolutional network for images of CIFAR's size, quick to train to a high accuracy.

Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, section 3.1.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo._norms import NORMS, Norm, norm_layer
from zoo._registry import register

__all__ = ["CifarNet"]


class _Block(nn.Module):
    """Two 3x3 convolutions, each with a norm and GELU; 2x2 maximum pooling after the first convolution."""

    def __init__(self, inputs: int, outputs: int, norm: Norm, statistics: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = norm_layer(norm, outputs, statistics=statistics)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, outputs, statistics=statistics)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class CifarNet(nn.Module):
    """A 2x2 convolution, blocks of 64, 256 and 256 channels, maximum pooling, a dense layer; 2 million parameters.

    A block's convolutions start as the identity, as far as they have as many inputs. The source's first layer whitens
    patches with fixed weights; this one learns them.

    Shapes: (N, in_channels, H, W) to (N, num_classes); H and W of 32 in the source, at least 9.

    Args:
        norm: "bln" (default), "bn", "ln", "gn", or a callable that takes the number of channels.
        num_classes: Default 10; 0 for features (N, 256).
        in_channels: Default 3.
        statistics: Of BLN: "per_position" (default, the paper), for one image size; "per_channel", for any.

    Raises:
        ValueError: If ``norm`` or ``statistics`` is not known.
    """

    classifier: ClassVar[str] = "fc"

    def __init__(
        self, norm: Norm = "bln", num_classes: int = 10, in_channels: int = 3, statistics: str = "per_position"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 24, 2)
        channels = 24
        blocks = []
        for width in (64, 256, 256):
            blocks.append(_Block(channels, width, norm, statistics))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc: nn.Module = nn.Linear(channels, num_classes, bias=False) if num_classes else nn.Identity()
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight[: module.in_channels].detach())

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.blocks(F.gelu(self.conv(x)))
        return self.fc(torch.amax(x, (2, 3)) / 9)


for _norm in NORMS:
    register(f"cifarnet_{_norm}", partial(CifarNet, norm=_norm))
