"""Which models there are, by name, and how to make one."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_bln import set_flags_
from zoo._weights import Weights, did_you_mean, get_weights, load_tensors_, weights_names

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, builder: Callable[..., nn.Module]) -> None:
    """Make ``create_model(name, ...)`` call ``builder(...)``.

    Args:
        name: Such as "resnet20_bln"; without a dot, which begins the tag of weights.
        builder: Returns the model; its keyword arguments are those of `create_model`.

    Raises:
        ValueError: If there is a model of that name already.
    """
    if name in _BUILDERS:
        raise ValueError(f"A model's name must be new, got {name!r} for a second one; list_models() shows all.")
    _BUILDERS[name] = builder


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The models' names, sorted.

    Args:
        pattern: As in a shell. Default all.
        pretrained: List trained weights instead, as ``arch.tag``; a pattern may leave the tag out. Default False.

    Returns:
        Names for `create_model`; those of weights for `get_weights` too.

    Example:
        >>> list_models("resnet20*")
        ['resnet20_bln', 'resnet20_bn', 'resnet20_gn', 'resnet20_ln']
    """
    if not pretrained:
        return sorted(fnmatch.filter(_BUILDERS, pattern))
    return [
        name
        for name in weights_names()
        if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.partition(".")[0], pattern)
    ]


def create_model(name: str, *, weights: str | Weights | None = None, **kwargs: Any) -> nn.Module:
    """A new model, with random weights or trained ones.

    With trained ones it is made with the arguments that it was trained with, except for ``kwargs``, and its
    BatchLayerNorm layers get the flags that were chosen for it. With another ``num_classes`` its last layer,
    ``model.classifier``, keeps its random weights; with 0 it is left out.

    Args:
        name: One of `list_models`, or ``arch.tag``, which is ``create_model(arch, weights=tag)``.
        weights: A tag of the model's weights, such as "cifar10", or what `get_weights` returns. Default None: random
            weights.
        kwargs: Of the model's builder, such as ``num_classes``.

    Returns:
        The model, in train mode, whether trained or not; call ``.eval()`` to use it.

    Raises:
        TypeError: For ``pretrained=``, and arguments that the model does not take.
        ValueError: If there is no such model or no such weights, if their file is damaged, or if ``kwargs`` make a
            model that they do not fit.

    Example:
        >>> model = create_model("resnet20_bln", num_classes=10)
        >>> model = create_model("resnet20_bln", weights="cifar10")  # doctest: +SKIP
    """
    if isinstance(weights, Weights):
        weights = weights.name.removeprefix(f"{name}.")
    if "pretrained" in kwargs:
        raise TypeError(
            f"Trained weights are chosen by their tag, got pretrained={kwargs['pretrained']!r}; call "
            f"zoo.create_model({name!r}, weights='cifar10'), say: zoo.list_models(pretrained=True) shows all."
        )
    arch, dot, tag = name.partition(".")
    if arch not in _BUILDERS or (dot and not tag):
        wrong = name if arch in _BUILDERS else arch
        hint = did_you_mean(arch, _BUILDERS) or "zoo.list_models() shows all."
        raise ValueError(f"The zoo has no model named {wrong!r}; {hint.strip()}")
    if tag and weights not in (None, tag):
        raise ValueError(
            f"The tag in the name and weights must agree, got {name!r} and weights={weights!r}; call "
            f"zoo.create_model({arch!r}, weights={weights!r})."
        )
    if not tag and weights is None:
        return _BUILDERS[arch](**kwargs)
    chosen = get_weights(f"{arch}.{tag or weights}")
    trained = chosen.metadata["arguments"]
    model = _BUILDERS[arch](**trained | kwargs)
    other = kwargs.get("num_classes", trained["num_classes"]) != trained["num_classes"]
    load_tensors_(model, chosen.state_dict(), fresh_classifier=other)
    if chosen.metadata["flags"] is not None:
        set_flags_(model, chosen.metadata["flags"])
    return model
