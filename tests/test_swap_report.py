"""The report as data, as one line and as a table."""

import dataclasses

import pytest

from lightning_bln.swap_report import SwapEntry, SwapReport

BATCH = SwapEntry("bn1", "BatchNorm2d", "BatchLayerNorm", "batch normalization")
OTHER = SwapEntry("layer1.0.bn1", "BatchNorm2d", "BatchLayerNorm", "batch normalization")
LAYER = SwapEntry("head.norm", "LayerNorm", "BatchLayerNorm", "layer normalization, shared with tail.norm")
GROUP = SwapEntry("stem.gn", "GroupNorm", None, "group normalization is swapped on request: norms=('group',)")
ROOT = SwapEntry("", "LayerNorm", "BatchLayerNorm", "layer normalization")


def test_entries_are_split_by_whether_there_is_a_new_layer():
    report = SwapReport((BATCH, GROUP, LAYER))
    assert report.swapped == (BATCH, LAYER)
    assert report.skipped == (GROUP,)
    assert [entry.swapped for entry in report.entries] == [True, False, True]
    assert not report.dry_run


@pytest.mark.parametrize(
    ("entries", "dry_run", "text"),
    [
        ((), False, "0 layers swapped"),
        ((BATCH,), False, "1 layer swapped (1 BatchNorm2d)"),
        ((BATCH, OTHER), False, "2 layers swapped (2 BatchNorm2d)"),
        ((BATCH, LAYER, OTHER), False, "3 layers swapped (2 BatchNorm2d, 1 LayerNorm)"),
        ((BATCH, GROUP), False, "1 layer swapped (1 BatchNorm2d), 1 skipped"),
        ((GROUP, GROUP), False, "0 layers swapped, 2 skipped"),
        ((BATCH, GROUP), True, "1 layer would be swapped (1 BatchNorm2d), 1 skipped"),
    ],
)
def test_summary(entries, dry_run, text):
    assert SwapReport(entries, dry_run).summary() == text


def test_table_has_a_row_for_each_layer_with_name_old_new_and_why():
    table = str(SwapReport((BATCH, GROUP, LAYER)))
    title, *lines = table.splitlines()
    assert title.strip() == "2 layers swapped (1 BatchNorm2d, 1 LayerNorm), 1 skipped"
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert ["layer", "old", "new", "why"] in cells
    for entry in (BATCH, GROUP, LAYER):
        assert [entry.name, entry.old, entry.new or "-", entry.why] in cells


def test_table_is_plain_text_that_fits_120_columns_and_cuts_nothing_off():
    long = SwapEntry("backbone." * 12 + "norm", "BatchNorm2d", None, "not in include " * 8)
    table = str(SwapReport((BATCH, long)))
    assert "\x1b" not in table
    assert max(map(len, table.splitlines())) <= 120
    assert "…" not in table
    folded = "".join(line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│"))
    assert long.name in folded


def test_the_model_itself_has_a_name_in_the_table():
    assert "(the model)" in str(SwapReport((ROOT,)))


def test_a_name_with_square_brackets_is_not_read_as_markup():
    entry = SwapEntry("norms.[bold]x", "LayerNorm", None, "filter_fn returned [red]False")
    assert "norms.[bold]x" in str(SwapReport((entry,)))
    assert "[red]False" in str(SwapReport((entry,)))


def test_rich_prints_the_same_table():
    from rich.console import Console

    report = SwapReport((BATCH, GROUP))
    console = Console(width=120, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(report)
    assert capture.get().rstrip() == str(report)


@pytest.mark.parametrize("value", [BATCH, SwapReport((BATCH,))], ids=["entry", "report"])
def test_frozen_and_compared_by_value(value):
    assert value == dataclasses.replace(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, "other")
