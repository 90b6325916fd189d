"""A small LightningModule, data and Trainer for the tests that run a real training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES, BATCH = 50, 8


def dataset(samples: int = SAMPLES, seed: int = 0) -> TensorDataset:
    """Images whose class shows in their mean, so that a loss falls within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (samples,), generator=generator)
    images = torch.randn(samples, 1, 8, 8, generator=generator) + target.view(-1, 1, 1, 1)
    return TensorDataset(images, target)


def loader(samples: int = SAMPLES, batch_size: int = BATCH, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(dataset(samples, seed), batch_size=batch_size)


class StatefulLoader:
    """Batches in an order that depends on the epoch, and that goes on where it was interrupted."""

    def __init__(self) -> None:
        self.data = dataset()
        self.epoch = 0
        self.done = 0
        self.sampler = self  # Lightning tells a loader's sampler the epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.data) // BATCH)

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        batches = order.split(BATCH)
        for batch in batches[self.done :]:
            self.done += 1
            if self.done == len(batches):
                self.done = 0
            yield list(self.data[batch])

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class LitNet(pl.LightningModule):
    """Convolution, BatchNorm, linear layer, LayerNorm; ``late`` builds one more norm in that hook."""

    def __init__(self, late: str | None = None, learning_rate: float = 0.05, first: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("late", "learning_rate")
        self.learning_rate = learning_rate
        norm = nn.BatchNorm2d(4) if first is None else first
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        )
        self.late = late

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")

    def _build(self, hook: str) -> None:
        if self.late == hook and not hasattr(self, "last"):
            self.last = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return self.last(y) if hasattr(self, "last") else y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def trainer(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU; no checkpoints unless asked for."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | kwargs))
