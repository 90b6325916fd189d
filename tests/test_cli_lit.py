"""The subcommands that run a user's model: ``fit``, ``validate``, ``test``, ``predict``, ``score`` and ``tune``."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from lightning_bln import BLNSwap, StatFlags
from lightning_bln.cli.lit import SwapArguments
from lightning_bln.tuning.apply import checkpoint_flags, read_checkpoint
from lightning_bln.tuning.table import ScoreTable
from tests.cli_runs import QUIET, ROOT, Ended, command, run, user_folder

pytestmark = [
    # LightningCLI's own use of jsonargparse.
    pytest.mark.filterwarnings(
        r"ignore:\s*(By default only one Jsonargparse|.*was deprecated in v4):DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden by:UserWarning"),
    # A checkpoint of another folder.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

MODEL = ("--model=my_model.LitModel", "--data=my_model.Data")
FIT = ("fit", *MODEL, *QUIET)
NO_CHECKPOINTS = "--trainer.enable_checkpointing=false"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after ``fit --bln``: best.ckpt, and config.yaml of that run."""
    folder = user_folder(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = run(*FIT, "--bln=true", "--trainer.default_root_dir=run")
    assert ended.code == 0, ended.err
    (checkpoint,) = folder.glob("run/checkpoints/*.ckpt")
    checkpoint.rename(folder / "best.ckpt")
    (folder / "run" / "config.yaml").rename(folder / "config.yaml")
    return folder


@pytest.fixture(autouse=True)
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with my_model.py, best.ckpt and config.yaml, and nothing in the environment."""
    for name in ("my_model.py", "best.ckpt", "config.yaml"):
        os.link(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    return tmp_path


def saved(folder: str = "run") -> Path:
    (path,) = Path(folder).glob("checkpoints/*.ckpt")
    return path


# ------------------------------------------------------------------------- fit


def test_fit_swaps_with_the_flag_and_only_with_it(trained: Path):
    assert checkpoint_flags(read_checkpoint("best.ckpt")) == dict.fromkeys(("net.1", "net.5"), StatFlags())
    assert yaml.safe_load(Path("config.yaml").read_text())["bln"] is True
    assert run(*FIT, "--trainer.default_root_dir=run").code == 0
    with pytest.raises(ValueError, match="hold none"):
        checkpoint_flags(read_checkpoint(saved()))
    assert yaml.safe_load(Path("run/config.yaml").read_text())["bln"] is False


@pytest.mark.parametrize(
    "written",
    [
        ("--bln.flags=FFFF", "--bln.statistics=per_channel"),
        ("--bln", "--bln.flags", "ffff", "--bln.statistics", "per_channel"),
        ("--bln", '{"flags": "FFFF", "statistics": "per_channel"}'),
        ("--config=bln.yaml",),
        ("--config=per_position.yaml", "--bln.statistics=per_channel"),
    ],
)
def test_arguments_of_the_swap(written: tuple[str, ...]):
    Path("bln.yaml").write_text("bln: {flags: FFFF, statistics: per_channel}\n")
    Path("per_position.yaml").write_text("bln:\n  flags: FFFF\n  statistics: per_position\n")
    ended = run(*FIT, *written, "--trainer.default_root_dir=run", "--trainer.limit_train_batches=2")
    assert ended.code == 0, ended.err
    states = read_checkpoint(saved())["state_dict"]
    configs = [states[f"{name}._extra_state"]["config"] for name in ("net.1", "net.5")]
    assert [(one["flags"], one["statistics"]) for one in configs] == [("FFFF", "per_channel")] * 2
    saved_again = yaml.safe_load(Path("run/config.yaml").read_text())["bln"]
    assert StatFlags.parse(saved_again["flags"]).code == "FFFF"


@pytest.mark.parametrize("written", [("--bln=false",), ("--bln.flags=FFFF", "--bln", "false"), ()])
def test_no_swap(written: tuple[str, ...]):
    Path("on.yaml").write_text("bln: true\n")
    config = ("--config=on.yaml",) if written else ()
    ended = run(*FIT, *config, *written, "--trainer.fast_dev_run=true")
    assert ended.code == 0
    assert "BLNSwap" not in ended.err


def test_the_options_are_those_of_the_callback():
    own = {one.name: one for one in dataclasses.fields(SwapArguments)}
    parameters = inspect.signature(BLNSwap).parameters
    assert list(own) == [name for name in parameters if name != "filter_fn"]  # a function cannot be written
    built = SwapArguments()
    for name in own:
        default = parameters[name].default
        assert getattr(built, name) == (list(default) if isinstance(default, tuple) else default), name


def test_the_swap_comes_before_all_other_callbacks():
    Path("my_callbacks.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Order(pl.Callback):\n"
        "    def setup(self, trainer, pl_module, stage):\n"
        "        print([type(c).__name__ for c in trainer.callbacks][:2], type(pl_module.net[1]).__name__)\n"
    )
    ended = run(*FIT, "--bln", "--trainer.callbacks=my_callbacks.Order", "--trainer.fast_dev_run=true")
    assert "['BLNSwap', 'Order'] BatchLayerNorm" in ended.out


def test_an_optimizer_from_the_command_line_trains_the_swapped_layers():
    # LightningCLI builds it from the model's parameters before the swap.
    once = (*FIT, "--bln", "--trainer.limit_train_batches=1")
    assert run(*once, "--trainer.default_root_dir=still", "--optimizer=SGD", "--optimizer.lr=0").code == 0
    assert run(*once, "--trainer.default_root_dir=moved", "--optimizer=SGD", "--optimizer.lr=0.1").code == 0
    still, moved = (read_checkpoint(saved(name))["state_dict"] for name in ("still", "moved"))
    for name in ("net.1.weight", "net.1.bias", "net.5.weight", "net.5.bias"):
        assert not torch.equal(still[name], moved[name]), name
    # "preserve": weight 1 times the root of the channels.
    torch.testing.assert_close(still["net.1.weight"], torch.full((4,), 2.0))


def test_a_model_with_loaders_of_its_own():
    ended = run("fit", "--model=my_model.WithData", *QUIET, "--bln", "--trainer.default_root_dir=run")
    assert ended.code == 0, ended.err
    # The layer that configure_model builds is swapped, and scored, too.
    assert list(checkpoint_flags(read_checkpoint(saved()))) == ["net.1", "net.5", "net.7"]
    ended = run("score", "--model=my_model.WithData", *QUIET, f"--ckpt_path={saved()}", "--cells=TTFF", "--json=-")
    assert ScoreTable.from_json(ended.out).best.samples == 48


def test_a_layer_built_in_setup():
    arguments = ("--model=my_model.BuiltInSetup", "--data=my_model.Data", *QUIET)
    assert run("fit", *arguments, "--bln", "--trainer.default_root_dir=run").code == 0
    ended = run("score", *arguments, f"--ckpt_path={saved()}", "--cells=TTFF,FFFF", "--json=-")
    assert len(ScoreTable.from_json(ended.out)) == 2


def test_resume(folder: Path):
    ended = run(*FIT, "--bln", "--trainer.max_epochs=2", "--ckpt_path=best.ckpt", "--trainer.default_root_dir=run")
    assert ended.code == 0, ended.err
    assert read_checkpoint(saved())["epoch"] == 1


# ---------------------------------------------------------- evaluation


@pytest.mark.parametrize("name", ["validate", "test"])
def test_evaluation_of_a_swapped_checkpoint(name: str):
    ended = run(name, *MODEL, *QUIET, "--bln", "--ckpt-path", "best.ckpt")
    assert ended.code == 0, ended.err
    loss = next(float(line.split("│")[2]) for line in ended.out.splitlines() if "val_loss" in line)
    table = ScoreTable.from_json(run("score", *MODEL, *QUIET, "--ckpt_path=best.ckpt", "--cells=TTFF", "--json=-").out)
    assert loss == pytest.approx(table.best.metrics["val_loss"], abs=1e-6)


def test_predict():
    assert run("predict", *MODEL, *QUIET, "--bln", "--ckpt_path=best.ckpt").code == 0


def test_one_configuration_for_all_commands(folder: Path):
    # Keys of one command are no mistake in the file of another, but are one on the command line.
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"cells": "TTFF,FFFF", "monitor": "val_acc", "mode": "max", "verbose": False, "n_trials": None}
    Path("all.yaml").write_text(yaml.safe_dump(config))
    ended = run("score", "--config=all.yaml", "--ckpt_path=best.ckpt", "--json=-")
    table = ScoreTable.from_json(ended.out)
    assert ({one.code for one in table}, table.monitor, table.mode) == ({"TTFF", "FFFF"}, "val_acc", "max")
    assert run("validate", "--config=all.yaml", "--ckpt_path=best.ckpt").code == 0
    assert run("fit", "--config=all.yaml", "--trainer.default_root_dir=run").code == 0
    # What was saved holds what fit knows, and no more.
    assert set(yaml.safe_load(Path("run/config.yaml").read_text())) == set(
        yaml.safe_load((folder / "config.yaml").read_text())
    )


# ---------------------------------------------------------------- score and tune


def test_score_prints_a_table_and_writes_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = run(
        "score", "--config=config.yaml", "--ckpt_path=best.ckpt", "--monitor=val_loss", "--csv=a.csv", "--json=a.json"
    )
    assert ended.code == 0, ended.err
    assert ended.out.startswith("16 settings; best by val_loss: ")
    assert all(f"  {flags.code} " in ended.out for flags in StatFlags.all())
    assert max(map(len, ended.out.splitlines())) <= 80
    table = ScoreTable.from_json(Path("a.json"))
    assert len(table) == 16
    assert Path("a.csv").read_text() == table.to_csv()
    assert table.best.code in ended.out.splitlines()[0]


def test_score_settings_by_layer_on_some_batches():
    cells = "net.1=TTFF,net.5=FFFF; FFFF"
    ended = run("score", *MODEL, *QUIET, "--ckpt_path=best.ckpt", f"--cells={cells}", "--limit_batches=2", "--json=-")
    table = ScoreTable.from_json(ended.out)
    assert {one.code for one in table} == {"net.1=TTFF,net.5=FFFF", "FFFF"}
    assert {one.samples for one in table} == {16}


def test_tune_and_what_comes_next():
    arguments = ("--config=config.yaml", "--ckpt_path=best.ckpt", "--monitor=val_loss", "--study-name=mine")
    ended = run("tune", *arguments, "--storage=sqlite:///flags.db", "--json=a.json")
    assert ended.code == 0, ended.err
    study = optuna.load_study(storage="sqlite:///flags.db", study_name="mine")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 16
    assert len(ScoreTable.from_json(Path("a.json"))) == 16
    # The next commands are ready to be typed.
    following = [line.strip() for line in ended.out.splitlines() if line.startswith("  lightning-bln ")]
    apply, report = ([word.strip("'") for word in line.split()[1:]] for line in following)
    assert apply == [
        *("apply", "--ckpt_path", "best.ckpt", "--out", "best-chosen.ckpt"),
        *("--storage", "sqlite:///flags.db", "--study_name", "mine"),
    ]
    assert run(*apply).code == 0
    best = ScoreTable.from_json(Path("a.json")).best
    assert set(checkpoint_flags(read_checkpoint("best-chosen.ckpt")).values()) == {best.setting}
    assert run(*report).code == 0
    # Once more: nothing is left to do.
    assert run("tune", *arguments, "--storage=sqlite:///flags.db", "--json=b.json").code == 0
    assert Path("b.json").read_text() == Path("a.json").read_text()
    assert len(optuna.load_study(storage="sqlite:///flags.db", study_name="mine").trials) == 16


def test_tune_by_layer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPTUNA_STORAGE", "flags.journal")
    ended = run(
        *("tune", *MODEL, *QUIET, "--ckpt_path=best.ckpt", "--monitor=val_loss", "--per-layer", "--n_trials=4"),
        *("--sampler=RandomSampler", "--sampler_kwargs", '{"seed": 1}', "--limit_batches=3"),
    )
    assert ended.code == 0, ended.err
    assert "Layers, in the order of the letters: net.1, net.5" in ended.out
    # Whoever reads this has the variable too.
    assert "--storage" not in ended.out
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("flags.journal"))
    study = optuna.load_study(storage=storage, study_name="lightning-bln")
    assert study.user_attrs["lightning_bln"]["kind"] == "per_layer"
    assert len(study.trials) == 20
    assert run("apply", "--ckpt_path=best.ckpt", "--out=chosen.ckpt").code == 0
    chosen = checkpoint_flags(read_checkpoint("chosen.ckpt"))
    best = study.best_trial.params
    assert all(
        best[f"{layer}.{flag}"] == value for layer, one in chosen.items() for flag, value in one.to_dict().items()
    )


def test_a_password_is_not_repeated():
    from lightning_bln.cli.flag_trainer import _next_commands

    text = _next_commands("best.ckpt", "postgresql://me:secret@host/db", "lightning-bln")
    assert "secret" not in text
    assert '--storage "$STORAGE"' in text


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fit"],
            "the following arguments are required: --model; write --model my_module.LitModel, or --config run.yaml",
        ),
        (
            ["fit", "--model=nope.Model"],
            "--model: nope.Model: No module named 'nope'; write --model my_module.LitModel",
        ),
        (["fit", "--model=my_model.Nope"], "module 'my_model' has no attribute 'Nope'"),
        (["fit", "--model=my_model.Data"], "does not correspond to a subclass of LightningModule, got 'my_model.Data'"),
        (
            ["fit", *MODEL, "--model.wdth=3"],
            "Option 'wdth' is not accepted, got '3'; see lightning-bln fit --model.help my_",
        ),
        (["fit", *MODEL, "--model.width=x"], "--model.width: my_model.LitModel: expected int, got 'x'"),
        (
            ["fit", *MODEL, "--trainer.max_epochs=x"],
            "--trainer.max_epochs: expected int, got 'x'; see lightning-bln fit --",
        ),
        (["fit", *MODEL, "--trainer.max_epocs=2"], "did you mean '--trainer.max_epochs'?"),
        (
            ["fit", *MODEL, "--optimizer=SDG"],
            "--optimizer: Expected a dot import path string: SDG; write --optimizer SGD",
        ),
        (["fit", *MODEL, "--trainer.accelerator=abacus"], "the Trainer must be given settings that fit"),
        (["fit", *MODEL, "--trainer.devices=nine"], "the Trainer must be given settings that fit"),
        (["fit", "--config=none.yaml"], "--config: File does not exist"),
        (["fit", "--config=foo.yaml"], "does not accept option 'foo'"),
        (
            ["fit", *MODEL, "--bln=maybe"],
            "write --bln true, or its arguments as in --bln.flags FFFF; see lightning-bln fit -",
        ),
        (
            ["fit", *MODEL, "--bln.statistics=x"],
            "--bln.statistics: Expected a Literal['per_position', 'per_channel']. Got",
        ),
        (["fit", *MODEL, "--bln.flags=XXXX"], "StatFlags are four letters"),
        (
            ["fit", *MODEL, "--bln.include=nothing"],
            "Every include pattern must match a normalization layer, got 'nothing'",
        ),
        (["fit", *MODEL, "--bln", "--trainer.callbacks=lightning_bln.BLNSwap"], "BLNSwap must be given once"),
        (["fit", *MODEL, "--cells=TTFF"], "--cells is an option of score, got it with fit; leave it out."),
        (
            ["fit", *MODEL, "--ckpt_path=none.ckpt"],
            "--ckpt_path must be a checkpoint, got 'none.ckpt', and there is no such",
        ),
        (["fit", *MODEL, "--ckpt_path=my_model.py"], "must be a complete file of plain types, got my_model.py"),
        (
            ["validate", *MODEL, "--ckpt_path=best.ckpt"],
            "got one with BatchLayerNorm for a model without; add --bln true",
        ),
        (
            ["validate", *MODEL, "--bln", "--ckpt_path=plain.ckpt"],
            "without BatchLayerNorm for a model with it; leave --bln",
        ),
        (
            ["test", *MODEL, "--ckpt_path=other.ckpt"],
            "must be a checkpoint of the same model, got another one (Missing key",
        ),
        (["score", *MODEL], "arguments are required: --ckpt_path; write --ckpt_path RUN/checkpoints/best.ckpt"),
        (["score", *MODEL, "--ckpt_path=plain.ckpt"], "Flags belong to BatchLayerNorm layers, got plain.ckpt"),
        (
            ["score", "--model=my_model.WithData", "--ckpt_path=best.ckpt"],
            "must be a checkpoint of the same model, got best",
        ),
        (["score", *MODEL, "--ckpt_path=best.ckpt", "--cells=TTXF"], "StatFlags are four letters"),
        (["score", *MODEL, "--ckpt_path=best.ckpt", "--cells=net.1=TTFF"], "missing: net.5"),
        (
            ["score", *MODEL, "--ckpt_path=best.ckpt", "--monitor=nope"],
            "got monitor='nope' and the logged val_acc, val_loss",
        ),
        (
            ["score", *MODEL, "--ckpt_path=best.ckpt", "--mode=mn"],
            "--mode: Expected a Literal['min', 'max']. Got value: mn",
        ),
        (["score", *MODEL, "--ckpt_path=best.ckpt", "--json=no/a.json"], "the folder of 'no/a.json' must exist"),
        (["score", *MODEL, "--ckpt_path=best.ckpt", "--limit_batches=0"], "--limit_batches must be at least 1, got 0"),
        (
            ["score", *MODEL, "--ckpt_path=best.ckpt", "--confidence=95"],
            "--confidence must lie between 0 and 1, got 95",
        ),
        (["tune", *MODEL, "--ckpt_path=best.ckpt", "--monitor=nope"], "got monitor='nope' and the logged"),
        (["tune", *MODEL, "--ckpt_path=best.ckpt", "--storage=a.csv"], "got 'a.csv'"),
        (
            ["tune", *MODEL, "--ckpt_path=best.ckpt", "--storage=sqlite:////no/a.db"],
            "storage must be a database that can be",
        ),
        (["tune", *MODEL, "--ckpt_path=best.ckpt", "--n_trials=3"], "got n_trials, which is for a search by layer"),
        (
            ["tune", *MODEL, "--ckpt_path=best.ckpt", "--per_layer", "--sampler=Nope"],
            "The sampler must be one of BruteForce",
        ),
        (
            ["tune", *MODEL, "--ckpt_path=best.ckpt", "--per_layer", "--sampler=GPSampler", "--sampler_kwargs.x=1"],
            "GPSampler must get arguments that it knows, got {'x': 1}",
        ),
        (
            ["tune", *MODEL, "--ckpt_path=best.ckpt", "--sampler_kwargs.seed=1"],
            "--sampler_kwargs must come with --sampler",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder: Path, arguments: list[str], message: str):
    Path("foo.yaml").write_text("model: my_model.LitModel\nfoo: 3\n")
    state = {"net.1.weight": torch.ones(4), "net.1.running_mean": torch.ones(4), "net.1.bias": torch.ones(4)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, "plain.ckpt")
    torch.save({"state_dict": {"w": torch.ones(4)}, "pytorch-lightning_version": "2.6.0"}, "other.ckpt")
    before = sorted(folder.iterdir())
    assert message in run(arguments[0], *QUIET, NO_CHECKPOINTS, *arguments[1:]).error
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_a_model_without_data():
    ended = run("fit", "--model=my_model.LitModel", *QUIET, "--trainer.default_root_dir=run")
    assert "`train_dataloader` must be implemented" in ended.error


def test_the_class_that_is_asked_for_is_not_replaced_by_the_checkpoints():
    # A checkpoint names its model's class, and LightningCLI would take that one. Its arguments serve all the same.
    assert run(*FIT, "--bln", "--model.width=3", "--trainer.default_root_dir=run").code == 0
    assert run("validate", *MODEL, *QUIET, "--bln", f"--ckpt_path={saved()}").code == 0
    other = ("--data=my_model.Data", *QUIET, "--bln", f"--ckpt_path={saved()}")
    assert "must be a checkpoint of the same model" in run("validate", "--model=my_model.BuiltInSetup", *other).error
    with pytest.raises(ValueError, match="a mistake in the user's own code"):
        run("validate", "--model=my_model.Broken", *other)


def test_a_checkpoint_that_a_script_wrote(folder: Path):
    # Its arguments are there, without the class; some of them may be none of the class's.
    checkpoint = read_checkpoint("best.ckpt")
    assert checkpoint["hyper_parameters"].pop("_class_path") == "my_model.LitModel"
    checkpoint["hyper_parameters"] = {"width": 4, "of_the_script": 3}
    torch.save(checkpoint, "script.ckpt")
    arguments = (
        "--model=my_model.LitModel",
        "--model.width=9",
        "--data=my_model.Data",
        *QUIET,
        "--ckpt_path=script.ckpt",
    )
    assert len(ScoreTable.from_json(run("score", *arguments, "--cells=TTFF", "--json=-").out)) == 1
    assert run("validate", *arguments, "--bln").code == 0
    checkpoint["hyper_parameters"] = {"width": "wide"}
    torch.save(checkpoint, "script.ckpt")
    assert (
        "got one with the arguments {'width': 'wide'}: --model.width: my_model.LitModel: expected int; name the"
        in run("validate", *arguments, "--bln").error
    )


def test_a_saved_configuration_is_not_replaced():
    Path("run").mkdir()
    Path("run/config.yaml").write_text("mine")
    ended = run(*FIT, NO_CHECKPOINTS, "--trainer.default_root_dir=run")
    assert "got run/config.yaml, which exists; move it, or write to another folder with" in ended.error
    assert Path("run/config.yaml").read_text() == "mine"


def test_a_mistake_in_the_users_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="a mistake in the user's own code"):
        run("validate", "--model=my_model.Broken", "--data=my_model.Data", *QUIET)
    with pytest.raises(ValueError, match="a mistake in the user's own code"):
        run("tune", "--model=my_model.Broken", "--data=my_model.Data", *QUIET, "--ckpt_path=best.ckpt")
    assert not Path("lightning-bln.db").exists()


# ------------------------------------------------------------- from a shell


@pytest.mark.slow
def test_from_a_shell(folder: Path):
    (folder / "config.yaml").unlink()
    ended = command(*FIT, "--bln", folder=folder)
    assert ended.code == 0, ended.err
    assert len(list(folder.glob("checkpoints/*.ckpt"))) == 1
    ended = command("fit", *MODEL, "--bln.flags=XXXX", folder=folder)
    assert "StatFlags are four letters" in ended.error
    ended = command("validate", "--model=my_model.Broken", "--data=my_model.Data", *QUIET, folder=folder)
    assert (ended.code, ended.err.count("Traceback")) == (1, 1)


def begun(folder: Path, name: str) -> bool:
    """Whether the process is in the middle of its work; for tune, on trials that are its own."""
    if name != "tune":
        return (folder / "begun").exists()
    database = folder / "flags.db"
    if not database.exists():
        return False
    with contextlib.closing(sqlite3.connect(database)) as connection, contextlib.suppress(sqlite3.OperationalError):
        return bool(connection.execute("SELECT 1 FROM trials WHERE state = 'RUNNING'").fetchone())
    return False  # the tables are being made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validate", "score", "tune"])
def test_ctrl_c(folder: Path, name: str):
    arguments = [name, "--model=my_model.Endless", "--data=my_model.Data", *QUIET, "--ckpt_path=best.ckpt"]
    arguments += {"validate": ["--bln"], "score": [], "tune": ["--storage=sqlite:///flags.db", "--monitor=val_loss"]}[
        name
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_bln", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background Ctrl-C is ignored, by their children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not begun(folder, name) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    ended = Ended(process.returncode, out, err)
    assert ended.code == 130, err
    assert "Traceback" not in err
    assert err.endswith("lightning-bln: interrupted\n")
    if name == "tune":
        study = optuna.load_study(storage="sqlite:///flags.db", study_name="lightning-bln")
        assert {trial.state.name for trial in study.trials} <= {"FAIL", "WAITING", "COMPLETE"}
