"""Each example runs as a user would run it, and prints what it is there to show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SHOWN = {
    "digits_resnet18.py": [
        "20 layers swapped (20 BatchNorm2d)",
        "The same recipe with either norm",
        "BatchLayerNorm network under all 16 inference flags",
        "TTTT",
        "FFFF",
    ],
    "features.py": ["64 8x8 pixels", "64 features"],
    "finetune.py": ["650 parameters trained", "269,722 parameters trained", "test accuracy"],
    "plain_loop.py": ["TTFF", "FFFF"],
    "resume_and_test.py": ["Resumed from last.ckpt", "The best checkpoint", "load_swapped_checkpoint(...)"],
    "tune_training.py": ["2 trials", "COMPLETE", "scored under all 16 flags", "On test images"],
}


def test_every_example_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    programs = {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert programs == set(SHOWN)
    assert [name for name in programs if name not in listed] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs_and_shows_its_point(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--fast"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert [text for text in SHOWN[name] if text not in output] == []
    assert "Traceback" not in output
