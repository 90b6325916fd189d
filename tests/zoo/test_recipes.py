"""The recipes: each runs through the command line, twice alike bit for bit, and alike when it was killed in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from tests.cli_runs import ROOT, run
from tests.zoo.small_data import cifar_tree, imdb_tree
from zoo.cards import training

pytestmark = [
    # LightningCLI's own use of jsonargparse.
    pytest.mark.filterwarnings(
        r"ignore:\s*(By default only one Jsonargparse|.*was deprecated in v4):DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*`configure_optimizers` will be overridden by:UserWarning"),
    # --ckpt_path last, of a run that begins.
    pytest.mark.filterwarnings(r"ignore:.*there is no last checkpoint available:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

RECIPES = sorted((ROOT / "zoo" / "recipes").glob("*.yaml"))
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger.init_args.save_dir=log",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """For each data module the arguments that put a small data set in the place of the large one."""
    folder = tmp_path_factory.mktemp("data")
    small = ("--data.batch_size=4", "--data.validation=4", "--data.eval_batch_size=4")
    ten = zoo.get_weights("resnet20_bn.cifar10").metadata["classes"]  # those of teachers
    return {
        "CIFAR10": (f"--data.root={cifar_tree(folder / 'cifar', train=2, test=1, classes=ten)}", *small),
        "IMDb": (f"--data.root={imdb_tree(folder, count=8)}", *small),
        "Digits": (),
    }


def recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


def fit_arguments(path: Path, data: dict[str, tuple[str, ...]], folder: Path) -> list[str]:
    small = data[recipe(path)["data"]["class_path"].rpartition(".")[2]]
    own = ["--trainer.max_epochs=2", f"--trainer.callbacks.dirpath={folder}", "--ckpt_path=last"]
    callbacks = recipe(path)["trainer"]["callbacks"]
    if len(callbacks) > 1:  # the option above is for the last one
        own[1] = f"--trainer.callbacks={yaml.safe_dump(_into(callbacks, folder), default_flow_style=True)}"
    return ["fit", f"--config={path}", *small, *QUIET, *own]


def _into(callbacks: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    for callback in callbacks:
        if "dirpath" in callback["init_args"]:
            callback["init_args"]["dirpath"] = str(folder)
    return callbacks


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["global_step"] == other["global_step"] > 0
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        same = torch.equal(value, other["state_dict"][name]) if isinstance(value, torch.Tensor) else True
        assert same, name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_epochs_twice_are_the_same_bit_for_bit(
    path: Path, data: dict[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "other"):
        ended = run(*fit_arguments(path, data, tmp_path / folder))
        assert ended.code == 0, ended.err
    assert_same(final(tmp_path / "one"), final(tmp_path / "other"))
    assert {file.name for file in tmp_path.iterdir()} == {"log", "one", "other"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_names(path: Path) -> None:
    settings = recipe(path)
    arch, _, tag = path.stem.partition(".")
    assert settings["model"]["init_args"]["model"] == arch
    assert arch in zoo.list_models()
    assert tag.partition("_")[0] == settings["data"]["class_path"].rpartition(".")[2].lower()
    assert bool(settings["bln"]) == arch.endswith("_bln")
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# lightning-bln fit --config zoo/recipes/{path.name}")


@pytest.mark.parametrize("tag", ["cifar10", "imdb", "digits"])
def test_twins_have_the_same_recipe(tag: str) -> None:
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in RECIPES:
        name, _, of = path.stem.partition(".")
        if of.partition("_")[0] == tag:
            settings = recipe(path)
            settings["model"]["init_args"].pop("model")
            if start := settings["model"]["init_args"].get("weights"):  # the model's own, or its twin's
                settings["model"]["init_args"]["weights"] = start.rpartition(".")[2]
            settings["model"]["init_args"].get("model_kwargs", {}).pop("statistics", None)
            if not settings["model"]["init_args"].get("model_kwargs", True):
                settings["model"]["init_args"].pop("model_kwargs")
            settings.pop("bln")
            settings["trainer"]["logger"]["init_args"].pop("save_dir")
            settings["trainer"]["callbacks"][0]["init_args"].pop("dirpath")
            families.setdefault((name.rpartition("_")[0], training(of)), []).append(settings)
    assert families
    for family in families.values():
        assert all(settings == family[0] for settings in family)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn_bln.digits", "gru_bln.digits"])
def test_killed_in_the_middle_of_an_epoch_and_resumed_is_the_same(name: str, tmp_path: Path) -> None:
    path = ROOT / "zoo" / "recipes" / f"{name}.yaml"
    # Of the 37 steps of an epoch 35, so that the last checkpoint is that of the last step.
    every = ["--trainer.callbacks.every_n_train_steps=10", "--trainer.limit_train_batches=35"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        arguments = [*fit_arguments(path, {"Digits": ()}, folder), *every]
        command = [sys.executable, "-m", "lightning_bln", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        if folder is killed:
            deadline = time.monotonic() + 120
            while not (killed / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            step = final(killed)["global_step"]
            assert 0 < step < 70
            assert step % 35
            process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert final(whole)["global_step"] == 70
    assert_same(final(whole), final(killed))
