"""Checkpoints of a swapped model: interrupt a run, resume it, test its best checkpoint, rebuild the model elsewhere.

python examples/resume_and_test.py
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from digits import SmallCNN, digits
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_bln import BLNSwap, load_swapped_checkpoint


class LitDigits(pl.LightningModule):
    def __init__(self, width: int = 32, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = SmallCNN(width)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self.model(images)
        self.accuracy(logits, labels)
        self.log("loss", cross_entropy(logits, labels))
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"])


class Interrupt(pl.Callback):
    """Ends training in the middle of an epoch, as a lost machine would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            raise ConnectionError("the machine is gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="two epochs, to see that everything runs")
    args = parser.parse_args()
    epochs = 2 if args.fast else args.epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # The data are in memory: workers would only slow the loading down.
    warnings.filterwarnings("ignore", message="The '.*' does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    # What a resumed run does on purpose: it goes on in the folder of the first one.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    pl.seed_everything(args.seed, verbose=False)
    console = Console(highlight=False)

    train, val, test = digits()
    train_loader = DataLoader(train, batch_size=64, shuffle=True)
    val_loader, test_loader = DataLoader(val, batch_size=64), DataLoader(test, batch_size=64)

    with tempfile.TemporaryDirectory() as folder:

        def make_trainer(*callbacks: pl.Callback) -> pl.Trainer:
            checkpoints = ModelCheckpoint(folder, "best", monitor="loss", save_last=True)
            return pl.Trainer(
                callbacks=[BLNSwap(), checkpoints, *callbacks],
                max_epochs=epochs,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        trainer = make_trainer(Interrupt(epoch=epochs // 2))
        try:
            trainer.fit(LitDigits(), train_loader, val_loader)
        except ConnectionError as error:
            console.print(f"Interrupted in epoch {trainer.current_epoch}: {error}.")

        trainer = make_trainer()
        trainer.fit(LitDigits(), train_loader, val_loader, ckpt_path=f"{folder}/last.ckpt")
        console.print(f"Resumed from last.ckpt and trained to the end of epoch {trainer.current_epoch - 1}.")
        best = trainer.checkpoint_callback.best_model_path
        logged = trainer.checkpoint_callback.best_model_score.item()

        table = Table(title="\nThe best checkpoint", title_justify="left")
        for column in ("", "data", "accuracy", "loss"):
            table.add_column(column, justify="right" if column in ("accuracy", "loss") else "left")

        def add_row(how: str, data: str, result: dict[str, float]) -> None:
            accuracy = f"{result['accuracy']:.1%}" if "accuracy" in result else ""
            table.add_row(how, data, accuracy, f"{result['loss']:.6f}")

        add_row("logged while training", "validation", {"loss": logged})
        # A new model and a new Trainer: the callback swaps the norms before the checkpoint is loaded.
        [result] = make_trainer().validate(LitDigits(), val_loader, ckpt_path=best, verbose=False)
        add_row("validate(ckpt_path=...)", "validation", result)
        [result] = make_trainer().test(LitDigits(), test_loader, ckpt_path=best, verbose=False)
        add_row("test(ckpt_path=...)", "test", result)

        # Without a Trainer, as a service would load it; load_from_checkpoint does not know of the swap.
        model = load_swapped_checkpoint(LitDigits, best).eval()
        images, labels = test.tensors
        with torch.no_grad():
            logits = model.model(images)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        loss = cross_entropy(logits, labels).item()
        add_row("load_swapped_checkpoint(...)", "test", {"accuracy": accuracy, "loss": loss})
        console.print(table)


if __name__ == "__main__":
    main()
