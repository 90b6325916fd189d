"""``python -m lightning_bln``: the command line."""

import sys

from lightning_bln.cli import main

if __name__ == "__main__":
    sys.exit(main())
