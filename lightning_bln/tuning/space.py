"""Settings and search spaces: which flags each layer gets, as codes, as Optuna parameters and as JSON.

Standard library only, so that the command line answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from lightning_bln.flags import FlagsLike, StatFlags

# Union, not "|": the alias is evaluated when the module is imported, on Python 3.10 too.
Setting = Union["StatFlags", Mapping[str, "StatFlags"]]
"""One point of the search: flags of all layers together, or of each layer by its name."""

CHOICES = (True, False)
"""Values of every flag in canonical order: it is part of a study's schema, and Optuna refuses another one."""


def parse_setting(value: FlagsLike | Mapping[str, FlagsLike], layers: Sequence[str] = ()) -> Setting:
    """Read a setting: flags for all layers together, or a mapping of layer names to flags.

    Args:
        value: As `StatFlags.parse` takes it, or ``{layer name: flags}``; a mapping may be written too, as
            ``"net.1=TTFF,net.5=FFFF"``.
        layers: The model's layer names. If given, a mapping must name exactly these.

    Returns:
        `StatFlags`, or a dict of `StatFlags` in the order of ``layers``.

    Raises:
        ValueError: If a code is not understood or the names are not the model's.

    Example:
        >>> parse_setting("TTFF")
        StatFlags('TTFF')
        >>> parse_setting("net.1=TTFF,net.5=FFFF")
        {'net.1': StatFlags('TTFF'), 'net.5': StatFlags('FFFF')}
    """
    if isinstance(value, str) and "=" in value:
        value = dict(part.strip().split("=", 1) for part in value.split(",") if "=" in part)
    if not isinstance(value, Mapping) or set(value) <= set(StatFlags.names()):
        return StatFlags.parse(value)  # type: ignore[arg-type]
    by_layer = {name: StatFlags.parse(flags) for name, flags in value.items()}  # type: ignore[arg-type]
    if not layers:
        return by_layer
    if set(by_layer) != set(layers):
        missing = sorted(set(layers) - set(by_layer))
        unknown = sorted(set(by_layer) - set(layers))
        raise ValueError(
            f"A setting by layer must name every BatchLayerNorm of the model once ({', '.join(layers)}), got "
            f"{', '.join(by_layer)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            + "; or give one code for all, such as 'TTFF'."
        )
    return {name: by_layer[name] for name in layers}


def setting_code(setting: Setting) -> str:
    """The written form: ``"TTFF"``, or ``"net.1=TTFF,net.5=FFFF"``; `parse_setting` reads it."""
    if isinstance(setting, StatFlags):
        return setting.code
    return ",".join(f"{name}={flags.code}" for name, flags in setting.items())


def by_layer(setting: Setting, layers: Iterable[str]) -> dict[str, StatFlags]:
    """The flags of every layer, whichever form the setting has."""
    return {name: setting if isinstance(setting, StatFlags) else setting[name] for name in layers}


def parameter_names(layers: Sequence[str] | None = None) -> list[str]:
    """Names of a study's parameters: the four flags, or ``<layer>.<flag>`` for each layer, in canonical order."""
    if layers is None:
        return list(StatFlags.names())
    return [_parameter(layer, flag) for layer in layers for flag in StatFlags.names()]


def setting_params(setting: Setting, layers: Sequence[str] | None = None) -> dict[str, bool]:
    """A setting as a trial's parameters; with ``layers`` those of a search by layer."""
    if layers is None:
        if not isinstance(setting, StatFlags):
            raise ValueError(f"A study over all layers together needs one code, got {setting_code(setting)!r}.")
        return setting.to_dict()
    flags = by_layer(setting, layers)
    return {_parameter(layer, name): value for layer in layers for name, value in flags[layer].to_dict().items()}


def params_setting(params: Mapping[str, Any], layers: Sequence[str] | None = None) -> Setting | None:
    """A trial's parameters as a setting, or None if they are not (all of) one."""
    names = parameter_names(layers)
    if any(not isinstance(params.get(name), bool) for name in names):
        return None
    if layers is None:
        return StatFlags(*(params[name] for name in names))
    return {layer: StatFlags(*(params[_parameter(layer, flag)] for flag in StatFlags.names())) for layer in layers}


def search_space_json(layers: Sequence[str] | None = None, indent: int | None = None) -> str:
    """The search space as ``optuna ask --search-space`` reads it.

    Args:
        layers: Layer names for a search by layer; None (default) for all layers together.
        indent: As of `json.dumps`.

    Example:
        >>> list(json.loads(search_space_json()))
        ['batch_moving_mean', 'batch_moving_var', 'feature_moving_mean', 'feature_moving_var']
    """
    distribution = {"name": "CategoricalDistribution", "attributes": {"choices": list(CHOICES)}}
    return json.dumps(dict.fromkeys(parameter_names(layers), distribution), indent=indent)


def _parameter(layer: str, flag: str) -> str:
    return f"{layer or '(model)'}.{flag}"
