"""``apply`` and ``report`` on studies and checkpoints; ``space`` of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest
import torch
from torch import nn

from lightning_bln import StatFlags, swap_norms_
from lightning_bln.tuning.apply import checkpoint_flags, read_checkpoint
from lightning_bln.tuning.space import setting_params
from tests.cli_runs import run

CHOICES = optuna.distributions.CategoricalDistribution((True, False))
DATABASE = "sqlite:///flags.db"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoint best.ckpt of two layers, and nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LayerNorm(72))
    swap_norms_(model)
    torch.save({"state_dict": model.state_dict()}, "best.ckpt")
    return tmp_path


def study(name: str, values: dict[str, float], storage: str = DATABASE, **attrs: object) -> None:
    """A study of these settings and values, as `optuna tell` leaves it."""
    made = optuna.create_study(storage=storage, study_name=name)
    for key, value in attrs.items():
        made.set_user_attr(key, value)
    for code, value in values.items():
        params = setting_params(StatFlags.parse(code))
        distributions = dict.fromkeys(params, CHOICES)
        made.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flags.db with studies that have no best setting for best.ckpt."""
    path = tmp_path_factory.mktemp("studies") / "flags.db"
    storage = f"sqlite:///{path}"
    about = {"monitor": "loss", "mode": "min"}
    study("empty", {}, storage)
    study("other", {"TTFF": 1.0}, storage, lightning_bln=about | {"kind": "uniform", "layers": ["a"]})
    study("training", {"TTFF": 1.0}, storage, lightning_bln=about | {"kind": "training", "layers": []})
    return path


def flags(path: str) -> dict[str, str]:
    return {name: one.code for name, one in checkpoint_flags(read_checkpoint(path)).items()}


def test_apply_flags_by_hand():
    ended = run("apply", "--ckpt-path", "best.ckpt", "--out", "all.ckpt", "--flags", "ffff")
    assert (ended.code, ended.out) == (0, "all.ckpt: 2 layers with FFFF\n")
    assert flags("all.ckpt") == {"1": "FFFF", "3": "FFFF"}
    ended = run("apply", "--ckpt_path=best.ckpt", "--out=each.ckpt", "--flags", "3=TFTF, 1=FFTT")
    assert ended.out == "each.ckpt: 2 layers with 1=FFTT,3=TFTF\n"
    assert flags("each.ckpt") == {"1": "FFTT", "3": "TFTF"}
    assert flags("best.ckpt") == {"1": "TTFF", "3": "TTFF"}


def test_apply_the_best_of_a_study(monkeypatch: pytest.MonkeyPatch):
    study("flags", {"TTFF": 2.0, "FTFT": 1.0, "FFFF": 3.0})
    ended = run("apply", "--ckpt_path=best.ckpt", "--out=a.ckpt", f"--storage={DATABASE}", "--study_name=flags")
    assert ended.out == "a.ckpt: 2 layers with FTFT, the best of 'flags'\n"
    assert flags("a.ckpt") == {"1": "FTFT", "3": "FTFT"}
    # Optuna's own variable serves, and the name that tune gives a study.
    study("lightning-bln", {"TTTT": 1.0})
    monkeypatch.setenv("OPTUNA_STORAGE", DATABASE)
    assert run("apply", "--ckpt_path=best.ckpt", "--out=b.ckpt").code == 0
    assert flags("b.ckpt") == {"1": "TTTT", "3": "TTTT"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flags=TTX"], "StatFlags are four letters"),
        (["--flags=1=TTFF"], "must name every BatchLayerNorm of the model once (1, 3), got 1; missing: 3"),
        (["--flags=TTFF", "--study_name=a"], "the flags must come from one place, got --flags and a study"),
        (["--storage=sqlite:///none.db"], "must exist, got 'sqlite:///none.db', and there is no such file"),
        (["--storage=none.journal"], "must exist, got 'none.journal', and there is no such file"),
        ([], "must exist, got 'sqlite:///lightning-bln.db', and there is no such file"),
        ([f"--storage={DATABASE}", "--study_name=x"], "got 'x' where there are 'empty', 'other', 'training'"),
        ([f"--storage={DATABASE}", "--study_name=empty"], "The best setting needs at least one that was scored"),
        (
            [f"--storage={DATABASE}", "--study_name=other"],
            "the study must be of this checkpoint's model, got one over a",
        ),
        ([f"--storage={DATABASE}", "--study_name=training"], "a study of kind 'training'"),
        (["--flags=TTFF", "--out=best.ckpt"], "--out must be a new file, got 'best.ckpt', which exists"),
        (["--flags=TTFF", "--out=no/x.ckpt"], "The folder of 'no/x.ckpt' must exist"),
        (["--flags=TTFF", "--ckpt_path=text.ckpt"], "must be a complete file of plain types, got text.ckpt"),
        (["--flags=TTFF", "--ckpt_path=plain.ckpt"], "Flags belong to BatchLayerNorm layers, got plain.ckpt"),
        (["--flags=TTFF", "--bad"], "unrecognized arguments: --bad"),
    ],
)
def test_apply_of_bad_input_leaves_nothing(folder: Path, studies: Path, arguments: list[str], message: str):
    shutil.copy(studies, folder)
    (folder / "text.ckpt").write_text("text")
    torch.save({"state_dict": nn.BatchNorm1d(2).state_dict()}, "plain.ckpt")
    before = sorted(folder.iterdir())
    assert message in run("apply", "--ckpt_path=best.ckpt", "--out=x.ckpt", *arguments).error
    assert sorted(folder.iterdir()) == before


def test_apply_over_an_older_file():
    Path("x.ckpt").write_text("older")
    assert run("apply", "--ckpt_path=best.ckpt", "--out=x.ckpt", "--flags=FFFF", "--overwrite").code == 0
    assert flags("x.ckpt") == {"1": "FFFF", "3": "FFFF"}


def test_space_of_a_checkpoint():
    names = list(json.loads(run("space", "--ckpt_path=best.ckpt").out))
    assert names == [f"{layer}.{flag}" for layer in ("1", "3") for flag in StatFlags.names()]


def test_report(folder: Path):
    study("flags", {flags.code: float(i) for i, flags in enumerate(StatFlags.all())})
    arguments = ("report", f"--storage={DATABASE}", "--study_name=flags", "--title=A title")
    ended = run(*arguments, "--out=page.html")
    assert (ended.code, ended.out) == (0, "page.html\n")
    page = Path("page.html").read_text()
    assert "A title" in page
    assert "TFTF" in page
    assert "--out must be a new file, got 'page.html', which exists" in run(*arguments, "--out=page.html").error
    assert run(*arguments, "--out=page.html", "--overwrite").code == 0


def test_report_of_bad_input_leaves_nothing(folder: Path):
    study("empty", {})
    before = sorted(folder.iterdir())
    assert "complete trial" in run("report", f"--storage={DATABASE}", "--study_name=empty").error
    assert "folder" in run("report", f"--storage={DATABASE}", "--study_name=empty", "--out=no/page.html").error
    assert "storage must be" in run("report", "--storage=oracle://a/b").error
    assert "secret" not in run("report", "--storage=postgresql://me:secret@localhost:1/x").error
    assert sorted(folder.iterdir()) == before
