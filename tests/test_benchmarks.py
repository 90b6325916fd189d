"""The benchmarks run, small; what they measure is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import preserve
from examples.digits import SmallCNN

SMALL = {"small": {"build": SmallCNN, "size": 8, "channels": 1, "epochs": 1, "batch_size": 64, "learning_rate": 0.1}}


def test_preserve_writes_plain_numbers(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(preserve.run, "__defaults__", (SMALL,))
    preserve.main(["--seeds", "0", "--out", str(tmp_path / "results" / "preserve.json")])
    result = json.loads((tmp_path / "results" / "preserve.json").read_text())
    (run,) = result["results"][0]["runs"]
    differences = [entry["relative_difference"] for entry in run["swapped"]]
    assert differences == sorted(differences, reverse=True), "the difference falls with B"
    assert 0 < differences[-1] < differences[0] < 1
    assert "written:" in capsys.readouterr().out


def test_the_committed_numbers_are_of_trained_networks() -> None:
    result = json.loads(preserve.RESULT.read_text())
    for network in result["results"]:
        assert len(network["runs"]) >= 3
        for run in network["runs"]:
            assert run["batchnorm_accuracy"] > 0.9
            parts = run["batchnorm_percentiles_5_95"]
            # A fresh BatchNorm has 0 and 0, 1 and 1, 1 and 1, 0 and 0 there.
            assert min(high - low for low, high in parts.values()) > 0.1


def test_outputs_do_not_depend_on_the_batch_they_are_computed_in() -> None:
    torch.manual_seed(0)
    model = SmallCNN()
    images = torch.randn(120, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(preserve.outputs(model, images), model.eval()(images))
