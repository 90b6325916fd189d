"""Train torchvision's ResNet-18 on real digits, as it is and with `BLNSwap()`, and compare.

    python examples/digits_resnet18.py        (or: make demo)

The two runs share seed, data, optimizer and schedule; the callback is the only difference. Then the trained network
is evaluated under all 16 settings of the four inference flags, which costs no training.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from digits import digits
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import resnet18

from lightning_bln import BLNSwap, StatFlags, set_flags_


class LitResNet18(pl.LightningModule):
    """A classifier like any other: nothing in it knows about the swap."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = resnet18(weights=None, num_classes=10)
        # The usual stem for small images; the original one shrinks them by 4.
        self.model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.model.maxpool = nn.Identity()
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.test_accuracy(logits, labels)
        self.log("test_loss", cross_entropy(logits, labels))
        self.log("test_acc", self.test_accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"], weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams["learning_rate"], total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few images only, to see that everything runs")
    args = parser.parse_args()
    if args.fast:
        args.epochs, args.batch_size = 1, 8
    limit = 2 if args.fast else None
    trainer_settings = {
        "limit_train_batches": limit,
        "limit_val_batches": limit,
        "limit_test_batches": limit,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    quieten()
    console = Console(highlight=False)

    train, val, test = digits()
    train_loader = DataLoader(train, args.batch_size, shuffle=True)
    val_loader, test_loader = DataLoader(val, args.batch_size), DataLoader(test, args.batch_size)
    console.print(
        f"ResNet-18 on {len(train)} training, {len(val)} validation and {len(test)} test images of digits;\n"
        f"epochs {args.epochs}, batch size {args.batch_size}, seed {args.seed}"
    )

    table = Table(title="\nThe same recipe with either norm", title_justify="left")
    for column in ("norm", "test accuracy", "test loss", "training seconds"):
        table.add_column(column, justify="left" if column == "norm" else "right")
    for norm, swap in (("BatchNorm", []), ("BatchLayerNorm", [BLNSwap()])):
        console.print(f"\n{norm}{', by Trainer(callbacks=[BLNSwap()])' if swap else ', as the model comes'}")
        pl.seed_everything(args.seed, verbose=False)
        model = LitResNet18()
        timer = Timer()
        trainer = pl.Trainer(
            callbacks=[*swap, timer, TQDMProgressBar()],
            max_epochs=args.epochs,
            num_sanity_val_steps=0,
            **trainer_settings,
        )
        trainer.fit(model, train_loader, val_loader)
        [result] = evaluator(trainer_settings).test(model, test_loader, verbose=False)
        seconds = timer.time_elapsed("train")
        table.add_row(norm, f"{result['test_acc']:.1%}", f"{result['test_loss']:.3f}", f"{seconds:.0f}")
        for callback in swap:
            console.print(callback.report.summary())
    console.print(table)
    console.print(f"One seed: a difference of 1 % is {len(test) / 100:.0f} images.\n")
    console.print(flags_table(model, test_loader, evaluator(trainer_settings), console))
    console.print(
        "True: this statistic is the population's. False: the mini-batch's.\n"
        "TTFF is the default; set_flags_(model, 'TTTT') sets others.\n"
        "To choose one, compare on validation data, not on the test set."
    )


def evaluator(settings: dict[str, Any]) -> pl.Trainer:
    """A silent Trainer. A model that was swapped in training needs no callback any more."""
    return pl.Trainer(enable_progress_bar=False, **settings)


def flags_table(model: pl.LightningModule, loader: DataLoader, trainer: pl.Trainer, console: Console) -> Table:
    """Test the one trained network under all 16 settings of its flags."""
    table = Table(title="That BatchLayerNorm network under all 16 inference flags", title_justify="left")
    table.add_column("flags")
    for name in StatFlags.names():
        table.add_column(name.replace("_", "_\n"))
    for name in ("test\naccuracy", "test\nloss"):
        table.add_column(name, justify="right")
    for flags in track(list(StatFlags.all()), "16 inference settings", console=console, transient=True):
        set_flags_(model, flags)
        [result] = trainer.test(model, loader, verbose=False)
        cells = ["True" if flag else "[dim]False[/dim]" for flag in flags]
        style = "bold" if flags == StatFlags() else None
        table.add_row(flags.code, *cells, f"{result['test_acc']:.1%}", f"{result['test_loss']:.3f}", style=style)
    return table


def quieten() -> None:
    """Leave out remarks that say nothing about this run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # The data are in memory: workers would only slow the loading down.
    warnings.filterwarnings("ignore", message="The '.*' does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)


if __name__ == "__main__":
    main()
