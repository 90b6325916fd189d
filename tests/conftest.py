"""What several test modules share: seeds, poisoned memory, the layouts of an input, two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

# A fixture for tests in several folders. No second conftest.py: two modules of one name hide each other from spawned
# processes, which look for the functions of this one.
from tests.tuning.postgres import postgres as postgres

SIZES = {"N": 5, "C": 7, "T": 4, "D": 2, "H": 3, "W": 2}


@dataclass(frozen=True)
class Layout:
    """Where samples, features and positions lie in an input: the axes in order, and the memory format."""

    axes: str
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def feature_dim(self) -> int:
        """As a user writes it: -1 for channels-last."""
        return -1 if self.axes.endswith("C") and len(self.axes) > 2 else self.axes.index("C")

    @property
    def axis(self) -> int:
        return self.axes.index("C")

    @property
    def has_positions(self) -> bool:
        return len(self.axes) > 2

    def shape(self, **sizes: int) -> tuple[int, ...]:
        return tuple((SIZES | sizes)[axis] for axis in self.axes)

    def input(self, dtype: torch.dtype = torch.float32, **sizes: int) -> Tensor:
        """A random input; sizes by axis letter replace the usual ones."""
        return (torch.randn(self.shape(**sizes), dtype=dtype) * 2 + 1).to(memory_format=self.memory_format)

    def __str__(self) -> str:
        return self.axes + ("" if self.memory_format is torch.contiguous_format else "-channels_last_memory")


LAYOUTS = (
    Layout("NC"),
    Layout("NTC"),
    Layout("NCT"),
    Layout("NCHW"),
    Layout("NCHW", torch.channels_last),
    Layout("NHWC"),
    Layout("NHCW"),
    Layout("NCDHW"),
    Layout("NCDHW", torch.channels_last_3d),
)


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request: pytest.FixtureRequest) -> Layout:
    """Each layout in turn: dense, sequences, images, volumes, the features first, last and in the middle."""
    return request.param


@pytest.fixture(params=("per_position", "per_channel"))
def statistics(request: pytest.FixtureRequest) -> str:
    """Each way of taking batch statistics in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _poisoned_memory():
    """Every `torch.empty` holds NaN, so that a value that is read before it is written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(enabled)


def _process(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()  # neither leaves while the other needs it
    # Tearing gloo down under DDP aborts now and then on a busy machine ("terminate called without an active
    # exception"), after all work is done.
    os._exit(0)


def two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)``, a function at the top of its module, returns in each of two processes joined by gloo."""
    torch.multiprocessing.spawn(_process, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
