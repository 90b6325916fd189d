"""Which models there are, by name, and how to make one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

from torch import nn

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, builder: Callable[..., nn.Module]) -> None:
    """Make ``create_model(name, ...)`` call ``builder(...)``.

    Args:
        name: Such as "resnet20_bln".
        builder: Returns the model; its keyword arguments are those of `create_model`.

    Raises:
        ValueError: If there is a model of that name already.
    """
    if name in _BUILDERS:
        raise ValueError(f"A model's name must be new, got {name!r} for a second one; list_models() shows all.")
    _BUILDERS[name] = builder


def list_models(pattern: str = "*") -> list[str]:
    """The models' names, sorted.

    Args:
        pattern: As in a shell. Default all.

    Returns:
        Names for `create_model`.

    Example:
        >>> list_models("resnet20*")
        ['resnet20_bln', 'resnet20_bn', 'resnet20_gn', 'resnet20_ln']
    """
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """A new model with random weights.

    Args:
        name: One of `list_models`.
        kwargs: Of the model's builder, such as ``num_classes``.

    Returns:
        The model, in train mode.

    Raises:
        ValueError: If there is no such model.

    Example:
        >>> model = create_model("resnet20_bln", num_classes=10)
    """
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "zoo.list_models() shows all."
        raise ValueError(f"The zoo has no model named {name!r}; {hint}")
    return _BUILDERS[name](**kwargs)
