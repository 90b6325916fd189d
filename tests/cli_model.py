"""What a user of the command line has in a file: a LightningModule and its data. The tests copy it to my_model.py."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def images(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (samples,), generator=generator)
    return TensorDataset(torch.randn(samples, 1, 8, 8, generator=generator) + target.view(-1, 1, 1, 1), target)


class Data(pl.LightningDataModule):
    def __init__(self, samples: int = 48, batch_size: int = 8) -> None:
        super().__init__()
        self.samples = samples
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images(self.samples, 0), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images(self.samples, 1), batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.val_dataloader()


class LitModel(pl.LightningModule):
    """A small classifier.

    Args:
        width: Channels of the convolution.
    """

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36 * width, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 4),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        output = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(output, batch[1]))
        self.log("val_acc", (output.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class WithData(LitModel):
    """Has its own loaders, and builds a layer late."""

    def configure_model(self) -> None:
        if len(self.net) == 7:
            self.net.append(nn.BatchNorm1d(4))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return Data().train_dataloader()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return Data().val_dataloader()


class BuiltInSetup(LitModel):
    """Builds a layer in setup."""

    def setup(self, stage: str) -> None:
        if len(self.net) == 7:
            self.net.append(nn.BatchNorm1d(4))


class Broken(LitModel):
    """Fails in the middle of its own code."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raise ValueError("a mistake in the user's own code")


class Endless(LitModel):
    """Validates until it is stopped, and says when it has begun."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        import pathlib
        import time

        super().validation_step(batch, batch_idx)
        pathlib.Path("begun").touch()
        time.sleep(1)
