"""`score_flags`: how a trained model does under each setting of its flags, in one pass over the data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.replay import map_tensors, tensors_in
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.losses import Loss, SampleLosses
from lightning_bln.tuning.records import CellRecord, MetricBank
from lightning_bln.tuning.sharing import SharedForward, normal_tensor
from lightning_bln.tuning.space import Setting, parse_setting, setting_code
from lightning_bln.tuning.table import CellScore, ScoreTable, check_choices

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torchmetrics import Metric, MetricCollection

ONE_LOSS_BYTES = 1 << 20
"""Outputs of all settings up to this size get their losses in one call."""

OnBatch = Callable[[int, dict[int, tuple[int, float]]], "Collection[int] | None"]
"""Called after each batch with its number and, for each setting by index, (samples, summed loss); returns the indices
of settings to drop."""


def score_flags(
    model: nn.Module,
    dataloader: Any = None,
    loss: Loss | None = None,
    metrics: Metric | MetricCollection | Mapping[str, Metric] | None = None,
    cells: Iterable[FlagsLike | Mapping[str, FlagsLike]] | None = None,
    *,
    monitor: str = "loss",
    mode: str = "min",
    confidence: float = 0.95,
    limit_batches: int | None = None,
    trainer: pl.Trainer | None = None,
    progress: bool = True,
    errors: str = "raise",
    on_batch: OnBatch | None = None,
) -> ScoreTable:
    """Score a trained model under many settings of its inference flags in one pass over the data.

    Each batch is loaded once. What the network computes before the settings part (all that comes before its first
    `BatchLayerNorm`, and for settings that agree in the first layers all that comes before the next) is computed once.
    The results are those of a separate evaluation for each setting. Do not shuffle the data: mini-batch statistics
    depend on which samples come together, and scores are compared batch by batch.

    A plain `nn.Module` is called as ``model(*inputs)`` with batches ``(*inputs, target)`` and needs a ``loss``. A
    LightningModule is run by a Trainer: its ``validation_step`` and the values that it logs serve, under the names that
    it gives them; each setting has metrics of its own. Give a ``loss`` to have it called as a plain module instead.

    Args:
        model: With `BatchLayerNorm` layers, trained. Its flags and mode are the same afterwards.
        dataloader: Batches; for a LightningModule also a LightningDataModule, or None for its own ``val_dataloader``.
        loss: Called with (output, target): a mean over the batch, or a value for each sample.
        metrics: torchmetrics, called with (output, target). Several batches may come in one ``update``.
        cells: Settings: codes such as "TTFF", `StatFlags`, or a mapping of layer names to flags. Default all 16.
        monitor: What is to be best: "loss" (default), the name of a metric, or of a value that a LightningModule
            logs. Default for a LightningModule: the one value it logs in each batch, if there is only one.
        mode: Whether the best value is the smallest, "min" (default), or the largest, "max".
        confidence: Of the intervals, for all comparisons with the best setting together. Default 0.95.
        limit_batches: Stop after so many batches. Default None, all.
        trainer: Runs a LightningModule: its accelerator, precision and callbacks count. Default a Trainer of its own on
            one device.
        progress: Show a progress bar in a terminal. Default True.
        errors: "raise" (default), or "keep": a setting whose forward or loss raises gets the error in its row, and the
            others go on.
        on_batch: Called after each batch with (batch, {index: (samples, summed loss)}); settings whose indices it
            returns are dropped and marked as pruned. Default None.

    Returns:
        A `ScoreTable`, best first.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`, a setting does not fit it, or the data, the loss and the
            monitored value do not fit each other.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_bln import BatchLayerNorm, update_statistics
        >>> model = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4), nn.Linear(4, 2))
        >>> data = DataLoader(TensorDataset(torch.randn(64, 3), torch.randint(2, (64,))), batch_size=16)
        >>> _ = update_statistics(model, data)
        >>> table = score_flags(model, data, nn.CrossEntropyLoss(), cells=["TTFF", "FFFF"])
        >>> sorted(score.code for score in table)
        ['FFFF', 'TTFF']
    """
    settings = settings_for(model, cells)
    check_choices(mode, confidence)
    if errors not in ("raise", "keep"):
        raise ValueError(f"errors must be 'raise' or 'keep', got {errors!r}.")
    if limit_batches is not None and limit_batches < 1:
        raise ValueError(f"limit_batches must be at least 1, or None for all, got {limit_batches!r}.")
    if is_lightning_module(model) and loss is None:
        from lightning_bln.tuning.lit_scoring import score_lightning_module

        if metrics is not None:
            raise ValueError(
                "A LightningModule's own logged metrics are scored, got metrics as well; log them in validation_step, "
                "or give a loss too: score_flags(model, loader, loss, metrics)."
            )
        scores, monitor = score_lightning_module(
            cast("pl.LightningModule", model),
            dataloader,
            settings,
            monitor=monitor,
            limit_batches=limit_batches,
            trainer=trainer,
            progress=progress,
            keep_errors=errors == "keep",
            on_batch=on_batch,
        )
    else:
        if loss is None or dataloader is None:
            raise ValueError(
                f"A plain nn.Module is scored by a loss of (output, target) on a data loader, got "
                f"{'no loss' if loss is None else 'no data'} for a {type(model).__name__}; call "
                f"score_flags(model, loader, nn.CrossEntropyLoss()), say."
            )
        run = _PlainRun(model, settings, loss, metrics, errors == "keep", on_batch)
        scores = run.score(dataloader, limit_batches, progress)
    return ScoreTable(scores, monitor=monitor, mode=mode, confidence=confidence)


def settings_for(model: nn.Module, cells: Iterable[FlagsLike | Mapping[str, FlagsLike]] | None) -> list[Setting]:
    """The settings to score, checked against the model's layers; None means all 16 for all layers together.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`, there is no setting, or one twice, or one that does not fit.
    """
    layers = list(bln_layers(model))
    if not layers:
        raise ValueError(
            f"Flags are scored on a model with BatchLayerNorm layers, got a {type(model).__name__} without any; train "
            f"it with BLNSwap() first, or load its checkpoint with load_swapped_checkpoint(...)."
        )
    if cells is None:
        return list(StatFlags.all())
    if isinstance(cells, (str, StatFlags, Mapping)):
        raise ValueError(f"cells must be a sequence of settings, got {cells!r}; write cells=[{cells!r}].")
    settings = [parse_setting(cell, layers) for cell in cells]
    codes = [setting_code(setting) for setting in settings]
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if twice or not settings:
        raise ValueError(f"cells must hold each setting once, at least one, got {', '.join(twice) or 'none'}.")
    return settings


def is_lightning_module(model: nn.Module) -> bool:
    """Whether it is a LightningModule; without importing Lightning, which takes seconds."""
    return any(cls.__name__ == "LightningModule" for cls in type(model).__mro__)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and nothing compiled inside; every module's own mode afterwards.

    A compiled graph would hold the flags of the setting that it was traced with, and see none of what is shared.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None for module in modes
    )
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), eager:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _PlainRun:
    """One pass over the data with a plain module."""

    def __init__(
        self,
        model: nn.Module,
        settings: Sequence[Setting],
        loss: Loss,
        metrics: Any,
        keep_errors: bool,
        on_batch: OnBatch | None,
    ) -> None:
        self.model = model
        self.records = [CellRecord(setting) for setting in settings]
        self.losses = SampleLosses(loss)
        self.device = next(iter(bln_layers(model).values())).num_samples.device
        self.metrics = None if metrics is None else MetricBank(metrics, len(settings), self.device)
        self.keep_errors = keep_errors
        self.on_batch = on_batch
        self.shared = SharedForward(model, settings, inference=True)

    def score(self, dataloader: Iterable[Any], limit_batches: int | None, progress: bool) -> list[CellScore]:
        """All settings' scores, in their order."""
        batches = itertools.islice(dataloader, limit_batches)
        count = len(dataloader) if isinstance(dataloader, Sized) else None
        if limit_batches is not None:
            count = limit_batches if count is None else min(count, limit_batches)
        with evaluating(self.model), self.shared, progress_bar(batches, count, progress) as shown:
            for number, batch in enumerate(shown):
                self._score_batch(number, batch)
        if not any(record.samples for record in self.records) and not any(record.error for record in self.records):
            raise ValueError("Flags are scored on at least one batch, got a data loader without any.")
        if self.metrics is not None:
            for cell, record in enumerate(self.records):
                if record.open:
                    record.metrics = self.metrics.compute(cell)
        return [record.score() for record in self.records]

    def _score_batch(self, number: int, batch: Any) -> None:
        inputs, target = _split(map_tensors(self._to_device, batch))
        samples = len(next(tensors_in((target, inputs))))
        cells = [cell for cell, record in enumerate(self.records) if record.open]
        errors: dict[int, Exception] | None = {} if self.keep_errors else None
        for group, outputs in self._outputs(inputs, cells, errors):
            self._record(group, outputs, target, samples, errors)
        for cell, error in (errors or {}).items():
            self.records[cell].fail(error)
        if self.on_batch is not None:
            seen = {cell: self.records[cell].batches[-1] for cell in cells if self.records[cell].open}
            for cell in self.on_batch(number, seen) or ():
                self.records[cell].pruned = True

    def _outputs(
        self, inputs: tuple[Any, ...], cells: list[int], errors: dict[int, Exception] | None
    ) -> Iterator[tuple[list[int], Any]]:
        """(settings, their outputs with a first axis for them) or ([setting], its output in a list)."""
        together = self.shared.run_together(lambda own: self.model(*own), inputs, cells)
        if together is not None:
            yield cells, together
            return
        small: list[tuple[int, Tensor]] = []
        for cell, output in self.shared.run(lambda _, own: self.model(*own), inputs, cells, errors=errors):
            if isinstance(output, Tensor) and output.nbytes * len(cells) <= ONE_LOSS_BYTES:
                small.append((cell, output))
            else:
                # A loss or a metric may write into what it is given.
                yield [cell], [map_tensors(normal_tensor, output)]
        if small:
            yield [cell for cell, _ in small], torch.stack([output for _, output in small])

    def _record(
        self, group: list[int], outputs: Any, target: Any, samples: int, errors: dict[int, Exception] | None
    ) -> None:
        each = self._losses_together(outputs, target, len(group), samples) if len(group) > 1 else None
        totals = None if each is None else each.sum(1).tolist()
        for i, cell in enumerate(group):
            output = map_tensors(itemgetter(i), outputs) if isinstance(outputs, Tensor) else outputs[i]
            try:
                own = self.losses.of_samples(output, target, samples) if each is None else each[i]
                if own is None:
                    total = self.losses.of_batch(output, target).item() * samples
                else:
                    own = own.double().cpu()
                    total = own.sum().item() if totals is None else totals[i]
                self.records[cell].add(samples, total, own)
                if self.metrics is not None:
                    self.metrics.update(cell, output, target)
            except Exception as error:
                if errors is None:
                    raise
                errors[cell] = error

    def _losses_together(self, outputs: Any, target: Any, count: int, samples: int) -> Tensor | None:
        """The losses (settings, samples), float64, by one call of the loss; None if it has none for samples."""
        if not (isinstance(outputs, Tensor) and isinstance(target, Tensor) and outputs.ndim > 1):
            return None
        repeated = target.repeat(count, *([1] * (target.ndim - 1)))
        together = self.losses.of_samples(outputs.flatten(0, 1), repeated, count * samples)
        return None if together is None else together.view(count, samples).double().cpu()

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _split(batch: Any) -> tuple[tuple[Any, ...], Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or next(tensors_in(batch), None) is None:
        raise ValueError(
            f"A plain module is scored on batches (*inputs, target) of tensors, got a {type(batch).__name__}"
            f"{f' of {len(batch)}' if hasattr(batch, '__len__') else ''}; use a LightningModule with a validation_step "
            f"for other batches."
        )
    return tuple(batch[:-1]), batch[-1]


@contextlib.contextmanager
def progress_bar(batches: Iterable[Any], count: int | None, shown: bool) -> Iterator[Iterable[Any]]:
    """The batches, with a bar on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield batches
        return
    with Progress(console=console, transient=True) as bar:
        yield bar.track(batches, total=count, description="Scoring settings")
