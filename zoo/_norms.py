"""The zoo's choice of normalization layers, for feature maps (N, C, H, W) or rows (N, C)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from lightning_bln import BatchLayerNorm

NORMS = ("bln", "bn", "ln", "gn")
Norm = str | Callable[[int], nn.Module]


class ChannelLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the channels of each position of (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over axis 1."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_layer(
    norm: Norm,
    channels: int,
    *,
    rows: bool = False,
    batch_size: int | None = None,
    statistics: str = "per_position",
) -> nn.Module:
    """A normalization layer for ``channels`` channels.

    "bln" starts with weight sqrt(C), which cancels the layer's 1/sqrt(C), so that its output has the scale of the
    others'; "gn" has up to 8 groups.

    Args:
        norm: "bln", "bn", "ln", "gn", or a callable that takes the number of channels.
        channels: C.
        rows: For (N, C) instead of (N, C, H, W). Default False.
        batch_size: B of BLN's weights where rows are not samples. Default None: the number of samples.
        statistics: Of BLN. Default "per_position".

    Returns:
        The layer.

    Raises:
        ValueError: If a name is not known.
    """
    if statistics not in ("per_position", "per_channel"):
        raise ValueError(f"statistics must be 'per_position' or 'per_channel', got {statistics!r}.")
    if callable(norm):
        return norm(channels)
    if norm == "bln":
        layer = BatchLayerNorm(channels, eps=1e-5, batch_size=batch_size, statistics=statistics)
        nn.init.constant_(layer.get_parameter("weight"), math.sqrt(channels))
        return layer
    if norm == "bn":
        return nn.BatchNorm1d(channels) if rows else nn.BatchNorm2d(channels)
    if norm == "ln":
        return nn.LayerNorm(channels) if rows else ChannelLayerNorm(channels)
    if norm == "gn":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))} or a callable, got {norm!r}.")
