"""`batch_layer_norm`: its values against a second implementation in numpy, its properties, its errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import Layout
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import random_population
from tolerances import SUMMED, assert_close
from torch import Tensor

from lightning_bln import StatFlags, batch_layer_norm
from lightning_bln.ops import reference
from lightning_bln.ops.reference import Population

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def oracle(x, weight, bias, axis, *, per_channel=False, flags="FFFF", population=None, batch_size=None, eps=1e-3):
    """The formulas in float64, one scalar at a time: tensors in, array of x's shape out."""
    x = np.moveaxis(x.detach().double().numpy(), axis, -1)
    shape = x.shape
    x = x.reshape(shape[0], -1, shape[-1])
    N, P, C = x.shape
    weight, bias = (None if v is None else v.detach().double().numpy() for v in (weight, bias))
    B = batch_size or N
    w_f, w_b = 1 / B - 1e-4, 1 - (1 / B + 1e-4)
    own = np.empty((P, C)), np.empty((P, C)), np.empty((N, P)), np.empty((N, P))
    for c in range(C):
        for p in range(P):
            values = x[:, :, c].ravel() if per_channel else x[:, p, c]
            own[0][p, c] = sum(values) / len(values)
            own[1][p, c] = sum((value - own[0][p, c]) ** 2 for value in values) / len(values)
    for n in range(N):
        for p in range(P):
            own[2][n, p] = sum(x[n, p]) / C
            own[3][n, p] = sum((value - own[2][n, p]) ** 2 for value in x[n, p]) / C
    used = list(own)
    for i, flag in enumerate(StatFlags.parse(flags)):
        if flag and population is not None and population[i] is not None:
            stat = population[i].double().numpy()
            if i < 2:
                stat = stat if stat.ndim == 1 else np.moveaxis(stat, axis - 1, -1).reshape(P, C)
                used[i] = np.broadcast_to(stat, (P, C))
            else:
                used[i] = np.broadcast_to(stat if stat.ndim == 0 else stat.reshape(-1, P), (N, P))
    y = np.empty_like(x)
    for n in range(N):
        for p in range(P):
            for c in range(C):
                x_b = (x[n, p, c] - used[0][p, c]) / math.sqrt(used[1][p, c] + eps)
                x_f = (x[n, p, c] - used[2][n, p]) / math.sqrt(used[3][n, p] + eps)
                y[n, p, c] = (w_f * x_f + w_b * x_b) / math.sqrt(C)
                y[n, p, c] = y[n, p, c] * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
    return np.moveaxis(y.reshape(shape), -1, axis)


@pytest.mark.usefixtures("_poisoned_memory")
class TestValues:
    @pytest.mark.parametrize("batch_size", [None, 1, 25])
    def test_training(self, layout: Layout, statistics: str, batch_size: int | None):
        x = layout.input(torch.float64)
        weight, bias = torch.randn(2, 7, dtype=torch.float64)
        y = batch_layer_norm(
            x, weight, bias, feature_dim=layout.feature_dim, statistics=statistics, batch_size=batch_size
        )
        per_channel = statistics == "per_channel"
        assert_close(y, oracle(x, weight, bias, layout.axis, per_channel=per_channel, batch_size=batch_size))

    @pytest.mark.parametrize("feature", ["slot", "pooled", "scalar"])
    def test_inference_under_all_flags(self, layout: Layout, statistics: str, feature: str):
        x = layout.input(torch.float64, N=3, C=4, D=1)
        population = random_population(x, layout.axis, statistics == "per_channel", feature)
        for flags in StatFlags.all():
            y = batch_layer_norm(
                x,
                feature_dim=layout.feature_dim,
                flags=flags,
                population=population,
                training=False,
                batch_size=25,
                statistics=statistics,
            )
            expected = oracle(
                x,
                None,
                None,
                layout.axis,
                per_channel=statistics == "per_channel",
                flags=flags,
                population=population,
                batch_size=25,
            )
            assert_close(y, expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("N", [1, 2, 50, 63])
    @pytest.mark.parametrize("C", [1, 50, 63])
    def test_odd_sizes_in_every_dtype(self, N: int, C: int, dtype: torch.dtype):
        x = (torch.randn(N, C, 3, dtype=torch.float64) * 3 - 1).to(dtype)
        weight, bias = torch.randn(2, C)
        y = batch_layer_norm(x, weight, bias)
        assert y.dtype == dtype
        assert_close(y, oracle(x, weight, bias, 1), dtype=dtype)

    @pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
    def test_gradients_in_half_precision(self, statistics: str, dtype: torch.dtype):
        x = torch.randn(8, 5, 6).to(dtype)
        grad_y = torch.randn(8, 5, 6).to(dtype)
        weight, bias = torch.randn(2, 5)
        results = []
        for cast in (torch.Tensor.clone, torch.Tensor.double):
            inputs = [cast(t).requires_grad_() for t in (x, weight, bias)]
            results.append(torch.autograd.grad(batch_layer_norm(*inputs, statistics=statistics), inputs, cast(grad_y)))
        ours, exact = results
        assert [grad.dtype for grad in ours] == [dtype, torch.float32, torch.float32]
        assert_close(ours[0], exact[0], dtype=dtype)
        for got, expected in zip(ours[1:], exact[1:], strict=True):
            assert_close(got, expected, dtype=torch.float32, table=SUMMED)

    def test_one_value_for_each_feature_holds_at_every_position(self):
        """A population carried over from a BatchNorm: (C,) statistics in per-position mode."""
        x = torch.randn(4, 3, 5)
        per_channel = random_population(x, 1, True, "pooled")
        settings_ = {"training": False, "flags": "TTTT"}
        y = batch_layer_norm(x, population=per_channel, **settings_)
        wide = (*(stat.unsqueeze(1).expand(3, 5) for stat in per_channel[:2]), *per_channel[2:])
        assert_close(y, batch_layer_norm(x, population=wide, **settings_))

    @pytest.mark.parametrize("absent", range(4))
    def test_an_absent_statistic_is_the_mini_batchs(self, absent: int):
        x = torch.randn(4, 3, 5)
        population = list(random_population(x, 1, False, "pooled"))
        code = "".join("F" if i == absent else "T" for i in range(4))
        expected = batch_layer_norm(x, flags=code, population=population, training=False)
        population[absent] = None
        assert torch.equal(batch_layer_norm(x, flags="TTTT", population=population, training=False), expected)

    def test_flags_act_at_inference_only(self):
        x = torch.randn(4, 3)
        population = random_population(x, 1, False, "pooled")
        training = batch_layer_norm(x, flags="TTTT", population=population, training=True)
        assert torch.equal(training, batch_layer_norm(x, flags="FFFF", population=population, training=False))
        default = batch_layer_norm(x, population=population, training=False)
        assert torch.equal(default, batch_layer_norm(x, flags="TTFF", population=population, training=False))
        assert not torch.equal(default, training)

    def test_returned_statistics_are_biased(self):
        x = torch.randn(4, 3, 5)
        _, own = batch_layer_norm(x, return_statistics=True)
        assert_close(own.batch_var, x.var(0, correction=0))
        assert_close(own.feature_var, x.var(1, correction=0))
        _, own = batch_layer_norm(x, return_statistics=True, statistics="per_channel")
        assert_close(own.batch_var, x.var((0, 2), correction=0))
        assert own.feature_mean.shape == (4, 5)

    def test_eps_sits_inside_the_root(self):
        x = torch.tensor([[3.0], [5.0]])
        y = batch_layer_norm(x, eps=3.0, batch_size=10_000)
        assert_close(y, torch.tensor([[-0.5], [0.5]]) * (1 - 2e-4))


@pytest.mark.usefixtures("_poisoned_memory")
class TestInputs:
    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (4, 3, 0, 2), (0, 3, 0)], ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_empty_input_gives_empty_output(self, shape: tuple[int, ...], statistics: str, training: bool):
        weight = torch.ones(3)
        y = batch_layer_norm(torch.randn(shape), weight, weight, training=training, statistics=statistics)
        assert y.shape == shape

    @pytest.mark.parametrize("shape", [(1, 3), (1, 1), (4, 1), (1, 3, 5), (1, 1, 1)], ids=str)
    def test_one_sample_or_one_feature_is_finite(self, shape: tuple[int, ...], statistics: str):
        assert batch_layer_norm(torch.randn(shape), statistics=statistics).isfinite().all()

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[::2],
            lambda x: x[:, ::2, 1:],
            lambda x: x.transpose(0, 2),
            lambda x: x[:1].expand(5, -1, -1),
            lambda x: x[:, :, :1].expand(-1, -1, 4),
            lambda x: x.mT,
        ],
        ids=["samples", "sliced", "transposed", "expanded samples", "expanded positions", "swapped"],
    )
    def test_strides_do_not_matter(self, view, statistics: str):
        x = view(torch.randn(6, 8, 5))
        expected = batch_layer_norm(x.contiguous(), statistics=statistics)
        assert_close(batch_layer_norm(x, statistics=statistics), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_autocast_keeps_the_inputs_dtype_and_memory_format(self, dtype: torch.dtype):
        x = torch.randn(4, 3, 5, 6).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        weight, bias = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        expected = batch_layer_norm(x, weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            y = batch_layer_norm(x, weight, bias)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, torch.float32, torch.float32)

    @pytest.mark.parametrize("batch_size", [7, torch.tensor(7)], ids=["int", "tensor"])
    def test_batch_size_is_a_number_or_a_tensor(self, batch_size):
        x = torch.randn(4, 3)
        assert_close(batch_layer_norm(x, batch_size=batch_size), oracle(x, None, None, 1, batch_size=7), torch.float32)

    @pytest.mark.parametrize(
        ("x", "keywords", "error", "text"),
        [
            (torch.ones(4, 3, dtype=torch.int64), {}, TypeError, r"floating-point input, got torch.int64; .*x.float"),
            (torch.ones(4, 3, dtype=torch.complex64), {}, TypeError, "real floating-point input, got torch.complex64"),
            (torch.ones(4), {}, ValueError, r"sample axis \(0\) and a feature axis, got .* \(4,\); .*x.unsqueeze\(0\)"),
            (
                torch.ones(4, 3),
                {"feature_dim": 0},
                ValueError,
                r"other than the sample axis, got feature_dim=0 .*use 1",
            ),
            (torch.ones(4, 3), {"feature_dim": 2}, ValueError, r"got feature_dim=2 for an input of shape \(4, 3\)"),
            (torch.ones(4, 3), {"feature_dim": -2}, ValueError, "got feature_dim=-2"),
            (
                torch.ones(4, 3),
                {"weight": torch.ones(4)},
                ValueError,
                r"weight must hold .* 3 .*got shape \(4,\); pass",
            ),
            (torch.ones(4, 3), {"bias": torch.ones(1, 3)}, ValueError, r"bias must hold .* got shape \(1, 3\)"),
            (torch.ones(4, 3), {"statistics": "batch"}, ValueError, "'per_position' or 'per_channel', got 'batch'"),
            (torch.ones(4, 3), {"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
            (torch.ones(4, 3), {"batch_size": 0}, ValueError, "batch_size must be at least 1 or None .* got 0"),
            (torch.ones(4, 3), {"flags": "TX", "population": [None] * 4, "training": False}, ValueError, "got 'TX'"),
        ],
    )
    def test_errors_say_what_is_needed(self, x: Tensor, keywords: dict, error: type[Exception], text: str):
        with pytest.raises(error, match=text):
            batch_layer_norm(x, **keywords)

    def test_no_feature_is_an_error_that_says_so(self):
        with pytest.raises(ValueError, match="feature"):
            batch_layer_norm(torch.ones(4, 0))

    @pytest.mark.parametrize(
        ("index", "shape", "text"),
        [
            (0, (3, 4), r"batch_mean has shape \(3, 4\), but the input of shape \(4, 3, 5\).*needs \(3, 5\) or \(3,\)"),
            (1, (5,), r"batch_var has shape \(5,\).*needs \(3, 5\) or \(3,\)"),
            (2, (3,), r"feature_mean has shape \(3,\).*needs \(5,\) or \(4, 5\) or \(\)"),
            (3, (2, 5), r"feature_var has shape \(2, 5\).*statistics='per_channel'.*flags 'FFFF'"),
        ],
    )
    def test_a_population_of_another_size_is_an_error(self, index: int, shape: tuple[int, ...], text: str):
        population: list[Tensor | None] = [None] * 4
        population[index] = torch.ones(shape)
        with pytest.raises(ValueError, match=text):
            batch_layer_norm(torch.randn(4, 3, 5), population=population, flags="TTTT", training=False)
        # A statistic whose flag is off is not looked at.
        batch_layer_norm(torch.randn(4, 3, 5), population=population, flags="FFFF", training=False)


# A shape (N, C, P) and a seed say everything about a random input; shrinking then finds the smallest shape that fails.
sizes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4))
seeds = st.integers(0, 2**31)
modes = st.sampled_from(["per_position", "per_channel"])
quick = settings(deadline=None, max_examples=30)
TINY_EPS = 1e-20


def random_input(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 2


def normalised_parts(x: Tensor, statistics: str) -> tuple[Tensor, Tensor]:
    """x_b and x_f, taken apart by two values of B: y * sqrt(C) = (1/B - d) * x_f + (1 - 1/B - d) * x_b."""
    at_one, at_two = (
        batch_layer_norm(x, batch_size=B, eps=TINY_EPS, statistics=statistics) * math.sqrt(x.shape[1]) for B in (1, 2)
    )
    weights = torch.tensor([[1 - 1e-4, -1e-4], [0.5 - 1e-4, 0.5 - 1e-4]], dtype=torch.float64)
    x_f, x_b = torch.linalg.solve(weights, torch.stack([at_one.flatten(), at_two.flatten()])).reshape(2, *x.shape)
    return x_b, x_f


class TestProperties:
    @quick
    @given(shape=sizes, seed=seeds, statistics=modes)
    def test_normalised_parts_have_mean_0_and_variance_1(self, shape, seed, statistics):
        x_b, x_f = normalised_parts(random_input(shape, seed), statistics)
        over = [0, 2] if statistics == "per_channel" else [0]
        for part, dims in ((x_b, over), (x_f, [1])):
            var, mean = torch.var_mean(part, dims, correction=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
            torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=1e-9)

    @quick
    @given(shape=sizes, seed=seeds, statistics=modes)
    def test_permuting_samples_permutes_outputs(self, shape, seed, statistics):
        x = random_input(shape, seed)
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
        y = batch_layer_norm(x, statistics=statistics)
        assert_close(batch_layer_norm(x[order], statistics=statistics), y[order])

    @quick
    @given(shape=sizes, seed=seeds, statistics=modes)
    def test_permuting_features_and_positions_permutes_outputs(self, shape, seed, statistics):
        x = random_input(shape, seed)
        generator = torch.Generator().manual_seed(seed)
        features, positions = (torch.randperm(size, generator=generator) for size in shape[1:])
        weight = random_input((shape[1],), seed)
        y = batch_layer_norm(x, weight, statistics=statistics)
        permuted = batch_layer_norm(x[:, features][:, :, positions], weight[features], statistics=statistics)
        assert_close(permuted, y[:, features][:, :, positions])

    @quick
    @given(shape=sizes, seed=seeds, statistics=modes, shift=st.floats(-50, 50), scale=st.floats(0.1, 50))
    def test_a_common_shift_and_scale_change_nothing(self, shape, seed, statistics, shift, scale):
        x = random_input(shape, seed)
        y = batch_layer_norm(x, eps=TINY_EPS, statistics=statistics)
        moved = batch_layer_norm(x * scale + shift, eps=TINY_EPS, statistics=statistics)
        # Subtracting a shift of s leaves an error of s * 2e-16 on deviations that can be as small as 1e-3.
        torch.testing.assert_close(moved, y, rtol=0, atol=1e-7)

    @quick
    @given(shape=sizes, seed=seeds)
    def test_each_part_ignores_shifts_of_its_own_groups(self, shape, seed):
        """x_b ignores a shift for each (position, feature), x_f one for each (sample, position)."""
        x = random_input(shape, seed)
        per_feature, per_sample = random_input(shape[1:], seed + 1), random_input((shape[0], 1, shape[2]), seed + 2)
        x_b, x_f = normalised_parts(x, "per_position")
        torch.testing.assert_close(normalised_parts(x + per_feature, "per_position")[0], x_b, rtol=0, atol=1e-7)
        torch.testing.assert_close(normalised_parts(x + per_sample, "per_position")[1], x_f, rtol=0, atol=1e-7)

    @quick
    @given(shape=sizes, seed=seeds, flags=st.sampled_from(list(StatFlags.all())))
    def test_inference_with_population_flags_is_independent_of_the_other_samples(self, shape, seed, flags):
        x = random_input(shape, seed)
        population = [torch.ones(shape[1:]), torch.ones(shape[1:]), torch.ones(shape[2]), torch.ones(shape[2])]
        keywords = {"training": False, "population": population, "flags": flags, "batch_size": 8}
        whole, alone = batch_layer_norm(x, **keywords)[:1], batch_layer_norm(x[:1], **keywords)
        if flags.batch_moving_mean and flags.batch_moving_var:
            assert_close(whole, alone)
        else:
            assert not torch.allclose(whole, alone)

    @quick
    @given(shape=sizes, seed=seeds, statistics=modes)
    def test_a_shift_in_the_gradient_of_x_sums_to_zero(self, shape, seed, statistics):
        """The output ignores a common shift, so the gradients of x sum to 0."""
        x = random_input(shape, seed).requires_grad_()
        y = batch_layer_norm(x, statistics=statistics)
        (grad,) = torch.autograd.grad(y, x, random_input(shape, seed + 1))
        assert abs(grad.sum()) < 1e-8


def test_a_gradient_penalty_equals_that_of_the_definition() -> None:
    """Through a loss that is not linear, so that what reaches the first backward pass depends on the input."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    results = []
    for norm in (
        lambda x, weight, bias: batch_layer_norm(x, weight, bias),
        lambda x, weight, bias: reference.normalize(x, weight, bias, Population(), None, 1, False, 1e-3)[0],
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        (first,) = torch.autograd.grad(norm(*leaves).pow(3).sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaves))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)
