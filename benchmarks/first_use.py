"""What the CPU kernel costs a process: compiling it on first use, and loading it later.

    python -m benchmarks.first_use

Fresh processes import the package, load the kernel and train one small step, each with a cache folder of its own: one
that is empty, then the same again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import timing

# Seconds of each stage, in order. The op is there without its kernel, so the kernel's loader is asked for by name.
STAGES = ("import torch", "import lightning_bln", "load the kernel", "first step")
CHILD = """
import importlib.util, json, time
points = [time.perf_counter()]
import torch
points.append(time.perf_counter())
import lightning_bln
points.append(time.perf_counter())
if importlib.util.find_spec("lightning_bln.ops.cpu"):
    from lightning_bln.ops import cpu
    cpu.load()
points.append(time.perf_counter())
lightning_bln.BatchLayerNorm(64)(torch.randn(32, 64, 8, 8)).sum().backward()
points.append(time.perf_counter())
print(json.dumps([end - start for start, end in zip(points, points[1:])]))
"""


def stages(cache: Path) -> dict[str, float]:
    """Seconds of each stage in one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"LIGHTNING_BLN_CACHE": str(cache)},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(zip(STAGES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def run(repeats: int) -> list[dict[str, Any]]:
    """Rows: each stage, with an empty cache and with what the first process left there."""
    measured: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "filled"):
                for stage, seconds in stages(Path(folder)).items():
                    measured.setdefault((cache, stage), []).append(seconds)
    rows = []
    for (cache, stage), values in measured.items():
        median, low, high = timing.spread(values)
        row = {"cache": cache, "stage": stage, "processes": len(values)}
        rows.append(row | {"seconds": median, "seconds_q1": low, "seconds_q3": high} | timing.environment("cpu"))
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="a fresh process, seconds: median (quartiles)")
    for name in ("stage", "empty cache", "filled cache"):
        shown.add_column(name)
    cells = {
        (row["cache"], row["stage"]): f"{row['seconds']:.3f} ({row['seconds_q1']:.3f} to {row['seconds_q3']:.3f})"
        for row in rows
    }
    for stage in STAGES:
        shown.add_row(stage, cells["empty", stage], cells["filled", stage])
    return shown


def in_short(rows: list[dict[str, Any]]) -> str:
    """What the targets are about, whichever stage the package compiles and loads its kernel in."""
    seconds = {(row["cache"], row["stage"]): row["seconds"] for row in rows}
    first, later = (sum(seconds[cache, stage] for stage in STAGES[1:]) for cache in ("empty", "filled"))
    return (
        f"first use, beyond a later one: {first - later:.2f} s (target: 10); "
        f"loading the kernel later: {seconds['filled', 'load the kernel']:.3f} s (target: 0.1)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes with an empty cache; default 3")
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder for first_use.csv")
    args = parser.parse_args(arguments)
    rows = run(args.repeats)
    Console().print(table(rows))
    print(in_short(rows))
    timing.write_csv(args.out / "first_use.csv", rows)
    print(f"written: {args.out / 'first_use.csv'}")


if __name__ == "__main__":
    main()
