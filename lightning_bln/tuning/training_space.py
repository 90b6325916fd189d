"""`suggest_swap`: the settings of `BLNSwap` as parameters of an Optuna trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from lightning_bln.callback import BLNSwap
from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.tuning.space import CHOICES

PREFIX = "bln."
"""Begins the names of the parameters that `suggest_swap` adds to a trial."""

Range = float | Sequence[float] | None


def suggest_swap(
    trial: optuna.trial.BaseTrial,
    *,
    flags: FlagsLike | bool | None = True,
    eps: Range = (1e-5, 1e-1),
    population: str | Sequence[str] = ("epoch", "ema", "precise"),
    momentum: Range = (0.01, 0.5),
    statistics: str | Sequence[str] = ("per_position", "per_channel"),
    **fixed: Any,
) -> BLNSwap:
    """Let a trial choose the settings of `BLNSwap`.

    What is a range or has several choices becomes a parameter of the trial: ``bln.eps``, ``bln.population``,
    ``bln.momentum`` (where the population is "ema"), ``bln.statistics``, and the four flags, ``bln.batch_moving_mean``
    and so on. For an objective of your own; `tune_training` calls it too.

    Args:
        trial: Of an Optuna study, or an `optuna.trial.FixedTrial`.
        flags: True (default): each of the four flags is a parameter. They act only at inference, so that trials which
            differ in them only train the same network again: `tune_training` has a cheaper way. Otherwise the flags
            themselves, such as "TTFF"; None for the default ones.
        eps: Range (low, high), log-uniform; default (1e-5, 1e-1). A number is taken as it is; None: as `BLNSwap`.
        population: Choices, or one. Default all three.
        momentum: Range (low, high), log-uniform, default (0.01, 0.5), or a number. None: as `BLNSwap`.
        statistics: Choices, or one. Default both; "per_position" needs images or sequences of one size.
        fixed: Further arguments of `BLNSwap`.

    Returns:
        The callback for the Trainer, as its first.

    Raises:
        ValueError: If a choice is not one of `BLNSwap`, or a range is not (low, high) with 0 < low <= high.

    Example:
        >>> trial = optuna.trial.FixedTrial({"bln.eps": 0.01, "bln.population": "ema"})
        >>> swap = suggest_swap(trial, flags="TTFF", momentum=0.1, statistics="per_channel")
        >>> swap.swap_arguments["eps"], swap.swap_arguments["population"]
        (0.01, 'ema')
    """
    ranges = {"eps": _range("eps", eps), "momentum": _range("momentum", momentum)}
    choices = {"population": _choices("population", population), "statistics": _choices("statistics", statistics)}
    for name, values in (*choices.items(), *ranges.items()):
        for value in values:
            BLNSwap(**fixed | {name: value})  # raises for a value that no trial could use, whichever this one chooses
    chosen: dict[str, Any] = {}
    for name, values in choices.items():
        several = len(values) > 1
        chosen[name] = trial.suggest_categorical(PREFIX + name, values) if several else values[0]
    if chosen["population"] != "ema":
        del ranges["momentum"]
    for name, limits in ranges.items():
        if len(limits) == 2:
            chosen[name] = trial.suggest_float(PREFIX + name, *limits, log=True)
        elif limits:
            chosen[name] = limits[0]
    if flags is True:
        chosen["flags"] = StatFlags(*(trial.suggest_categorical(PREFIX + name, CHOICES) for name in StatFlags.names()))
    else:
        chosen["flags"] = None if flags is None else StatFlags.parse(flags)  # type: ignore[arg-type]
    return BLNSwap(**fixed | chosen)


def check_swap_space(arguments: Mapping[str, Any]) -> None:
    """Make sure that a trial can use these arguments of `suggest_swap`.

    Raises:
        ValueError: As `suggest_swap`.
        TypeError: If there is no argument of that name.
    """
    suggest_swap(_FirstChoices(), **arguments)


class _FirstChoices(optuna.trial.FixedTrial):
    """A trial that takes the first choice of all, to look whether a search space can be used."""

    def __init__(self) -> None:
        super().__init__({})

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[0]

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return low


def _range(name: str, limits: Range) -> tuple[float, ...]:
    """() for None, (value,) for a number, (low, high)."""
    if limits is None:
        return ()
    if isinstance(limits, (int, float)):
        return (float(limits),)
    values = tuple(float(limit) for limit in limits)
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ValueError(f"{name} must be a number or a range (low, high) with 0 < low <= high, got {limits!r}.")
    return values if values[0] < values[1] else values[:1]


def _choices(name: str, values: str | Sequence[str]) -> tuple[str, ...]:
    choices = (values,) if isinstance(values, str) else tuple(values)
    if not choices:
        raise ValueError(f"{name} needs at least one choice, got {values!r}.")
    return choices
