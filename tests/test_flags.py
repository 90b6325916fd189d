"""`StatFlags`: order, written forms, errors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bln import StatFlags

NAMES = ("batch_moving_mean", "batch_moving_var", "feature_moving_mean", "feature_moving_var")
flag_values = st.tuples(*[st.booleans()] * 4)


def test_defaults_are_the_authors():
    flags = StatFlags()
    assert (flags.batch_moving_mean, flags.batch_moving_var) == (True, True)
    assert (flags.feature_moving_mean, flags.feature_moving_var) == (False, False)
    assert flags.code == str(flags) == "TTFF"
    assert repr(flags) == "StatFlags('TTFF')"


def test_canonical_order():
    assert StatFlags.names() == NAMES
    assert list(StatFlags(True, False, True, False)) == [True, False, True, False]
    assert list(StatFlags().to_dict().items()) == list(zip(NAMES, (True, True, False, False), strict=True))


def test_all_runs_over_true_then_false_with_the_last_flag_fastest():
    codes = [flags.code for flags in StatFlags.all()]
    assert codes == [f"{number:04b}".translate({ord("0"): "T", ord("1"): "F"}) for number in range(16)]


def test_is_a_frozen_value():
    flags = StatFlags()
    with pytest.raises(FrozenInstanceError):
        flags.batch_moving_mean = False
    assert flags == StatFlags(True, True, False, False) != StatFlags(False)
    assert {flags: 1}[StatFlags.parse("TTFF")] == 1
    assert flags == copy.deepcopy(flags) == pickle.loads(pickle.dumps(flags))


@given(values=flag_values)
def test_parse_reads_back_every_form_it_is_written_in(values: tuple[bool, ...]):
    flags = StatFlags(*values)
    words = [str(value) for value in values]
    forms = [flags, values, list(values), tuple(flags), flags.to_dict(), flags.code, flags.code.lower(), str(flags)]
    forms += [separator.join(part) for separator in (",", ", ", ";", " ", "-") for part in (flags.code, words)]
    for form in forms:
        assert StatFlags.parse(form) == flags, form


@pytest.mark.parametrize("text", ["TT-FF", "TT FF", "tt, ff"])
def test_separators_in_a_string_are_ignored(text: str):
    assert StatFlags.parse(text) == StatFlags()


def test_a_mapping_may_leave_flags_out():
    assert StatFlags.parse({}) == StatFlags()
    assert StatFlags.parse({"feature_moving_var": True}).code == "TTFT"


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ("TTF", ValueError, "four letters T .* got 'TTF'; write for example 'TTFF'"),
        ("TTFX", ValueError, "four letters T .* got 'TTFX'"),
        ("", ValueError, "four letters T .* got ''"),
        ("yes,no,no,no", ValueError, "four letters T .* got 'yes,no,no,no'"),
        ([True, True], ValueError, r"has four flags .* got 2 values .*; call for example"),
        ([1, 1, 0, 0], TypeError, r"batch_moving_mean must be True \(population\) .* got 1"),
        (["T", "T", "F", "F"], TypeError, "batch_moving_mean must be True .* got 'T'"),
        ({"moving_mean": True}, ValueError, "has the flags batch_moving_mean, .* got 'moving_mean'; call"),
        ({"batch_moving_mean": None}, TypeError, "batch_moving_mean must be True .* got None"),
        (None, TypeError, "a string, four bools or a mapping, got NoneType None"),
        (3, TypeError, "a string, four bools or a mapping, got int 3"),
    ],
)
def test_parse_says_what_it_needs(value: object, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        StatFlags.parse(value)


def test_the_constructor_takes_bools_only():
    with pytest.raises(TypeError, match=r"got 'TTFF'; to read a written form .* call StatFlags.parse"):
        StatFlags("TTFF")
