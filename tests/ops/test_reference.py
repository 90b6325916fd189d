"""The definition: its closed-form gradients, its statistics, its weights. Its values: test_function.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import Layout
from tolerances import assert_close

from lightning_bln import StatFlags
from lightning_bln.ops import reference
from lightning_bln.ops.reference import Population, Statistics

pytestmark = pytest.mark.usefixtures("_poisoned_memory")


def random_population(x: torch.Tensor, axis: int, per_channel: bool, feature: str) -> Population:
    """Statistics of the shapes that a population may have; ``feature`` is slot, pooled or scalar."""
    positions = [size for d, size in enumerate(x.shape) if d not in (0, axis)]
    batch_shape = [x.shape[axis]] if per_channel else list(x.shape[1:])
    feature_shape = {"slot": [x.shape[0], *positions], "pooled": positions, "scalar": []}[feature]
    factory = {"dtype": reference.accumulation_dtype(x.dtype)}
    return Population(
        torch.randn(batch_shape, **factory),
        torch.rand(batch_shape, **factory) + 0.5,
        torch.randn(feature_shape, **factory),
        torch.rand(feature_shape, **factory) + 0.5,
    )


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_closed_form_gradients_equal_autograds(layout: Layout, statistics: str, affine: bool):
    per_channel = statistics == "per_channel"
    x = layout.input(torch.float64).requires_grad_()
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True) if affine else None
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if affine else None
    grad_y = torch.randn_like(x)
    nominal = torch.tensor(3)
    settings = (nominal, layout.axis, per_channel, 1e-3)
    for flags, feature in zip(StatFlags.all(), itertools.cycle(("slot", "pooled", "scalar"))):
        everything = random_population(x, layout.axis, per_channel, feature)
        population = Population(*(stat if flag else None for stat, flag in zip(everything, flags, strict=True)))
        y, own = reference.normalize(x, weight, bias, population, *settings)
        expected = torch.autograd.grad(y, [x, weight, bias] if affine else [x], grad_y)
        own = Statistics(*(stat.detach() for stat in own))
        actual = reference.gradients(grad_y, x.detach(), weight, own, population, *settings)
        for ours, autograds in zip(actual[: len(expected)], expected, strict=True):
            assert_close(ours, autograds)


def test_only_the_statistics_that_are_needed_are_computed(layout: Layout, statistics: str):
    """A mean is needed for its own sake or as the centre of a mini-batch variance."""
    per_channel = statistics == "per_channel"
    x = layout.input()
    dims = [d for d in range(x.ndim) if d != layout.axis] if per_channel else [0]
    full = [x.mean(dims), x.var(dims, correction=0), x.mean(layout.axis), x.var(layout.axis, correction=0)]
    everything = random_population(x, layout.axis, per_channel, "pooled")
    for flags in StatFlags.all():
        population = Population(*(stat if flag else None for stat, flag in zip(everything, flags, strict=True)))
        used, own = reference.compute_statistics(x, population, layout.axis, per_channel)
        b_mean, b_var, f_mean, f_var = flags
        needed = [not (b_mean and b_var), not b_var, not (f_mean and f_var), not f_var]
        for i, flag in enumerate(flags):
            assert_close(used[i], everything[i] if flag else full[i])
            assert_close(own[i], full[i]) if needed[i] else assert_close(own[i], torch.empty(0))


@pytest.mark.parametrize("batch_size", [None, 0, 1, 2, 25])
def test_mixing_weights(batch_size: int | None):
    like = torch.empty(0, dtype=torch.float64)
    nominal = None if batch_size is None else torch.tensor(batch_size)
    w_f, w_b = reference.mixing_weights(8, nominal, like)
    B = batch_size or 8
    assert_close(torch.stack([w_f, w_b]), torch.tensor([1 / B - 1e-4, 1 - (1 / B + 1e-4)], dtype=torch.float64))


def test_mixing_weights_of_no_samples_are_finite():
    w_f, w_b = reference.mixing_weights(0, None, torch.empty(0))
    assert w_f.isfinite()
    assert w_b.isfinite()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_statistics_are_kept_in_float32_and_for_float64_in_float64(dtype: torch.dtype, kept: torch.dtype):
    assert reference.accumulation_dtype(dtype) == kept
    y, own = reference.normalize(torch.randn(4, 3).to(dtype), None, None, Population(), None, 1, False, 1e-3)
    assert y.dtype == dtype
    assert {stat.dtype for stat in own} == {kept}


@pytest.mark.parametrize("samples", [16, 63, 1000])
@pytest.mark.parametrize("statistics", ["per_position", "per_channel"])
def test_a_large_mean_survives_in_float32_as_in_batch_norm(samples: int, statistics: str):
    per_channel = statistics == "per_channel"
    x = torch.randn(samples, 8, 5, 5) + 1e4
    # With weight sqrt(C) the layer has BatchNorm's scale; BatchNorm1d over (N, C * H * W) has per-position statistics.
    weight = torch.full((8,), 8**0.5)
    flat = x if per_channel else x.flatten(1)
    errors = []
    for apply, value in (
        (lambda v: reference.normalize(v, weight, None, Population(), None, 1, per_channel, 1e-3)[0], x),
        (lambda v: torch.nn.functional.batch_norm(v, None, None, training=True, eps=1e-3), flat),
    ):
        errors.append((apply(value).double() - apply(value.double())).abs().max())
    ours, batch_norms = errors
    assert ours <= 2 * batch_norms
