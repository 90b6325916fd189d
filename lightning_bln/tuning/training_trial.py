"""One trial of a training study: build the user's model, train it with BLNSwap, score its flags, keep its weights."""

from __future__ import annotations

import copy
import logging
import math
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import optuna

from lightning_bln.callback import BLNSwap
from lightning_bln.flags import StatFlags
from lightning_bln.surgery import bln_layers, set_flags_
from lightning_bln.tuning.scoring import score_flags
from lightning_bln.tuning.space import setting_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_bln.tuning.table import ScoreTable

log = logging.getLogger("lightning.pytorch.lightning_bln")

Data = pl.LightningDataModule | Sequence[Any] | None
Built = pl.LightningModule | tuple[pl.LightningModule, Data] | tuple[pl.LightningModule, Data, Mapping[str, Any]]
"""What the user's ``build(trial)`` returns: the model, its data, arguments of the Trainer."""

Build = Callable[[optuna.Trial], Built]

# A study is many short runs: what one run shows and writes by default is too much here. The user's arguments win.
_TRAINER = {"devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
# What the scoring has in common with the training; the rest, such as averaging callbacks, belongs to training.
_SCORING = ("accelerator", "devices", "precision")


@dataclass(frozen=True)
class TrialRun:
    """Trains and scores the model of one trial; called with the trial, returns its value.

    Attributes:
        build: The user's function.
        suggest: Makes the trial's BLNSwap; None if ``build`` puts one among its callbacks.
        monitor: Name of the logged value.
        mode: "min" or "max".
        all_flags: Score all 16 settings, not only that of the swap.
        seed: Added to the trial's number; None leaves the generators alone.
        checkpoint_dir: Where each complete trial's checkpoint goes; None for nowhere.
    """

    build: Build
    suggest: Callable[[optuna.Trial], BLNSwap] | None
    monitor: str
    mode: str
    all_flags: bool
    seed: int | None
    checkpoint_dir: Path | None

    def __call__(self, trial: optuna.Trial) -> float:
        """Train, score, and write what was found to the trial's user attributes."""
        if self.seed is not None:
            trial.set_user_attr("seed", self.seed + trial.number)
            pl.seed_everything(self.seed + trial.number, workers=True, verbose=False)
        model, data, arguments = _unpack(self.build(trial))
        swap, callbacks = self._callbacks(trial, arguments.pop("callbacks", None))
        settings = {name: swap.swap_arguments[name] for name in ("eps", "population", "momentum", "statistics")}
        trial.set_user_attr("swap", settings)
        with tempfile.TemporaryDirectory(prefix="lightning-bln-") as folder:
            best = _KeepBest(Path(folder) / "best.ckpt", self.monitor, self.mode)
            arguments |= {"enable_checkpointing": True}
            trainer = pl.Trainer(**_TRAINER | arguments, callbacks=[*callbacks, best])
            _check_one_process(trainer)
            with _own_interrupts():
                _fit(trainer, model, data)
            self._check_finite(trial, best)
            trial.set_user_attr("epoch", best.epoch)
            model.load_state_dict(best.weights)
            table = self._score(model, data, swap, trainer, arguments)
            value = self._record(trial, model, table)
            if self.checkpoint_dir is not None:
                self._keep(trial, best.path, table)
        return value

    def _callbacks(self, trial: optuna.Trial, given: Any) -> tuple[BLNSwap, list[pl.Callback]]:
        others = [given] if isinstance(given, pl.Callback) else list(given or ())
        swaps = [callback for callback in others if isinstance(callback, BLNSwap)]
        if len(swaps) != (self.suggest is None):
            raise ValueError(
                "A trial needs one BLNSwap: from tune_training(swap={...}), or with swap=None among the callbacks that "
                f"build(trial) returns; got swap={'None' if self.suggest is None else '{...}'} and {len(swaps)} there. "
                "Leave one of them out."
            )
        if self.suggest is not None:
            swaps = [self.suggest(trial)]
            others.insert(0, swaps[0])  # before averaging callbacks, which copy the model when they are set up
        return swaps[0], [_pruning_callback(trial, self.monitor), *others]

    def _check_finite(self, trial: optuna.Trial, best: _KeepBest) -> None:
        if best.value is not None:
            return
        if best.validations == 0:
            raise ValueError(
                f"A trial is valued by {self.monitor!r} of its validations, got a training without any; give "
                f"validation data and let check_val_every_n_epoch be at most max_epochs."
            )
        # Not a failure: that these hyper-parameters diverge is what the sampler is to learn.
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned(f"{self.monitor} was not finite in any validation.")

    def _score(
        self, model: pl.LightningModule, data: Data, swap: BLNSwap, trainer: pl.Trainer, arguments: Mapping[str, Any]
    ) -> ScoreTable:
        same = {name: arguments[name] for name in _SCORING if name in arguments}
        if trainer.limit_val_batches != 1.0:  # from fast_dev_run and overfit_batches too
            same["limit_val_batches"] = trainer.limit_val_batches
        scorer = pl.Trainer(**_TRAINER | same, enable_checkpointing=False)
        loaders = data if isinstance(data, pl.LightningDataModule) or data is None else data[1]
        cells = None if self.all_flags else [swap.flags or StatFlags()]
        return score_flags(
            model, loaders, cells=cells, monitor=self.monitor, mode=self.mode, trainer=scorer, progress=False
        )

    def _record(self, trial: optuna.Trial, model: pl.LightningModule, table: ScoreTable) -> float:
        state = table.best.to_dict()
        for name in ("setting", "loss", "metrics", "samples", "units"):
            trial.set_user_attr(name, state[name])
        trial.set_user_attr("layers", list(bln_layers(model)))
        if self.all_flags:
            values = {score.code: score.value(table.monitor) for score in table}
            trial.set_user_attr("scores", {code: v if math.isfinite(v) else None for code, v in values.items()})
        set_flags_(model, table.best.setting)
        return table.best.value(table.monitor)

    def _keep(self, trial: optuna.Trial, best: Path, table: ScoreTable) -> None:
        from lightning_bln.tuning.apply import apply_flags

        assert self.checkpoint_dir is not None
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        study = re.sub(r"[^\w.-]+", "_", trial.study.study_name)
        path = self.checkpoint_dir / f"{study}-trial-{trial.number:05d}.ckpt"
        apply_flags(best, setting_code(table.best.setting), path, overwrite=True)
        trial.set_user_attr("checkpoint", str(path))


class _KeepBest(pl.callbacks.Checkpoint):
    """Writes a checkpoint whenever a validation is the best one so far, and keeps its weights.

    In `on_validation_end`, so that it holds the very statistics that were validated. `ModelCheckpoint` would do, but
    two of them with equal arguments are an error, and the user may have one. The weights are those of the file, which
    averaging callbacks write in place of the model's own; checkpoint callbacks come after them.
    """

    def __init__(self, path: Path, monitor: str, mode: str) -> None:
        self.path = path
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1
        self.weights: dict[str, Any] = {}
        self._saving = False
        self.value: float | None = None
        self.epoch: int | None = None
        self.validations = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        value = float(trainer.callback_metrics[self.monitor])
        better = self.value is None or self.sign * value < self.sign * self.value
        if math.isfinite(value) and better:
            self.value, self.epoch = value, trainer.current_epoch
            self._saving = True
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saving = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._saving:
            self.weights = copy.deepcopy(checkpoint["state_dict"])


def _pruning_callback(trial: optuna.Trial, monitor: str) -> pl.Callback:
    """optuna-integration's callback, for the first validation of each epoch."""
    from optuna_integration import PyTorchLightningPruningCallback  # type: ignore[import-untyped]

    class PruningCallback(PyTorchLightningPruningCallback):
        """The step that it reports is the epoch: later validations of the same epoch would be warned about."""

        epoch: int | None = None

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.sanity_checking or trainer.current_epoch == self.epoch:
                return
            if monitor not in trainer.callback_metrics:
                raise ValueError(
                    f"monitor must be a value that validation_step logs ({', '.join(trainer.callback_metrics)}), got "
                    f"{monitor!r}; call self.log({monitor!r}, ...) there, or tune_training(..., monitor=...)."
                )
            self.epoch = trainer.current_epoch
            super().on_validation_end(trainer, pl_module)

    return PruningCallback(trial, monitor=monitor)


def _unpack(built: Any) -> tuple[pl.LightningModule, Data, dict[str, Any]]:
    parts = built if isinstance(built, tuple) else (built,)
    model, data, arguments = (*parts, None, None)[:3]
    arguments = {} if arguments is None else arguments
    pair = isinstance(data, Sequence) and not isinstance(data, str) and len(data) == 2
    if (
        len(parts) > 3
        or not isinstance(model, pl.LightningModule)
        or not (data is None or pair or isinstance(data, pl.LightningDataModule))
        or not isinstance(arguments, Mapping)
    ):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            "build(trial) must return (LightningModule, LightningDataModule or [train loader, validation loader], "
            f"{{Trainer arguments}}), the last one or two if needed, got ({got}); return for example "
            "(model, datamodule, {'max_epochs': 5})."
        )
    return model, data, dict(arguments)


def _check_one_process(trainer: pl.Trainer) -> None:
    if trainer.world_size > 1:
        raise ValueError(
            f"Each trial is trained in one process on one device, got a Trainer with {trainer.world_size}; give "
            f"devices=1, and start tune_training(...) on the same storage once a device."
        )


def _fit(trainer: pl.Trainer, model: pl.LightningModule, data: Data) -> None:
    if data is None or isinstance(data, pl.LightningDataModule):
        trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, data[0], data[1])
    if trainer.interrupted:
        raise KeyboardInterrupt  # a Lightning that returns instead of exiting


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ctrl-C as it is outside of Lightning, which exits instead and leaves the signal ignored."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
