"""`FlagTrainer`, whose methods are the subcommands ``score`` and ``tune``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import lightning.pytorch as pl
from rich.console import Console

from lightning_bln.cli.errors import UsageError
from lightning_bln.cli.options import DEFAULT_STUDY, STORAGE_VARIABLE
from lightning_bln.surgery import restore_swaps_
from lightning_bln.tuning.apply import checkpoint_flags, read_checkpoint
from lightning_bln.tuning.table import ScoreTable


class FlagTrainer(pl.Trainer):
    """A Trainer that scores the settings of a trained model's flags on its validation data."""

    def score(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        *,
        ckpt_path: str,
        cells: str | list[str] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        limit_batches: int | None = None,
        confidence: float = 0.95,
        csv: str | None = None,
        json: str | None = None,
        progress: bool = True,
    ) -> None:
        """Score settings of the flags of a trained model, all in one pass over its validation data.

        Args:
            model: The model as it was built for training.
            datamodule: Its data; without one the model's own val_dataloader serves.
            ckpt_path: Checkpoint of the model, trained with --bln.
            cells: Settings, such as TTFF,FFFF; by layer as "net.1=TTFF,net.5=FFFF", several with ";" between them.
                Default all 16.
            monitor: The logged value that is to be best, such as val_loss. Default: the one that is logged in each
                batch, if there is only one.
            mode: Whether the smallest or the largest value is best.
            limit_batches: Score on so many batches only.
            confidence: Of the intervals, for all settings together.
            csv: Write the table to this file.
            json: Write all there is to this file, for scripts; - for standard output instead of the table.
            progress: Show a progress bar in a terminal.
        """
        from lightning_bln.tuning.scoring import score_flags

        _check(limit_batches, csv, json)
        if not 0 < confidence < 1:
            raise UsageError(f"--confidence must lie between 0 and 1, got {confidence}; write --confidence 0.95.")
        load_checkpoint_(model, ckpt_path)
        table = score_flags(
            model,
            datamodule,
            cells=_settings(cells),
            monitor=monitor or "loss",
            mode=mode,
            confidence=confidence,
            limit_batches=limit_batches,
            trainer=self,
            progress=progress,
        )
        if not _write(table, csv, json):
            Console().print(table)

    def tune(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        *,
        ckpt_path: str,
        storage: str | None = None,
        study_name: str = DEFAULT_STUDY,
        per_layer: bool = False,
        n_trials: int | None = None,
        sampler: str | None = None,
        sampler_kwargs: dict[str, Any] | None = None,
        proposals: int = 8,
        workers: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        limit_batches: int | None = None,
        heartbeat: float = 10.0,
        grace: float = 60.0,
        max_retries: int = 2,
        csv: str | None = None,
        json: str | None = None,
        progress: bool = True,
    ) -> None:
        """Search the flags of a trained model in an Optuna study, which several processes can share.

        Args:
            model: The model as it was built for training.
            datamodule: Its data; without one the model's own val_dataloader serves.
            ckpt_path: Checkpoint of the model, trained with --bln.
            storage: The study's storage: sqlite:///FILE, postgresql://..., mysql://..., grpc://HOST:PORT or a
                FILE.journal. Default: OPTUNA_STORAGE, else sqlite:///lightning-bln.db.
            study_name: The study, made if there is none; run the same command again to go on with it.
            per_layer: Search settings for each layer, after the 16 for all layers together.
            n_trials: With per_layer, proposals beyond the 16. Default 64.
            sampler: With per_layer, a class of optuna.samplers, such as TPESampler.
            sampler_kwargs: Its arguments, such as '{"seed": 1}'.
            proposals: With per_layer, how many proposals are scored in one pass.
            workers: How many processes work on the study, each started by the same command.
            monitor: The logged value that is to be best, such as val_loss. Default: the one that is logged in each
                batch, if there is only one.
            mode: Whether the smallest or the largest value is best.
            limit_batches: Score on so many batches only.
            heartbeat: Seconds between this process's signs of life.
            grace: Seconds without one after which another process takes over its settings.
            max_retries: How often a setting that failed is tried again.
            csv: Write the table to this file.
            json: Write all there is to this file, for scripts; - for standard output instead of the table.
            progress: Show a progress bar in a terminal.
        """
        from lightning_bln.tuning.lookup import make_sampler
        from lightning_bln.tuning.study import tune_flags

        _check(limit_batches, csv, json)
        if sampler is None and sampler_kwargs is not None:
            raise UsageError("--sampler_kwargs must come with --sampler, got it alone; add --sampler TPESampler, say.")
        load_checkpoint_(model, ckpt_path)
        given = storage
        storage = storage or os.environ.get(STORAGE_VARIABLE) or None
        result = tune_flags(
            model,
            datamodule,
            storage=storage,
            study_name=study_name,
            per_layer=per_layer,
            n_trials=n_trials,
            sampler=None if sampler is None else make_sampler(sampler, sampler_kwargs),
            proposals=proposals,
            workers=workers,
            monitor=monitor or "loss",
            mode=mode,
            limit_batches=limit_batches,
            trainer=self,
            heartbeat=heartbeat,
            grace=grace,
            max_retries=max_retries,
            progress=progress,
        )
        if not _write(result.table, csv, json):
            Console().print(result)
            sys.stdout.write(_next_commands(ckpt_path, given, study_name))


def _next_commands(ckpt_path: str, storage: str | None, study_name: str) -> str:
    """What to type next; a password is not repeated."""
    study = []
    if storage is not None:
        has_password = "://" in storage and urlsplit(storage).password is not None
        study += ["--storage", '"$STORAGE"' if has_password else shlex.quote(storage)]
    if study_name != DEFAULT_STUDY:
        study += ["--study_name", shlex.quote(study_name)]
    path = Path(ckpt_path)
    out = path.with_name(f"{path.stem}-chosen.ckpt")
    commands = (
        ["apply", "--ckpt_path", shlex.quote(ckpt_path), "--out", shlex.quote(str(out)), *study],
        ["report", "--out", "report.html", *study],
    )
    return "\nNext:\n" + "".join(f"  lightning-bln {' '.join(command)}\n" for command in commands)


def load_checkpoint_(model: pl.LightningModule, path: str) -> None:
    """Load the checkpoint of a swapped model into the model as it was built: what a Trainer with `BLNSwap` would do.

    Raises:
        UsageError: If the checkpoint is of another model.
    """
    checkpoint = read_checkpoint(path)
    names = checkpoint_flags(checkpoint, path)
    model.configure_model()
    modules = dict(model.named_modules())
    if not set(names) <= set(modules):
        model.setup("validate")  # it may build them there
    model.on_load_checkpoint(checkpoint)
    try:
        restore_swaps_(model, checkpoint["state_dict"])
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"--ckpt_path must be a checkpoint of the same model, got {path} for {type(model).__name__}: {error} Give "
            f"the model's arguments of its training, as --config of its run."
        ) from error


def _settings(cells: str | Sequence[str] | None) -> list[str] | None:
    if cells is None:
        return None
    if isinstance(cells, str):
        cells = cells.split(";" if "=" in cells or ";" in cells else ",")
    return [cell.strip() for cell in cells if cell.strip()]


def _check(limit_batches: int | None, *files: str | None) -> None:
    """Before minutes of work, not after."""
    if limit_batches is not None and limit_batches < 1:
        raise UsageError(f"--limit_batches must be at least 1, got {limit_batches}; leave it out for all batches.")
    for path in files:
        if path is not None and path != "-" and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"the folder of {path!r} must exist, got none; create {Path(path).parent} first.")


def _write(table: ScoreTable, csv: str | None, json: str | None) -> bool:
    """Write the files that are asked for; whether standard output was one of them."""
    if csv is not None:
        table.to_csv(csv)
    if json is not None and json != "-":
        table.to_json(json)
    if json == "-":
        sys.stdout.write(table.to_json())
    return json == "-"
