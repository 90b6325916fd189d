"""The only seam between the layer and its kernels: one schema, one fake, one autograd formula.

`reference` is registered for every device ("default"). A faster kernel is registered for its device under the same
names and takes precedence there: `cpu` at the first CPU tensor, `cuda` from the start (it imports Triton at the first
CUDA tensor). Nothing else changes with the kernel.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_bln.ops import cpu, reference
from lightning_bln.ops.reference import Population, Statistics

FORWARD = "lightning_bln::batch_layer_norm"
INFER = "lightning_bln::infer"
BACKWARD = "lightning_bln::batch_layer_norm_backward"

_PARAMETERS = "Tensor? weight, Tensor? bias"
_POPULATION = "Tensor? batch_mean, Tensor? batch_var, Tensor? feature_mean, Tensor? feature_var"
_SETTINGS = "Tensor? batch_size, int feature_dim, bool per_channel, float eps"

torch.library.define(
    FORWARD,
    f"(Tensor x, {_PARAMETERS}, {_POPULATION}, {_SETTINGS})"
    " -> (Tensor y, Tensor own_batch_mean, Tensor own_batch_var, Tensor own_feature_mean, Tensor own_feature_var)",
)
# y alone, where nothing is recorded: own statistics that nobody asked for take time and memory. Into memory that is
# there, since what an op's arguments are wrapped in comes between one y and the next in the C library's heap: it would
# find another place for each, which no cache holds.
torch.library.define(INFER, f"(Tensor(a!) y, Tensor x, {_PARAMETERS}, {_POPULATION}, {_SETTINGS}) -> ()")
torch.library.define(
    BACKWARD,
    "(Tensor grad_y, Tensor x, Tensor? weight, Tensor own_batch_mean, Tensor own_batch_var,"
    f" Tensor own_feature_mean, Tensor own_feature_var, {_POPULATION}, {_SETTINGS})"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)


# Statistics that the backward pass needs, as a share of x in memory, up to which they are saved with it. Beyond, they
# are taken from x again: together with x they must not need more than 1.05 times what BatchNorm saves.
SAVED_SHARE = 0.04

# One mini-batch into population statistics of its shapes, in place, where a kernel does that at one go (CPU); the layer
# writes down what it computes. A momentum below 0 stands for the average over all samples since num_samples was 0.
torch.library.define(
    "lightning_bln::accumulate_statistics",
    "(Tensor(a!) batch_mean, Tensor(b!) batch_var, Tensor(c!) feature_mean, Tensor(d!) feature_var,"
    " Tensor(e!) num_samples, Tensor(f!) nominal_batch_size, Tensor own_batch_mean, Tensor own_batch_var,"
    " Tensor own_feature_mean, Tensor own_feature_var, int samples, int values, float momentum, bool fixed_batch_size)"
    " -> ()",
)


def _batch_statistic(x: Tensor, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Memory for a per-position batch statistic of x: the layout of x[0], so that kernels write it as they read x."""
    device = x.device if device is None else device
    return torch.empty_like(torch.empty_strided(x.shape[1:], x.stride()[1:], dtype=dtype, device=device))


def _in_batch_layout(value: Tensor, x: Tensor, per_channel: bool) -> Tensor:
    if per_channel or value.ndim != x.ndim - 1:
        return value.contiguous()
    layout = _batch_statistic(x, value.dtype, "meta")
    return value if value.stride() == layout.stride() else torch.empty_like(layout, device=x.device).copy_(value)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` with x's memory layout, so that fake and real outputs have the same strides."""
    strides = torch.empty_like(x, device="meta").stride()  # no memory is taken to learn them
    return value if value.stride() == strides and value.dtype == x.dtype else torch.empty_like(x).copy_(value)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    feature_mean: Tensor | None,
    feature_var: Tensor | None,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    population = Population(batch_mean, batch_var, feature_mean, feature_var)
    if x.is_cpu and cpu.load():  # now there is a kernel that comes before this one
        return torch.ops.lightning_bln.batch_layer_norm(
            x, weight, bias, *population, batch_size, feature_dim, per_channel, eps
        )
    y, own = reference.normalize(x, weight, bias, population, batch_size, feature_dim, per_channel, eps)
    return (
        _like(y, x),
        _in_batch_layout(own.batch_mean, x, per_channel),
        _in_batch_layout(own.batch_var, x, per_channel),
        own.feature_mean.contiguous(),
        own.feature_var.contiguous(),
    )


@torch.library.register_fake(FORWARD)
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    feature_mean: Tensor | None,
    feature_var: Tensor | None,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(x.dtype)
    feature_shape = [size for d, size in enumerate(x.shape) if d != feature_dim]

    def batch(needed: bool) -> Tensor:
        if not needed or per_channel:
            return x.new_empty([x.shape[feature_dim] if needed else 0], dtype=dtype)
        return _batch_statistic(x, dtype)

    def feature(needed: bool) -> Tensor:
        return x.new_empty(feature_shape if needed else [0], dtype=dtype)

    needed = reference.needed_statistics(Population(batch_mean, batch_var, feature_mean, feature_var))
    return torch.empty_like(x), batch(needed[0]), batch(needed[1]), feature(needed[2]), feature(needed[3])


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    own_batch_mean: Tensor,
    own_batch_var: Tensor,
    own_feature_mean: Tensor,
    own_feature_var: Tensor,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    feature_mean: Tensor | None,
    feature_var: Tensor | None,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    own = Statistics(own_batch_mean, own_batch_var, own_feature_mean, own_feature_var)
    population = Population(batch_mean, batch_var, feature_mean, feature_var)
    if x.is_cpu and cpu.load():
        return torch.ops.lightning_bln.batch_layer_norm_backward(
            grad_y, x, weight, *own, *population, batch_size, feature_dim, per_channel, eps
        )
    needed = reference.needed_statistics(population)
    if any(n and stat.numel() == 0 for n, stat in zip(needed, own, strict=True)):
        a = x.to(reference.accumulation_dtype(x.dtype))
        own = reference.compute_statistics(a, population, feature_dim, per_channel)[1]
    grad_x, grad_weight, grad_bias = reference.gradients(
        grad_y, x, weight, own, population, batch_size, feature_dim, per_channel, eps
    )
    return _like(grad_x, x), grad_weight, grad_bias


@torch.library.impl(INFER, "default")
def _infer(y: Tensor, *inputs: Any) -> None:
    if y.is_cpu and cpu.load():
        torch.ops.lightning_bln.infer(y, *inputs)
    else:
        y.copy_(torch.ops.lightning_bln.batch_layer_norm(*inputs)[0])


@torch.library.register_fake(INFER)
def _infer_fake(*_: Any) -> None:
    pass


torch.library.impl(FORWARD, "default", func=_forward)
torch.library.impl(BACKWARD, "default", func=_backward)


@functools.cache
def _triton() -> Any:
    """The module `cuda`, imported at the first CUDA tensor; None where there is no Triton."""
    try:
        from lightning_bln.ops import cuda
    except ImportError as error:
        warnings.warn(
            f"Batch layer normalization runs on CUDA in plain PyTorch, several times slower, because Triton cannot be "
            f"imported ({error}); pip install triton brings the fast kernel.",
            stacklevel=2,
        )
        return None
    return cuda


def _forward_cuda(*args: Any) -> tuple[Tensor, ...]:
    kernels = _triton()
    if kernels is None:
        return _forward(*args)
    x, per_channel = args[0], args[9]
    y, batch_mean, batch_var, *feature = kernels.forward(*args)
    return y, _in_batch_layout(batch_mean, x, per_channel), _in_batch_layout(batch_var, x, per_channel), *feature


def _backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    kernels = _triton()
    return (_backward if kernels is None else kernels.backward)(*args)


torch.library.impl(FORWARD, "cuda", func=_forward_cuda)
torch.library.impl(BACKWARD, "cuda", func=_backward_cuda)


@torch.library.register_fake(BACKWARD)
def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    feature_dim = rest[9]
    vector = x.new_empty(x.shape[feature_dim], dtype=reference.accumulation_dtype(x.dtype))
    return torch.empty_like(x), vector, torch.empty_like(vector)


def _worth_saving(x: Tensor, own: tuple[Tensor, ...]) -> list[Tensor]:
    """The mini-batch statistics that take up at most `SAVED_SHARE` of x's memory, shape (0,) in place of the others.

    Batch statistics come first, since a kernel needs all samples to take them again; their mean alone, if that fits.
    None are saved by a graph that is compiled for any size: it must not be compiled again for the other answer.
    """
    left = SAVED_SHARE * x.numel() * x.element_size() if isinstance(x.numel(), int) else -1.0
    nothing = own[0].new_empty(0)
    kept: list[Tensor] = []
    for mean, var in (own[:2], own[2:]):
        sizes = [stat.numel() * stat.element_size() for stat in (mean, var)]
        if sum(sizes) <= left:
            kept += [mean, var]
            left -= sum(sizes)
        elif not kept and sizes[0] <= left:
            kept += [mean, nothing]
            left -= sizes[0]
        else:
            kept += [nothing, nothing]
    return kept


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *population, batch_size, feature_dim, per_channel, eps = inputs
    # x and the small statistics; nothing of x's size besides.
    ctx.save_for_backward(x, weight, *_worth_saving(x, output[1:]), *population, batch_size)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros are made for each statistic in every backward pass
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.settings = (feature_dim, per_channel, eps)


def _autograd(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:  # nothing of y is differentiated
        return (None,) * 11
    grad_x, grad_weight, grad_bias = _call(
        torch.ops.lightning_bln.batch_layer_norm_backward.default, grad_y, *ctx.saved_tensors, *ctx.settings
    )
    return (
        grad_x,
        None if ctx.weight_dtype is None else grad_weight.to(ctx.weight_dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        *([None] * 8),
    )


torch.library.register_autograd(FORWARD, _autograd, setup_context=_save_for_backward)


def _call(op: Any, *inputs: Any) -> Any:
    """The op, past autograd where nothing is recorded: that costs a quarter of a small call."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


class _Eager(torch.autograd.Function):
    """The same formula without the op's own wrapping, which takes longer than a small layer does."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _call(torch.ops.lightning_bln.batch_layer_norm.default, *inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


def run(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op, called with its own arguments, on the shortest way."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Eager.apply(*inputs)
    return _call(torch.ops.lightning_bln.batch_layer_norm.default, *inputs)


def infer(*inputs: Any) -> Tensor:
    """y of `run`."""
    x = inputs[0]
    # torch.func's transforms have no rule for an op that writes into its arguments.
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed or not x.is_cpu:
        return run(*inputs)[0]
    y = torch.empty_like(x)
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.lightning_bln.infer.default(y, *inputs)
    return y


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_y, x, weight, _, _, _, _, *population, batch_size, feature_dim, per_channel, eps = inputs
    ctx.save_for_backward(grad_y, x, weight, *population, batch_size)
    ctx.settings = (feature_dim, per_channel, eps)


def _double_autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the definition twice by PyTorch's autograd: the statistics are functions of x again here."""
    grad_y, x, weight, *population, batch_size = ctx.saved_tensors
    feature_dim, per_channel, eps = ctx.settings
    create_graph = torch.is_grad_enabled()

    def leaf(t: Tensor) -> Tensor:
        # A view: the gradient must not go on into what grad_y or x were computed from.
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        grad_y, x = leaf(grad_y), leaf(x)
        weight = None if weight is None else leaf(weight)
        bias = torch.zeros(x.shape[feature_dim], dtype=reference.accumulation_dtype(x.dtype), device=x.device)
        bias.requires_grad_()
        y, _ = reference.normalize(x, weight, bias, Population(*population), batch_size, feature_dim, per_channel, eps)
        first = torch.autograd.grad(
            y, [x, bias] if weight is None else [x, bias, weight], grad_y, create_graph=True, allow_unused=True
        )
        cotangents = [grads[0], grads[2], grads[1]][: len(first)]
        pairs = [
            (f, c.to(f.dtype)) for f, c in zip(first, cotangents, strict=True) if f is not None and f.requires_grad
        ]
        inputs = [grad_y, x] if weight is None else [grad_y, x, weight]
        second = torch.autograd.grad(
            [f for f, _ in pairs], inputs, [c for _, c in pairs], create_graph=create_graph, allow_unused=True
        )
    return (*second, *([None] * (15 - len(second))))


torch.library.register_autograd(BACKWARD, _double_autograd, setup_context=_save_for_double_backward)


# Whether it runs within a backward pass, as a tensor: a compiled graph is the same for a forward and its repetition.
torch.library.define("lightning_bln::recomputing", "(Tensor like) -> Tensor")


@torch.library.impl("lightning_bln::recomputing", "default")
def _recomputing(like: Tensor) -> Tensor:
    return torch.full((), torch._C._current_graph_task_id() != -1, device=like.device)


@torch.library.register_fake("lightning_bln::recomputing")
def _recomputing_fake(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)
