"""What the zoo's data modules share: data in memory, and a place in an epoch that checkpoints keep."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from zoo.data.loader import BatchSource, ResumableLoader


class InMemoryDataModule(pl.LightningDataModule):
    """A LightningDataModule whose ``setup`` makes ``train``, ``val`` and ``test``, sources of whole batches.

    The order of training depends on the seed of the process (``seed_everything``) and the epoch only, and a run that is
    resumed in the middle of an epoch goes on with the batch that comes next.

    Args:
        batch_size: Of training; a smaller last batch is left out.
        eval_batch_size: Of validation and test.
        num_workers: Processes that make batches; 0: this one.
    """

    mean: Tensor | None = None
    """By which ``setup`` standardised the inputs, and ``std``; None for tokens."""
    std: Tensor | None = None
    train: BatchSource
    val: BatchSource
    test: BatchSource

    def __init__(self, batch_size: int, eval_batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = torch.initial_seed()
        self._train_loader: ResumableLoader | None = None
        self._place: dict[str, int] | None = None

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, of whole batches."""
        self._train_loader = self._loader(self.train, self.batch_size, shuffle=True, drop_last=True)
        if self._place is not None:
            self._train_loader.load_state_dict(self._place)
            self._place = None
        return self._train_loader

    def val_dataloader(self) -> ResumableLoader:
        """In the order of the data."""
        return self._loader(self.val, self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        """In the order of the data."""
        return self._loader(self.test, self.eval_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        """The test data."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch.

        Lightning itself restores a loader's place only if nobody asked for the loader before, as
        ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` does.
        """
        return {} if self._train_loader is None else {"place": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For the loader that training will ask for; Lightning calls this before validation and test too."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._place = state_dict.get("place")

    def input_metadata(self) -> dict[str, Any]:
        """What a model that was trained on these batches takes, for its weights file."""
        raise NotImplementedError

    def _loader(self, data: BatchSource, batch_size: int, **kwargs: Any) -> ResumableLoader:
        trainer = self.trainer
        return ResumableLoader(
            data,
            batch_size=batch_size,  # by name, since Lightning replaces it by name
            seed=self.seed,
            num_workers=self.num_workers,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            **kwargs,
        )
