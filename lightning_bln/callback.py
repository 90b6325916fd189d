"""`BLNSwap`, the Lightning callback that swaps a model's norms and keeps their epochs: glue over the other modules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_bln.averaging import align_averaged_copies, is_averaging, needs_refresh
from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.replay import CallRecorder
from lightning_bln.statistics import merge_ranks_, recompute_statistics, start_epoch
from lightning_bln.surgery import bln_layers, set_flags_, swap_norms_
from lightning_bln.swap_report import SwapEntry, SwapReport

log = logging.getLogger("lightning.pytorch.lightning_bln")


class BLNSwap(pl.Callback):
    """Train any model with Batch Layer Normalization: ``Trainer(callbacks=[BLNSwap()])``.

    Swaps the model's normalization layers (see `swap_norms_`) before its optimizers are made, those too that it builds
    in ``setup`` or ``configure_model``; once, whatever is called in which order. Each training epoch accumulates
    population statistics afresh; they are merged over processes before each validation and at the end of each epoch,
    before checkpoints are written. A checkpoint, a full or a weights-only one, holds all that a swapped model needs:
    resume with ``trainer.fit(ckpt_path=...)`` and test with ``trainer.test(ckpt_path=...)`` under the same callback,
    or rebuild the model with `load_swapped_checkpoint`. ``load_from_checkpoint`` by itself builds the model without
    the swap and then fails on the keys that it does not know.

    Put it before averaging callbacks (EMA, SWA): they copy the model when they are set up. After SWA call
    `update_statistics`: it averages parameters only. With a strategy that starts
    its processes from this one (``ddp_spawn``, ``ddp_notebook``) call `swap_norms_` on the model before ``fit``
    too: the processes swap their copies, and this process gets weights back, not layers.

    Args:
        flags: Inference flags; also set on what a checkpoint brings. None (default): `StatFlags()`, or a checkpoint's.
        statistics: As in `swap_norms_`, as all arguments down to ``filter_fn``. Default "per_position".
        feature_population: Default "pooled".
        population: "epoch" (default), "ema" or "precise": recomputed over the last ``precise_batches`` training batches
            before each validation and at the end of each epoch.
        momentum: Default 0.1.
        batch_size: Default None.
        sync: Batch statistics over all processes. "auto" (default): if the Trainer has ``sync_batchnorm=True``, and
            where the old layer was a SyncBatchNorm.
        affine: "preserve" (default) or "paper".
        eps: Of all new layers. Default None: as ``affine`` says, the old layer's or 1e-3.
        norms: Default ("batch", "layer").
        include: Default None.
        exclude: Default None.
        filter_fn: Default None.
        precise_batches: Batches that "precise" keeps and runs again. Default 16.

    Attributes:
        report: The `SwapReport` of the last model, None before.

    Raises:
        ValueError: For settings that do not fit, and when training or evaluation starts on a model in which there was
            nothing to swap.

    Example:
        >>> trainer = pl.Trainer(callbacks=[BLNSwap()], max_epochs=3)  # doctest: +SKIP
        >>> trainer.fit(LitModel(), datamodule)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        flags: FlagsLike | None = None,
        statistics: str = "per_position",
        feature_population: str = "pooled",
        population: str = "epoch",
        momentum: float = 0.1,
        batch_size: int | None = None,
        sync: bool | str = "auto",
        affine: str = "preserve",
        eps: float | None = None,
        norms: Sequence[str] = ("batch", "layer"),
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        precise_batches: int = 16,
    ) -> None:
        if precise_batches < 1:
            raise ValueError(f"precise_batches must be at least 1, got {precise_batches!r}; say 16.")
        self.flags = None if flags is None else StatFlags.parse(flags)
        self.sync = sync
        self.swap_arguments: dict[str, Any] = {
            "flags": self.flags or StatFlags(),
            "statistics": statistics,
            "feature_population": feature_population,
            "population": population,
            "momentum": momentum,
            "batch_size": batch_size,
            "affine": affine,
            "eps": eps,
            "norms": tuple(norms) if not isinstance(norms, str) else norms,
            "include": include if include is None or isinstance(include, str) else list(include),
            "exclude": exclude if exclude is None or isinstance(exclude, str) else list(exclude),
            "filter_fn": filter_fn,
        }
        self.precise_batches = precise_batches
        self.report: SwapReport | None = None
        # Settings that cannot work fail here and not in the middle of a run.
        checked = self.swap_arguments | {"filter_fn": None}
        swap_norms_(nn.Sequential(nn.BatchNorm1d(1)), sync=sync, missing_ok=True, **checked)
        self._ready = False
        self._stage = ""
        self._passes: tuple[SwapEntry, ...] = ()
        self._epoch: int | None = None
        self._refreshed_at: int | None = None
        self._recorder: CallRecorder | None = None
        self._averaging = False
        self._aligned = True

    # ----------------------------------------------------------------- surgery

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Swap what exists already, and arrange for what ``setup`` and ``configure_model`` are yet to build."""
        self._ready = False
        self._passes = ()
        self._stage = stage
        self._warn_about_averaging(trainer)
        if not any(_overrides(pl_module, hook) for hook in ("setup", "configure_model")):
            self._swap(trainer, pl_module, missing_ok=False)
        else:
            # Not now: a pattern may be for layers that are yet to be built. But averaging callbacks copy the model now.
            averaging = any(is_averaging(callback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            if averaging:
                self._swap(trainer, pl_module, missing_ok=True)
            # No callback hook lies between configure_model and the loading of a checkpoint or configure_optimizers.
            # An attribute of this one module, removed again when the run starts, puts the swap there.
            present = vars(pl_module).get("configure_model")
            if present is None or isinstance(present, _ConfigureAndSwap):
                swap = partial(self._swap, trainer, missing_ok=averaging)
                pl_module.configure_model = _ConfigureAndSwap(  # type: ignore[method-assign]
                    _configure_and_swap, pl_module, swap
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is complete: it must have something swapped by now."""
        self._start(trainer, pl_module)
        self._epoch = None
        self._refreshed_at = None
        self._averaging = any(is_averaging(callback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        # The layers' own policy counts: a checkpoint, or a swap before this one, may have brought another.
        self._close_recorder()
        if any(layer.population == "precise" for layer in bln_layers(pl_module).values()):
            self._recorder = CallRecorder(pl_module, self.precise_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_fit_start`."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_fit_start`."""
        self._start(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing of the callback in the module but the swapped layers."""
        self._tidy(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As `teardown`, which is not called then."""
        self._tidy(pl_module)

    def _swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, missing_ok: bool) -> None:
        sync = self.sync
        if sync == "auto" and _sync_batchnorm(trainer):
            sync = True
        report = swap_norms_(pl_module, sync=sync, missing_ok=missing_ok, **self.swap_arguments)
        if report.swapped:
            if not self._passes:
                self._warn_about_spawned_processes(trainer)
            # Layers swapped in an earlier pass of this set-up stay in the report.
            names = {entry.name for entry in self._passes}
            self._passes += tuple(entry for entry in report.entries if entry.name not in names)
            self.report = SwapReport(self._passes)
            if trainer.is_global_zero:
                log.info("BLNSwap: %s", self.report)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ready:
            return
        self._remove_wrapper(pl_module)
        self._swap(trainer, pl_module, missing_ok=False)
        if self.flags is not None:
            set_flags_(pl_module, self.flags)
        self._warn_about_other_settings(pl_module)
        self._ready = True

    def _tidy(self, pl_module: pl.LightningModule) -> None:
        self._remove_wrapper(pl_module)
        self._close_recorder()
        self._ready = False

    def _remove_wrapper(self, pl_module: pl.LightningModule) -> None:
        wrapper = vars(pl_module).get("configure_model")
        if isinstance(wrapper, _ConfigureAndSwap):
            del pl_module.configure_model

    def _warn_about_other_settings(self, pl_module: pl.LightningModule) -> None:
        # None asks for nothing: a model's own layers may well have a batch size and an eps of their own.
        names = ["population", "momentum"]
        names += [name for name in ("batch_size", "eps") if self.swap_arguments[name] is not None]
        for name, layer in bln_layers(pl_module).items():
            other = {n: getattr(layer, n) for n in names if getattr(layer, n) != self.swap_arguments[n]}
            if other:
                kept = ", ".join(f"{n}={value!r}" for n, value in other.items())
                asked = ", ".join(f"{n}={self.swap_arguments[n]!r}" for n in other)
                rank_zero_warn(
                    f"A layer that was swapped before, or that a checkpoint brought, keeps its settings: {name!r} has "
                    f"{kept}, this BLNSwap has {asked}. Write BLNSwap({kept}), or set the attributes of the layers."
                )
                return

    def _warn_about_averaging(self, trainer: pl.Trainer) -> None:
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        if any(needs_refresh(callback) for callback in callbacks):
            rank_zero_warn(
                "The averaged weights of StochasticWeightAveraging must get population statistics of their own, got "
                "those of the last epoch's weights: call update_statistics(model, train_dataloader) after fit."
            )
        for callback in callbacks[: callbacks.index(self)] if self in callbacks else []:
            if is_averaging(callback):
                rank_zero_warn(
                    f"BLNSwap must stand before {type(callback).__name__}, which copies the model when it is set up, "
                    f"got it after; write callbacks=[BLNSwap(), {type(callback).__name__}(...)]."
                )

    def _warn_about_spawned_processes(self, trainer: pl.Trainer) -> None:
        if self._stage == "fit" and "MultiProcessing" in type(trainer.strategy.launcher).__name__:
            rank_zero_warn(
                "The model in the main process must be swapped too, got one that is swapped in the processes that "
                f"{type(trainer.strategy).__name__} starts only: after fit it would be the old "
                "model with the new weights. Call swap_norms_(model, ...) before trainer.fit(model), or read the "
                "checkpoint with load_swapped_checkpoint(...)."
            )

    # -------------------------------------------------------------- statistics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run from the start has nothing to do with the epochs of an earlier one."""
        if trainer.ckpt_path is None and trainer.global_step == 0:
            for layer in bln_layers(pl_module).values():
                layer.epoch = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the epoch's accumulation at its first batch.

        Here, and by the epoch's number kept in the layers, because the epoch hooks do not fire in every order of
        resuming, and must not begin anew where an epoch is resumed in its middle.
        """
        if trainer.current_epoch != self._epoch:
            start_epoch(pl_module, trainer.current_epoch)
            self._epoch = trainer.current_epoch
            self._aligned = not self._averaging
            if self._recorder is not None:
                self._recorder.batches.clear()  # a run resumed here has none of the last epoch's either
        if self._recorder is not None:
            self._recorder.begin_batch()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The batch's calls are complete; averaging callbacks come next."""
        if self._recorder is not None:
            self._recorder.end_batch()
        if not self._aligned:  # the shapes are known from an epoch's first batch on
            self._align_copies(trainer, pl_module)
            self._aligned = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation inside fit uses the statistics of all processes, of the epoch so far."""
        self._start(trainer, pl_module)
        # Not in the sanity check: nothing was trained, and statistics that a resumed run loaded are merged already.
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._close_statistics(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch's statistics are final; checkpoint callbacks run after this."""
        self._close_statistics(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """An averaging callback writes its copy of the model next."""
        self._align_copies(trainer, pl_module)

    def _align_copies(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        align_averaged_copies(trainer.callbacks, pl_module)  # type: ignore[attr-defined]

    def _close_statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recorder is None:
            merge_ranks_(pl_module)
        elif self._recorder.batches and self._refreshed_at != trainer.global_step:
            with trainer.precision_plugin.forward_context():
                modes = self._recorder.modes
                layers = [layer for layer in bln_layers(pl_module).values() if modes[layer]]
                batches = list(self._recorder.batches)
                recompute_statistics(pl_module, layers, batches, self._recorder.replay, modes)
            self._refreshed_at = trainer.global_step
        self._align_copies(trainer, pl_module)

    def _close_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


class _ConfigureAndSwap(partial):  # type: ignore[type-arg]
    """What stands in for ``pl_module.configure_model`` until the run starts; a partial, which Lightning can inspect."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[], None]:
        # A copy of the module is configured already, and must not copy the trainer that this refers to.
        return partial(_nothing)


def _nothing() -> None:
    pass


def _configure_and_swap(pl_module: pl.LightningModule, swap: Callable[[pl.LightningModule], None]) -> None:
    type(pl_module).configure_model(pl_module)
    swap(pl_module)


def _overrides(pl_module: pl.LightningModule, hook: str) -> bool:
    defined_in = getattr(type(pl_module), hook).__module__.split(".")[0]
    return defined_in not in ("lightning", "pytorch_lightning")


def _sync_batchnorm(trainer: pl.Trainer) -> bool:
    # The Trainer has no public attribute for its argument sync_batchnorm.
    layer_sync = getattr(trainer.strategy, "_layer_sync", None)
    return any(cls.__name__ == "TorchSyncBatchNorm" for cls in type(layer_sync).__mro__)
