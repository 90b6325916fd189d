"""The only seam between the layer and its kernels: one schema, one fake, one autograd formula.

`reference` is registered for every device ("default"). A faster kernel registers itself for its device under the same
names and takes precedence there; nothing else changes:

    torch.library.impl("lightning_bln::batch_layer_norm", "cuda", func=...)
    torch.library.impl("lightning_bln::batch_layer_norm_backward", "cuda", func=...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bln.ops import reference
from lightning_bln.ops.reference import Population, Statistics

FORWARD = "lightning_bln::batch_layer_norm"
BACKWARD = "lightning_bln::batch_layer_norm_backward"

_POPULATION = "Tensor? batch_mean, Tensor? batch_var, Tensor? feature_mean, Tensor? feature_var"
_SETTINGS = "Tensor? batch_size, int feature_dim, bool per_channel, float eps"

torch.library.define(
    FORWARD,
    f"(Tensor x, Tensor? weight, Tensor? bias, {_POPULATION}, {_SETTINGS})"
    " -> (Tensor y, Tensor own_batch_mean, Tensor own_batch_var, Tensor own_feature_mean, Tensor own_feature_var)",
)
torch.library.define(
    BACKWARD,
    "(Tensor grad_y, Tensor x, Tensor? weight, Tensor own_batch_mean, Tensor own_batch_var,"
    f" Tensor own_feature_mean, Tensor own_feature_var, {_POPULATION}, {_SETTINGS})"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` with x's memory layout, so that fake and real outputs have the same strides."""
    strides = torch.empty_like(x, device="meta").stride()  # no memory is taken to learn them
    return value if value.stride() == strides and value.dtype == x.dtype else torch.empty_like(x).copy_(value)


@torch.library.impl(FORWARD, "default")
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
    y, own = reference.normalize(x, weight, bias, population, batch_size, feature_dim, per_channel, eps)
    return (
        _like(y, x),
        own.batch_mean.contiguous(),
        own.batch_var.contiguous(),
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
    batch_shape = [x.shape[feature_dim]] if per_channel else list(x.shape[1:])
    feature_shape = [size for d, size in enumerate(x.shape) if d != feature_dim]

    def own(shape: list[int], mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
        return (
            x.new_empty([0] if mean is not None and var is not None else shape, dtype=dtype),
            x.new_empty([0] if var is not None else shape, dtype=dtype),
        )

    return torch.empty_like(x), *own(batch_shape, batch_mean, batch_var), *own(feature_shape, feature_mean, feature_var)


@torch.library.impl(BACKWARD, "default")
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
    grad_x, grad_weight, grad_bias = reference.gradients(
        grad_y, x, weight, own, population, batch_size, feature_dim, per_channel, eps
    )
    return _like(grad_x, x), grad_weight, grad_bias


@torch.library.register_fake(BACKWARD)
def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    feature_dim = rest[9]
    vector = x.new_empty(x.shape[feature_dim], dtype=reference.accumulation_dtype(x.dtype))
    return torch.empty_like(x), vector, torch.empty_like(vector)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *population, batch_size, feature_dim, per_channel, eps = inputs
    # x and the small statistics; nothing of x's size besides.
    ctx.save_for_backward(x, weight, *output[1:], *population, batch_size)
    ctx.mark_non_differentiable(*output[1:])
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.settings = (feature_dim, per_channel, eps)


def _autograd(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = torch.ops.lightning_bln.batch_layer_norm_backward(
        grad_y, *ctx.saved_tensors, *ctx.settings
    )
    return (
        grad_x,
        None if ctx.weight_dtype is None else grad_weight.to(ctx.weight_dtype),
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        *([None] * 8),
    )


torch.library.register_autograd(FORWARD, _autograd, setup_context=_save_for_backward)


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
        return t if t.requires_grad else t.detach().requires_grad_()

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
