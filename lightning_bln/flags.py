"""The four inference flags of Batch Layer Normalization, as one frozen value."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

# Union, not "|": the alias is evaluated when the module is imported, on Python 3.10 too.
FlagsLike = Union["StatFlags", str, Mapping[str, bool], Sequence[bool]]

# Written out, not read from the dataclass: torch.compile traces it in every supported version.
_NAMES = ("batch_moving_mean", "batch_moving_var", "feature_moving_mean", "feature_moving_var")


@dataclass(frozen=True)
class StatFlags:
    """Which statistics inference takes from the population (True) and which from the current mini-batch (False).

    The flags act at inference only: training always uses the mini-batch's own statistics, so one trained model
    serves all 16 settings.

    Args:
        batch_moving_mean: Population mean over the samples, ``mu_b``. Default True.
        batch_moving_var: Population variance over the samples, ``var_b``. Default True.
        feature_moving_mean: Population mean over the features, ``mu_f``. Default False.
        feature_moving_var: Population variance over the features, ``var_f``. Default False.

    Raises:
        TypeError: If a flag is not a bool.

    Example:
        >>> StatFlags()
        StatFlags('TTFF')
        >>> StatFlags.parse("T,T,T,F").feature_moving_mean
        True

    Source: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898, and the authors' Keras layer, whose
    constructor has the same names, order and defaults.
    """

    batch_moving_mean: bool = True
    batch_moving_var: bool = True
    feature_moving_mean: bool = False
    feature_moving_var: bool = False

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if not isinstance(value, bool):
                raise TypeError(
                    f"StatFlags.{name} must be True (population) or False (mini-batch), got {value!r}; "
                    f"to read a written form such as 'TTFF' call StatFlags.parse(...)."
                )

    @classmethod
    def parse(cls, value: FlagsLike) -> StatFlags:
        """Read flags from a StatFlags, a string, four bools in order, or a mapping of flag names.

        A string is four letters T or F (``"TTFF"``, case and separators ``, ; space -`` ignored) or four words
        ``true`` / ``false`` (``"true,true,false,false"``). A mapping may leave flags out: they keep their defaults.

        Args:
            value: The written form.

        Returns:
            The flags.

        Raises:
            ValueError: If the string, the length or a name is not understood.
            TypeError: If ``value`` is of another type.

        Example:
            >>> StatFlags.parse("ttff") == StatFlags.parse([True, True, False, False]) == StatFlags()
            True
        """
        if isinstance(value, StatFlags):
            return value
        if isinstance(value, str):
            return cls._parse_string(value)
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(cls.names()))
            if unknown:
                raise ValueError(
                    f"StatFlags has the flags {', '.join(cls.names())}, got {', '.join(map(repr, unknown))}; "
                    f"call for example StatFlags.parse({{'batch_moving_mean': True}})."
                )
            return cls(**value)
        if isinstance(value, Sequence):
            if len(value) != 4:
                raise ValueError(
                    f"StatFlags has four flags ({', '.join(cls.names())}), got {len(value)} values {value!r}; "
                    f"call for example StatFlags.parse([True, True, False, False])."
                )
            return cls(*value)
        raise TypeError(
            f"StatFlags can be read from a string, four bools or a mapping, got {type(value).__name__} {value!r}; "
            f"call for example StatFlags.parse('TTFF')."
        )

    @classmethod
    def _parse_string(cls, text: str) -> StatFlags:
        letters = {"t": True, "f": False, "true": True, "false": False}
        words = text.lower()
        for separator in ",;-":
            words = words.replace(separator, " ")
        parts = words.split()
        if len("".join(parts)) == 4:
            parts = list("".join(parts))
        if len(parts) != 4 or any(part not in letters for part in parts):
            raise ValueError(
                f"StatFlags are four letters T (population) or F (mini-batch) in the order {', '.join(cls.names())}, "
                f"got {text!r}; write for example 'TTFF', the default."
            )
        return cls(*(letters[part] for part in parts))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The flags' names in canonical order."""
        return _NAMES

    @classmethod
    def all(cls) -> Iterator[StatFlags]:
        """All 16 settings, in canonical order: each flag runs over True, False, the last one fastest.

        Example:
            >>> [flags.code for flags in StatFlags.all()][:3]
            ['TTTT', 'TTTF', 'TTFT']
        """
        return (cls(*values) for values in itertools.product((True, False), repeat=4))

    @property
    def code(self) -> str:
        """The four letters, such as ``"TTFF"``."""
        return "".join("T" if value else "F" for value in self)

    def to_dict(self) -> dict[str, bool]:
        """The flags as a plain dict in canonical order, as checkpoints and studies hold them."""
        return {name: getattr(self, name) for name in self.names()}

    def __iter__(self) -> Iterator[bool]:
        return iter((self.batch_moving_mean, self.batch_moving_var, self.feature_moving_mean, self.feature_moving_var))

    def __repr__(self) -> str:
        return f"StatFlags({self.code!r})"

    def __str__(self) -> str:
        return self.code
