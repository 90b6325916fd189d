"""A training process that test_resume kills and starts again: python resume_worker.py ORDER FOLDER [--kill-at N]."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import LitNet, StatefulLoader, loader, trainer

from lightning_bln import BLNSwap

STEPS = len(StatefulLoader())
EPOCHS = 2

ORDERS: dict[str, dict[str, Any]] = {
    "epoch_end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation_end": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "mid_epoch": {"every_n_train_steps": STEPS - 3},
    "last_batch": {"every_n_train_steps": STEPS},
}


class Kill(pl.Callback):
    """SIGKILL: nothing is cleaned up, nothing is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("order", choices=ORDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--population", default="epoch")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(1)
    torch.set_num_threads(1)
    checkpoints = ModelCheckpoint(args.folder, filename="{step}", save_top_k=-1, **ORDERS[args.order])
    callbacks: list[pl.Callback] = [BLNSwap(population=args.population), checkpoints]
    if args.kill_at is not None:
        callbacks.append(Kill(args.kill_at))
    run = trainer(*callbacks, max_epochs=EPOCHS)
    ckpt_path = None
    if args.resume:
        written = sorted(args.folder.glob("*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))
        ckpt_path = str(written[-1])
    model = LitNet()
    run.fit(model, StatefulLoader(), loader(24, seed=1), ckpt_path=ckpt_path)
    state = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    torch.save({"steps": run.global_step, "resumed_from": ckpt_path, "state": state}, args.folder / "final.pt")


if __name__ == "__main__":
    main()
