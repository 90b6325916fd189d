"""Runs of the command line for its tests: in this process, where that is quicker, or in one of their own."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lightning_bln.cli import main

ROOT = Path(__file__).parents[1]
QUIET = (
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of bad input, without the program's name."""
        lines = [line for line in self.err.splitlines() if line.startswith("lightning-bln")]
        assert self.code == 2, self
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].partition(": error: ")[2]


def run(*arguments: str) -> Ended:
    """Run the command line in this process, in the current folder."""
    path, modules = list(sys.path), set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(arguments)
        finally:
            sys.path[:] = path
            # The next test has a my_model of its own.
            for name in {"my_model"} & (set(sys.modules) - modules):
                del sys.modules[name]
    return Ended(code, out.getvalue(), err.getvalue())


def command(*arguments: str, folder: Path, **environment: str) -> Ended:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_bln", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def user_folder(folder: Path) -> Path:
    """A user's folder, with my_model.py in it."""
    shutil.copy(ROOT / "tests" / "cli_model.py", folder / "my_model.py")
    return folder
