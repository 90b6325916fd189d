"""Search a learning rate and the layer's settings together: an Optuna study, one training a trial.

    python examples/tune_training.py

Interrupt it and start it again, or start it in several terminals at once: they work on one study, in tune_training.db,
until it has as many trials as asked for. `optuna-dashboard sqlite:///tune_training.db` shows it.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from digits import SmallCNN, digits
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_bln import load_swapped_checkpoint
from lightning_bln.tuning import tune_training


class LitDigits(pl.LightningModule):
    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = SmallCNN()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        logits = self.model(batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"])


class Digits(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = digits()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=50)

    def test_loader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=50)


def shown(study: optuna.Study) -> Table:
    """The study's trials as a table."""
    table = Table(title=f"\n{len(study.trials)} trials", title_justify="left")
    columns = ("trial", "state", "lr", "eps", "population", "statistics", "flags", "val_loss")
    for column in columns:
        table.add_column(column, justify="right" if column in ("trial", "lr", "eps", "val_loss") else "left")
    for trial in study.trials:
        settings = trial.user_attrs.get("swap", {})
        table.add_row(
            f"{trial.number}",
            trial.state.name,
            f"{trial.params.get('learning_rate', float('nan')):.4f}",
            f"{settings.get('eps') or float('nan'):.5f}",
            settings.get("population"),
            settings.get("statistics"),
            trial.user_attrs.get("setting"),
            "" if trial.value is None else f"{trial.value:.4f}",
            style="bold" if trial.number == study.best_trial.number else None,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--storage", default="sqlite:///tune_training.db")
    parser.add_argument("--fast", action="store_true", help="two short trials, to see that everything runs")
    args = parser.parse_args()
    if args.fast:
        args.trials, args.epochs = 2, 1
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    console = Console(highlight=False)

    def build(trial: optuna.Trial) -> Any:
        model = LitDigits(learning_rate=trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True))
        return model, Digits(), {"max_epochs": args.epochs, "accelerator": "cpu"}

    study = tune_training(build, n_trials=args.trials, storage=args.storage, checkpoint_dir="tune_training_checkpoints")
    console.print(shown(study))
    best = study.best_trial
    scores = {code: value for code, value in best.user_attrs["scores"].items() if value is not None}
    worst = max(scores, key=scores.__getitem__)
    console.print(
        f"\nTrial {best.number} is best. One training, scored under all 16 flags: from {best.value:.4f} with "
        f"{best.user_attrs['setting']} to {scores[worst]:.4f} with {worst}."
    )

    model = load_swapped_checkpoint(LitDigits, best.user_attrs["checkpoint"])
    data = Digits()
    data.setup("test")
    evaluator = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (tested,) = evaluator.validate(model, data.test_loader(), verbose=False)
    console.print(
        f"Its checkpoint on the validation images, on which it was chosen: val_loss {best.value:.4f}.\n"
        f"On test images, which had no part in it: loss {tested['val_loss']:.4f}, "
        f"accuracy {tested['val_accuracy']:.1%}."
    )


if __name__ == "__main__":
    main()
