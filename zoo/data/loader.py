"""Batches in an order that the seed and the epoch decide, from any of them on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Draw = tuple[int, int]
"""An epoch, and the number of a sample."""


class BatchSource(Protocol):
    """A data set that makes whole batches."""

    def __len__(self) -> int: ...

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        """The batch of these samples, as it is in that epoch."""
        ...


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A generator for what these numbers name; those of as many other numbers are independent of it."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def fixed_order(n: int) -> list[int]:
    """The numbers below n in a random order that is always the same, whatever the seed of a run.

    For splits, and for test data: sorted by class, as folders are, whole batches would be of one class, and statistics
    of the mini-batch those of that class.
    """
    return torch.randperm(n, generator=generator_for(0)).tolist()


class EpochSampler(DistributedSampler[Draw]):
    """`torch.utils.data.DistributedSampler` that yields the epoch with each number, and can start within an epoch.

    The epoch is read when iteration begins, since Lightning sets it after it has made the iterator.
    """

    start = 0
    """Samples of this epoch to leave out: a resumed run has seen them."""
    given: Iterable[int] | None = None
    """Another sampler, whose numbers to yield instead."""

    def set_epoch(self, epoch: int) -> None:
        """Another epoch begins at its first sample."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Draw]:
        start, self.start = self.start, 0
        numbers: Iterable[Any] = super().__iter__() if self.given is None else self.given
        for number in itertools.islice(numbers, start, None):
            yield self.epoch, int(number)

    def __len__(self) -> int:
        return super().__len__() if self.given is None else len(self.given)  # type: ignore[arg-type]


class ResumableLoader(DataLoader[Any]):
    """A `torch.utils.data.DataLoader` whose place in an epoch Lightning saves in checkpoints and restores.

    Lightning makes it anew with another sampler (``overfit_batches``) or batch sampler (``trainer.predict``).

    Args:
        dataset: Makes whole batches by ``__getitems__`` from (epoch, number) pairs.
        batch_size: Samples in a batch, of this process.
        shuffle: A new order each epoch, decided by the seed and the epoch. Default False.
        drop_last: Leave out the last batch where it is smaller. Default False.
        seed: Default 0.
        num_workers: Processes that make batches. Default 0: this one.
        rank: Of this process. Default 0.
        world_size: Number of processes, each of which gets its part. Default 1.
        sampler: Of numbers of samples, instead of the order above. Default None.
        batch_sampler: Of lists of (epoch, number) pairs, instead of all that. Default None.
    """

    def __init__(
        self,
        dataset: BatchSource,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sampler: Iterable[int] | None = None,
        batch_sampler: Any = None,
    ) -> None:
        data: Any = dataset
        seed %= 1 << 32  # DistributedSampler adds the epoch to it
        order: Any
        if batch_sampler is not None:
            order = batch_sampler.sampler
            batches = {"batch_sampler": batch_sampler}
        else:
            order = EpochSampler(data, world_size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
            order.given = sampler
            batches = {"batch_size": batch_size, "sampler": order, "drop_last": drop_last}
        super().__init__(
            data,
            **batches,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            # Workers' seeds must not be drawn from the global generator, which dropout uses.
            generator=torch.Generator().manual_seed(seed),
            persistent_workers=num_workers > 0,
        )
        self.epochs = order
        self._batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # With a batch sampler of its own there is nothing to resume.
        self._batches = 0 if self.batch_size is None else self.epochs.start // self._size
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    @property
    def _size(self) -> int:
        assert self.batch_size is not None
        return self.batch_size

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches were given out; a whole epoch is the next one's beginning."""
        done = self._batches >= len(self)
        return {
            "epoch": self.epochs.epoch + done,
            "batches": 0 if done else self._batches,
            "seed": self.epochs.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there.

        Raises:
            ValueError: If the loader is that of another seed: its order would be another one.
        """
        if state["seed"] != self.epochs.seed:
            raise ValueError(
                f"A run must be resumed with the seed that it was started with, {state['seed']}, got "
                f"{self.epochs.seed}; call seed_everything({state['seed']}) first, or write it into the configuration."
            )
        self.epochs.set_epoch(state["epoch"])
        self.epochs.start = state["batches"] * self._size
        self._batches = state["batches"]


def _as_it_is(batch: Any) -> Any:
    return batch


class Rows(Dataset[Any]):
    """Tensors of samples, as whole batches.

    Args:
        tensors: Each (N, ...).
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, draws: Sequence[Draw]) -> tuple[torch.Tensor, ...]:
        """These samples of each tensor."""
        index = torch.tensor([number for _, number in draws])
        return tuple(tensor[index] for tensor in self.tensors)
