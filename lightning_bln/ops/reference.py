"""THE definition of Batch Layer Normalization, in plain PyTorch; every faster kernel is tested against it.

Notation (design of the layer): ``x`` has N samples along axis 0, C features along axis ``feature_dim`` and positions P
along every other axis. With per-position statistics a *batch* statistic is taken over the N samples, one for each
(position, feature); with per-channel statistics over samples and positions, one for each feature. A *feature* statistic
is taken over the C features, one for each (sample, position).

    x_b = (x - mu_b) / sqrt(var_b + eps)        x_f = (x - mu_f) / sqrt(var_f + eps)
    w_f = 1/B - delta                           w_b = 1 - (1/B + delta)
    y   = weight * (w_f * x_f + w_b * x_b) / sqrt(C) + bias

Source: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DELTA = 1e-4
"""The paper's constant in both weights ``w_f`` and ``w_b``."""


class Statistics(NamedTuple):
    """Means and variances of one call, biased variances; an entry that was not computed has shape (0,).

    Shapes: batch statistics ``x.shape[1:]`` (per_position) or ``(C,)`` (per_channel), feature statistics ``x.shape``
    without the feature axis.
    """

    batch_mean: Tensor
    batch_var: Tensor
    feature_mean: Tensor
    feature_var: Tensor


class Population(NamedTuple):
    """Population statistics, each used in place of the mini-batch's where it is not None.

    Shapes: batch statistics ``x.shape[1:]``, or ``(C,)`` for one value per feature at every position; feature
    statistics ``x.shape`` without the feature axis, or without both the feature and the sample axis (one value per
    position, for every sample), or ``()``. Variances are used as they come.
    """

    batch_mean: Tensor | None = None
    batch_var: Tensor | None = None
    feature_mean: Tensor | None = None
    feature_var: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are computed and kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def batch_dims(ndim: int, feature_dim: int, per_channel: bool) -> list[int]:
    """The axes of x that a batch statistic is taken over."""
    return [d for d in range(ndim) if d != feature_dim] if per_channel else [0]


def expand_feature_vector(vector: Tensor, ndim: int, feature_dim: int) -> Tensor:
    """View a (C,) vector so that it broadcasts along the feature axis of x."""
    shape = [1] * ndim
    shape[feature_dim] = -1
    return vector.reshape(shape)


def expand_batch(stat: Tensor, ndim: int, feature_dim: int) -> Tensor:
    """View a batch statistic, of shape x.shape[1:] or (C,), so that it broadcasts against x."""
    if stat.ndim == 1:
        return expand_feature_vector(stat, ndim, feature_dim)
    return stat.unsqueeze(0)


def expand_feature(stat: Tensor, ndim: int, feature_dim: int) -> Tensor:
    """View a feature statistic, with the sample axis, without it or (), so that it broadcasts against x."""
    if stat.ndim == 0:
        return stat
    if stat.ndim == ndim - 2:
        stat = stat.unsqueeze(0)
    return stat.unsqueeze(feature_dim)


def mixing_weights(samples: int | torch.SymInt, batch_size: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """``(w_f, w_b)`` for the nominal batch size if there is one above 0, else for the current number of samples."""
    current = torch.full((), samples, dtype=like.dtype, device=like.device).clamp(min=1)
    if batch_size is not None:
        nominal = batch_size.to(like)
        current = torch.where(nominal > 0, nominal, current)
    inverse = current.reciprocal()
    return inverse - DELTA, 1 - (inverse + DELTA)


def _var_mean(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    # var_mean subtracts a running mean (Welford): a mean of 1e4 with a deviation of 1 survives in float32.
    if x.numel() == 0:
        shape = [size for d, size in enumerate(x.shape) if d not in dims]
        return x.new_zeros(shape), x.new_zeros(shape)
    return torch.var_mean(x, dim=dims, correction=0)


def needed_statistics(population: Population) -> tuple[bool, bool, bool, bool]:
    """Which of the mini-batch's own statistics `compute_statistics` computes."""
    batch, feature = ((mean is None or var is None, var is None) for mean, var in (population[:2], population[2:]))
    return *batch, *feature


def compute_statistics(
    x: Tensor, population: Population, feature_dim: int, per_channel: bool
) -> tuple[Statistics, Statistics]:
    """The statistics to normalise with and the mini-batch's own, of which only what is needed is computed.

    A population mean with a mini-batch variance needs the mini-batch mean too: the gradient of that variance is taken
    around it. So a mini-batch mean is computed wherever the mean or the variance is the mini-batch's.
    """

    def pair(mean: Tensor | None, var: Tensor | None, dims: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if mean is not None and var is not None:
            return mean.to(x.dtype), var.to(x.dtype), x.new_empty(0), x.new_empty(0)
        own_var, own_mean = _var_mean(x, dims)
        return (
            own_mean if mean is None else mean.to(x.dtype),
            own_var if var is None else var.to(x.dtype),
            own_mean,
            own_var if var is None else x.new_empty(0),
        )

    b = pair(population.batch_mean, population.batch_var, batch_dims(x.ndim, feature_dim, per_channel))
    f = pair(population.feature_mean, population.feature_var, [feature_dim])
    return Statistics(b[0], b[1], f[0], f[1]), Statistics(b[2], b[3], f[2], f[3])


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    population: Population,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Statistics]:
    """The definition itself; differentiable to any order by PyTorch's autograd.

    Args:
        x: Input, samples along axis 0, floating point.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        population: Statistics to use instead of the mini-batch's.
        batch_size: 0-dim integer tensor with the nominal B; None or 0 for the current number of samples.
        feature_dim: Axis of the features, 1 or above.
        per_channel: Batch statistics over samples and positions instead of samples.
        eps: Added to variances inside the root.

    Returns:
        y in x's dtype, and the mini-batch statistics that were computed.
    """
    a = x.to(accumulation_dtype(x.dtype))
    used, own = compute_statistics(a, population, feature_dim, per_channel)
    w_f, w_b = mixing_weights(x.shape[0], batch_size, a)
    n = x.ndim
    r_b = (expand_batch(used.batch_var, n, feature_dim) + eps).rsqrt()
    r_f = (expand_feature(used.feature_var, n, feature_dim) + eps).rsqrt()
    y = (a - expand_batch(used.batch_mean, n, feature_dim)) * (w_b * r_b)
    y = y + (a - expand_feature(used.feature_mean, n, feature_dim)) * (w_f * r_f)
    scale = 1.0 / math.sqrt(x.shape[feature_dim])
    if weight is None:
        y = y * scale
    else:
        y = y * expand_feature_vector(weight.to(a.dtype) * scale, n, feature_dim)
    if bias is not None:
        y = y + expand_feature_vector(bias.to(a.dtype), n, feature_dim)
    return y.to(x.dtype), own


def input_gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    own_mean: Tensor,
    mean_is_own: bool,
    var_is_own: bool,
    dims: list[int],
) -> Tensor:
    """Gradient of ``sum(g * (x - mean) * rstd)`` with respect to x, for one of the two normalisations.

        dx = rstd * (g - [mean is own] * avg(g) - [var is own] * (x - own_mean) * rstd^2 * avg(g * (x - mean)))

    Args:
        g: Gradient of the normalised value.
        x: Input, in the accumulation dtype.
        mean: The mean that was used, broadcastable against x.
        rstd: 1 / sqrt(variance + eps) that was used, broadcastable against x.
        own_mean: The mini-batch mean, broadcastable against x; read only where the variance is the mini-batch's.
        mean_is_own: Whether the mean was the mini-batch's.
        var_is_own: Whether the variance was the mini-batch's.
        dims: The axes that the statistic is taken over.
    """
    dx = g
    if mean_is_own:
        dx = dx - g.mean(dims, keepdim=True)
    if var_is_own:
        dx = dx - (x - own_mean) * (rstd.square() * (g * (x - mean)).mean(dims, keepdim=True))
    return dx * rstd


def gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    own: Statistics,
    population: Population,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients of `normalize` with respect to x, weight and bias, from x and the small statistics.

    Population statistics are constants.

    Returns:
        dx in x's dtype, dweight and dbias of shape (C,) in the accumulation dtype.
    """
    n = x.ndim
    a = x.to(accumulation_dtype(x.dtype))
    g = grad_y.to(a.dtype)
    per_feature = batch_dims(n, feature_dim, per_channel=True)
    if x.numel() == 0:
        zeros = a.new_zeros(x.shape[feature_dim])
        return torch.zeros_like(x), zeros, zeros.clone()

    def used(value: Tensor | None, own_value: Tensor) -> Tensor:
        return own_value if value is None else value.to(a.dtype)

    w_f, w_b = mixing_weights(x.shape[0], batch_size, a)
    mean_b = expand_batch(used(population.batch_mean, own.batch_mean), n, feature_dim)
    rstd_b = (expand_batch(used(population.batch_var, own.batch_var), n, feature_dim) + eps).rsqrt()
    mean_f = expand_feature(used(population.feature_mean, own.feature_mean), n, feature_dim)
    rstd_f = (expand_feature(used(population.feature_var, own.feature_var), n, feature_dim) + eps).rsqrt()
    scale = 1.0 / math.sqrt(x.shape[feature_dim])

    normalized = (a - mean_b) * (w_b * rstd_b) + (a - mean_f) * (w_f * rstd_f)
    grad_weight = (g * normalized).sum(per_feature) * scale
    grad_bias = g.sum(per_feature)

    g = g * (scale if weight is None else expand_feature_vector(weight.to(a.dtype) * scale, n, feature_dim))

    own_b = expand_batch(own.batch_mean, n, feature_dim) if own.batch_mean.numel() else mean_b
    own_f = expand_feature(own.feature_mean, n, feature_dim) if own.feature_mean.numel() else mean_f
    grad_x = input_gradient(
        g * w_b,
        a,
        mean_b,
        rstd_b,
        own_b,
        population.batch_mean is None,
        population.batch_var is None,
        batch_dims(n, feature_dim, per_channel),
    ) + input_gradient(
        g * w_f,
        a,
        mean_f,
        rstd_f,
        own_f,
        population.feature_mean is None,
        population.feature_var is None,
        [feature_dim],
    )
    return grad_x.to(x.dtype), grad_weight, grad_bias
