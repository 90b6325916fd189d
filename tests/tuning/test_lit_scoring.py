"""score_flags on LightningModules: what each setting logs is what trainer.validate logs under that setting."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_bln import StatFlags, set_flags_
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning import ScoreTable, score_flags
from tests.lit import trainer
from tests.tuning.networks import cnn, images


class Lit(pl.LightningModule):
    """Logs what users log: a loss, a metric, a collection, values of the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.inputs = MeanMetric()  # updated before the first layer
        self.collection = MetricCollection(
            {"micro": MulticlassAccuracy(4, average="micro"), "macro": MulticlassAccuracy(4, average="macro")}
        )
        self.confusion = MulticlassConfusionMatrix(4)
        self.register_buffer("seen", torch.zeros(()))
        self.outputs: list[Tensor] = []
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_validation_epoch_start(self) -> None:
        self.outputs.clear()
        self.confusion.reset()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        self.inputs(x.mean())
        self.log("inputs", self.inputs)
        self.log("scale", x.std())
        output = self(x)
        loss = F.cross_entropy(output, target)
        self.accuracy(output, target)
        self.collection.update(output, target)
        self.confusion.update(output, target)
        self.outputs.append(output)
        self.steps += 1
        self.log("val_loss", loss, prog_bar=True, batch_size=len(x))
        self.log("val_acc", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict(self.collection)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("spread", torch.cat(self.outputs).std())
        self.log("diagonal", self.confusion.compute().diag().sum().float())

    def val_dataloader(self) -> Any:
        return images()


def separately(model: pl.LightningModule, *data: Any, **settings: Any) -> dict[str, dict[str, float]]:
    """What trainer.validate logs under each setting, one after the other."""
    logged = {}
    for flags in StatFlags.all():
        set_flags_(model, flags)
        own = trainer(**settings)
        own.validate(model, *data, verbose=False)
        logged[flags.code] = {name: float(value) for name, value in own.callback_metrics.items()}
    set_flags_(model, StatFlags())
    return logged


def assert_same(table: ScoreTable, expected: dict[str, dict[str, float]]) -> None:
    assert {score.code for score in table} == set(expected)
    for score in table:
        assert score.metrics == pytest.approx(expected[score.code], abs=1e-6)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("own_trainer", [True, False])
def test_every_logged_value_is_that_of_a_separate_validation(inference_mode: bool, own_trainer: bool) -> None:
    model = Lit()
    expected = separately(model)
    given = {} if own_trainer else {"trainer": trainer(inference_mode=inference_mode)}
    table = score_flags(model, images(), monitor="val_loss", progress=False, **given)
    assert_same(table, expected)
    assert all(score.loss == score.metrics["val_loss"] for score in table)
    assert all(score.samples == 50 and len(score.units) == 7 for score in table)
    assert len({round(score.loss, 9) for score in table}) > 8
    assert len({score.metrics["spread"] for score in table}) > 8
    # Nothing of the scoring is left in the module.
    assert model.steps == 16 * 7  # the separate validations
    assert [layer.flags.code for layer in bln_layers(model).values()] == ["TTFF"] * 3
    assert not any("forward" in vars(layer) for layer in bln_layers(model).values())
    assert "log" not in vars(model)


def test_its_own_data_and_a_datamodule() -> None:
    class Data(pl.LightningDataModule):
        prepared = False

        def setup(self, stage: str) -> None:
            Data.prepared = stage == "validate"

        def val_dataloader(self) -> Any:
            return images(samples=20)

    model = Lit()
    assert_same(score_flags(model, progress=False), separately(model))
    table = score_flags(model, Data(), progress=False)
    assert Data.prepared
    assert_same(table, separately(model, images(samples=20)))


def test_transfer_hooks_of_the_datamodule_and_of_the_module() -> None:
    class Data(pl.LightningDataModule):
        def val_dataloader(self) -> Any:
            return images(samples=20)

        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [3 * batch[0], batch[1]]

    class Own(Plain):
        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] / 2, batch[1]]

    plain, own = Plain(), Own()
    assert_same(score_flags(plain, Data(), progress=False), separately(plain, Data()))
    assert_same(score_flags(own, images(samples=20), progress=False), separately(own, images(samples=20)))
    assert score_flags(plain, Data(), progress=False).best.loss != score_flags(plain, images(samples=20)).best.loss


def test_the_first_part_is_computed_once() -> None:
    class Count(TorchDispatchMode):
        convolutions = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.convolutions += func.overloadpacket is torch.ops.aten.convolution
            return func(*args, **(kwargs or {}))

    model = Lit()
    with Count():
        score_flags(model, images(samples=16), progress=False)
    assert Count.convolutions == 2 * (1 + 16)


class Plain(Lit):
    """A step with fewer arguments, that logs two numbers."""

    def validation_step(self, batch: list[Tensor]) -> None:  # type: ignore[override]
        output = self(batch[0])
        self.log("val_loss", F.cross_entropy(output, batch[1]))
        self.log("val_error", (output.argmax(1) != batch[1]).float().mean())

    def on_validation_epoch_end(self) -> None:
        pass


def test_what_is_monitored() -> None:
    model = Plain()
    by_loss = score_flags(model, images(), progress=False)  # of two numbers the one that is called a loss
    assert by_loss.monitor == "val_loss"
    by_error = score_flags(model, images(), monitor="val_error", progress=False)
    assert by_error.best.loss == min(score.metrics["val_error"] for score in by_loss)
    assert by_error.best.units  # paired by batch too
    accuracy = score_flags(Lit(), images(), monitor="val_acc", mode="max", progress=False)
    assert accuracy.best.metrics["val_acc"] == max(score.metrics["val_acc"] for score in accuracy)
    with pytest.raises(ValueError, match=r"got monitor='nonsense' and the logged val_error, val_loss"):
        score_flags(model, images(), monitor="nonsense", progress=False)


def test_several_loaders() -> None:
    class Two(Lit):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

        def on_validation_epoch_end(self) -> None:
            pass

    model = Two()
    loaders = [images(samples=20), images(samples=30, seed=3)]
    table = score_flags(model, loaders, monitor="val_loss/dataloader_idx_1", progress=False)
    expected = separately(model, loaders)
    assert_same(table, expected)
    assert table.best.loss == pytest.approx(min(e["val_loss/dataloader_idx_1"] for e in expected.values()))
    assert table.best.samples == 30


def test_errors_and_dropped_settings() -> None:
    class Raises(Plain):
        def validation_step(self, batch: list[Tensor]) -> None:
            super().validation_step(batch)
            if self.net[2].flags.code == "FTFT":
                raise ArithmeticError("planted")

    with pytest.raises(ArithmeticError, match="planted"):
        score_flags(Raises(), images(), progress=False)
    table = score_flags(
        Raises(),
        images(),
        cells=["TTFF", "FTFT", "FFFF"],
        errors="keep",
        progress=False,
        on_batch=lambda batch, losses: [2] if batch == 1 and set(losses) == {0, 2} else [],
    )
    assert {score.code: (score.error, score.pruned) for score in table} == {
        "TTFF": (None, False),
        "FTFT": ("ArithmeticError: planted", False),
        "FFFF": (None, True),
    }
    expected = separately(Plain(), images())
    assert set(expected["TTFF"]) == {"val_loss", "val_error"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": MulticlassAccuracy(4)}, "own logged metrics are scored, got metrics as well"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_flags(Plain(), images(), progress=False, **arguments)


def test_a_module_without_a_validation_step() -> None:
    class Silent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with pytest.raises(ValueError, match="got a Silent without one; write one that logs, or give a loss"):
        score_flags(Silent(), images())
    # As the message says: with a loss it is called as a plain module.
    table = score_flags(Silent(), images(), F.cross_entropy, MulticlassAccuracy(4))
    assert len(table) == 16


def test_limit_batches() -> None:
    model = Plain()
    table = score_flags(model, images(), limit_batches=2, progress=False)
    assert table.best.samples == 16
    assert_same(table, separately(model, images(), limit_val_batches=2))


def test_limit_batches_with_a_trainer_whose_own_limit_stays() -> None:
    own = trainer(limit_val_batches=3)
    assert score_flags(Plain(), images(), limit_batches=2, trainer=own, progress=False).best.samples == 16
    assert score_flags(Plain(), images(), trainer=own, progress=False).best.samples == 24
