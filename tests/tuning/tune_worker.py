"""Worker processes of a study, which can be told to fail or to die: python tune_worker.py STORAGE FOLDER JSON."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln import BatchLayerNorm, update_statistics
from lightning_bln.tuning.study import tune_flags

SAMPLES, BATCH = 60, 6
TRIED = 2
"""Forward passes of tune_flags before it writes anything."""


class Net(nn.Module):
    """Small; counts its forward passes, and does under certain flags what it is told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = BatchLayerNorm(6)
        self.last = nn.Linear(6, 2)
        self.pause = 0.0
        self.fails: tuple[str, Path] | None = None
        self.dies_at = -1
        self.death: Path | None = None
        self.waits = False
        self.interrupted_at = -1
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if len(y) != len(x):
            raise RuntimeError("Calls are counted setting by setting, not of several in one call.")
        if not self.training:
            self._do_as_told(self.norm.flags.code)
        return self.last(y.relu())

    def _do_as_told(self, code: str) -> None:
        self.calls.append(code)
        time.sleep(self.pause)
        if self.death is not None and 0 <= self.dies_at <= len(self.calls):
            self.death.touch()
            os.kill(os.getpid(), signal.SIGKILL)  # nothing is cleaned up, nothing is written
        while self.waits and len(self.calls) > TRIED and self.death is not None and not self.death.exists():
            time.sleep(0.005)
        if self.interrupted_at == len(self.calls):
            raise KeyboardInterrupt
        if self.fails is not None and code == self.fails[0] and not self.fails[1].exists():
            self.fails[1].touch()
            raise RuntimeError(f"no {code} today")


def make_model() -> Net:
    """The same in every process."""
    torch.manual_seed(3)
    model = Net()
    update_statistics(model, make_data())
    return model.eval()


def make_data(batch: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Batches whose scale grows, so that it matters which statistics are taken."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(SAMPLES, 3, generator=generator) * torch.linspace(0.5, 2.0, SAMPLES)[:, None]
    targets = (inputs.sum(1) > 0).long()
    return list(zip(inputs.split(batch), targets.split(batch), strict=True))


def work(storage: str, folder: Path, options: dict[str, Any]) -> None:
    """One worker's whole life."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    model = make_model()
    model.death = folder / "dead"
    for name in ("pause", "dies_at", "waits"):
        setattr(model, name, options.get(name, getattr(model, name)))
    if "fails" in options:
        model.fails = (options["fails"], folder / "failed")
    result = tune_flags(
        model,
        make_data(),
        nn.functional.cross_entropy,
        storage=storage,
        workers=options.get("workers", 3),
        heartbeat=0.5,
        grace=8.0,
        progress=False,
    )
    assert len(result.table) == 16, result.summary()
    assert not result.given_up
    assert not result.elsewhere


def main() -> None:
    storage, folder, workers = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    # Importing takes longer than all the rest: it is done once, before the workers are processes of their own.
    pids = []
    for number, options in enumerate(workers):
        pid = os.fork()
        if pid == 0:
            output = os.open(folder / f"output-{number}", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                work(storage, folder, options)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps({"pids": pids, "codes": codes}))


if __name__ == "__main__":
    main()
