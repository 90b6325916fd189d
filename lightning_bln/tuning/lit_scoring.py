"""Score a LightningModule: its own ``validation_step`` runs for each setting, under a real Trainer."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_bln.replay import tensors_in
from lightning_bln.tuning.records import CellRecord
from lightning_bln.tuning.sharing import SharedForward
from lightning_bln.tuning.space import Setting
from lightning_bln.tuning.table import CellScore

if TYPE_CHECKING:
    from lightning_bln.tuning.scoring import OnBatch

_LOG = inspect.signature(pl.LightningModule.log)  # takes longer to make than a value to log
_CONTAINERS = (list, dict, set, deque)


def score_lightning_module(
    model: pl.LightningModule,
    data: Any,
    settings: Sequence[Setting],
    *,
    monitor: str,
    limit_batches: int | None,
    trainer: pl.Trainer | None,
    progress: bool,
    keep_errors: bool,
    on_batch: OnBatch | None,
) -> tuple[list[CellScore], str]:
    """The scores of all settings and the name of the monitored value; see `score_flags`.

    Raises:
        ValueError: If ``validation_step`` is missing or does not log the monitored value.
    """
    from lightning_bln.tuning.scoring import evaluating

    if type(model).validation_step is pl.LightningModule.validation_step:
        raise ValueError(
            f"A LightningModule is scored by its validation_step, got a {type(model).__name__} without one; write one "
            f"that logs, or give a loss: score_flags(model, loader, loss)."
        )
    if trainer is None:
        trainer = pl.Trainer(
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            inference_mode=False,
        )
    limit = trainer.limit_val_batches
    try:
        attached = model.trainer
    except RuntimeError:  # never was with one
        attached = None
    with evaluating(model):
        run = _Run(model, settings, None if monitor == "loss" else monitor, keep_errors, on_batch)
        loaders: dict[str, Any] = {}
        if isinstance(data, pl.LightningDataModule):
            loaders["datamodule"] = data
        elif data is not None:
            loaders["dataloaders"] = data
        try:
            if limit_batches is not None:
                trainer.limit_val_batches = limit_batches
            with run.shared:
                trainer.validate(run, **loaders, verbose=False)
        finally:
            model.trainer = attached
            trainer.limit_val_batches = limit
    return run.scores(trainer.callback_metrics), run.monitor or "loss"


class _Run(pl.LightningModule):
    """Runs another module's validation once for each setting in each batch.

    Each setting has a view of the module: the same parameters, buffers and submodules, but its own metrics and its own
    Python attributes, so that what one setting collects is not another's. What a view logs is logged here, under the
    setting's number, and averaged by Lightning.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        settings: Sequence[Setting],
        monitor: str | None,
        keep_errors: bool,
        on_batch: OnBatch | None,
    ) -> None:
        super().__init__()
        self.shared = SharedForward(model, settings)
        self.records = [CellRecord(setting) for setting in settings]
        self.monitor = monitor
        self.keep_errors = keep_errors
        self.on_batch = on_batch
        self._batches = self._dataloader = 0
        self._logged: dict[str, tuple[float, int | None]] = {}  # numbers of the step in progress, with batch_size
        self._seen: dict[int, tuple[int, float]] = {}  # each setting's (samples, summed loss) in this batch
        self._views = [_view(model, self.shared) for _ in settings]
        for cell, view in enumerate(self._views):
            view.log = partial(self._log, cell)  # type: ignore[method-assign]
        # Lightning finds the views' metrics among the submodules.
        self.views = nn.ModuleList(self._views)
        # Lightning passes by position; a step may leave the later arguments out.
        self._taken = len(inspect.signature(model.validation_step).parameters)
        self.model = model  # for hooks that are called once
        # Lightning asks who overrides these, the module or the data module.
        for hook in ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer"):
            if getattr(type(model), hook) is not getattr(pl.LightningModule, hook):
                setattr(self, hook, getattr(model, hook))

    # -------------------------------------------------------------------- hooks

    def prepare_data(self) -> None:
        """The module's."""
        self.model.prepare_data()

    def setup(self, stage: str) -> None:
        """The module's, and the trainer for everyone."""
        self.model.trainer = self.trainer
        self.model.setup(stage)
        for view in self._views:
            view.trainer = self.trainer

    def teardown(self, stage: str) -> None:
        """The module's."""
        self.model.teardown(stage)

    def val_dataloader(self) -> Any:
        """The module's."""
        return self.model.val_dataloader()

    def on_validation_start(self) -> None:
        """Every setting's."""
        self._each("on_validation_start")

    def on_validation_epoch_start(self) -> None:
        """Every setting's."""
        self._each("on_validation_epoch_start")

    def on_validation_epoch_end(self) -> None:
        """Every setting's; metrics that are computed here are logged here."""
        self._each("on_validation_epoch_end")

    def on_validation_end(self) -> None:
        """Every setting's."""
        self._each("on_validation_end")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The module's, for every setting that is still in the race."""
        errors: dict[int, Exception] | None = {} if self.keep_errors else None
        step = partial(self._step, batch_idx=batch_idx, dataloader_idx=dataloader_idx)
        self._seen, self._dataloader = {}, dataloader_idx
        with _writable():
            for _ in self.shared.run(step, batch, self._open(), errors=errors):
                pass
        for cell, error in (errors or {}).items():
            self.records[cell].fail(error)
            self._seen.pop(cell, None)
        if self.on_batch is not None and self._seen:
            for cell in self.on_batch(self._batches, dict(self._seen)) or ():
                self.records[cell].pruned = True
        self._batches += 1

    def _step(self, cell: int, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        view = self._views[cell]
        self._logged = {}
        view.on_validation_batch_start(batch, batch_idx, dataloader_idx)
        output = view.validation_step(*(batch, batch_idx, dataloader_idx)[: self._taken])
        view.on_validation_batch_end(output, batch, batch_idx, dataloader_idx)
        if self.monitor is None:
            self.monitor = _only_loss(self._logged)
        if self.monitor in self._logged:
            value, size = self._logged[self.monitor]
            samples = size or len(next(tensors_in(batch)))
            self.records[cell].add(samples, value * samples)
            self._seen[cell] = samples, value * samples

    def _log(self, cell: int, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        bound = _LOG.bind(self, name, value, *args, **kwargs)
        kwargs = {key: own for key, own in bound.arguments.items() if key not in ("self", "name", "value")}
        # The bar and the logger are for one model's values, not for those of many settings.
        kwargs |= {"prog_bar": False, "logger": False}
        with self.shared.paused():
            if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
                several = len(self.trainer.num_val_batches) > 1 and kwargs.get("add_dataloader_idx", True)
                suffix = f"/dataloader_idx_{self._dataloader}" if several else ""
                self._logged[name + suffix] = float(value), kwargs.get("batch_size")
            self.log(_prefix(cell) + name, value, **kwargs)

    def _each(self, hook: str) -> None:
        for cell in self._open():
            self.shared.use(cell)
            with _writable():
                getattr(self._views[cell], hook)()

    def _open(self) -> list[int]:
        return [cell for cell, record in enumerate(self.records) if record.open]

    # ------------------------------------------------------------------- results

    def scores(self, logged: Mapping[str, Any]) -> list[CellScore]:
        """Every setting's score, with what it logged as Lightning averaged it."""
        scores = []
        for cell, record in enumerate(self.records):
            prefix = _prefix(cell)
            own = {name.removeprefix(prefix): value for name, value in logged.items() if name.startswith(prefix)}
            record.metrics = {name: float(value) for name, value in own.items()}
            if record.open and self.monitor not in own:
                raise ValueError(
                    f"The monitored value must be one that validation_step logs, got monitor="
                    f"{self.monitor or 'loss'!r} and the logged {', '.join(sorted(own)) or '(nothing)'}; pass monitor="
                    f"{next(iter(sorted(own)), 'val_loss')!r}, say."
                )
            score = record.score()
            scores.append(replace(score, loss=record.metrics[self.monitor]) if record.open and self.monitor else score)
        return scores


def _only_loss(logged: Iterable[str]) -> str | None:
    """The one number that was logged, or the one that is called a loss."""
    names = list(logged)
    if len(names) > 1:
        names = [name for name in names if "loss" in name.lower()]
    return names[0] if len(names) == 1 else None


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """Normal tensors without gradients, whatever mode the Trainer is in: only they tell when they are written to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _prefix(cell: int) -> str:
    return f"setting {cell}/"


def _view(model: pl.LightningModule, shared: SharedForward) -> pl.LightningModule:
    """The module once more, with the same parts but metrics and collected values of its own."""
    view = copy.copy(model)
    state = dict(vars(model))
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dict(state[name])
    for name, child in state["_modules"].items():
        if child is not None and _has_metrics(child):
            state["_modules"][name] = _own_metrics(child, shared)
    for name, value in state.items():
        if isinstance(value, _CONTAINERS) and not name.startswith("_"):
            state[name] = copy.copy(value)
    vars(view).update(state)
    return view


def _own_metrics(module: nn.Module, shared: SharedForward) -> nn.Module:
    """The module with copies of its metrics; other parts stay the same objects."""
    if isinstance(module, (Metric, MetricCollection)):
        own = copy.deepcopy(module)
        own.reset()
        # Its state is this setting's alone, also where it is updated with what all settings share.
        for part in own.modules():
            for name in ("update", "forward"):
                if hasattr(part, name):
                    setattr(part, name, _paused(getattr(part, name), shared))
        return own
    twin = copy.copy(module)
    vars(twin)["_modules"] = {
        name: _own_metrics(child, shared) if child is not None and _has_metrics(child) else child
        for name, child in module._modules.items()
    }
    return twin


def _has_metrics(module: nn.Module) -> bool:
    return any(isinstance(part, Metric) for part in module.modules())


def _paused(function: Callable[..., Any], shared: SharedForward) -> Callable[..., Any]:
    def paused(*args: Any, **kwargs: Any) -> Any:
        with shared.paused():
            return function(*args, **kwargs)

    return paused
