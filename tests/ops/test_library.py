"""The op as PyTorch sees it: schema, fake, autograd to second order, layouts, compilers, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from conftest import Layout
from test_reference import random_population
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bln import StatFlags, batch_layer_norm
from lightning_bln.ops import library
from lightning_bln.ops.reference import Population

FORWARD = torch.ops.lightning_bln.batch_layer_norm
INFER = torch.ops.lightning_bln.infer
BACKWARD = torch.ops.lightning_bln.batch_layer_norm_backward
TINY = {"N": 3, "C": 2, "T": 2, "D": 2, "H": 2, "W": 1}
TRAINING = "training"
MODES = [TRAINING, *(flags.code for flags in StatFlags.all())]


def chosen_population(x: torch.Tensor, axis: int, per_channel: bool, mode: str, feature: str = "pooled") -> Population:
    if mode == TRAINING:
        return Population()
    everything = random_population(x, axis, per_channel, feature)
    return Population(*(s if flag else None for s, flag in zip(everything, StatFlags.parse(mode), strict=True)))


def check_gradients(x, weight, bias, population, nominal, axis, per_channel, *, fast: bool) -> None:
    """gradcheck and gradgradcheck of y; fast compares one random projection instead of every element."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]

    def y(*given: torch.Tensor) -> torch.Tensor:
        tensors = iter(given)
        x_, weight_, bias_ = (next(tensors) if t is not None else None for t in (x, weight, bias))
        return FORWARD(x_, weight_, bias_, *population, nominal, axis, per_channel, 1e-3)[0]

    assert torch.autograd.gradcheck(y, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(y, inputs, fast_mode=fast)


class TestGradients:
    @pytest.mark.parametrize(
        ("statistics", "mode"),
        [("per_position", mode) for mode in MODES]
        + [("per_channel", mode) for mode in (TRAINING, "TTFF", "FFTT", "TFFT", "FTTF")],
    )
    def test_first_and_second_order(self, layout: Layout, statistics: str, mode: str):
        per_channel = statistics == "per_channel"
        x = layout.input(torch.float64, **TINY)
        weight, bias = torch.randn(2, 2, dtype=torch.float64)
        population = chosen_population(x, layout.axis, per_channel, mode)
        check_gradients(x, weight, bias, population, None, layout.axis, per_channel, fast=True)

    @pytest.mark.parametrize("mode", [TRAINING, "TTFF", "TFTF", "FTFT"])
    @pytest.mark.parametrize("feature", ["slot", "scalar"])
    def test_other_feature_populations(self, statistics: str, mode: str, feature: str):
        x = torch.randn(3, 2, 2, dtype=torch.float64)
        per_channel = statistics == "per_channel"
        population = chosen_population(x, 1, per_channel, mode, feature)
        check_gradients(x, None, None, population, torch.tensor(5), 1, per_channel, fast=False)

    @pytest.mark.parametrize("mode", [TRAINING, "TTFF", "TFFT", "FTTF"])
    @pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
    @pytest.mark.parametrize("shape", [(3, 2, 2), (1, 3), (3, 1), (1, 1, 2)], ids=str)
    def test_odd_sizes_and_absent_parameters(self, shape: tuple[int, ...], weight: bool, bias: bool, mode: str):
        x = torch.randn(shape, dtype=torch.float64)
        vectors = [torch.randn(shape[1], dtype=torch.float64) if given else None for given in (weight, bias)]
        population = chosen_population(x, 1, False, mode)
        check_gradients(x, *vectors, population, None, 1, False, fast=False)

    def test_empty_inputs_have_zero_gradients(self, statistics: str):
        for shape in ((0, 3, 2), (4, 3, 0)):
            x = torch.randn(shape, requires_grad=True)
            weight = torch.ones(3, requires_grad=True)
            y = batch_layer_norm(x, weight, weight * 0, statistics=statistics)
            y.sum().backward()
            assert x.grad.shape == x.shape
            assert_close(weight.grad, torch.zeros(3))


@pytest.mark.usefixtures("_poisoned_memory")
class TestOpcheck:
    """`torch.library.opcheck`: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes.

    And y alone, by the op for where nothing is recorded, is y.
    """

    @staticmethod
    def check(
        x: torch.Tensor, axis: int, statistics: str, mode: str, *, affine: bool = True, aot: bool = False
    ) -> None:
        """All ops; the AOT check, which takes a second, only where asked for."""
        utilities = "ALL" if aot else ("test_schema", "test_autograd_registration", "test_faketensor")
        per_channel = statistics == "per_channel"
        weight, bias = (torch.randn(x.shape[axis], requires_grad=True) if affine else None for _ in range(2))
        rest = (*chosen_population(x, axis, per_channel, mode), torch.tensor(4), axis, per_channel, 1e-3)
        torch.library.opcheck(FORWARD, (x, weight, bias, *rest), test_utils=utilities)
        with torch.no_grad():
            y, *own = FORWARD(x, weight, bias, *rest)
            alone = torch.empty_like(x)
            INFER(alone, x, weight, bias, *rest)
            arguments = (torch.empty_like(x), x.detach(), None, None, *rest)
            torch.library.opcheck(INFER, arguments, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(alone, y)
        assert alone.stride() == y.stride()
        grad_y = torch.randn_like(x).requires_grad_()
        torch.library.opcheck(BACKWARD, (grad_y, x, weight, *own, *rest), test_utils=utilities)

    @pytest.mark.parametrize("mode", [TRAINING, "FTFT"])
    def test_layouts(self, layout: Layout, statistics: str, mode: str):
        self.check(layout.input(**TINY).requires_grad_(), layout.axis, statistics, mode)

    @pytest.mark.parametrize(("statistics", "mode"), [("per_position", "TTTT"), ("per_channel", TRAINING)])
    def test_modes(self, statistics: str, mode: str):
        self.check(torch.randn(4, 3, 2, requires_grad=True), 1, statistics, mode, aot=True)

    def test_channels_last(self):
        x = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last).requires_grad_()
        self.check(x, 1, "per_position", TRAINING, aot=True)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.randn(4, 6, 5)[:, ::2, 1:],
            lambda: torch.randn(5, 3, 4).transpose(0, 2),
            lambda: torch.randn(4, 3, 1).expand(4, 3, 5),
            lambda: torch.randn(1, 3, 5).expand(4, 3, 5),
            lambda: torch.randn(4, 3, 5, dtype=torch.bfloat16),
            lambda: torch.randn(4, 3, 5).half(),
            lambda: torch.randn(0, 3, 5),
            lambda: torch.randn(4, 3, 0),
            lambda: torch.randn(1, 1, 1),
        ],
        ids=["sliced", "transposed", "expanded", "one sample expanded", "bf16", "fp16", "no sample", "empty", "one"],
    )
    def test_strides_dtypes_and_sizes(self, make):
        for affine in (True, False):
            self.check(make(), 1, "per_position", "FTFT", affine=affine)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", ["whole", "sliced", "transposed", "expanded"])
def test_output_and_gradient_lie_in_memory_as_empty_like_of_the_input(layout: Layout, dtype: torch.dtype, view: str):
    x = layout.input(dtype)
    if view == "sliced":
        x = layout.input(dtype, N=10, H=6)[::2]
    elif view == "transposed":
        x = x.flip(0).transpose(0, -1)
    elif view == "expanded":
        x = x[:1].expand(x.shape)
    x = x.detach().requires_grad_()
    axis = layout.axis if view != "transposed" or layout.axis < x.ndim - 1 else 1
    y = batch_layer_norm(x, feature_dim=axis)
    (grad,) = torch.autograd.grad(y, x, torch.randn(y.shape, dtype=dtype))
    for value in (y, grad):
        assert value.dtype == dtype
        assert value.stride() == torch.empty_like(x).stride()
        assert value.isfinite().all()


@pytest.mark.parametrize("mode", [TRAINING, "TTFF", "FFTT"])
def test_only_the_input_and_small_tensors_are_saved_for_backward(statistics: str, mode: str):
    x = torch.randn(50, 16, 9, 9, requires_grad=True)
    weight, bias = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    population = chosen_population(x, 1, statistics == "per_channel", mode)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FORWARD(x, weight, bias, *population, None, 1, statistics == "per_channel", 1e-3)
    large = [t for t in saved if t.numel() >= x.numel() // 8]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize("call", [batch_layer_norm, lambda x: FORWARD(x, *[None] * 7, 1, False, 1e-3)[0]])
def test_the_backward_pass_makes_no_gradients_of_statistics(call):
    class Zeros(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.made += "zero" in str(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = call(x)
    with Zeros() as zeros:
        torch.autograd.grad(y, x, torch.randn_like(y))
    assert zeros.made == 0


def test_no_gradient_of_y_is_none_of_the_input():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(4, 3, requires_grad=True)
    Stop.apply(batch_layer_norm(x)).sum().backward()
    assert x.grad is None


class TestCompilers:
    @pytest.mark.parametrize(
        ("training", "flags"),
        [(True, None), (False, None), (False, StatFlags.parse("TFFT"))],
        ids=["train", "eval, default flags", "eval"],
    )
    def test_compiled_function_for_any_batch_size_and_its_gradients(self, statistics: str, training: bool, flags):
        torch._dynamo.reset()

        def call(x, weight, bias, *population):
            return batch_layer_norm(
                x, weight, bias, flags=flags, population=population, training=training, statistics=statistics
            )

        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
        weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
        frames = 0
        for samples in (4, 7, 50):
            x = torch.randn(samples, 6, 3, 2, requires_grad=True)
            population = random_population(x, 1, statistics == "per_channel", "pooled")
            grad_y = torch.randn_like(x)
            outputs = [f(x, weight, bias, *population) for f in (call, compiled)]
            grads = [torch.autograd.grad(y, [x, weight, bias], grad_y) for y in outputs]
            assert_close(outputs[1], outputs[0])
            for ours, eager in zip(*grads, strict=True):
                assert_close(ours, eager)
            frames = frames or counter.frame_count
        assert counter.frame_count == frames

    def test_compiled_keeps_channels_last(self):
        torch._dynamo.reset()
        x = torch.randn(4, 6, 3, 2).to(memory_format=torch.channels_last).bfloat16().requires_grad_()
        y = torch.compile(batch_layer_norm, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(y, x, torch.ones(y.shape, dtype=y.dtype))
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["TTFF", "FFTT"])
@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
@torch.no_grad()
def test_inference_under_transforms(transform, mode: str):
    x, (weight, bias) = torch.randn(4, 3, 2, 5), torch.randn(2, 2)
    population = chosen_population(x[0], 1, False, mode)

    def y(x: torch.Tensor) -> torch.Tensor:
        return library.infer(x, weight, bias, *population, torch.tensor(4), 1, False, 1e-3)

    if transform is torch.vmap:
        assert_close(transform(y)(x), torch.stack([y(one) for one in x]))
    else:
        assert_close(transform(y)(x[0]), y(x[0]))


def test_every_statistic_is_returned_without_gradient(statistics: str):
    x = torch.randn(4, 3, 5, requires_grad=True)
    y, *own = FORWARD(x, None, None, None, None, None, None, None, 1, statistics == "per_channel", 1e-3)
    assert y.requires_grad
    assert not any(stat.requires_grad for stat in own)


def test_inputs_are_left_as_they_are():
    x, weight, bias = torch.randn(4, 3, 5), torch.randn(3), torch.randn(3)
    population = random_population(x, 1, False, "pooled")
    given = [x, weight, bias, *population, torch.tensor(4)]
    before = [t.clone() for t in given]
    for flags in itertools.islice(StatFlags.all(), 0, None, 5):
        batch_layer_norm(x, weight, bias, flags=flags, population=population, training=False, batch_size=given[-1])
    assert all(torch.equal(now, was) for now, was in zip(given, before, strict=True))
