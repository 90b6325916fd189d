"""Two `BatchLayerNorm` variants that surgery needs: sizes inferred at the first forward, and a fused activation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from lightning_bln.layer import BatchLayerNorm, is_extra_state


class LazyBatchLayerNorm(LazyModuleMixin, BatchLayerNorm):
    """A `BatchLayerNorm` whose number of features is read from the first input; it then becomes a `BatchLayerNorm`.

    Args:
        affine: Learn weight and bias. Default True.
        preserve_scale: Start with weight sqrt(C), which cancels the layer's 1/sqrt(C), instead of 1. Default False.
        kwargs: As `BatchLayerNorm`, without ``num_features``.

    Example:
        >>> layer = LazyBatchLayerNorm()
        >>> _ = layer(torch.randn(4, 6, 3))
        >>> layer.num_features
        6
    """

    cls_to_become = BatchLayerNorm

    def __init__(self, *, affine: bool = True, preserve_scale: bool = False, **kwargs: Any) -> None:
        # The size 1 stands until the first forward; no parameter is made from it.
        super().__init__(1, affine=False, **kwargs)
        self.num_features = 0
        self.preserve_scale = preserve_scale
        self.affine = affine
        if affine:
            factory: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
            for name in ("weight", "bias"):
                uninitialized: Any = UninitializedParameter(**factory)
                self.register_parameter(name, uninitialized)

    def initialize_parameters(self, x: Tensor) -> None:
        """Make weight and bias in the size of x's feature axis."""
        scale = math.sqrt(x.shape[self.feature_dim]) if self.preserve_scale else 1.0
        if self.num_features == 0:  # not if a checkpoint brought size and gain
            self.num_features = x.shape[self.feature_dim]
            if not self.affine:
                self.gain = scale
        if not self.has_uninitialized_params():
            return
        with torch.no_grad():
            parameters: list[tuple[Any, float]] = [(self.weight, scale), (self.bias, 0.0)]
            for parameter, value in parameters:
                if isinstance(parameter, UninitializedParameter):
                    parameter.materialize((x.shape[self.feature_dim],))
                    parameter.fill_(value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "_extra_state"] = self.get_extra_state()  # torch's lazy modules leave it out

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        state = state_dict.get(prefix + "_extra_state")
        if self.num_features == 0 and is_extra_state(state):
            self.num_features = state["config"]["num_features"]  # type: ignore[index]
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchLayerNormAct(BatchLayerNorm):
    """A `BatchLayerNorm` followed by dropout and activation, in place of timm's ``BatchNormAct2d`` and its kin.

    Args:
        args: As `BatchLayerNorm`.
        drop: Applied after the normalization. Default identity.
        act: Applied last. Default identity.
        kwargs: As `BatchLayerNorm`.
    """

    def __init__(self, *args: Any, drop: nn.Module | None = None, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, drop, activate."""
        return self.act(self.drop(super().forward(x)))
