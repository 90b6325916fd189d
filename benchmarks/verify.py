"""Whether the kernel's tests are green: without that, no benchmark here says how fast it is.

    python -m benchmarks.verify [--device cuda]

A green run is remembered in the user's cache folder under a hash of the kernel's sources, its tests, torch and the
machine, so that the next benchmark need not wait for the tests again.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_bln.ops.cpu import cache_folder

ROOT = Path(__file__).parent.parent
TESTS = ("tests/ops", "tests/test_parity.py")
# What those tests run, and what they import of the tests' own.
SOURCES = (
    "lightning_bln/ops",
    "lightning_bln/flags.py",
    "lightning_bln/layer.py",
    "tests/conftest.py",
    "tests/tolerances.py",
    "tests/golden",
    "pyproject.toml",
)


def fingerprint(device: str, root: Path = ROOT, paths: Sequence[str] = (*SOURCES, *TESTS)) -> str:
    """Changes when anything that the tests' outcome depends on does."""
    digest = hashlib.sha256(f"{device} {version('torch')} {platform.python_version()} {platform.node()}".encode())
    for path in paths:
        named = root / path
        files = sorted(named.rglob("*")) if named.is_dir() else [named]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def test_command(device: str) -> list[str]:
    """A CUDA kernel counts as tested only by the tests that need a GPU: there must be some."""
    marker = "gpu" if device == "cuda" else "not gpu"
    return [sys.executable, "-m", "pytest", *TESTS, "-q", "-m", marker, "-p", "no:cacheprovider"]


def is_green(device: str, command: Sequence[str] | None = None) -> bool:
    """Run the tests of the device's kernel, unless a run of the very same was green before; show a red one."""
    remembered = cache_folder() / "verified" / fingerprint(device)
    if remembered.exists():
        return True
    done = subprocess.run(
        command or test_command(device), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        print("\n".join(done.stdout.splitlines()[-40:]))
        return False
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.touch()
    return True


def require_green(device: str) -> None:
    """Stop unless the tests of the device's kernel are green."""
    print(f"Running the tests of the {device} kernel, unless they were green before: {', '.join(TESTS)}")
    if not is_green(device):
        raise SystemExit(
            f"A speed-up is told of a kernel that passes its tests, and those of the {device} kernel are not green "
            f"(see above). For times alone call the benchmark with --unverified."
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether the kernel's tests are green.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    green = is_green(parser.parse_args(arguments).device)
    print("green" if green else "red")
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
