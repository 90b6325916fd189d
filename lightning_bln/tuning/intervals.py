"""Confidence intervals of paired differences: is one setting's loss truly different from another's?"""

from __future__ import annotations

import math
from collections.abc import Sequence

Units = Sequence[tuple[int, float]]
"""What a loss was taken over, in order: (number of samples, sum of their losses) of each unit."""

MAX_UNITS = 256
"""As many units are kept at the most; neighbours are merged, for every setting at the same places."""

MIN_BATCHES = 10
"""From this number of batches on the units are batches; below, they are samples, if each sample's loss is known."""


def mean_loss(units: Units) -> float:
    """The loss over all samples."""
    samples = sum(n for n, _ in units)
    totals = [total for _, total in units]
    total = math.fsum(totals) if all(map(math.isfinite, totals)) else sum(totals)  # fsum refuses inf - inf
    return total / samples if samples else math.nan


def paired_difference(
    first: Units, second: Units, *, confidence: float = 0.95, comparisons: int = 1
) -> tuple[float, float, float]:
    """How much larger the first loss is than the second on the same units, and between which values that lies.

        d = sum_u (a_u - b_u) / n,   s^2 = G/(G-1) * sum_u (a_u - b_u - n_u * d)^2 / n^2,   d -+ t * s

    with a_u and b_u the units' summed losses, n_u their samples, n all samples, G the number of units and t Student's
    quantile with G - 1 degrees of freedom at ``1 - (1 - confidence) / comparisons`` (two-sided, Bonferroni): the
    intervals of all comparisons hold together with at least that confidence.

    Units are meant to be mini-batches: where flags take statistics from the mini-batch, the losses of its samples move
    together, and an interval that took them as independent would be too narrow.

    Args:
        first: Units of one setting.
        second: Those of another setting on the same data.
        confidence: Of all comparisons together. Default 0.95.
        comparisons: How many such intervals are looked at. Default 1.

    Returns:
        The difference, its lower and its upper limit. The limits are NaN with fewer than two units; all three are NaN
        if a loss is not finite.

    Raises:
        ValueError: If the settings were not scored on the same units.

    Example:
        >>> paired_difference([(2, 4.0), (2, 6.0), (2, 5.0)], [(2, 2.0), (2, 4.0), (2, 3.0)])
        (1.0, 1.0, 1.0)

    Source: cluster-robust variance of a mean, Liang and Zeger, Biometrika 73 (1986), 13-22.
    """
    sizes = [n for n, _ in first]
    if sizes != [n for n, _ in second]:
        raise ValueError(
            f"Settings can be compared on the same batches only, got {_described(first)} and {_described(second)}; "
            f"score both with one data loader that does not shuffle."
        )
    samples, count = sum(sizes), len(sizes)
    differences = [a - b for (_, a), (_, b) in zip(first, second, strict=True)]
    if samples == 0 or not all(map(math.isfinite, differences)):
        return math.nan, math.nan, math.nan
    mean = math.fsum(differences) / samples
    if count < 2:
        return mean, math.nan, math.nan
    residuals = math.fsum((d - n * mean) ** 2 for d, n in zip(differences, sizes, strict=True))
    error = math.sqrt(count / (count - 1) * residuals) / samples
    width = student_quantile(1 - (1 - confidence) / comparisons / 2, count - 1) * error
    return mean, mean - width, mean + width


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution."""
    from scipy.stats import t  # takes a quarter of a second to import

    return float(t.ppf(probability, degrees))


def merge_units(units: Units) -> list[tuple[int, float]]:
    """The units with neighbours merged, pair by pair, until there are at most `MAX_UNITS`."""
    merged = list(units)
    while len(merged) > MAX_UNITS:
        merged = [
            (sum(n for n, _ in merged[i : i + 2]), sum(total for _, total in merged[i : i + 2]))
            for i in range(0, len(merged), 2)
        ]
    return merged


def _described(units: Units) -> str:
    return f"{len(units)} units of {sum(n for n, _ in units)} samples"
