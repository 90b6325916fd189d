"""Small trained networks and data for the tests of tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import BatchLayerNorm, update_statistics


def images(samples: int = 50, batch_size: int = 8, seed: int = 0) -> DataLoader[Any]:
    """Images of 4 classes in an order that stays; the last batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (samples,), generator=generator)
    x = torch.randn(samples, 3, 6, 6, generator=generator) + target.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(x, target), batch_size=batch_size)


def cnn(**arguments: Any) -> nn.Sequential:
    """Two convolutions and a dense layer, each with a `BatchLayerNorm` behind it, with population statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Tanh(),
        BatchLayerNorm(4, **arguments),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace=True),
        BatchLayerNorm(5, **arguments),
        nn.Flatten(),
        nn.Linear(20, 6),
        BatchLayerNorm(6, **arguments),
        nn.Linear(6, 4),
    )
    return with_statistics(model)


def with_statistics(model: nn.Module, **data: Any) -> Any:
    update_statistics(model, (x for x, _ in images(seed=1, **data)))
    return model.eval()


class PreNorm(nn.Module):
    """A block as in transformers: what comes before the norm goes round it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem = nn.Linear(108, 8)
        self.norms = nn.ModuleList(BatchLayerNorm(8) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        for norm, linear in zip(self.norms, self.linears, strict=True):
            y = torch.tanh(linear(norm(h)))
            if self.inplace:
                h += y
            else:
                h = h + y
        return self.head(h)
