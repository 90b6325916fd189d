"""Order, resuming and processes of the loader."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from zoo.data.loader import ResumableLoader, Rows, generator_for


def loader(n: int = 23, **kwargs: Any) -> ResumableLoader:
    return ResumableLoader(Rows(torch.arange(n)), 4, **{"shuffle": True, "seed": 5, **kwargs})


def batches(data: ResumableLoader) -> list[list[int]]:
    return [batch[0].tolist() for batch in data]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    one, other = loader(), loader()
    torch.manual_seed(1)
    first = batches(one)
    assert sorted(itertools.chain(*first)) == list(range(23))
    torch.manual_seed(2)
    assert batches(other) == first
    one.epochs.set_epoch(1)
    assert batches(one) != first
    one.epochs.set_epoch(0)
    assert batches(one) == first
    assert batches(loader(seed=6)) != first


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert batches(loader(n=6, shuffle=False)) == [[0, 1, 2, 3], [4, 5]]
    assert batches(loader(n=6, shuffle=False, drop_last=True)) == [[0, 1, 2, 3]]


def test_the_global_generator_is_not_used() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batches(loader())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_within_an_epoch_gives_the_rest_of_it(workers: int) -> None:
    whole = loader(num_workers=workers)
    whole.epochs.set_epoch(3)
    expected = batches(whole)
    part = loader(num_workers=workers)
    part.epochs.set_epoch(3)
    seen = [batch[0].tolist() for batch in itertools.islice(part, 2)]
    state = part.state_dict()
    assert state == {"epoch": 3, "batches": 2, "seed": 5}
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(state)
    resumed.epochs.set_epoch(3)  # as Lightning does after loading
    assert seen + batches(resumed) == expected
    resumed.epochs.set_epoch(4)
    assert len(batches(resumed)) == len(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_may_be_set_after_the_iterator_is_made(workers: int) -> None:
    expected = loader()
    expected.epochs.set_epoch(3)
    data = loader(num_workers=workers)
    iterator = iter(data)
    data.epochs.set_epoch(3)  # Lightning's order
    assert [batch[0].tolist() for batch in iterator] == batches(expected)


def test_a_whole_epoch_is_the_beginning_of_the_next_one() -> None:
    data = loader()
    batches(data)
    assert data.state_dict() == {"epoch": 1, "batches": 0, "seed": 5}


def test_another_epoch_than_the_saved_one_begins_at_its_beginning() -> None:
    data = loader()
    data.load_state_dict({"epoch": 3, "batches": 2, "seed": 5})  # a run with limit_train_batches=2
    data.epochs.set_epoch(4)
    assert sorted(itertools.chain(*batches(data))) == list(range(23))


def test_another_seed_cannot_be_resumed() -> None:
    with pytest.raises(ValueError, match=r"resumed with the seed that it was started with, 7, got 5; call seed_every"):
        loader().load_state_dict({"epoch": 3, "batches": 2, "seed": 7})


def test_processes_share_the_samples() -> None:
    parts = [batches(loader(n=24, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(itertools.chain(*itertools.chain(*parts))) == list(range(24))


def test_generators_are_independent_and_the_same_everywhere() -> None:
    drawn = {torch.rand(1, generator=generator_for(0, a, b)).item() for a in range(10) for b in range(10)}
    assert len(drawn) == 100
    assert generator_for(1, 2, 3).initial_seed() == 16416179746454340671


def test_an_order_that_is_given() -> None:
    data = loader(n=6, shuffle=False, sampler=[5, 3, 1, 0, 2])
    assert batches(data) == [[5, 3, 1, 0], [2]]
    data.load_state_dict({"epoch": 1, "batches": 1, "seed": 5})
    assert batches(data) == [[2]]
    assert batches(data) == [[5, 3, 1, 0], [2]]
    assert len(data) == 2
