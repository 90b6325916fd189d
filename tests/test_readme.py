"""Every Python block of README.md runs, in order, as one program; its numbers are the committed ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[1]


def test_every_python_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    program = tmp_path / "readme_blocks.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "BatchLayerNorm(32, feature_dim=1" in done.stdout
    assert "1 layer would be swapped (1 BatchNorm2d), 1 skipped" in done.stdout


def test_the_numbers_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme.refreshed(text) == text, "run python -m benchmarks.readme"
    assert readme.main(["--check"]) == 0


def test_a_changed_number_is_noticed(tmp_path: Path, monkeypatch, capsys) -> None:
    text = (ROOT / "README.md").read_text()
    changed = tmp_path / "README.md"
    changed.write_text(re.sub(r"\| 32 \| \d", "| 32 | 9", text, count=1))
    assert changed.read_text() != text
    monkeypatch.setattr(readme, "README", changed)
    assert readme.main(["--check"]) == 1
    assert "call: python -m benchmarks.readme" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert changed.read_text() == text


def test_every_file_that_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
