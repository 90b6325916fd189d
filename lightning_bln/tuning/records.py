"""What is kept of each setting during a pass: its losses batch by batch, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bln.tuning.intervals import MIN_BATCHES, mean_loss, merge_units
from lightning_bln.tuning.space import Setting
from lightning_bln.tuning.table import CellScore

BUFFERED_SAMPLES = 4096
BUFFERED_BYTES = 1 << 20
"""A metric's update costs about the same for one sample and for thousands: batches of one setting are collected up to
the first of these."""


class CellRecord:
    """The losses of one setting so far."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.batches: list[tuple[int, float]] = []
        self.metrics: Mapping[str, float] = {}
        self.error: str | None = None
        self.pruned = False
        self._each: list[Tensor] | None = []  # losses of single samples, while there are few batches

    @property
    def open(self) -> bool:
        """Whether it is still being scored."""
        return self.error is None and not self.pruned

    @property
    def samples(self) -> int:
        """How many samples were scored."""
        return sum(n for n, _ in self.batches)

    def add(self, samples: int, total: float, each: Tensor | None = None) -> None:
        """One batch: its number of samples, their summed loss, and the loss of each of them, if that is known."""
        self.batches.append((samples, total))
        if each is None or len(self.batches) >= MIN_BATCHES:
            self._each = None
        elif self._each is not None:
            self._each.append(each)

    def fail(self, error: Exception) -> None:
        """It cannot be scored."""
        text = str(error).strip().splitlines()
        self.error = type(error).__name__ + (f": {text[0]}" if text else "")

    def score(self) -> CellScore:
        """All that is known of it."""
        units = self.batches
        if self._each:
            units = [(1, loss) for loss in torch.cat(self._each).tolist()]
        loss = mean_loss(self.batches) if self.open else float("nan")
        return CellScore(
            self.setting, loss, dict(self.metrics), self.samples, tuple(merge_units(units)), self.error, self.pruned
        )


class MetricBank:
    """A copy of the metrics for each setting.

    Args:
        metrics: A torchmetrics Metric, MetricCollection or dict of them.
        count: How many settings.
        device: Where the outputs are.
    """

    def __init__(self, metrics: Any, count: int, device: torch.device) -> None:
        from torchmetrics import Metric, MetricCollection

        if isinstance(metrics, Metric):
            metrics = {type(metrics).__name__: metrics}
        collection = metrics if isinstance(metrics, MetricCollection) else MetricCollection(dict(metrics))
        self._copies = [collection.clone().to(device) for _ in range(count)]
        for copy in self._copies:
            copy.reset()
        self._waiting: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
        self._sizes = [(0, 0)] * count  # of what waits: samples, bytes

    def update(self, cell: int, output: Any, target: Any) -> None:
        """One batch of one setting."""
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            self._copies[cell].update(output, target)
            return
        # A copy: the output may be a part of several settings' together, which must not be kept for so long.
        self._waiting[cell].append((output.clone(), target))
        samples, size = self._sizes[cell]
        self._sizes[cell] = samples + len(target), size + output.nbytes + target.nbytes
        if self._sizes[cell][0] >= BUFFERED_SAMPLES or self._sizes[cell][1] >= BUFFERED_BYTES:
            self._flush(cell)

    def compute(self, cell: int) -> dict[str, float]:
        """The metrics' values, by name; one with several values has them numbered."""
        self._flush(cell)
        values: dict[str, float] = {}
        for name, value in self._copies[cell].compute().items():
            flat = torch.as_tensor(value).flatten().tolist()
            values |= {name: flat[0]} if len(flat) == 1 else {f"{name}_{i}": v for i, v in enumerate(flat)}
        return values

    def _flush(self, cell: int) -> None:
        waiting = self._waiting[cell]
        if len({tuple(output.shape[1:]) for output, _ in waiting}) == 1:
            waiting = [(torch.cat([output for output, _ in waiting]), torch.cat([target for _, target in waiting]))]
        for output, target in waiting:
            self._copies[cell].update(output, target)
        self._waiting[cell] = []
        self._sizes[cell] = 0, 0
