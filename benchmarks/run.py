"""Run the benchmarks, all or by name, and bring README.md up to date.

python -m benchmarks.run [preserve]
"""

from __future__ import annotations

import argparse

from benchmarks import preserve, readme

BENCHMARKS = {"preserve": preserve.main}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks and bring README.md up to date.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; default all")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"a benchmark is one of {', '.join(BENCHMARKS)}, got {name!r}")
    for name in args.names or BENCHMARKS:
        print(f"--- {name}")
        BENCHMARKS[name]([])
    return readme.main([])


if __name__ == "__main__":
    raise SystemExit(main())
