"""Run the benchmarks, all or by name, and bring README.md up to date.

python -m benchmarks.run                    all of them
python -m benchmarks.run layers models      these
python -m benchmarks.run layers --quick     one, with options of its own; layers --help lists them
"""

from __future__ import annotations

import argparse
import sys
from itertools import takewhile

from benchmarks import first_use, flags, layers, models, preserve, readme

BENCHMARKS = {
    "preserve": preserve.main,
    "flags": flags.main,
    "first_use": first_use.main,
    "layers": layers.main,
    "models": models.main,
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    names = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    options = arguments[len(names) :]
    parser = argparse.ArgumentParser(
        description="Run the benchmarks and bring README.md up to date.",
        epilog="Options after the name of one benchmark are its own: layers --help lists them.",
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; default all")
    if options and len(names) != 1:
        if {"-h", "--help"} & set(options):
            parser.parse_args(["--help"])
        parser.error(f"options follow the name of one benchmark, got {' '.join(arguments)!r}; call: layers --quick")
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"a benchmark is one of {', '.join(BENCHMARKS)}, got {name!r}")
    for name in names or BENCHMARKS:
        print(f"--- {name}")
        BENCHMARKS[name](options)
    return readme.main([])


if __name__ == "__main__":
    raise SystemExit(main())
