"""Write the measured blocks of README.md from the results in benchmarks/results.

python -m benchmarks.readme            rewrite the blocks
python -m benchmarks.readme --check    exit 1 if README.md says anything else than the results do
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import summary
from benchmarks.timing import milliseconds, read_csv, threads_sleep

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"


def preserve_table(results: Path) -> str:
    """The block ``preserve``: one row for each network and nominal batch size."""
    result = json.loads((results / "preserve.json").read_text())
    lines = [
        "| network | B | output difference | accuracy with BatchNorm | after the swap |",
        "|---|--:|--:|--:|--:|",
    ]
    for measured in result["results"]:
        runs = measured["runs"]
        before = spread([run["batchnorm_accuracy"] for run in runs])
        for i, row in enumerate(runs[0]["swapped"]):
            difference = spread([run["swapped"][i]["relative_difference"] for run in runs], digits=2)
            after = spread([run["swapped"][i]["accuracy"] for run in runs])
            lines.append(f"| {measured['network']} | {row['batch_size']} | {difference} | {before} | {after} |")
    seeds = len(result["results"][0]["runs"])
    swap, versions = result["swap"], result["versions"]
    lines += [
        "",
        f'Median of {seeds} seeds (smallest to largest). `affine="{swap["affine"]}"`, flags {swap["flags"]}, '
        f'statistics "{swap["statistics"]}"; {result["data"]}; torch {versions["torch"]}, {result["device"]}. '
        f"Reproduce it with `{result['command']}`.",
    ]
    return "\n".join(lines)


def spread(values: list[float], digits: int = 1) -> str:
    """Median, smallest and largest in percent."""
    middle, low, high = (f"{value * 100:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} % ({low} to {high})"


def speed_tables(results: Path) -> str:
    """The block ``layers``: the layers' ratios and the models' steps, for each device and way to wait measured."""
    # The CPU's file, which has neither in its name, comes first.
    layers = sorted(results.glob("layers*.csv"), key=lambda path: path.stem)
    return "\n\n".join(_speed_tables(path, path.with_stem(path.stem.replace("layers", "models"))) for path in layers)


def _speed_tables(layers: Path, models: Path) -> str:
    rows, steps = read_csv(layers), read_csv(models)
    where = rows[0]
    shapes = len({row["shape"] for row in rows})
    lines = [
        *summary.as_markdown(summary.layer_findings(rows)),
        "",
        "| a whole training step | norms | original | swapped | ratio (quartiles) |",
        "|---|--:|--:|--:|--:|",
        *map(_model_line, steps[::2], steps[1::2]),
        "",
        f"{_device(where)}{_waiting(where)}, torch {where['torch']}, kernel: {where['kernel']}, {shapes} shapes.",
    ]
    return "\n".join(lines)


def _model_line(original: dict[str, Any], swapped: dict[str, Any]) -> str:
    name = " ".join(original[part] for part in ("model", "batch", "layout", "dtype"))
    times = " | ".join(f"{milliseconds(row['seconds'])} ms" for row in (original, swapped))
    ratios = [swapped[column] for column in ("vs_original", "vs_original_q1", "vs_original_q3")]
    return f"| {name} | {original['norms']} | {times} | {ratios[0]:.3f} ({ratios[1]:.3f} to {ratios[2]:.3f}) |"


def _device(where: dict[str, Any]) -> str:
    return (
        f"{where['device_name']} with {where['threads']} threads" if where["device"] == "cpu" else where["device_name"]
    )


def _waiting(where: dict[str, Any]) -> str:
    if where["device"] != "cpu":
        return ""
    return " that sleep between calls" if threads_sleep(where) else " that spin between calls"


def flags_table(results: Path) -> str:
    """The block ``flags``: one row for each batch size."""
    rows = read_csv(results / "flags.csv")
    where = rows[0]
    lines = [
        "| batch size | one evaluation | all 16 settings | 16 evaluations | all 16 over one | 16 over one |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        plain, own, separate = (row for row in rows if row["batch_size"] == batch_size)
        seconds = " | ".join(f"{row['seconds']:.2f} s" for row in (plain, own, separate))
        ratios = " | ".join(
            f"{row['vs_plain']:.1f} ({row['vs_plain_q1']:.1f} to {row['vs_plain_q3']:.1f})" for row in (own, separate)
        )
        lines.append(f"| {batch_size} | {seconds} | {ratios} |")
    difference = max(row["largest_loss_difference"] for row in rows)
    lines += [
        "",
        f"The paper's CNN, {where['samples']:,} images of {where['data']}, loss and accuracy; medians (quartiles) over "
        f"{where['rounds']} rounds in turn; losses differ by at most {difference:.0e}. {_device(where)}, torch "
        f"{where['torch']}. Reproduce it with `python -m benchmarks.flags --data FOLDER`.",
    ]
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "preserve": preserve_table,
    "flags": flags_table,
    "layers": speed_tables,
}


def refreshed(readme: str) -> str:
    """The text of README.md with every block written anew."""
    for name, table in BLOCKS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if readme.count(start) != 1 or readme.count(end) != 1 or readme.index(start) > readme.index(end):
            raise SystemExit(f"README.md must hold the lines {start} and {end} once, in this order.")
        block = table(RESULTS)
        pattern = re.escape(start) + ".*?" + re.escape(end)
        readme = re.sub(pattern, lambda _, text=f"{start}\n{block}\n{end}": text, readme, flags=re.DOTALL)
    return readme


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the measured blocks of README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")
    args = parser.parse_args(arguments)
    text = README.read_text()
    new = refreshed(text)
    if args.check:
        if new != text:
            print("README.md differs from benchmarks/results; call: python -m benchmarks.readme", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
