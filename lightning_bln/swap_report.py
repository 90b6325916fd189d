"""`SwapReport`: what a swap did to each normalization layer, as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SwapEntry:
    """What happened to one layer: its name in the model, class before and after, and why."""

    name: str
    old: str
    new: str | None
    why: str

    @property
    def swapped(self) -> bool:
        """Whether the layer was (in a dry run: would be) replaced."""
        return self.new is not None


@dataclass(frozen=True)
class SwapReport:
    """What `swap_norms_` did: an entry for each normalization layer, replaced or skipped. Prints as a table."""

    entries: tuple[SwapEntry, ...]
    dry_run: bool = False

    @property
    def swapped(self) -> tuple[SwapEntry, ...]:
        """The entries of replaced layers."""
        return tuple(entry for entry in self.entries if entry.swapped)

    @property
    def skipped(self) -> tuple[SwapEntry, ...]:
        """The entries of layers that were left as they are."""
        return tuple(entry for entry in self.entries if not entry.swapped)

    def summary(self) -> str:
        """One line, such as ``20 layers swapped (20 BatchNorm2d), 1 skipped``."""
        counts = Counter(entry.old for entry in self.swapped)
        listed = ", ".join(f"{count} {old}" for old, count in counts.items())
        plural = "" if len(self.swapped) == 1 else "s"
        verb = "would be swapped" if self.dry_run else "swapped"
        return (
            f"{len(self.swapped)} layer{plural} {verb}"
            + (f" ({listed})" if listed else "")
            + (f", {len(self.skipped)} skipped" if self.skipped else "")
        )

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left")
        for column in ("layer", "old", "new", "why"):
            table.add_column(column, overflow="fold")
        for entry in self.entries:
            table.add_row(*map(escape, (entry.name or "(the model)", entry.old, entry.new or "-", entry.why)))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
