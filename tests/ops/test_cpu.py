"""The CPU kernel: against the definition in float64, repeated, its accuracy and memory; built and loaded."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import Layout
from test_library import BACKWARD, FORWARD, MODES, TRAINING, chosen_population
from test_reference import random_population
from tolerances import SUMMED, TOLERANCES, assert_close
from torch import Tensor, nn

from lightning_bln import BatchLayerNorm, StatFlags, batch_layer_norm
from lightning_bln.ops import cpu, reference
from lightning_bln.ops.reference import Population, Statistics

ROOT = Path(__file__).parents[2]
EPS = 1e-3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FALLBACK = r"runs on the CPU in plain PyTorch, several times slower, because its kernel could not be compiled: "


@pytest.fixture
def _kernel() -> None:
    if not cpu.load():
        pytest.skip("needs the CPU kernel, which needs a C++20 compiler")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lightning_bln::batch_layer_norm", "CPU")


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, whose effect ends with the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def without(own: Statistics, batch: str, feature: str) -> Statistics:
    """The statistics as a backward pass may get them: each pair "saved", "missing", or of the batch's "mean only"."""
    empty = own.batch_mean.new_empty(0)
    return Statistics(
        empty if batch == "missing" else own.batch_mean,
        own.batch_var if batch == "saved" else empty,
        empty if feature == "missing" else own.feature_mean,
        empty if feature == "missing" else own.feature_var,
    )


SAVED = list(itertools.product(("saved", "mean only", "missing"), ("saved", "missing")))


class Case:
    """One call of both ops, and its truth: the definition in float64."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        population: Population = Population(),  # noqa: B008  (immutable)
        nominal: Tensor | None = None,
        axis: int = 1,
        per_channel: bool = False,
        grad_y: Tensor | None = None,
    ):
        self.x, self.weight, self.bias, self.population = x, weight, bias, population
        self.settings = (nominal, axis, per_channel, EPS)
        self.grad_y = torch.randn_like(x) if grad_y is None else grad_y
        args = double(x), double(weight), double(bias), Population(*map(double, population))
        self.y, self.own = reference.normalize(*args, *self.settings)
        # The gradient as the op gets it from autograd: in y's dtype.
        given = self.grad_y.to(x.dtype).double()
        self.grads = reference.gradients(given, *args[:2], self.own, args[3], *self.settings)
        self.factor = self.gradient_factor()

    def gradient_factor(self) -> Tensor:
        """Size of the terms of dx, at least 1: of few samples or features dx is a small difference of large terms."""
        nominal, axis, per_channel, _ = self.settings
        x, n = self.x.double(), self.x.ndim
        used, own = reference.compute_statistics(x, Population(*map(double, self.population)), axis, per_channel)
        w_f, w_b = reference.mixing_weights(x.shape[0], nominal, x)
        terms = []
        for w, (mean, var), (own_mean, _), expand in (
            (w_b, used[:2], own[:2], reference.expand_batch),
            (w_f, used[2:], own[2:], reference.expand_feature),
        ):
            rstd = (expand(var, n, axis) + EPS).rsqrt()
            off = (expand(own_mean, n, axis) - expand(mean, n, axis)) * rstd if own_mean.numel() else torch.zeros(())
            terms.append(w.abs() * rstd * (1 + off.abs()))
        W = torch.ones(x.shape[axis]) if self.weight is None else self.weight.abs()
        W = reference.expand_feature_vector(W.double() / x.shape[axis] ** 0.5, n, axis)
        return (sum(terms) * W).clamp(min=1)

    def forward(self) -> tuple[Tensor, Statistics]:
        y, *own = FORWARD(self.x, self.weight, self.bias, *self.population, *self.settings)
        return y, Statistics(*own)

    def backward(self, own: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        return BACKWARD(self.grad_y, self.x, self.weight, *own, *self.population, *self.settings)

    def check(self) -> None:
        """Everything that the kernel returns, with every choice of statistics that the backward pass may get."""
        dtype, kept = self.x.dtype, reference.accumulation_dtype(self.x.dtype)
        y, own = self.forward()
        assert_close(y, self.y, dtype)
        for ours, truth in zip(own, self.own, strict=True):
            assert_close(ours, truth, kept)
        for saved in SAVED:
            grad_x, grad_weight, grad_bias = self.backward(without(own, *saved))
            assert_close(grad_x / self.factor, self.grads[0] / self.factor, dtype)
            assert_close(grad_weight, self.grads[1], kept, SUMMED)
            assert_close(grad_bias, self.grads[2], kept, SUMMED)
            for value in (y, grad_x):
                assert value.dtype == dtype
                assert value.stride() == torch.empty_like(self.x).stride()
            assert {value.dtype for value in (*own, grad_weight, grad_bias)} == {kept}


def scaled_weight(C: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the size that makes y as large as BatchNorm's, so that tolerances mean something for any C."""
    return (torch.randn(C) * C**0.5).to(dtype)


@pytest.mark.usefixtures("_kernel", "_poisoned_memory")
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layouts_modes_and_dtypes(self, layout: Layout, statistics: str, dtype: torch.dtype):
        per_channel = statistics == "per_channel"
        x = layout.input(dtype)
        kept = reference.accumulation_dtype(dtype)
        for i, mode in enumerate(MODES):
            weight, bias = torch.randn(2, 7, dtype=kept) if i % 2 else (None, None)
            population = chosen_population(x, layout.axis, per_channel, mode, ("pooled", "slot", "scalar")[i % 3])
            Case(x, weight, bias, population, None, layout.axis, per_channel).check()

    @pytest.mark.parametrize("feature", ["pooled", "slot", "scalar"])
    def test_all_flags_with_each_kind_of_population(self, layout: Layout, statistics: str, feature: str):
        per_channel = statistics == "per_channel"
        x = layout.input()
        one_a_feature = random_population(x, layout.axis, True, feature)
        for i, flags in enumerate(StatFlags.all()):
            population = chosen_population(x, layout.axis, per_channel, flags.code, feature)
            if i % 2:  # as a population that was carried over from a BatchNorm
                population = Population(*(s if f else None for s, f in zip(one_a_feature, flags, strict=True)))
            Case(x, torch.randn(7), torch.randn(7), population, torch.tensor(3), layout.axis, per_channel).check()

    @pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("lies", ["as the input", "transposed", "sliced"])
    def test_populations_of_other_dtypes_and_strides(self, layout: Layout, given: torch.dtype, lies: str):
        x = layout.input()
        move = {
            "as the input": lambda t: torch.empty_like(x[0], dtype=t.dtype).copy_(t) if t.shape == x.shape[1:] else t,
            "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
            "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        }[lies]
        for feature in ("pooled", "slot") if layout.has_positions else ("slot",):
            for per_channel in (False, True):
                population = random_population(x, layout.axis, per_channel, feature)
                population = Population(*(move(stat.to(given)) for stat in population))
                Case(x, None, None, population, None, layout.axis, per_channel).check()

    @pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parameters_of_other_dtypes_alone_or_strided(self, dtype: torch.dtype, parameter: torch.dtype):
        x = torch.randn(5, 37, 6).to(dtype)
        weight, bias = scaled_weight(37, parameter), torch.randn(37).to(parameter)
        strided = torch.randn(37, 2).to(parameter)[:, 0]
        for vectors in ((weight, bias), (weight, None), (None, bias), (strided, strided)):
            Case(x, *vectors).check()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("features", ["outside", "inside"])
    @pytest.mark.parametrize(
        ("N", "C", "P"),
        [
            (1, 1, 1),
            (1, 1, 1023),
            (1, 1023, 1),
            (1023, 1, 1),
            (1, 63, 50),
            (50, 1, 63),
            (63, 50, 1),
            (1023, 3, 2),
            (2, 1023, 3),
            (3, 5, 1023),
            (50, 63, 7),
            (17, 33, 65),
        ],
    )
    def test_odd_sizes(self, N: int, C: int, P: int, features: str, dtype: torch.dtype, statistics: str):
        x = (torch.randn(N, C, P) * 2 + 1 if features == "outside" else torch.randn(N, P, C) * 2 + 1).to(dtype)
        axis = 1 if features == "outside" else 2
        per_channel = statistics == "per_channel"
        for mode in (TRAINING, "FTTF"):
            population = chosen_population(x, axis, per_channel, mode)
            Case(x, scaled_weight(C), torch.randn(C), population, None, axis, per_channel).check()

    # Inference sample by sample. Rows are whole vectors of 4, 8 or 16 values, or several are together; a sample has
    # enough of these for them to be used.
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape",
        [(7, 128, 7, 7), (5, 64, 20), (6, 32, 14, 14), (1, 128, 17), (3, 13, 16, 16), (2, 103, 1024), (1, 101, 320)],
        ids=str,
    )
    def test_samples_without_each_other(self, shape: tuple[int, ...], dtype: torch.dtype):
        x = (torch.randn(shape) * 2 + 1).to(dtype)
        for mode in ("TTFF", "TTTF", "TTFT", "TTTT"):
            population = chosen_population(x, 1, False, mode, "slot" if mode == "TTTF" else "pooled")
            Case(x, scaled_weight(shape[1]), torch.randn(shape[1]), population).check()
        x[0, 3, 2], x[0, 100 % shape[1]] = float("nan"), float("inf")
        case = Case(x, population=chosen_population(x, 1, False, "TTFF"))
        assert torch.equal(case.forward()[0].isnan(), case.y.isnan())

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (4, 3, 0, 2), (0, 3, 0)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_empty_inputs(self, shape: tuple[int, ...], dtype: torch.dtype, statistics: str):
        for mode in MODES:
            x = torch.empty(shape, dtype=dtype)
            per_channel = statistics == "per_channel"
            population = chosen_population(x, 1, per_channel, mode)
            Case(x, torch.ones(3), torch.ones(3), population, None, 1, per_channel).check()

    # Whatever the sizes of the caches: the kernel takes a third-level cache for at most 8 MiB.
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    @pytest.mark.parametrize(
        ("shape", "axis", "per_channel"),
        [
            ((24, 40, 300), 1, False),
            ((24, 300, 40), 2, False),
            ((73, 63, 15), 1, False),
            ((301, 257), 1, False),
            ((150, 500, 1), 1, False),
            ((512, 300, 3), 1, False),
            ((600, 2, 1800), 2, False),
            ((19, 30, 150), 1, True),
            ((19, 150, 30), 2, True),
            ((2, 70, 501), 1, True),
            ((301, 257), 1, True),
        ],
        ids=[
            "several blocks, features outside",
            "several blocks, features inside",
            "fewer positions than threads, features outside",
            "dense",
            "one position",
            "samples beyond the cache, features outside",
            "samples beyond the cache, features inside",
            "per channel with a tail, features outside",
            "per channel with a tail, features inside",
            "per channel with few samples",
            "per channel, dense",
        ],
    )
    def test_every_plan_with_one_and_two_threads(self, shape, axis: int, per_channel: bool, dtype, set_threads):
        x = (torch.randn(shape) * 2 + 1).to(dtype)
        C = x.shape[axis]
        for mode in (TRAINING, "FTTF"):
            population = chosen_population(x, axis, per_channel, mode)
            case = Case(x, scaled_weight(C), torch.randn(C), population, None, axis, per_channel)
            for threads in (1, 2):
                set_threads(threads)
                case.check()

    def test_samples_beyond_the_cache_in_float64(self, set_threads):
        x = torch.randn(600, 2, 1800, dtype=torch.float64)
        case = Case(x, scaled_weight(1800, torch.float64), axis=2)
        for threads in (1, 2):
            set_threads(threads)
            case.check()

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[::2],
            lambda x: x[:, ::2, 1:],
            lambda x: x[:, 1:2],
            lambda x: x[:, :, 1:2],
            lambda x: x.transpose(0, 2),
            lambda x: x.transpose(0, 1),
            lambda x: x.transpose(2, 3),
            lambda x: x.permute(3, 1, 0, 2),
            lambda x: x[:1].expand(5, -1, -1, -1),
            lambda x: x[:, :1].expand(-1, 5, -1, -1),
            lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
            lambda x: x.to(memory_format=torch.channels_last)[:, ::2],
            lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:],
            lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        ],
        ids=[
            "every second sample",
            "sliced",
            "one feature",
            "one row",
            "samples and rows swapped",
            "samples and features swapped",
            "rows and columns swapped",
            "permuted",
            "expanded samples",
            "expanded features",
            "expanded positions",
            "channels_last, every second feature",
            "channels_last, sliced",
            "rows first in memory",
            "features first in memory",
        ],
    )
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_strides_of_the_input(self, view, dtype: torch.dtype, statistics: str):
        x = view(torch.randn(6, 8, 5, 7).to(dtype))
        per_channel = statistics == "per_channel"
        for axis in (1, 2, 3):
            for mode in (TRAINING, "TFFT"):
                population = chosen_population(x, axis, per_channel, mode)
                weight = torch.randn(x.shape[axis])
                Case(x, weight, weight, population, None, axis, per_channel).check()

    def test_a_sequence_with_its_steps_first(self, statistics: str):
        x = torch.randn(11, 6, 20).transpose(0, 1)  # as an RNN without batch_first makes them
        Case(x, torch.randn(20), torch.randn(20), axis=2, per_channel=statistics == "per_channel").check()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize(
        "gradient",
        [
            lambda x: torch.ones((), dtype=x.dtype).expand(x.shape),
            lambda x: torch.randn(x.shape[1:]).to(x.dtype).expand(x.shape),
            lambda x: torch.randn(x.shape).to(x.dtype),
            lambda x: torch.randn(x.shape).to(x.dtype).to(memory_format=torch.channels_last),
            lambda x: torch.randn(x.shape).to(x.dtype).transpose(0, 1).contiguous().transpose(0, 1),
            lambda x: torch.randn(x.shape).to(x.dtype).repeat_interleave(2, -1)[..., ::2],
            lambda x: torch.randn(x.shape).double(),
        ],
        ids=["one value", "expanded samples", "contiguous", "channels_last", "features first", "sliced", "float64"],
    )
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_strides_of_the_gradient(self, gradient, memory_format, dtype: torch.dtype, statistics: str):
        x = torch.randn(6, 8, 5, 7).to(dtype).to(memory_format=memory_format)
        Case(x, torch.randn(8), per_channel=statistics == "per_channel", grad_y=gradient(x)).check()

    def test_a_sum_and_its_gradients_through_autograd(self, layout: Layout, statistics: str):
        """The gradient of a sum is one value, expanded."""
        x, weight, bias = layout.input().requires_grad_(), *(torch.randn(7, requires_grad=True) for _ in range(2))
        batch_layer_norm(x, weight, bias, feature_dim=layout.feature_dim, statistics=statistics).sum().backward()
        given = {"axis": layout.axis, "per_channel": statistics == "per_channel", "grad_y": torch.ones(x.shape)}
        case = Case(x.detach(), weight.detach(), **given)
        for leaf, truth in zip((x, weight, bias), case.grads, strict=True):
            assert_close(leaf.grad, truth, table=TOLERANCES if leaf is x else SUMMED)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32], ids=str)
    def test_batch_size_of_another_dtype(self, dtype: torch.dtype):
        sevens = torch.full((8,), 7, dtype=dtype)  # so that reading it as int64 gives another number
        Case(torch.randn(4, 3, 5), nominal=sevens[0]).check()

    @pytest.mark.parametrize("axis", [1, 2])
    def test_nan_stays_where_the_definition_has_it(self, axis: int, statistics: str):
        x = torch.randn(9, 40, 40)
        x[3, 2, 21] = float("nan")
        case = Case(x, axis=axis, per_channel=statistics == "per_channel")
        y, own = case.forward()
        for ours, truth in zip((y, *own), (case.y, *case.own), strict=True):
            assert torch.equal(ours.isnan(), truth.isnan())

    @pytest.mark.parametrize("N", [4, 16, 64])
    @pytest.mark.parametrize("axis", [1, 2])
    def test_a_variance_that_overflows_is_infinite(self, axis: int, N: int, statistics: str):
        x = torch.randn(N, 6, 40).movedim(1, axis).contiguous()
        x.select(axis, 2).mul_(1e20)
        case = Case(x, axis=axis, per_channel=statistics == "per_channel")
        y, own = case.forward()
        assert own.batch_var.select(0 if statistics == "per_channel" else axis - 1, 2).isinf().all()
        kept = [i for i in range(6) if i != 2]
        assert not own.batch_mean.isnan().any()
        assert not own.batch_var.isnan().any()
        assert not y.index_select(axis, torch.tensor(kept)).isnan().any()

    def test_nothing_is_left_from_an_earlier_call(self, statistics: str):
        """The kernel keeps its working memory, so that a call finds what the one before left there."""
        for shape, axis in (((9, 13, 37), 1), ((9, 37, 13), 2), ((9, 13), 1)):
            case = Case(torch.randn(shape), axis=axis, per_channel=statistics == "per_channel")
            for larger in (shape, (20, *(size + 8 for size in shape[1:]))):
                nan = torch.full(larger, float("nan"))
                _, *own = FORWARD(nan, None, None, *Population(), *case.settings)
                for saved in SAVED:
                    BACKWARD(nan, nan, None, *without(Statistics(*own), *saved), *Population(), *case.settings)
                case.check()


@pytest.mark.usefixtures("_kernel", "_poisoned_memory")
class TestRepeats:
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize(
        ("shape", "axis"), [((24, 40, 300), 1), ((24, 300, 40), 2), ((301, 257), 1), ((512, 300, 3), 1)], ids=str
    )
    def test_bit_for_bit(self, shape: tuple[int, ...], axis: int, threads: int, statistics: str, set_threads):
        set_threads(threads)
        case = Case(torch.randn(shape), scaled_weight(shape[axis]), axis=axis, per_channel=statistics == "per_channel")
        first_y, own = case.forward()
        first_grads = [case.backward(without(own, *saved)) for saved in SAVED]
        for _ in range(4):
            y, again = case.forward()
            assert torch.equal(y, first_y)
            assert all(torch.equal(now, was) for now, was in zip(again, own, strict=True))
            for saved, first in zip(SAVED, first_grads, strict=True):
                grads = case.backward(without(own, *saved))
                assert all(torch.equal(now, was) for now, was in zip(grads, first, strict=True))


# A checkpoint may hold them in another layout than training on this input makes.
@pytest.mark.usefixtures("_kernel", "_poisoned_memory")
@pytest.mark.parametrize("shape", [(3, 64, 28, 28), (3, 128, 7, 7), (3, 20, 40, 40)], ids=str)
def test_inference_does_not_depend_on_the_layout_of_population_statistics(shape: tuple[int, ...]):
    x = torch.randn(shape)
    population = chosen_population(x, 1, False, "TTFF")
    turned = Population(*(None if s is None else s.movedim(0, -1).contiguous().movedim(-1, 0) for s in population))
    assert torch.equal(Case(x, population=population).forward()[0], Case(x, population=turned).forward()[0])


# Threads take as many samples as they come to, a different number each time.
@pytest.mark.usefixtures("_kernel", "_poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((9, 64, 28, 28), 1),
        ((3, 128, 28, 28), 1),
        ((33, 128, 7, 7), 1),
        ((63, 40, 100), 1),
        ((5, 16, 3200), 1),
        ((33, 300, 40), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [2, 3])
def test_inference_is_the_same_whichever_thread_takes_a_sample(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, threads: int, statistics: str, set_threads
):
    set_threads(threads)
    per_channel = statistics == "per_channel"
    x = torch.randn(shape).to(dtype)
    population = chosen_population(x, axis, per_channel, "TTFF")
    case = Case(x, scaled_weight(shape[axis]), population=population, axis=axis, per_channel=per_channel)
    first = case.forward()[0]
    for _ in range(10):
        assert torch.equal(case.forward()[0], first)


# Statistics, what brings them together and the result are jobs of one call. A thread that comes late finds its own
# task done.
@pytest.mark.usefixtures("_kernel", "_poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((32, 256, 4, 4), 1), ((32, 64, 16, 16), 1), ((300, 70, 20), 2)], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_training_is_the_same_whichever_thread_takes_a_task(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, threads: int, statistics: str, set_threads
):
    set_threads(threads)
    case = Case(
        torch.randn(shape).to(dtype), scaled_weight(shape[axis]), axis=axis, per_channel=statistics == "per_channel"
    )
    y, own = case.forward()
    nothing = without(own, "missing", "missing")
    grads = case.backward(nothing)
    for _ in range(10):
        assert torch.equal(case.forward()[0], y)
        assert all(torch.equal(now, was) for now, was in zip(case.backward(nothing), grads, strict=True))


# Calls side by side share PyTorch's threads; none waits for a thread that another one has.
@pytest.mark.usefixtures("_kernel")
def test_calls_from_several_threads_at_once(statistics: str, set_threads):
    set_threads(3)
    per_channel = statistics == "per_channel"
    cases = [Case(torch.randn(32, 256, n, n), scaled_weight(256), per_channel=per_channel) for n in (3, 4, 5, 6)]
    results = [(case.forward(), case.backward(case.forward()[1])) for case in cases]

    def same(i: int) -> bool:
        torch.set_num_threads(3)  # a fresh thread has as many as there are cores
        (y, own), grads = results[i % 4]
        now = cases[i % 4].forward()[0], *cases[i % 4].backward(own)
        return all(torch.equal(ours, was) for ours, was in zip(now, (y, *grads), strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(80)))


NAMES = ("y", "grad of x", "grad of weight", "grad of bias")


def errors(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, grad_y: Tensor) -> Tensor:
    """Of y and the gradients of x, weight and bias: largest error in float32, as a part of the largest true value."""
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (x.clone(), weight, torch.zeros_like(weight))]
        y = norm(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(dtype))])
    return torch.stack(
        [(ours.double() - truth).abs().max() / truth.abs().max() for ours, truth in zip(*results, strict=True)]
    )


@pytest.mark.usefixtures("_kernel")
class TestAccuracy:
    @pytest.mark.parametrize("mean", [0.0, 1e4])
    @pytest.mark.parametrize(
        ("shape", "memory_format"),
        [
            *itertools.product(
                [(64, 16, 12, 12), (32, 64, 14, 14), (512, 8, 4, 4), (8, 256, 7, 7)],
                [torch.contiguous_format, torch.channels_last],
            ),
            ((128, 512), torch.contiguous_format),
        ],
        ids=str,
    )
    def test_errors_are_at_most_twice_batch_norms(self, shape, memory_format, mean: float, statistics: str):
        C = shape[1]
        batch_norm = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d

        def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            layer = batch_norm(C, eps=EPS, dtype=x.dtype)
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return batch_layer_norm(x, weight, bias, eps=EPS, statistics=statistics)

        totals = torch.zeros(2, 4, dtype=torch.float64)
        for seed in range(5):
            torch.manual_seed(seed)
            x, grad_y = ((torch.randn(shape) + m).to(memory_format=memory_format) for m in (mean, 0.0))
            totals[0] += errors(ours, x, torch.full((C,), C**0.5), grad_y)
            totals[1] += errors(theirs, x, torch.ones(C), grad_y)
        ratios = dict(zip(NAMES, (totals[0] / totals[1]).tolist(), strict=True))
        assert max(ratios.values()) <= 2, ratios


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_many_values_are_as_exact_as_of_few(memory_format):
    x = (torch.randn(4, 16, 128, 128) + 3).to(memory_format=memory_format)
    _, mean, var, _, _ = FORWARD(x, None, None, *Population(), None, 1, True, EPS)
    values = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), values.mean(1), rtol=3e-7, atol=0)
    torch.testing.assert_close(var.double(), values.var(1, unbiased=False), rtol=3e-7, atol=0)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_of_many_values_are_as_exact_as_of_few(axis: int, statistics: str, set_threads):
    set_threads(1)
    x = torch.randn(1024, 256, 4).movedim(2, axis).contiguous()
    Case(x, axis=axis, per_channel=statistics == "per_channel", grad_y=torch.full_like(x, 0.1)).check()


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("C", [64, 1024])
def test_features_of_two_kinds(C: int, axis: int):
    x = torch.randn(8, 32, C)
    x[..., :16] += 100
    x = x.movedim(2, axis).contiguous()
    _, _, _, mean, var = FORWARD(x, None, None, *Population(), None, axis, False, EPS)
    torch.testing.assert_close(mean.double(), x.double().mean(axis), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), x.double().var(axis, unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("C", [3, 33, 64, 300])
def test_feature_means_are_rounded_once(C: int, axis: int):
    x = (torch.randn(2, 40, C) + 100).movedim(2, axis).contiguous()
    _, _, _, mean, var = FORWARD(x, None, None, *Population(), None, axis, False, EPS)
    # Half of the last digit of numbers from 64 to 128, and what is lost among the digits below.
    torch.testing.assert_close(mean.double(), x.double().mean(axis), atol=2.0**-18 + 1e-6, rtol=0)
    torch.testing.assert_close(var.double(), x.double().var(axis, unbiased=False), rtol=2e-6, atol=1e-9)
    assert batch_layer_norm(torch.full_like(x, 10.1), feature_dim=axis).count_nonzero() == 0


class TestSavedMemory:
    @staticmethod
    def saved_bytes(layer: nn.Module, x: Tensor) -> int:
        """What the layer keeps for its backward pass besides what lives on anyway: its parameters and buffers."""
        own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in own:
                saved[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        assert y.requires_grad
        return sum(saved.values())

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    @pytest.mark.parametrize("N", [2, 8, 32, 128])
    @pytest.mark.parametrize("C", [8, 16, 64, 512, 2048])
    def test_little_more_than_batch_norm(self, N: int, C: int, dtype: torch.dtype, statistics: str):
        for size in (1, 7, 16):
            if N * C * size**2 > 2**21:
                continue
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(N, C, size, size).to(dtype).to(memory_format=memory_format).requires_grad_()
                ours = self.saved_bytes(BatchLayerNorm(C, statistics=statistics), x)
                assert ours <= 1.05 * self.saved_bytes(nn.BatchNorm2d(C), x), (size, memory_format)


@pytest.mark.slow
@pytest.mark.usefixtures("_kernel")
def test_a_compiled_model_trains_as_the_eager_one():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), BatchLayerNorm(6), nn.ReLU(), nn.Conv2d(6, 2, 3), BatchLayerNorm(2))
    x = torch.randn(5, 3, 9, 8)
    results = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in model.parameters())])
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert_close(compiled, eager, table=SUMMED)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel as a file, compiled at most once."""
    if not cpu.load():
        pytest.skip("needs the CPU kernel, which needs a C++20 compiler")
    try:
        return cpu.build(cpu.cache_folder())
    except OSError:  # no cache folder can be written on this machine
        return cpu.build(tmp_path_factory.mktemp("library"))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path: Path, library: Path) -> Path:
    """A compiler that takes no time and notes its runs, one a line, in the file ``runs`` beside it."""
    return script(
        tmp_path / "compiler",
        f"""\
case "$*" in
    --version) echo quick 1.0; exit;;
    *-shared*) made={library};;
    *) made=/dev/null;;
esac
echo "$*" >> {tmp_path}/runs
sleep 0.2
while [ "$1" != -o ]; do shift; done
cp "$made" "$2\"""",
    )


def runs(compiler: Path) -> int:
    path = compiler.with_name("runs")
    return len(path.read_text().splitlines()) if path.exists() else 0


# Runs of the compiler: the parts and their union.
BUILD = len(cpu.PARTS) + 1

USE = """
import json, torch, warnings
from lightning_bln import batch_layer_norm
from lightning_bln.ops import cpu, reference
x = torch.randn(4, 3, 5)
expected, _ = reference.normalize(x, None, None, reference.Population(), None, 1, False, 1e-3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        torch.testing.assert_close(batch_layer_norm(x), expected)
print(json.dumps({
    "kernel": torch._C._dispatch_has_kernel_for_dispatch_key("lightning_bln::batch_layer_norm", "CPU"),
    "warnings": [str(w.message) for w in caught],
}))
"""
WITH_KERNEL = {"kernel": True, "warnings": []}


def start(code: str, folder: Path | str, compiler: Path | str | None = None) -> subprocess.Popen[str]:
    """Python with a cache folder of its own, and a compiler if one is named."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LIGHTNING_BLN_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    if compiler is not None:
        environment["CXX"] = str(compiler)
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> object:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(output)


def libraries(folder: Path) -> list[Path]:
    """The libraries in the folder; besides them there may be nothing but their digests and the lock."""
    found = sorted(path for path in folder.iterdir() if path.name != "lock")
    assert [path for path in found if path.suffix == ".sha256"] == [p.with_suffix(".sha256") for p in found[1::2]]
    return found[1::2]


BITS = """
import hashlib, json, torch
from lightning_bln import BatchLayerNorm
bits = []
for shape in ((6, 32, 8, 8), (5, 48, 4, 12), (3, 16, 7, 7), (9, 64), (4, 6, 32)):
    for memory_format in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
        torch.manual_seed(0)
        x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
        layer = BatchLayerNorm(shape[1] if len(shape) == 4 else shape[-1], feature_dim=1 if len(shape) == 4 else -1)
        y = layer(x)
        found = [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(x)), layer.eval()(x)]
        bits.append([hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in found])
print(json.dumps(bits))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("_kernel")
def test_results_that_no_cache_holds_are_the_same(tmp_path: Path) -> None:
    compiler = shlex.join([*cpu.compiler(), "-DLIGHTNING_BLN_LAST_CACHE=0"])
    assert answer(start(BITS, tmp_path / "cache", compiler)) == answer(start(BITS, cpu.cache_folder()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
class TestLoader:
    def test_an_import_compiles_nothing_and_the_first_use_does(self, tmp_path: Path, compiler: Path):
        folder = tmp_path / "cache"
        imported = f"""
import pathlib, lightning_bln
lightning_bln.BatchLayerNorm(3)
assert not pathlib.Path({str(folder)!r}).exists()
"""
        assert answer(start(imported + USE, folder, compiler)) == WITH_KERNEL
        assert len(libraries(folder)) == 1
        assert folder.stat().st_mode & 0o777 == 0o700
        assert runs(compiler) == BUILD

    def test_a_real_build_is_used_by_later_processes(self, library: Path):
        before = library.stat().st_mtime_ns
        assert answer(start(USE, library.parent)) == WITH_KERNEL
        assert library.stat().st_mtime_ns == before

    def test_processes_that_start_at_once_build_it_once(self, tmp_path: Path, compiler: Path):
        folder = tmp_path / "cache"
        processes = [start(USE, folder, compiler) for _ in range(3)]
        assert [answer(process) for process in processes] == [WITH_KERNEL] * 3
        assert len(libraries(folder)) == 1
        assert runs(compiler) == BUILD

    @pytest.mark.parametrize("size", [0, 100_000])
    def test_a_damaged_library_is_built_again(self, tmp_path: Path, compiler: Path, library: Path, size: int):
        folder = tmp_path / "cache"
        folder.mkdir(mode=0o700)
        damaged = folder / cpu.library_name([str(compiler)])
        damaged.write_bytes(library.read_bytes()[:size])
        damaged.with_suffix(".sha256").write_bytes(library.with_suffix(".sha256").read_bytes())
        assert answer(start(USE, folder, compiler)) == WITH_KERNEL
        assert libraries(folder) == [damaged]
        assert damaged.read_bytes() == library.read_bytes()

    def test_a_folder_that_cannot_be_written_holds_nobody_up(self, tmp_path: Path, compiler: Path):
        not_a_folder = tmp_path / "file"
        not_a_folder.touch()
        assert answer(start(USE, not_a_folder / "cache", compiler)) == WITH_KERNEL
        assert runs(compiler) == BUILD

    def test_without_a_compiler_the_reference_serves_after_one_warning(self, tmp_path: Path):
        said = answer(start(USE, tmp_path / "cache", "/nonexistent/g++"))
        assert said["kernel"] is False
        (text,) = said["warnings"]
        assert text.startswith("Batch layer normalization runs on the CPU in plain PyTorch, several times slower")
        assert "the compiler '/nonexistent/g++' that CXX names is not there. Install a C++20 compiler" in text


ELSEWHERE = "Check the compiler, CXX and LIGHTNING_BLN_CACHE"


class TestFailingBuilds:
    """In this process: nothing is loaded. `_load` is what `load` runs once."""

    @pytest.fixture(autouse=True)
    def _environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIGHTNING_BLN_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("CXX", raising=False)

    @staticmethod
    def assert_warns(reason: str, advice: str = r"Install a C\+\+20 compiler .* CXX") -> None:
        with pytest.warns(UserWarning, match=FALLBACK + reason + rf"\. {advice}\.$"):
            assert cpu._load.__wrapped__() is False

    def test_no_compiler_on_the_path(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", "")
        self.assert_warns(r"there is no C\+\+ compiler \(g\+\+, c\+\+ or clang\+\+\) on the PATH")

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
    def test_a_failing_compiler_is_quoted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        text = "echo a remark; echo 'a.cpp:7: error: too new'; echo 'error: 2' >&2; exit 3"
        failing = script(tmp_path / "failing", text)
        monkeypatch.setenv("CXX", str(failing))
        self.assert_warns(rf"{failing} failed \(3\): a\.cpp:7: error: too new")
        assert libraries(tmp_path / "cache") == []

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
    def test_a_compiler_that_makes_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        text = 'while [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done; echo no library > "${2:-/dev/null}"'
        monkeypatch.setenv("CXX", str(script(tmp_path / "wrong", text)))
        self.assert_warns(r".*", ELSEWHERE)

    def test_a_compiler_that_is_no_program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        nothing = tmp_path / "nothing"
        nothing.write_text("not a program")
        nothing.chmod(0o755)
        monkeypatch.setenv("CXX", str(nothing))
        self.assert_warns(r".*nothing.*", ELSEWHERE)

    @pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
    @pytest.mark.parametrize("mode", [0o770, 0o707])
    def test_a_folder_that_others_can_write_is_not_trusted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
    ):
        folder = tmp_path / "cache"
        folder.mkdir()
        folder.chmod(mode)
        monkeypatch.setenv("CXX", sys.executable)  # a program, never run
        self.assert_warns(f"others can write into the cache folder {folder}", f"Call: chmod go-w {folder}")
        assert list(folder.iterdir()) == []


class TestNames:
    def test_whatever_a_build_depends_on_is_in_the_librarys_name(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        command = [sys.executable]
        names = [cpu.library_name(command)]
        assert cpu.library_name(command) == names[0]
        names.append(cpu.library_name([*command, "-I"]))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", "2.99.0")
            names.append(cpu.library_name(command))
        for function in ("compile_flags", "link_flags"):
            with monkeypatch.context() as patch:
                flags = getattr(cpu, function)()
                patch.setattr(cpu, function, lambda flags=flags: [*flags, "-O3"])
                names.append(cpu.library_name(command))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_processor", lambda: "another")
            names.append(cpu.library_name(command))
        with monkeypatch.context() as patch:
            source = tmp_path / "cpu.cpp"
            source.write_text(cpu.SOURCE.read_text() + "\n")
            patch.setattr(cpu, "SOURCE", source)
            names.append(cpu.library_name(command))
        assert len(set(names)) == len(names) == 7

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
    def test_a_new_version_of_the_compiler_gives_another_name(self, tmp_path: Path):
        path = tmp_path / "compiler"
        names = {cpu.library_name([str(script(path, f"echo compiler {version}"))]) for version in (1, 2)}
        assert len(names) == 2

    def test_the_cache_folder_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setenv("LIGHTNING_BLN_CACHE", str(tmp_path))
        assert cpu.cache_folder() == tmp_path
        monkeypatch.delenv("LIGHTNING_BLN_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cpu.cache_folder() == tmp_path / "lightning-bln"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cpu.cache_folder() == Path.home() / ".cache" / "lightning-bln"

    def test_cxx_may_hold_arguments(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", f"'{sys.executable}' -O0")
        assert cpu.compiler() == [sys.executable, "-O0"]
