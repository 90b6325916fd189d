"""Synchronised statistics: two processes give what one process gives on the concatenated batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import two_processes
from tolerances import SUMMED, assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bln import BatchLayerNorm, batch_layer_norm
from lightning_bln.layer import RUNNING
from lightning_bln.statistics import merge_ranks_

STEPS = 2


@dataclass(frozen=True)
class Case:
    """Samples on each of the two processes, the input's other axes, and the layer."""

    samples: tuple[int, int]
    shape: tuple[int, ...] = (6, 3)
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    keywords: dict[str, Any] = field(default_factory=dict)

    def layer(self, **keywords: Any) -> BatchLayerNorm:
        axis = self.keywords.get("feature_dim", 1)
        features = self.shape[axis - 1] if axis > 0 else self.shape[axis]
        layer = BatchLayerNorm(features, **self.keywords, **keywords)
        if layer.weight is not None:
            with torch.no_grad():
                layer.weight.copy_(torch.linspace(-1, 2, features))
                layer.bias.copy_(torch.linspace(3, 1, features))
        return layer

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Whole batches and gradients of the outputs, the same in every process."""
        generator = torch.Generator().manual_seed(1)
        return [
            tuple(
                (torch.randn(sum(self.samples), *self.shape, generator=generator, dtype=torch.float64) * 2 + step)
                .to(self.dtype)
                .to(memory_format=self.memory_format)
                for _ in range(2)
            )
            for step in range(STEPS)
        ]

    def shard(self, x: Tensor, rank: int) -> Tensor:
        return x[: self.samples[0]] if rank == 0 else x[self.samples[0] :]


CASES = {
    "even": Case((4, 4)),
    "uneven": Case((5, 2)),
    "one sample each": Case((1, 1)),
    "one sample": Case((0, 1)),
    "first shard empty": Case((0, 4)),
    "second shard empty": Case((4, 0)),
    "dense": Case((5, 2), (7,)),
    "channels-last dims": Case((5, 2), (3, 2, 7), keywords={"feature_dim": -1}),
    "channels_last memory": Case((5, 2), (7, 3, 2), memory_format=torch.channels_last),
    "per_channel": Case((5, 2), (7, 3, 2), keywords={"statistics": "per_channel"}),
    "per_channel, empty": Case((0, 4), keywords={"statistics": "per_channel"}),
    "fixed batch size": Case((5, 2), keywords={"batch_size": 25}),
    "no affine": Case((5, 2), keywords={"affine": False}),
    "fp64": Case((5, 2), dtype=torch.float64),
    "bf16": Case((5, 2), dtype=torch.bfloat16),
    "bf16, one sample each": Case((1, 1), dtype=torch.bfloat16, keywords={"affine": False}),
    "bf16, per_channel": Case((5, 2), dtype=torch.bfloat16, keywords={"statistics": "per_channel"}),
    "fp16": Case((5, 2), dtype=torch.float16),
}


def run(case: Case, rank: int | None) -> dict[str, Tensor]:
    """Two training steps of one process of two, or, where rank is None, of one process alone."""
    layer = case.layer(sync=rank is not None)
    results: dict[str, Tensor] = {}
    for step, (x, dy) in enumerate(case.batches()):
        if rank is not None:
            x, dy = case.shard(x, rank), case.shard(dy, rank)
        x = x.detach().requires_grad_()
        y = layer(x)
        names = ["dx", "dweight", "dbias"][: 3 if layer.weight is not None else 1]
        inputs = [x, layer.weight, layer.bias][: len(names)]
        gradients = torch.autograd.grad(y, inputs, dy)
        for name, value in zip(["y", *names], [y, *gradients], strict=True):
            results[f"{name} {step}"] = value.detach()
    merge_ranks_(layer)
    results |= {name: getattr(layer, name) for name in (*RUNNING, "num_samples", "nominal_batch_size")}
    return results


def images(rank: int) -> Tensor:
    """Images of a size that differs between the processes."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4 - 2 * rank, 6, 3 + rank, 3, generator=generator) * (rank + 1) + rank


def all_cases(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {name: run(case, rank) for name, case in CASES.items()}
    layer = BatchLayerNorm(6, statistics="per_channel", sync=True, affine=False)
    results["image sizes"] = {"y": layer(images(rank))}
    merge_ranks_(layer)
    results["image sizes"] |= {name: getattr(layer, name) for name in RUNNING}
    return results


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """All cases in two processes, once: starting them takes longer than the cases."""
    return two_processes(all_cases, tmp_path_factory.mktemp("sync"))


@pytest.mark.parametrize("name", CASES)
class TestEqualsOneProcess:
    def test_outputs_and_input_gradients(self, sharded: list[dict[str, dict[str, Tensor]]], name: str):
        whole = run(CASES[name], None)
        for step in range(STEPS):
            for key in (f"y {step}", f"dx {step}"):
                assert_close(torch.cat([rank[name][key] for rank in sharded]), whole[key])

    def test_parameter_gradients_sum_over_processes(self, sharded: list[dict[str, dict[str, Tensor]]], name: str):
        whole = run(CASES[name], None)
        keys = [key for key in whole if key.startswith(("dweight", "dbias"))]
        assert len(keys) == (0 if CASES[name].keywords.get("affine") is False else 2 * STEPS)
        for key in keys:
            total = sharded[0][name][key] + sharded[1][name][key]
            assert_close(total, whole[key], table=SUMMED)

    def test_population_statistics(self, sharded: list[dict[str, dict[str, Tensor]]], name: str):
        whole = run(CASES[name], None)
        for rank in sharded:
            for key in (*RUNNING, "num_samples", "nominal_batch_size"):
                assert rank[name][key].dtype == whole[key].dtype, key
                if key in RUNNING:
                    assert_close(rank[name][key], whole[key])
                else:
                    assert torch.equal(rank[name][key], whole[key]), key


def test_image_sizes_may_differ_between_processes_per_channel(sharded: list[dict[str, dict[str, Tensor]]]):
    x = [images(rank) for rank in range(2)]
    values = torch.cat([image.movedim(1, -1).reshape(-1, 6) for image in x])
    population = (values.mean(0), values.var(0, correction=0), None, None)
    for rank, results in enumerate(run["image sizes"] for run in sharded):
        keywords = {"training": False, "batch_size": 6, "statistics": "per_channel"}
        assert_close(results["y"], batch_layer_norm(x[rank], population=population, **keywords))
        assert_close(results["running_batch_mean"], values.mean(0))
        assert_close(results["running_batch_var"], values.var(0))
        of_samples = torch.cat([image.mean((1, 2, 3)) for image in x])
        assert_close(results["running_feature_mean"], of_samples.mean())


def test_outputs_have_the_inputs_dtype_and_memory_format(sharded: list[dict[str, dict[str, Tensor]]]):
    for name, case in CASES.items():
        for rank, results in enumerate(sharded):
            x = case.shard(case.batches()[0][0], rank)
            for key in ("y 0", "dx 0"):
                value = results[name][key]
                assert value.dtype == case.dtype
                assert value.stride() == torch.empty_like(x).stride(), (name, rank, key)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype.itemsize == 2])
def test_input_gradients_in_half_precision_are_rounded_once(sharded: list[dict[str, dict[str, Tensor]]], name: str):
    """As near to the exact gradients as one process's, which computes in float32 and rounds at the end."""
    case = CASES[name]
    layer, whole = case.layer().double(), run(case, None)
    for step, (x, dy) in enumerate(case.batches()):
        x = x.double().requires_grad_()
        (exact,) = torch.autograd.grad(layer(x), x, dy.double())
        ours = torch.cat([rank[name][f"dx {step}"] for rank in sharded])
        errors = [(value.double() - exact).abs().max() for value in (ours, whole[f"dx {step}"])]
        assert errors[0] <= 1.01 * errors[1]


def empty_first_shard_under_ddp(rank: int) -> dict[str, Tensor]:
    case = Case((4, 4))
    model = DistributedDataParallel(nn.Sequential(case.layer(sync=True)))
    (first, _), (second, _) = case.batches()
    model(first[:4] if rank == 0 else first[:0]).sum().backward()
    model(case.shard(second, rank)).sum().backward()
    merge_ranks_(model)
    return {name: getattr(model.module[0], name) for name in (*RUNNING, "num_samples")}


def test_a_first_shard_may_be_empty_under_ddp(tmp_path):
    """DDP broadcasts buffers, so they must have one shape everywhere, also where there was nothing to record."""
    case = Case((4, 4))
    (first, _), (second, _) = case.batches()
    layer = case.layer()
    layer(first[:4])
    layer(second)
    for results in two_processes(empty_first_shard_under_ddp, tmp_path):
        for name, value in results.items():
            assert_close(value.float(), getattr(layer, name).float())
