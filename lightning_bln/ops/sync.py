"""Batch statistics over the samples of every process, as `torch.nn.SyncBatchNorm` takes them.

The feature statistics of a sample live on its own process, so only the batch statistics travel: two all-reduces of
their size forward and one backward. The normalisation itself is the one op of `library`, given the global statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bln.ops import (
    library,  # noqa: F401  (registers the op)
    reference,
)
from lightning_bln.ops.reference import Statistics


def _global_statistics(x: Tensor, dims: list[int], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Mean, biased variance, number of values and of samples, over ``dims`` of x on every process of the group."""
    values = math.prod(x.shape[d] for d in dims)
    kept = [size for d, size in enumerate(x.shape) if d not in dims]
    if values:
        own_var, own_mean = torch.var_mean(x, dim=dims, correction=0)
    else:  # an empty shard still takes part in the collectives
        own_var, own_mean = x.new_zeros(kept), x.new_zeros(kept)
    sums = torch.cat([(own_mean * values).flatten(), x.new_tensor([values, x.shape[0]])])
    dist.all_reduce(sums, group=group)
    count, samples = sums[-2].clone(), sums[-1].round().to(torch.int64)
    mean = (sums[:-2] / count.clamp(min=1)).reshape(kept)
    # Around the global mean, so that nothing cancels: a second exchange costs less than a wrong variance.
    squares = (own_var + (own_mean - mean).square()) * values
    dist.all_reduce(squares, group=group)
    return mean, squares / count.clamp(min=1), count, samples


class _SyncBatchLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch_size: Tensor | None,
        feature_dim: int,
        per_channel: bool,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        dims = reference.batch_dims(x.ndim, feature_dim, per_channel)
        a = x.to(reference.accumulation_dtype(x.dtype))
        mean, var, count, samples = _global_statistics(a, dims, group)
        size = samples if batch_size is None else batch_size
        y, _, _, feature_mean, feature_var = torch.ops.lightning_bln.batch_layer_norm(
            x, weight, bias, mean, var, None, None, size, feature_dim, per_channel, eps
        )
        ctx.save_for_backward(x, weight, mean, var, feature_mean, feature_var, size, count)
        ctx.settings = (feature_dim, per_channel, eps)
        ctx.group = group
        ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(mean, var, feature_mean, feature_var, samples, count)
        return y, mean, var, feature_mean, feature_var, samples, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        grad_y = grad_outputs[0]
        x, weight, mean, var, feature_mean, feature_var, size, count = ctx.saved_tensors
        feature_dim, per_channel, eps = ctx.settings
        nothing = mean.new_empty(0)
        grad_x, grad_weight, grad_bias = torch.ops.lightning_bln.batch_layer_norm_backward(
            grad_y.to(mean.dtype),  # rounded to x's dtype once, at the end
            x.to(mean.dtype),
            weight,
            nothing,
            nothing,
            feature_mean,
            feature_var,
            mean,
            var,
            None,
            None,
            size,
            *ctx.settings,
        )
        # The op took mean and var as constants; what they owe to x on every process is added here.
        n = x.ndim
        dims = reference.batch_dims(n, feature_dim, per_channel)
        a = x.to(mean.dtype)
        _, w_b = reference.mixing_weights(x.shape[0], size, a)
        g = grad_y.to(a.dtype) * (w_b / math.sqrt(x.shape[feature_dim]))
        if weight is not None:
            g = g * reference.expand_feature_vector(weight.to(a.dtype), n, feature_dim)
        centred = a - reference.expand_batch(mean, n, feature_dim)
        rstd = (reference.expand_batch(var, n, feature_dim) + eps).rsqrt()
        sums = torch.stack([g.sum(dims), (g * centred).sum(dims)])
        dist.all_reduce(sums, group=ctx.group)
        g_mean, g_centred_mean = (reference.expand_batch(s, n, feature_dim) for s in sums / count.clamp(min=1))
        grad_x = (grad_x - rstd * (g_mean + centred * rstd.square() * g_centred_mean)).to(x.dtype)
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad_x,
            None if weight_dtype is None else grad_weight.to(weight_dtype),
            None if bias_dtype is None else grad_bias.to(bias_dtype),
            *([None] * 5),
        )


def sync_batch_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    feature_dim: int,
    batch_size: Tensor | None,
    eps: float,
    statistics: str,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Statistics, Tensor, Tensor]:
    """`batch_layer_norm` in training with batch statistics and B taken over every process of ``group``.

    Returns:
        y, the statistics (feature statistics of this process's samples), and the numbers of samples and of values
        that each batch statistic was taken over, on all processes.
    """
    y, *own, samples, values = _SyncBatchLayerNorm.apply(
        x, weight, bias, batch_size, feature_dim, statistics == "per_channel", eps, group
    )
    return y, Statistics(*own), samples, values
