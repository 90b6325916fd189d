"""What the tests of training studies share: a small study on a real SQLite file."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import optuna
from lit import LitNet, loader, trainer

from lightning_bln import StatFlags

QUICK: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2}
FLAGS = [f"bln.{name}" for name in StatFlags.names()]


def loaders() -> tuple[Any, Any]:
    return loader(), loader(24, seed=1)


def build(trial: optuna.Trial) -> Any:
    learning_rate = trial.suggest_float("learning_rate", 1e-3, 0.3, log=True)
    return LitNet(learning_rate=learning_rate), loaders(), QUICK


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def validated(model: pl.LightningModule, monitor: str = "val_loss") -> float:
    return trainer().validate(model, loaders()[1], verbose=False)[0][monitor]
