"""ScoreTable: order, ties, and its written forms."""

from __future__ import annotations

import csv
import io
import math

import pytest

from lightning_bln import StatFlags
from lightning_bln.tuning import CellScore, ScoreTable
from lightning_bln.tuning.intervals import mean_loss
from lightning_bln.tuning.space import parse_setting


def score(code: str, losses: list[float], **metrics: float) -> CellScore:
    units = tuple((10, 10 * loss) for loss in losses)
    return CellScore(parse_setting(code), mean_loss(units), metrics, 10 * len(units), units)


BEST = score("TTFF", [1.0, 2.0, 1.5, 1.2], accuracy=0.5)
NEAR = score("TTFT", [1.1, 1.9, 1.6, 1.2], accuracy=0.7)
FAR = score("FFFF", [2.0, 3.0, 2.6, 2.1], accuracy=0.4)
FAILED = CellScore(StatFlags.parse("FTFT"), math.nan, error="ValueError: [bold]no[/bold]")
PRUNED = CellScore(parse_setting("a=TTFF,b=FFFF"), math.nan, samples=10, units=((10, 9.0),), pruned=True)
TABLE = ScoreTable([FAILED, FAR, PRUNED, NEAR, BEST])


def test_best_first_and_what_was_not_scored_last() -> None:
    assert [own.code for own in TABLE] == ["TTFF", "TTFT", "FFFF", "FTFT", "a=TTFF,b=FFFF"]
    assert TABLE.best is BEST
    assert TABLE[1:3] == (NEAR, FAR)
    assert len(TABLE) == 5
    by_accuracy = ScoreTable([FAR, NEAR, BEST], monitor="accuracy", mode="max")
    assert by_accuracy.best is NEAR
    diverged = score("TFFF", [math.nan] * 4, accuracy=math.nan)
    assert [own.code for own in ScoreTable([diverged, FAR])] == ["FFFF", "TFFF"]


def test_ties() -> None:
    assert [TABLE.tied(own) for own in TABLE] == [True, True, False, False, False]
    difference, low, high = TABLE.compared(FAR)
    assert difference == pytest.approx(FAR.loss - BEST.loss)
    assert 0 < low < difference < high
    assert "best by loss: TTFF, 1 tied with it" in TABLE.summary()
    assert "1 failed, 1 pruned" in TABLE.summary()
    # Two comparisons are made here, one in a table of two: the interval is narrower there.
    assert ScoreTable([BEST, FAR]).compared(FAR)[1] > low


def test_as_json() -> None:
    again = ScoreTable.from_json(TABLE.to_json())
    assert again.rows() == TABLE.rows()
    assert [own.units for own in again] == [own.units for own in TABLE]
    with pytest.raises(ValueError, match=r"is what ScoreTable\.to_json writes"):
        ScoreTable.from_json('{"format": "another"}')


def test_as_files(tmp_path) -> None:
    TABLE.to_json(tmp_path / "table.json")
    assert ScoreTable.from_json(tmp_path / "table.json").rows() == TABLE.rows()
    text = TABLE.to_csv(tmp_path / "table.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert text == (tmp_path / "table.csv").read_text()
    assert [row["setting"] for row in rows] == [own.code for own in TABLE]
    assert rows[0]["loss"] == str(BEST.loss)
    assert [row["status"] for row in rows] == ["complete", "complete", "complete", "failed", "pruned"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "", ""]
    assert rows[3]["loss"] == ""


def test_as_text() -> None:
    text = str(TABLE)
    for part in ("TTFF", "best", "tied", "FTFT failed: ValueError: [bold]no[/bold]", "pruned", "95 % interval"):
        assert part in text
    assert "nan" not in text
    assert repr(TABLE) == f"ScoreTable({TABLE.summary()})"


def test_as_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = TABLE.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["setting"]) == [own.code for own in TABLE]


def test_there_may_be_no_best() -> None:
    with pytest.raises(ValueError, match="got none at all"):
        ScoreTable([]).best  # noqa: B018
    with pytest.raises(ValueError, match=r"finite value, got FTFT: ValueError: \[bold\]no"):
        ScoreTable([FAILED]).best  # noqa: B018
    assert ScoreTable([FAILED]).summary() == "1 setting, 1 failed"
    assert str(ScoreTable([])).startswith("0 settings")


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'up'"):
        ScoreTable([BEST], mode="up")
    with pytest.raises(ValueError, match="confidence lies between 0 and 1, got 95"):
        ScoreTable([BEST], confidence=95)
    with pytest.raises(ValueError, match="one of the metrics accuracy, got 'f1'"):
        ScoreTable([BEST], monitor="f1")
