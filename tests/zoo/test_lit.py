"""`LitClassifier` under a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_bln import BLNSwap
from lightning_bln.surgery import bln_layers
from zoo.data import Digits
from zoo.lit import LitClassifier, computes_in_bf16

# The resumed run does not save checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

GRU = {"model": "gru_bln", "optimizer": "adam", "lr": 1e-2, "bf16": False}
GRU_KWARGS = {"vocabulary_size": None, "embedding_size": 8, "hidden_size": 12, "batch_size": 32}


def trainer(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(
        default_root_dir=folder, callbacks=[BLNSwap(), *callbacks], **{"max_epochs": 2, **quiet, **kwargs}
    )


class StopAt(pl.Callback):
    """An error at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def module(**kwargs: Any) -> LitClassifier:
    pl.seed_everything(3)
    return LitClassifier(**{**GRU, "model_kwargs": GRU_KWARGS, **kwargs})


@pytest.mark.parametrize(("saved", "stopped"), [(10, 15), (37, 40), (50, 55), (74, None)])
def test_resuming_from_any_step_is_the_same_bit_for_bit(saved: int, stopped: int | None, tmp_path: Path) -> None:
    expected = module()
    trainer(tmp_path, enable_checkpointing=False, max_epochs=3).fit(expected, Digits("sequences"))
    model = module()
    every = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=saved, save_top_k=-1)
    first = trainer(tmp_path, every, StopAt(-1 if stopped is None else stopped), max_epochs=3)
    if stopped is None:
        first.fit(model, Digits("sequences"))
    else:
        with pytest.raises(RuntimeError, match="stopped"):
            first.fit(model, Digits("sequences"))
    resumed = module()
    torch.randn(100)  # the global generator may be anywhere
    rest = trainer(tmp_path, enable_checkpointing=False, max_epochs=3)
    rest.fit(resumed, Digits("sequences"), ckpt_path=tmp_path / "steps" / f"step={saved}.ckpt", weights_only=True)
    assert rest.global_step == 111
    for name, value in expected.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_it_learns_and_logs(tmp_path: Path) -> None:
    pl.seed_everything(1)
    model = LitClassifier("cnn_bln", optimizer="adam", lr=1e-2)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(model, Digits())
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(run.callback_metrics)
    (tested,) = run.test(model, Digits(), verbose=False)
    assert tested["test_accuracy"] > 0.9
    data = Digits(eval_batch_size=300)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        outputs = model.eval()(images)
    assert tested["test_accuracy"] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    assert tested["test_loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5)


def test_one_output_is_a_logit() -> None:
    outputs, labels = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])
    expected = nn.functional.binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.ones(2))
    torch.testing.assert_close(LitClassifier.loss(outputs, labels), expected)


def test_accuracy_of_logits_that_could_be_probabilities() -> None:
    module = LitClassifier("paper_lstm_bln", num_classes=1, model_kwargs={"vocabulary_size": 5})
    module.model = Constant(torch.tensor([[0.3], [0.1], [0.45], [-0.2]]))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4).long()), 4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    (tested,) = pl.Trainer(**quiet, enable_checkpointing=False).test(module, loader, verbose=False)
    assert tested["test_accuracy"] == 0.75


class Constant(nn.Module):
    """Outputs that are given."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs


def test_validation_from_a_checkpoint_says_nothing_about_the_next_training(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10)
    model, data = module(), Digits("sequences")
    trainer(tmp_path, every, max_steps=10).fit(model, data)
    again = Digits("sequences")
    first = trainer(tmp_path, enable_checkpointing=False)
    first.test(module(), again, ckpt_path=tmp_path / "step=10.ckpt", weights_only=True, verbose=False)
    fresh = trainer(tmp_path, enable_checkpointing=False, max_epochs=1)
    fresh.fit(module(), again)
    assert fresh.global_step == 37


def test_the_seed_of_the_process_is_the_same_after_a_training(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, max_steps=3, enable_checkpointing=False).fit(model, Digits("sequences"))
    assert torch.initial_seed() == model.seed == Digits().seed == 3


def test_the_seed_goes_with_the_checkpoint(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, every, StopAt(12), max_epochs=1).fit(module(), Digits("sequences"))
    resumed, data = module(), Digits("sequences")
    resumed.seed = 99
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit(resumed, data, ckpt_path=tmp_path / "step=10.ckpt", weights_only=True)
    assert resumed.seed == 3


def test_each_epoch_begins_statistics_afresh_without_a_callback(tmp_path: Path) -> None:
    model = LitClassifier("cnn_bln")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=2, enable_checkpointing=False, **quiet).fit(model, Digits())
    assert int(model.model.layers[1].num_samples) == 37 * 32


def test_groups_that_are_added_later_do_not_decay() -> None:
    optimizer: Any = LitClassifier(
        "cnn_bln", optimizer="adam", weight_decay=0.1, schedule="constant"
    ).configure_optimizers()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]


def test_classes_are_those_of_the_weights() -> None:
    module = LitClassifier("gru_bln", weights="imdb")
    assert module.hparams["num_classes"] == 2
    assert module.model.fc.out_features == 2
    assert LitClassifier("cnn_bln").hparams["num_classes"] == 10


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    model = LitClassifier("cnn_bn", weight_decay=0.1, schedule="constant", optimizer="sgd", lr=0.5)
    optimizer: Any = model.configure_optimizers()
    decayed, rest = optimizer.param_groups
    assert [group["weight_decay"] for group in (decayed, rest)] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert optimizer.defaults["nesterov"]


@pytest.mark.parametrize(("optimizer", "scales"), [("sgd", {1, 32, 64}), ("adam", {1, 32**0.5, 8})])
def test_matched_gains_have_rates_of_their_own(optimizer: str, scales: set[float], tmp_path: Path) -> None:
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    settings: dict[str, Any] = {"optimizer": optimizer, "lr": 1e-3, "matched_gains": True}
    model = LitClassifier("cnn_bln", **settings)
    fitting = trainer(tmp_path, Rates(), max_epochs=1)
    fitting.fit(model, Digits())
    for of_step in rates:
        lowest = min(of_step)
        assert {round(rate / lowest, 4) for rate in of_step} == {round(scale, 4) for scale in scales}
    assert min(max(rates)) == pytest.approx(1e-3, rel=0.1)
    gains = {id(layer.weight): layer.num_features for layer in bln_layers(model.model).values()}
    for group in fitting.optimizers[0].param_groups:
        assert len({gains.get(id(parameter), 1) for parameter in group["params"]}) == 1
    # There is nothing to match without BLN, or where its layers are frozen.
    for layer in bln_layers(model.model).values():
        layer.requires_grad_(False)
    model.hparams["schedule"] = "constant"
    frozen: Any = model.configure_optimizers()
    assert {group["lr"] for group in frozen.param_groups} == {1e-3}
    plain: Any = LitClassifier("cnn_bn", schedule="constant", matched_gains=True).configure_optimizers()
    assert {group["lr"] for group in plain.param_groups} == {0.1}


def test_the_rate_rises_and_falls(tmp_path: Path) -> None:
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, Rates(), max_epochs=1).fit(LitClassifier("cnn_bln", lr=0.1), Digits())
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.1, rel=0.1)
    assert rates[-1] < 0.005
    assert rates.index(max(rates)) in (6, 7)  # of 37


def test_bf16_is_for_training_only(tmp_path: Path) -> None:
    seen = {}

    class Watch(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            def note(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                seen[layer.training] = output.dtype

            pl_module.model.layers[0].register_forward_hook(note)

    trainer(tmp_path, Watch(), max_epochs=1, limit_train_batches=2).fit(LitClassifier("cnn_bln", bf16=True), Digits())
    assert seen == {True: torch.bfloat16, False: torch.float32}


def test_whether_bf16_pays_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert computes_in_bf16(torch.device("cpu")) == expected
    assert not computes_in_bf16(torch.device("meta"))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="optimizer must be 'sgd' or 'adam', got 'lamb'"):
        LitClassifier("cnn_bln", optimizer="lamb")
    with pytest.raises(ValueError, match="schedule must be 'triangle' or 'constant', got 'step'"):
        LitClassifier("cnn_bln", schedule="step")


def test_predictions_are_those_of_the_test_data() -> None:
    model, data = module(), Digits("sequences", eval_batch_size=70)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    outputs = pl.Trainer(**quiet).predict(model, datamodule=data)
    assert [len(part) for part in outputs] == [70, 70, 70, 70, 20]
    with torch.no_grad():
        expected = [model.eval()(*batch[:-1]) for batch in data.test_dataloader()]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


def test_a_model_can_be_made_to_overfit(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Labels(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, _: int) -> None:
            seen.append(batch[-1])

    run = trainer(tmp_path, Labels(), enable_checkpointing=False, overfit_batches=2, max_epochs=3)
    with pytest.warns(UserWarning, match="overfit"):
        run.fit(module(), Digits("sequences"))
    assert run.global_step == 6
    assert all(torch.equal(label, seen[i % 2]) for i, label in enumerate(seen))
