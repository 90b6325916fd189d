"""What the examples share: scikit-learn's digits (1797 real 8x8 images inside the package) and a small network."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset


def digits(size: int = 8, channels: int = 1) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, validation and test images with their labels: always the same 1197, 300 and 300 of them."""
    data, target = load_digits(return_X_y=True)
    images = torch.tensor(data, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.5
    if size != 8:
        images = interpolate(images, size=(size, size), mode="bilinear")
    images = images.repeat(1, channels, 1, 1)
    labels = torch.tensor(target)
    # Neighbours come from the same writer, so the split is drawn from all of them.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val, test = order.split([1197, 300, 300])
    return tuple(TensorDataset(images[part], labels[part]) for part in (train, val, test))  # type: ignore[return-value]


class SmallCNN(nn.Sequential):
    """Three convolutions with BatchNorm, for 8x8 images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )
