"""Epochs, recomputed statistics, and the merge over processes of a DDP model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import two_processes
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bln import BatchLayerNorm, start_epoch, update_statistics
from lightning_bln.layer import RUNNING
from lightning_bln.statistics import merge_ranks_

KEPT = (*RUNNING, "num_samples", "nominal_batch_size")


def network(**keywords: Any) -> nn.Sequential:
    """Two layers, so that the second one's input depends on the first one's output."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(BatchLayerNorm(6, **keywords), nn.Linear(6, 4), BatchLayerNorm(4, **keywords))
    for parameter in model[1].parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def snapshot(model: nn.Module) -> list[dict[str, Tensor]]:
    """Statistics of each layer."""
    layers = [module for module in model.modules() if isinstance(module, BatchLayerNorm)]
    return [{name: getattr(layer, name).clone() for name in KEPT} for layer in layers]


def assert_same(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], *, exact: bool = False) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        for name in KEPT:
            if exact or name not in RUNNING:
                assert torch.equal(ours[name], theirs[name]), name
            else:
                assert_close(ours[name], theirs[name])


def trained(batches: Iterable[Tensor], **keywords: Any) -> nn.Sequential:
    model = network(**keywords)
    for x in batches:
        model(x)
    return model


class TestStartEpoch:
    def test_returns_whether_any_layer_begins(self):
        model = network()
        assert start_epoch(model, 0)
        assert not start_epoch(model, 0)
        model[0].start_epoch(1)
        assert start_epoch(model, 1)
        assert not start_epoch(model, 1)
        assert start_epoch(model)

    def test_keeps_the_statistics_until_the_next_batch(self):
        a, b = torch.randn(2, 8, 6)
        model = trained([a])
        before = snapshot(model)
        start_epoch(model)
        for now, was in zip(snapshot(model), before, strict=True):
            assert all(torch.equal(now[name], was[name]) for name in (*RUNNING, "nominal_batch_size"))
        model(b)
        assert_same(snapshot(model), snapshot(trained([b])), exact=True)

    @pytest.mark.parametrize(
        ("call", "name"),
        [(start_epoch, "start_epoch"), (lambda model: update_statistics(model, []), "update_statistics")],
        ids=["start_epoch", "update_statistics"],
    )
    def test_a_model_without_layers_is_an_error(self, call, name: str):
        with pytest.raises(
            ValueError, match=rf"{name}\(.*needs a model with BatchLayerNorm layers, got a Linear .*swap"
        ):
            call(nn.Linear(2, 2))


class TestUpdateStatistics:
    @pytest.mark.parametrize("population", ["epoch", "ema", "precise"])
    def test_equals_the_average_over_the_batches_whatever_was_there(self, population: str):
        batches = [torch.randn(n, 6) for n in (8, 8, 3)]
        model = trained([torch.randn(50, 6) * 9], population=population)
        assert update_statistics(model, batches) == 3
        assert_same(snapshot(model), snapshot(trained(batches)), exact=True)
        assert model[0].num_samples == 19
        assert model[0].nominal_batch_size == 8

    @pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: [x, None], lambda x: x], ids=["tuple", "list", "x"])
    def test_takes_the_first_item_of_a_batch(self, wrap):
        batches = [torch.randn(4, 6) for _ in range(2)]
        model = network()
        update_statistics(model, (wrap(x) for x in batches), device="cpu")
        assert_same(snapshot(model), snapshot(trained(batches)), exact=True)

    def test_forward_calls_the_model_as_it_needs(self):
        batches = [{"image": torch.randn(4, 6)} for _ in range(2)]
        model = network()
        update_statistics(model, batches, forward=lambda batch: model(batch["image"]))
        assert_same(snapshot(model), snapshot(trained([batch["image"] for batch in batches])), exact=True)

    @pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
    def test_leaves_everything_else_as_it_was(self, fails: bool):
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), *trained([torch.randn(4, 6)])).eval()
        model[3].train()
        start_epoch(model, 3)
        modes = [module.training for module in model.modules()]
        population = snapshot(model)
        before = copy.deepcopy(model.state_dict())
        random_state = torch.get_rng_state()

        def batches() -> Iterable[Tensor]:
            yield torch.ones(4, 6)
            yield torch.zeros(4, 6)
            if fails:
                raise RuntimeError("no more data")

        if fails:
            with pytest.raises(RuntimeError, match="no more data"):
                update_statistics(model, batches())
            assert_same(snapshot(model), population, exact=True)
        else:
            update_statistics(model, batches())
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random_state)
        own = {f"{i}.{name}" for i in (2, 4) for name in KEPT}
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor) and name not in own:
                assert torch.equal(value, before[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not start_epoch(model, 3)
        # An "epoch" layer in train mode accumulates as before, a "precise" one would not: the switch is off again.
        assert not any(module._refreshing for module in model.modules() if isinstance(module, BatchLayerNorm))

    def test_without_batches_nothing_changes(self):
        model = trained([torch.randn(4, 6)])
        before = snapshot(model)
        assert update_statistics(model, []) == 0
        assert_same(snapshot(model), before, exact=True)
        fresh = network()
        update_statistics(fresh, [])
        assert not fresh[0].has_population

    def test_precise_layers_do_not_accumulate_afterwards(self):
        model = network(population="precise")
        x = torch.randn(4, 6)
        update_statistics(model, [x])
        before = snapshot(model)
        model(x * 3)
        assert_same(snapshot(model), before, exact=True)

    def test_merging_one_process_does_nothing(self):
        model = trained([torch.randn(4, 6)])
        before = snapshot(model)
        merge_ranks_(model)
        assert_same(snapshot(model), before, exact=True)


# Micro-batches of two processes: sizes differ between them and between steps.
SIZES = ((4, 2), (4, 5), (3, 1), (1, 6))


def micro_batches(seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(size, 6, generator=generator) * 3 + step + rank for rank, size in enumerate(sizes))
        for step, sizes in enumerate(SIZES)
    ]


def everything(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [x for pair in batches for x in pair]


def steps(model: nn.Module, batches: list[tuple[Tensor, Tensor]], rank: int) -> None:
    for pair in batches:
        model(pair[rank]).sum().backward()


def partial_epoch() -> dict[str, Any]:
    """The state of one process that saw the first two steps of all processes' micro-batches."""
    return trained(everything(micro_batches()[:2])).state_dict()


def several_runs(loaded: dict[str, Any], rank: int) -> dict[str, Any]:
    """Every run of the tests below in one pair of processes."""
    batches = micro_batches()
    results: dict[str, Any] = {}

    for population in ("epoch", "ema"):
        model = DistributedDataParallel(network(population=population))
        steps(model, batches, rank)
        merge_ranks_(model)
        results[population] = snapshot(model)
    model = DistributedDataParallel(network())
    steps(model, batches, rank)
    merge_ranks_(model)
    start_epoch(model, 1)
    steps(model, batches[2:], rank)
    merge_ranks_(model)
    results["second epoch"] = snapshot(model)

    model = DistributedDataParallel(network())
    steps(model, batches[:2], rank)
    merge_ranks_(model)
    results["middle"] = snapshot(model)
    # A validation in the middle: DDP broadcasts process 0's buffers there too.
    model.eval()
    model(batches[0][rank])
    model.train()
    steps(model, batches[2:], rank)
    merge_ranks_(model)
    results["end"] = snapshot(model)
    merge_ranks_(model)
    results["end, merged twice"] = snapshot(model)

    model = DistributedDataParallel(network())
    steps(model, batches[:2], rank)
    model.eval()
    model(batches[0][rank])
    results["overwritten"] = snapshot(model)
    model.train()
    steps(model, batches[2:], rank)
    merge_ranks_(model)
    results["unmerged middle"] = snapshot(model)

    for name, early in (("resumed", False), ("resumed, merged first", True)):
        model = network()
        model.load_state_dict(loaded)
        model = DistributedDataParallel(model)
        if early:
            merge_ranks_(model)
            results["loaded and merged"] = snapshot(model)
        steps(model, batches[2:], rank)
        merge_ranks_(model)
        results[name] = snapshot(model)

    # Without DDP the processes may have different numbers of batches.
    model = network()
    for pair in batches[: 3 if rank == 0 else 1]:
        model(pair[rank])
    merge_ranks_(model)
    results["3 and 1 batches"] = snapshot(model)
    model = network()
    if rank == 1:
        model(batches[0][1])
    merge_ranks_(model)
    results["0 and 1 batches"] = snapshot(model)
    model = network()
    merge_ranks_(model)
    results["no batches"] = snapshot(model)

    model = trained([batches[3][rank]])
    update_statistics(model, [pair[rank] for pair in batches[:3]])
    results["update"] = snapshot(model)
    model = trained([batches[3][rank]])
    merge_ranks_(model)
    update_statistics(model, [pair[0] for pair in batches[:3]] if rank == 0 else [])
    results["update, one without batches"] = snapshot(model)

    generator = torch.Generator().manual_seed(rank)
    image = torch.randn(4, 6, 3 + rank, 3, generator=generator)
    layer = BatchLayerNorm(6, statistics="per_channel")
    layer(image)
    merge_ranks_(layer)
    results["image sizes, per_channel"] = snapshot(layer)
    layer = BatchLayerNorm(6)
    layer(image)
    try:
        merge_ranks_(layer)
    except ValueError as error:
        results["image sizes, per_position"] = str(error)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes return, once for the module: starting them takes longer than the runs."""
    return two_processes(partial(several_runs, partial_epoch()), tmp_path_factory.mktemp("ddp"))


class TestTwoProcesses:
    """The population equals that of one process that sees all micro-batches, although DDP broadcasts buffers."""

    def test_broadcasting_really_overwrites_the_buffers(self, runs: list[dict[str, Any]]):
        first, second = (run["overwritten"] for run in runs)
        assert_same(second, first, exact=True)
        assert_same(first, snapshot(trained([pair[0] for pair in micro_batches()[:2]])), exact=True)

    @pytest.mark.parametrize(
        ("run", "steps_seen"),
        [
            ("epoch", [0, 1, 2, 3]),
            ("second epoch", [2, 3]),
            ("middle", [0, 1]),
            ("end", [0, 1, 2, 3]),
            ("end, merged twice", [0, 1, 2, 3]),
            ("unmerged middle", [0, 1, 2, 3]),
            ("update", [0, 1, 2]),
            # A partial epoch that every process loaded counts once.
            ("resumed", [0, 1, 2, 3]),
            ("loaded and merged", [0, 1]),
            ("resumed, merged first", [0, 1, 2, 3]),
        ],
    )
    def test_equals_one_process(self, runs: list[dict[str, Any]], run: str, steps_seen: list[int]):
        batches = micro_batches()
        expected = snapshot(trained(everything([batches[step] for step in steps_seen])))
        for results in runs:
            assert_same(results[run], expected)

    def test_every_process_has_the_same_to_the_bit(self, runs: list[dict[str, Any]]):
        for run in ("epoch", "ema", "second epoch", "middle", "end", "update"):
            assert_same(runs[0][run], runs[1][run], exact=True)

    def test_moving_averages_are_weighted_by_samples(self, runs: list[dict[str, Any]]):
        batches = micro_batches()
        models = [snapshot(trained([pair[rank] for pair in batches], population="ema")) for rank in range(2)]
        for layer, expected in enumerate(zip(*models, strict=True)):
            total = sum(stats["num_samples"] for stats in expected)
            for name in RUNNING:
                average = sum(stats[name] * stats["num_samples"] for stats in expected) / total
                assert_close(runs[0]["ema"][layer][name], average)

    @pytest.mark.parametrize(
        ("run", "seen"),
        [
            ("3 and 1 batches", [(0, 0), (1, 0), (2, 0), (0, 1)]),
            ("0 and 1 batches", [(0, 1)]),
            ("update, one without batches", [(0, 0), (1, 0), (2, 0)]),
        ],
    )
    def test_processes_may_have_different_numbers_of_batches(
        self, runs: list[dict[str, Any]], run: str, seen: list[tuple[int, int]]
    ):
        batches = micro_batches()
        expected = snapshot(trained(batches[step][rank] for step, rank in seen))
        for results in runs:
            assert_same(results[run], expected)

    def test_without_any_batch_there_is_no_population(self, runs: list[dict[str, Any]]):
        for results in runs:
            assert all(stats[name].shape == (0,) for stats in results["no batches"] for name in RUNNING)

    def test_image_sizes_may_differ_per_channel_only(self, runs: list[dict[str, Any]]):
        layer = BatchLayerNorm(6, statistics="per_channel")
        for rank in range(2):
            layer(torch.randn(4, 6, 3 + rank, 3, generator=torch.Generator().manual_seed(rank)))
        for results in runs:
            assert_same(results["image sizes, per_channel"], snapshot(layer))
            text = results["image sizes, per_position"]
            assert "merged only if every process saw inputs of the same sizes" in text
            assert "(6, 3, 3), (6, 4, 3)" in text
            assert "statistics='per_channel'" in text
