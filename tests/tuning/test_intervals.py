"""Intervals of paired differences: the formula recomputed, and how often they hold."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from lightning_bln.tuning.intervals import MAX_UNITS, mean_loss, merge_units, paired_difference, student_quantile


def test_equal_units_are_a_paired_t_test() -> None:
    random.seed(0)
    first = [(1, random.gauss(1, 1)) for _ in range(30)]
    second = [(1, value + random.gauss(0.1, 0.3)) for _, value in first]
    difference, low, high = paired_difference(second, first, confidence=0.9)
    test = stats.ttest_rel([v for _, v in second], [v for _, v in first])
    interval = test.confidence_interval(0.9)
    assert (difference, low, high) == pytest.approx(
        (statistics.fmean(b - a for (_, a), (_, b) in zip(first, second, strict=True)), interval.low, interval.high)
    )


def test_unequal_units_by_hand() -> None:
    first, second = [(2, 4.0), (3, 9.0), (1, 1.0)], [(2, 2.0), (3, 9.0), (1, 0.0)]
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(3 / 6)
    squares = (2 - 2 * 0.5) ** 2 + (0 - 3 * 0.5) ** 2 + (1 - 0.5) ** 2
    width = student_quantile(0.975, 2) * math.sqrt(3 / 2 * squares) / 6
    assert (low, high) == pytest.approx((0.5 - width, 0.5 + width))


def test_more_comparisons_make_wider_intervals() -> None:
    first, second = [(1, float(i)) for i in range(9)], [(1, float(i * i)) for i in range(9)]
    widths = [paired_difference(first, second, comparisons=n)[2] for n in (1, 5, 15)]
    assert widths == sorted(widths)
    _, low, high = paired_difference(first, second, comparisons=5)
    assert (low, high) == pytest.approx(paired_difference(first, second, confidence=0.99)[1:])


def test_intervals_hold_as_often_as_they_say_where_batches_move_together() -> None:
    """Samples of a batch share a shift: intervals from batches hold, from samples taken as independent they do not."""
    random.seed(1)
    held = {"batches": 0, "samples": 0}
    for _ in range(400):
        shifts = [random.gauss(0, 1) for _ in range(25)]
        values = [[shift + random.gauss(0, 1) for _ in range(16)] for shift in shifts]
        zero = {"batches": [(16, 0.0)] * 25, "samples": [(1, 0.0)] * 400}
        units = {
            "batches": [(16, sum(batch)) for batch in values],
            "samples": [(1, value) for batch in values for value in batch],
        }
        for name in held:
            _, low, high = paired_difference(units[name], zero[name])
            held[name] += low <= 0 <= high
    assert 0.92 < held["batches"] / 400 < 0.98
    assert held["samples"] / 400 < 0.7


def test_what_cannot_be_said() -> None:
    assert paired_difference([(3, 6.0)], [(3, 3.0)])[0] == 1
    assert all(map(math.isnan, paired_difference([(3, 6.0)], [(3, 3.0)])[1:]))
    assert all(map(math.isnan, paired_difference([], [])))
    assert all(map(math.isnan, paired_difference([(1, math.inf), (1, 1.0)], [(1, math.inf), (1, 1.0)])))
    with pytest.raises(ValueError, match=r"got 2 units of 4 samples and 1 units of 4 samples; score both with one"):
        paired_difference([(2, 1.0), (2, 1.0)], [(4, 2.0)])


def test_merging_keeps_sums() -> None:
    units = [(i % 3 + 1, float(i)) for i in range(1000)]
    merged = merge_units(units)
    assert len(merged) <= MAX_UNITS
    assert sum(n for n, _ in merged) == sum(n for n, _ in units)
    assert mean_loss(merged) == pytest.approx(mean_loss(units))
    assert merge_units(units[:MAX_UNITS]) == units[:MAX_UNITS]
    assert math.isnan(mean_loss([]))
    assert mean_loss([(1, math.inf), (1, -math.inf)]) != 0
