"""Training killed by SIGKILL and resumed gives, bit for bit, what an uninterrupted run gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_worker import EPOCHS, ORDERS, STEPS

WORKER = Path(__file__).parent / "resume_worker.py"
# Killed in the last epoch: its statistics are the ones that the final state holds. "mid_epoch" writes a checkpoint
# every STEPS - 3 steps, so its last one before step STEPS + 6 lies in the middle of that epoch.
KILL_AT = {"epoch_end": STEPS + 3, "validation_end": STEPS + 2, "mid_epoch": STEPS + 6, "last_batch": STEPS + 1}
CASES = [(order, "epoch") for order in ORDERS] + [("mid_epoch", "ema")]

pytestmark = pytest.mark.slow


def run(order: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(WORKER), order, str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @cache
    def result(population: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("uninterrupted")
        done = run("epoch_end", folder, "--population", population)
        assert done.returncode == 0, done.stderr
        return final(folder)

    return result


@pytest.mark.parametrize(("order", "population"), CASES)
def test_killed_and_resumed_run_ends_with_the_same_bits(
    order: str, population: str, uninterrupted: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    killed = run(order, tmp_path, "--population", population, "--kill-at", str(KILL_AT[order]))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "final.pt").exists()
    assert list(tmp_path.glob("*.ckpt"))

    resumed = run(order, tmp_path, "--population", population, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    result = final(tmp_path)
    assert result["resumed_from"] is not None
    expected = uninterrupted(population)
    assert result["steps"] == expected["steps"] == EPOCHS * STEPS
    assert result["state"].keys() == expected["state"].keys()
    different = [name for name, value in expected["state"].items() if not torch.equal(value, result["state"][name])]
    assert different == []
