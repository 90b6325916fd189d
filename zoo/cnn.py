"""A small convolutional network for small images, such as scikit-learn's digits."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo._norms import NORMS, Norm, norm_layer
from zoo._registry import register

__all__ = ["CNN"]


class CNN(nn.Module):
    """Three 3x3 convolutions of width, 2 x width and 2 x width channels, each with a norm and ReLU; a dense layer.

    Shapes: (N, in_channels, H, W) to (N, num_classes). The second and third convolution halve the resolution.

    Args:
        norm: "bln" (default), "bn", "ln", "gn", or a callable that takes the number of channels.
        num_classes: Default 10; 0 for features (N, 2 x width).
        in_channels: Default 1.
        width: Default 32.
    """

    classifier: ClassVar[str] = "fc"

    def __init__(self, norm: Norm = "bln", num_classes: int = 10, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for size, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            layers += [nn.Conv2d(channels, size, 3, stride, 1, bias=False), norm_layer(norm, size), nn.ReLU()]
            channels = size
        self.layers = nn.Sequential(*layers)
        self.fc: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.fc(torch.mean(self.layers(x), (2, 3)))


for _norm in NORMS:
    register(f"cnn_{_norm}", partial(CNN, norm=_norm))
