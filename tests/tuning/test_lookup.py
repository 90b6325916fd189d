"""What the command line is given by name: studies and samplers."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from lightning_bln.tuning.lookup import find_study, make_sampler


def test_a_study_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    optuna.create_study(storage="sqlite:///lightning-bln.db", study_name="flags")
    assert find_study(None, "flags").study_name == "flags"
    assert find_study("sqlite:///lightning-bln.db?timeout=5", "flags").study_name == "flags"
    backend = optuna.storages.journal.JournalFileBackend("flags.journal")
    optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="flags")
    assert find_study("flags.journal", "flags").study_name == "flags"


@pytest.mark.parametrize("storage", [None, "sqlite:///none.db", "sqlite:////no/folder/none.db", "none.journal"])
def test_a_storage_that_does_not_exist_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str | None
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The storage of a study must exist, got .*, and there is no such file; name"):
        find_study(storage, "flags")
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_is_not_there(tmp_path: Path):
    storage = f"sqlite:///{tmp_path / 'a.db'}"
    optuna.create_study(storage=storage, study_name="flags")
    with pytest.raises(
        ValueError, match="The study must be in the storage, got 'flag' where there are 'flags'; `lightn"
    ):
        find_study(storage, "flag")
    optuna.delete_study(storage=storage, study_name="flags")
    with pytest.raises(ValueError, match="got 'flag', and the storage has none; `lightning-bln tune"):
        find_study(storage, "flag")


def test_samplers():
    sampler = make_sampler("RandomSampler", {"seed": 3})
    assert isinstance(sampler, optuna.samplers.RandomSampler)
    assert isinstance(make_sampler("TPESampler"), optuna.samplers.TPESampler)
    with pytest.raises(
        ValueError, match=r"The sampler must be one of .*RandomSampler.*, got 'BaseSampler'; write --sampler"
    ):
        make_sampler("BaseSampler")
    with pytest.raises(
        ValueError, match=r"RandomSampler must get arguments that it knows, got {'sed': 3}: .*; it takes seed"
    ):
        make_sampler("RandomSampler", {"sed": 3})
    with pytest.raises(ValueError, match=r"GridSampler must get arguments that it knows, got {}: missing a required"):
        make_sampler("GridSampler")
