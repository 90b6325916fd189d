"""The paper's small convolutional network, as its authors' code has it.

Source: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898, and the authors' Keras notebooks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lightning_bln import BatchLayerNorm
from zoo._norms import ChannelLayerNorm, Norm
from zoo._registry import register

__all__ = ["PaperCNN"]

EPS = 1e-3
"""Of every norm in the paper's code."""


def _norm(norm: Norm, features: int, *, image: bool) -> nn.Module:
    """A norm with Keras' settings: weight 1, bias 0; BatchNorm's moving average takes 1 % of each new value."""
    if callable(norm):
        return norm(features)
    if norm == "bln":
        return BatchLayerNorm(features, eps=EPS)
    if norm == "bn":
        return (nn.BatchNorm2d if image else nn.BatchNorm1d)(features, eps=EPS, momentum=0.01)
    if norm == "ln":
        return (ChannelLayerNorm if image else nn.LayerNorm)(features, eps=EPS)
    raise ValueError(f"norm must be one of 'bln', 'bn', 'ln', as in the paper, or a callable, got {norm!r}.")


class PaperCNN(nn.Module):
    """A LeNet of tanh units with a norm after each pooling and each hidden dense layer.

        conv 6 5x5 same, tanh, average pool 2, N, conv 16 5x5 valid, tanh, average pool 2, N, flatten (576),
        dense 120, tanh, N, dense 84, tanh, N, dense num_classes

    Convolutions start from Glorot's uniform distribution, dense layers from orthogonal matrices, biases from 0.

    Shapes: (N, 3, 32, 32) to (N, num_classes). The authors standardise images by pixel and channel.

    Args:
        norm: "bln" (default), "bn", "ln", or a callable that takes the number of features.
        num_classes: Default 10.

    Raises:
        ValueError: If ``norm`` is not known.

    Source: the authors' CIFAR-10 notebook.
    """

    def __init__(self, norm: Norm = "bln", num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5, padding=2)
        self.norm1 = _norm(norm, 6, image=True)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.norm2 = _norm(norm, 16, image=True)
        self.fc1 = nn.Linear(576, 120)
        self.norm3 = _norm(norm, 120, image=False)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = _norm(norm, 84, image=False)
        self.fc3 = nn.Linear(84, num_classes)
        self.pool = nn.AvgPool2d(2)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                start = nn.init.xavier_uniform_ if isinstance(module, nn.Conv2d) else nn.init.orthogonal_
                start(module.weight)
                nn.init.zeros_(module.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.norm1(self.pool(torch.tanh(self.conv1(x))))
        x = self.norm2(self.pool(torch.tanh(self.conv2(x))))
        x = self.norm3(torch.tanh(self.fc1(x.flatten(1))))
        x = self.norm4(torch.tanh(self.fc2(x)))
        return self.fc3(x)


for _name in ("bln", "bn", "ln"):
    register(f"paper_cnn_{_name}", partial(PaperCNN, norm=_name))
