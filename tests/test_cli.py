"""The command line without a model: help, version, the search space, and how runs end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import json_to_distribution

import lightning_bln
from lightning_bln import StatFlags, cli
from lightning_bln.cli import COMMANDS, main
from lightning_bln.cli.errors import UsageError, bad_input, did_you_mean, one_line, parser_message
from lightning_bln.tuning.apply import read_checkpoint
from tests.cli_runs import ROOT, command, run

HEAVY = {"torch", "lightning", "optuna", "jsonargparse", "rich", "plotly", "numpy"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["space"], ["space", "--layers", "a,b"], ["fitt"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]):
    code = f"""
import sys
from lightning_bln.cli import main
main({arguments!r})
print({HEAVY!r} & set(sys.modules), file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.splitlines()[-1] == "set()"
    assert time.monotonic() - started < 1.5


def test_help_names_every_command_and_fits_a_terminal():
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        ended = run(*arguments)
        assert (ended.code, ended.err) == (0, "")
        assert all(f"\n  {name} " in ended.out for name in COMMANDS)
        assert max(map(len, ended.out.splitlines())) <= 88


def test_version():
    assert run("--version").out == f"lightning-bln {lightning_bln.__version__}\n"


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="lightning-bln")
    assert script.load() is main


def test_space_is_what_optuna_reads():
    space = {name: json_to_distribution(json.dumps(one)) for name, one in json.loads(run("space").out).items()}
    assert list(space) == list(StatFlags.names())
    # The order of the choices is a part of the schema.
    assert all(one == optuna.distributions.CategoricalDistribution((True, False)) for one in space.values())
    by_layer = json.loads(run("space", "--layers", "net.1, net.5").out)
    assert list(by_layer) == [f"{layer}.{flag}" for layer in ("net.1", "net.5") for flag in StatFlags.names()]
    assert "\n  " in run("space", "--indent=2").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "got the command 'fitt'; did you mean 'fit'?"),
        (
            ["xyz"],
            "must be a command (fit, validate, test, predict, score, tune, apply, report, space), got the command",
        ),
        (["--fit"], "got the option '--fit'; did you mean 'fit'?"),
        (
            ["space", "--laers", "a"],
            "unrecognized arguments: --laers a; did you mean '--layers'?; see lightning-bln space",
        ),
        (["space", "--layers", "a,a"], "--layers must be names of layers, each once, got 'a,a'; write --layers a,b."),
        (["space", "--layers", ","], "--layers must be names of layers"),
        (["space", "--layers", "a", "--ckpt_path", "b"], "not allowed with argument --layers"),
        (["space", "--ckpt-path", "none.ckpt"], "A checkpoint must be a file, got 'none.ckpt', which is none"),
        (["space", "--indent", "x"], "argument --indent: invalid int value: 'x'; see lightning-bln space --help"),
        (["apply"], "the following arguments are required: --ckpt_path, --out; see lightning-bln apply --help"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str):
    assert message in run(*arguments).error


def test_bad_input_from_a_shell(tmp_path: Path):
    ended = command("fitt", folder=tmp_path)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)


def test_an_unexpected_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(command: str, arguments: list[str]) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["space"])


def test_ctrl_c_and_a_reader_that_has_seen_enough(monkeypatch: pytest.MonkeyPatch):
    def interrupted(command: str, arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert run("space").code == 130
    code = (
        "import sys; from lightning_bln.cli import main;"
        "sys.exit(main(['space', '--layers', ','.join(map(str, range(9999)))]))"
    )
    shell = f'"{sys.executable}" -c "{code}" | head -c 10; echo " ${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == '{"0.batch_ 0\n'
    assert done.stderr == ""


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, UsageError])
def test_what_our_checks_raise_is_bad_input(kind: type[Exception]):
    def check() -> None:
        exec(compile("raise kind('must be one,\\n got two')", __file__, "exec"), {"kind": kind, "__name__": "x"})

    with pytest.raises(kind) as caught:
        check()
    # Raised outside the package, only a UsageError is for the user.
    assert bad_input(caught.value) == ("must be one, got two" if kind is UsageError else None)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        StatFlags.parse("x") if kind is ValueError else StatFlags(1) if kind is TypeError else read_checkpoint("none")  # type: ignore[arg-type]
    assert bad_input(caught.value) == one_line(str(caught.value))


def test_what_python_raises_in_our_code_is_not_bad_input():
    with pytest.raises(TypeError) as caught:
        StatFlags.parse({1: True, "x": False})  # type: ignore[dict-item]
    assert "not supported between" in str(caught.value)
    assert bad_input(caught.value) is None


def test_one_line():
    assert one_line("\x1b[31ma\n  b\x1b[0m ") == "a b"


def test_did_you_mean():
    assert did_you_mean("scor", COMMANDS) == "; did you mean 'score'?"
    assert did_you_mean("xyz", COMMANDS) == ""


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (['Parser key "a.b":', "  Expected a <class 'int'>. Got value: x"], "--a.b: expected int, got 'x'"),
        (
            [
                'Parser key "model":',
                "  Does not validate against any of the Union subtypes",
                "  Subtypes: [<class 'lightning.LightningModule'>, <class 'NoneType'>]",
                "  Errors:",
                "    - Problem with given class_path 'my.Model':",
                "        Option 'wdth' is not accepted",
                "    - Expected a <class 'NoneType'>",
                "  Given value type: <class 'jsonargparse._util.NestedArg'>",
                "  Given value: NestedArg(key='wdth', val='3')",
            ],
            "--model: my.Model: Option 'wdth' is not accepted, got '3'",
        ),
        (["the following arguments are required: fit.model"], "the following arguments are required: fit.model"),
    ],
)
def test_a_parsers_lines_become_one(lines: list[str], line: str):
    assert parser_message("\n".join(lines)) == line


@pytest.mark.parametrize("spelling", ["--study-name=x", "--study_name=x"])
def test_dashes_and_underscores_alike(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    optuna.create_study(storage="sqlite:///a-b.db", study_name="other")
    # Values keep their dashes.
    assert "got 'x' where there are 'other'" in run("report", "--storage", "sqlite:///a-b.db", spelling).error


def test_as_a_module(tmp_path: Path):
    assert command("--version", folder=tmp_path).out == f"lightning-bln {lightning_bln.__version__}\n"
