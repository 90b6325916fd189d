"""`batch_layer_norm`, the function: argument checks in front of the one op that every kernel implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.ops import library
from lightning_bln.ops.reference import Population, Statistics

__all__ = ["Population", "Statistics", "batch_layer_norm"]


def feature_axis(x: Tensor, feature_dim: int, num_features: int | None = None) -> int:
    """The features' axis as a number from 1, after checking that x can be normalised.

    Args:
        x: Input.
        feature_dim: Axis, negative ones counted from the end.
        num_features: The size that axis must have, if known.

    Raises:
        TypeError: If x is not real floating point.
        ValueError: If x has no sample axis and feature axis of the right size.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"Batch layer normalization needs a real floating-point input, got {x.dtype}; call it with x.float(), say."
        )
    if x.ndim < 2:
        raise ValueError(
            f"Batch layer normalization needs a sample axis (0) and a feature axis, got an input of shape "
            f"{tuple(x.shape)}; pass shape (N, C), for one sample x.unsqueeze(0)."
        )
    axis = feature_dim + x.ndim if feature_dim < 0 else feature_dim
    if not 1 <= axis < x.ndim:
        raise ValueError(
            f"feature_dim must be an axis of the input other than the sample axis, got feature_dim={feature_dim} for "
            f"an input of shape {tuple(x.shape)}; use 1 for (N, C, ...) or -1 for (N, ..., C)."
        )
    if x.shape[axis] == 0:
        raise ValueError(
            f"Batch layer normalization needs at least one feature, got an input of shape {tuple(x.shape)} with none "
            f"along axis {axis}; choose another feature_dim."
        )
    if num_features is not None and x.shape[axis] != num_features:
        fitting = [d for d in range(1, x.ndim) if x.shape[d] == num_features]
        hint = f"feature_dim={fitting[0]} fits this input" if fitting else f"build it for {x.shape[axis]} features"
        raise ValueError(
            f"The input must have {num_features} features along axis {axis}, got {x.shape[axis]} in shape "
            f"{tuple(x.shape)}; {hint}."
        )
    return axis


def check_eps(eps: float) -> None:
    """Raise ValueError unless eps is above 0."""
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps!r}; the paper's value is 1e-3.")


@overload
def batch_layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    feature_dim: int = ...,
    flags: FlagsLike | None = ...,
    population: Population | Sequence[Tensor | None] | None = ...,
    training: bool = ...,
    batch_size: int | Tensor | None = ...,
    eps: float = ...,
    statistics: str = ...,
    return_statistics: Literal[False] = ...,
) -> Tensor: ...


@overload
def batch_layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    feature_dim: int = ...,
    flags: FlagsLike | None = ...,
    population: Population | Sequence[Tensor | None] | None = ...,
    training: bool = ...,
    batch_size: int | Tensor | None = ...,
    eps: float = ...,
    statistics: str = ...,
    return_statistics: Literal[True],
) -> tuple[Tensor, Statistics]: ...


def batch_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    feature_dim: int = 1,
    flags: FlagsLike | None = None,
    population: Population | Sequence[Tensor | None] | None = None,
    training: bool = True,
    batch_size: int | Tensor | None = None,
    eps: float = 1e-3,
    statistics: str = "per_position",
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, Statistics]:
    """Normalise x over the mini-batch and over the features, mixed by the inverse batch size.

        x_b = (x - mu_b) / sqrt(var_b + eps)        x_f = (x - mu_f) / sqrt(var_f + eps)
        w_f = 1/B - 1e-4                            w_b = 1 - (1/B + 1e-4)
        y   = weight * (w_f * x_f + w_b * x_b) / sqrt(C) + bias

    ``mu_b, var_b`` are the mean and biased variance over the samples, one for each position and feature;
    ``mu_f, var_f`` those over the C features, one for each sample and position.

    Shapes: x (N, C), (N, C, ...) or (N, ..., C) with samples along axis 0; weight and bias (C,); y as x, in x's dtype
    and memory format (under autocast too). Everything is computed in float32, for float64 input in float64.

    Args:
        x: Input, floating point.
        weight: Scale for each feature, None for 1.
        bias: Shift for each feature, None for 0.
        feature_dim: Axis of the features; 1 for channels-first, -1 for channels-last. Default 1.
        flags: At inference, which statistics come from the population. Default `StatFlags()`.
        population: Population statistics (batch mean, batch variance, feature mean, feature variance), None entries
            for those that do not exist. A flag whose statistic does not exist uses the mini-batch's. Default None.
        training: Use the mini-batch's statistics whatever the flags. Default True.
        batch_size: B in the weights; None (default) for the number of samples in x.
        eps: Added to each variance inside the root. Default 1e-3, as the paper's code.
        statistics: "per_position" (default, the paper) or "per_channel", where mu_b and var_b are taken over samples
            and positions as BatchNorm does.
        return_statistics: Return the mini-batch's statistics too. Default False.

    Returns:
        y, or ``(y, statistics)`` with `Statistics` of the mini-batch, biased variances; entries that were not needed
        have shape (0,).

    Raises:
        TypeError: If x is not floating point.
        ValueError: If the shape, ``feature_dim``, ``statistics``, ``batch_size`` or ``eps`` do not fit.

    Example:
        >>> x = torch.randn(8, 3, 5, 5)
        >>> batch_layer_norm(x, torch.ones(3), torch.zeros(3)).shape
        torch.Size([8, 3, 5, 5])

    Source: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898.
    """
    axis = feature_axis(x, feature_dim)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (x.shape[axis],):
            raise ValueError(
                f"{name} must hold one value for each of the {x.shape[axis]} features along axis {axis} of x "
                f"{tuple(x.shape)}, got shape {tuple(vector.shape)}; pass torch.ones({x.shape[axis]}), say."
            )
    if statistics not in ("per_position", "per_channel"):
        raise ValueError(f"statistics must be 'per_position' or 'per_channel', got {statistics!r}.")
    check_eps(eps)
    if isinstance(batch_size, int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None for the samples in x, got {batch_size!r}.")
        batch_size = torch.full((), batch_size, dtype=torch.int64, device=x.device)

    chosen = Population()
    if not training and population is not None:
        flags = StatFlags() if flags is None else StatFlags.parse(flags)
        chosen = Population(*(stat if flag else None for stat, flag in zip(population, flags, strict=True)))
        _check_population(chosen, x, axis, statistics)
    y, *own = library.run(x, weight, bias, *chosen, batch_size, axis, statistics == "per_channel", eps)
    return (y, Statistics(*own)) if return_statistics else y


def _check_population(population: Population, x: Tensor, axis: int, statistics: str) -> None:
    features = (x.shape[axis],)
    positions = tuple(size for d, size in enumerate(x.shape) if d not in (0, axis))
    batch_shapes = [features] if statistics == "per_channel" else [tuple(x.shape[1:]), features]
    feature_shapes = [positions, (x.shape[0], *positions), ()]
    for name, stat, shapes in (
        ("batch_mean", population.batch_mean, batch_shapes),
        ("batch_var", population.batch_var, batch_shapes),
        ("feature_mean", population.feature_mean, feature_shapes),
        ("feature_var", population.feature_var, feature_shapes),
    ):
        if stat is not None and tuple(stat.shape) not in shapes:
            raise ValueError(
                f"The population's {name} has shape {tuple(stat.shape)}, but the input of shape {tuple(x.shape)} with "
                f"features along axis {axis} needs {' or '.join(str(s) for s in dict.fromkeys(shapes))}. Population "
                f"statistics hold for the input sizes that they were taken at: use inputs of that size, or "
                f"statistics='per_channel', which takes any size, or mini-batch statistics (flags 'FFFF')."
            )
