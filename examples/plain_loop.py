"""Batch Layer Normalization in a plain PyTorch loop, without Lightning.

    python examples/plain_loop.py

Swap the norms, call `start_epoch` once an epoch, and choose the inference flags afterwards.
"""

from __future__ import annotations

import argparse

import torch
from digits import SmallCNN, digits
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_bln import set_flags_, start_epoch, swap_norms_, update_statistics


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    correct, loss, count = 0, 0.0, 0
    for images, labels in loader:
        logits = model(images)
        correct += int((logits.argmax(1) == labels).sum())
        loss += cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return correct / count, loss / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that everything runs")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    console = Console(highlight=False)

    train, val, test = digits()
    train_loader = DataLoader(train, batch_size=64, shuffle=True)
    val_loader, test_loader = DataLoader(val, batch_size=64), DataLoader(test, batch_size=64)

    model = SmallCNN()
    console.print(swap_norms_(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for epoch in range(1 if args.fast else args.epochs):
        model.train()
        start_epoch(model)  # the population statistics become the averages over this epoch
        for images, labels in train_loader:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy, loss = evaluate(model, val_loader)
        console.print(f"epoch {epoch}: validation accuracy {accuracy:.1%}, loss {loss:.3f}")

    table = Table(title="\nOne trained network, tested with", title_justify="left")
    for column in ("population statistics", "flags", "test accuracy", "test loss"):
        table.add_column(column, justify="right" if column.startswith("test") else "left")

    def add_row(statistics: str, flags: str) -> None:
        set_flags_(model, flags)
        accuracy, loss = evaluate(model, test_loader)
        table.add_row(statistics, flags, f"{accuracy:.1%}", f"{loss:.3f}")

    for flags in ("TTFF", "TTTT", "FFFF"):
        add_row("the last epoch's averages", flags)
    # The averages were taken while the weights were changing; this takes them anew with the final ones.
    update_statistics(model, train_loader)
    add_row("recomputed: update_statistics", "TTFF")
    console.print(table)


if __name__ == "__main__":
    main()
