"""Fine-tune a pretrained model of the zoo: its new classifier first, with all other layers frozen, then every layer.

    python examples/finetune.py

Frozen layers are in eval mode: in train mode a norm would use the mini-batch's statistics, and its population
statistics would become those of the new images, whether its weights are frozen or not.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from digits import digits
from lightning.pytorch.callbacks import BaseFinetuning
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from lightning_bln import BatchLayerNorm, BLNSwap
from zoo.lit import LitClassifier


class FrozenFirst(BaseFinetuning):
    """Train the classifier alone until epoch ``unfreeze_at`` begins, then all layers, the others at the rate ``lr``."""

    def __init__(self, unfreeze_at: int, lr: float) -> None:
        super().__init__()
        self.unfreeze_at = unfreeze_at
        self.lr = lr

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        for layer in all_but_classifier(pl_module.model):
            self.freeze(layer, train_bn=False)
            layer.eval()  # Lightning keeps this mode

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == self.unfreeze_at:
            layers = all_but_classifier(pl_module.model)
            self.unfreeze_and_add_param_group(layers, optimizer, lr=self.lr)
            for layer in layers:
                layer.train()


def all_but_classifier(model: nn.Module) -> list[nn.Module]:
    return [layer for name, layer in model.named_children() if name != model.classifier]


class PrintAccuracy(pl.Callback):
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        accuracy = trainer.callback_metrics["val_accuracy"]
        print(f"epoch {trainer.current_epoch}: {trained:7,} parameters trained, validation accuracy {accuracy:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="cifar10", help="a tag of zoo.list_models(pretrained=True), or none")
    parser.add_argument("--frozen-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few images only, to see that everything runs")
    args = parser.parse_args()
    if args.fast:
        args.frozen_epochs, args.epochs = 1, 2
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # The data are in memory: workers would only slow the loading down.
    warnings.filterwarnings("ignore", message="The '.*' does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    # They are meant to be.
    warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode at the start of training")
    pl.seed_everything(args.seed, verbose=False)
    console = Console(highlight=False)

    pretrained = None if args.weights == "none" else args.weights
    transform = nn.Identity() if pretrained is None else zoo.get_weights(f"resnet20_bln.{pretrained}").transforms()

    def prepared(images: torch.Tensor, labels: torch.Tensor) -> TensorDataset:
        return TensorDataset(transform(images + 0.5), labels)  # the weights' transform takes pixels from 0 to 1

    train, val, test = (prepared(*part.tensors) for part in digits(size=32, channels=3))
    train_loader = DataLoader(train, batch_size=32, shuffle=True)
    val_loader, test_loader = DataLoader(val, batch_size=100), DataLoader(test, batch_size=100)

    module = LitClassifier("resnet20_bln", weights=pretrained, optimizer="adam", lr=2e-2, schedule="constant")
    module.model.fc.reset_parameters()  # ten classes again, but others
    for layer in module.modules():
        if isinstance(layer, BatchLayerNorm):
            # An average over an epoch would lag behind weights that change as fast as they do here.
            layer.population = "precise"
    limit = 2 if args.fast else None
    trainer = pl.Trainer(
        # There is nothing to swap; BLNSwap takes the population statistics of trained layers before each validation.
        callbacks=[BLNSwap(population="precise"), FrozenFirst(args.frozen_epochs, lr=3e-3), PrintAccuracy()],
        max_epochs=args.epochs,
        limit_train_batches=limit,
        limit_val_batches=limit,
        limit_test_batches=limit,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_loader, val_loader)
    [result] = trainer.test(module, test_loader, verbose=False)
    console.print(f"test accuracy {result['test_accuracy']:.1%}, loss {result['test_loss']:.3f}")


if __name__ == "__main__":
    main()
