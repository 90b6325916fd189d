"""What all speed benchmarks share: contenders that take turns, medians with spread, memory, options, tidy CSV files.

A machine is rarely quiet. So the contenders of one comparison take turns in many short rounds, a ratio is taken within
each round, where both met the same disturbance, and medians and quartiles over the rounds are reported.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln.ops import library

RESULTS = Path(__file__).parent / "results"

# A point in time: seconds of the host's clock, or an event on the device.
Mark = Any
# Does its work once, setting marks on the way, and returns the start and end of each mode that it measured.
Contender = Callable[[Callable[[], Mark]], Mapping[str, tuple[Mark, Mark]]]
# Seconds of one call, by (contender, mode) and then by round; a contender may have sat a round out.
Timings = dict[tuple[str, str], dict[int, float]]


class Clock:
    """Marks points in time on a device and tells how far they lie apart."""

    def __init__(self, device: str) -> None:
        self.device = device

    def mark(self) -> Mark:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until all marks have been reached."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, start: Mark, end: Mark) -> float:
        return start.elapsed_time(end) / 1000 if self.device == "cuda" else end - start


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    values = sorted(values)
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def measure(
    contenders: Mapping[str, Contender], clock: Clock, rounds: int, seconds: float, round_seconds: float = 0.005
) -> Timings:
    """Let the contenders take turns, and time them.

    Args:
        contenders: By name.
        clock: Of the device that they run on.
        rounds: How often each has its turn. A contender that would take longer than ``seconds`` for them sits out
            every second round, or three of four, and so on, but has at least 3 turns; rounds that a slow one takes
            part in are a subset of those of a faster one, so that there are rounds to compare them in.
        seconds: For each contender, all its turns together.
        round_seconds: A turn is as many calls as take about this long. Half as many come before them and are not
            counted: they find in the caches what the contender before left there.
    """
    turns = {}
    for name, contender in contenders.items():
        cost = _warm_up(contender, clock)
        calls = max(1, math.ceil(round_seconds / cost))
        turns[name] = (calls, _every(calls * cost, rounds, seconds))
    timings: Timings = {}
    for i in range(rounds):
        for name, contender in contenders.items():
            calls, every = turns[name]
            if i % every:
                continue
            for _ in range(calls // 2):
                contender(clock.mark)
            marks = [contender(clock.mark) for _ in range(calls)]
            clock.wait()
            for mode in marks[0]:
                total = sum(clock.seconds(*marked[mode]) for marked in marks)
                timings.setdefault((name, mode), {})[i] = total / calls
    return timings


def _warm_up(contender: Contender, clock: Clock) -> float:
    """About how long one call takes; a second call tells it better where that costs little."""
    elapsed = math.inf
    for _ in range(2):
        start = clock.mark()
        contender(clock.mark)
        end = clock.mark()
        clock.wait()
        elapsed = clock.seconds(start, end)
        if elapsed > 1:
            break
    return max(elapsed, 1e-7)


def _every(cost: float, rounds: int, seconds: float) -> int:
    """A contender takes part in every so many rounds: a power of two."""
    every = 1
    while cost * rounds / every > seconds and rounds // (2 * every) >= 3:
        every *= 2
    return every


def ratio(timings: Timings, name: str, mode: str, baselines: Sequence[str]) -> Spread | None:
    """How many times as long ``name`` took as the baselines together, over the rounds that all took part in."""
    own, others = timings[name, mode], [timings.get((baseline, mode), {}) for baseline in baselines]
    shared = [i for i in own if all(i in other for other in others)]
    return spread(own[i] / sum(other[i] for other in others) for i in shared) if shared else None


def timing_rows(
    timings: Timings, baselines: Mapping[str, Sequence[str]], with_ratios: bool
) -> dict[tuple[str, str], dict[str, Any]]:
    """For each contender and mode: seconds and, unless they are to be left empty, ratios, each with quartiles.

    Args:
        timings: From `measure`.
        baselines: Column name of a ratio, and the contenders whose times together it is taken to.
        with_ratios: False leaves the ratios empty.
    """
    rows = {}
    for (name, mode), rounds in timings.items():
        row: dict[str, Any] = {"contender": name, "mode": mode, "rounds": len(rounds)}
        row |= _columns("seconds", spread(rounds.values()))
        for column, others in baselines.items():
            row |= _columns(column, ratio(timings, name, mode, others) if with_ratios else None)
        rows[name, mode] = row
    return rows


def _columns(name: str, value: Spread | None) -> dict[str, float | None]:
    median, low, high = value or (None, None, None)
    return {name: median, f"{name}_q1": low, f"{name}_q3": high}


def saved_bytes(call: Callable[[], Any], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from a forward pass for its backward pass.

    Every storage counts once, as large as it is; ``held`` are tensors that exist anyway (parameters, buffers).
    """
    anyway = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in anyway:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    # While the result lives, so does all that was saved: no address was given out twice.
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that tensors held at one time during the call, beyond what they held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    # Otherwise the profiler writes a line to stderr each time it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


# ------------------------------------------------------------------ one run


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every speed benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default 2")
    parser.add_argument("--quick", action="store_true", help="a small part, few rounds")
    parser.add_argument("--only", metavar="PATTERN", help="lines whose description contains it, such as channels_last")
    parser.add_argument("--repeats", type=int, help="how many rounds")
    parser.add_argument("--seconds", type=float, help="for all turns of one contender, where that leaves it 3 turns")
    parser.add_argument("--unverified", action="store_true", help="do not run the kernel's tests; no ratios then")
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results; default {RESULTS.name}/ for whole runs, nothing for parts"
    )


def effort(args: argparse.Namespace, rounds: int, seconds: float) -> tuple[int, float]:
    """Rounds and seconds as asked for, else the benchmark's own, of which ``--quick`` takes a third."""
    own = (max(3, rounds // 3), seconds / 3) if args.quick else (rounds, seconds)
    return args.repeats or own[0], own[1] if args.seconds is None else args.seconds


def chosen(lines: Sequence[Any], args: argparse.Namespace) -> list[Any]:
    """The lines that ``--only`` leaves."""
    left = [line for line in lines if args.only is None or args.only.lower() in str(line).lower()]
    if not left:
        listed = "\n  ".join(str(line) for line in lines)
        raise SystemExit(f"--only must be part of a line's description, got {args.only!r}; the lines are\n  {listed}")
    return left


def out_folder(args: argparse.Namespace) -> Path | None:
    """Where results go: a part of a benchmark replaces the whole's committed results only when asked to."""
    if args.out is None and not (args.quick or args.only or args.unverified):
        return RESULTS
    return args.out


def environment(device: str) -> dict[str, Any]:
    """Where a result was measured; the columns that end each row."""
    return {
        "kernel": kernel(device),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "").lower() or "unset",
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def kernel(device: str) -> str:
    """The implementation of the op that serves ``device``: its own, or the reference."""
    # There is no public way to ask whether a device has its own implementation of an op.
    own = torch._C._dispatch_has_kernel_for_dispatch_key(library.FORWARD, device.upper())
    return device if own else "reference"


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", _text(Path("/proc/cpuinfo")))
    return found[1] if found else platform.processor() or platform.machine()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def threads_sleep(where: Mapping[str, Any]) -> bool:
    """Whether OpenMP's threads slept while they waited, in an `environment` of the CPU: they do only when told to."""
    return bool(where["wait_policy"] == "passive")


def result_name(stem: str, where: Mapping[str, Any]) -> str:
    """``stem`` for the CPU, otherwise with the device's name, as in layers_nvidia-h200.

    layers_spinning for the CPU unless its `threads_sleep`.
    """
    if where["device"] == "cpu":
        return stem if threads_sleep(where) else f"{stem}_spinning"
    return f"{stem}_{re.sub(r'[^a-z0-9]+', '-', where['device_name'].lower()).strip('-')}"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a measurement, floats with 4 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{value:.4g}" if isinstance(value, float) else value for value in row.values())


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of `write_csv`: numbers as such, None where a cell is empty."""
    with path.open(newline="") as file:
        return [{name: _parsed(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _parsed(value: str) -> Any:
    if value == "":
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"
