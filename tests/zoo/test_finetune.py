"""Fine-tuning as examples/finetune.py does it: what is frozen stays put bit for bit, and begins anew when it is not."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import BatchLayerNorm, BLNSwap
from lightning_bln.layer import RUNNING
from tests.lit import trainer
from zoo.lit import LitClassifier

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAMPLES, BATCH = 20, 8

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("finetune")


def loader(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(SAMPLES, 1, 8, 8, generator=generator) * 3 + 1
    return DataLoader(TensorDataset(images, torch.arange(SAMPLES) % 10), BATCH)


def trained_module(population: str) -> LitClassifier:
    """With population statistics of other images, at another batch size."""
    module = LitClassifier("cnn_bln", optimizer="adam", lr=0.01, schedule="constant")
    module.model(torch.randn(16, 1, 8, 8))
    for layer in bln_layers(module):
        layer.population = population
    return module


def bln_layers(module: LitClassifier) -> list[BatchLayerNorm]:
    return [layer for layer in module.modules() if isinstance(layer, BatchLayerNorm)]


def frozen_tensors(module: LitClassifier) -> dict[str, Tensor]:
    """All of the state but the classifier's, and but the count of this epoch's samples."""
    return {
        name: value.clone()
        for name, value in module.model.state_dict().items()
        if isinstance(value, Tensor) and not name.startswith("fc.") and not name.endswith(".num_samples")
    }


class Modes(pl.Callback):
    """Which of the model's norms are in train mode, at every training batch."""

    def __init__(self) -> None:
        self.seen: list[set[bool]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: LitClassifier, batch: Any, batch_idx: int) -> None:
        self.seen.append({layer.training for layer in bln_layers(module)})


@pytest.mark.parametrize("population", ["epoch", "ema", "precise"])
@pytest.mark.parametrize("swap", [True, False])
def test_frozen_layers_stay_as_they_are(finetune: ModuleType, population: str, swap: bool) -> None:
    module = trained_module(population)
    before, classifier = frozen_tensors(module), module.model.fc.weight.detach().clone()
    modes = Modes()
    callbacks = [BLNSwap(population=population)] if swap else []
    fit = trainer(*callbacks, finetune.FrozenFirst(unfreeze_at=9, lr=0.01), modes, max_epochs=2)
    fit.fit(module, loader(0), loader(1))
    fit.test(module, loader(1), verbose=False)
    assert modes.seen == [{False}] * 6
    after = frozen_tensors(module)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not torch.equal(module.model.fc.weight, classifier)


def test_an_unfrozen_layers_statistics_begin_anew(finetune: ModuleType) -> None:
    module = trained_module("epoch")
    before = frozen_tensors(module)
    modes = Modes()
    fit = trainer(BLNSwap(), finetune.FrozenFirst(unfreeze_at=1, lr=0.01), modes, max_epochs=2)
    fit.fit(module, loader(0), loader(1))
    assert modes.seen == [{False}] * 3 + [{True}] * 3
    after = frozen_tensors(module)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    for layer in bln_layers(module):
        # Of the unfrozen epoch only: not of the 16 samples from before.
        assert layer.num_samples == SAMPLES
        assert layer.nominal_batch_size == BATCH
    trained = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.model.parameters()}


def test_frozen_weights_alone_do_not_keep_the_statistics() -> None:
    class WeightsOnly(BaseFinetuning):
        def freeze_before_training(self, pl_module: LitClassifier) -> None:
            self.freeze(pl_module.model.layers, train_bn=False)

        def finetune_function(self, pl_module: LitClassifier, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            pass

    module = trained_module("epoch")
    before = frozen_tensors(module)
    trainer(BLNSwap(), WeightsOnly()).fit(module, loader(0), loader(1))
    after = frozen_tensors(module)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*RUNNING, "nominal_batch_size"}
