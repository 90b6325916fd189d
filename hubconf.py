"""The zoo's models for torch.hub, each under its name.

torch.hub.load(".", "resnet20_bln", source="local", pretrained=True)
torch.hub.load(".", "create_model", "resnet20_bln", weights="cifar10", source="local")
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from torch import nn as _nn

import zoo as _zoo
from zoo import create_model as create_model

dependencies = ["torch", "safetensors"]


def _entry(name: str) -> _Callable[..., _nn.Module]:
    def entry(pretrained: bool = False, weights: str | None = None, **kwargs: _Any) -> _nn.Module:
        if pretrained and weights is None:
            weights = _zoo.get_weights(name).tag
        return create_model(name, weights=weights, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""`zoo.create_model("{name}", ...)`.

    Args:
        pretrained: Load the model's trained weights, where it has one set. Default False: random weights.
        weights: A tag of trained weights, such as "cifar10". Default None: as ``pretrained`` says.
        kwargs: Of the model's builder, such as ``num_classes``.

    Returns:
        The model, in train mode; call ``.eval()`` to use it.
    """
    return entry


globals().update({_name: _entry(_name) for _name in _zoo.list_models()})
