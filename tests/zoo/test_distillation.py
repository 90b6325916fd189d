"""Learning from trained models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

import zoo
from zoo import _weights
from zoo.data import Digits
from zoo.distillation import Teachers, distillation_loss
from zoo.lit import LitClassifier

TEACHERS = ["cnn_bn.digits", "cnn_bln.digits"]
CPU = torch.device("cpu")


def test_teachers_probabilities_are_averaged() -> None:
    teachers = Teachers(TEACHERS)
    teachers.load_(CPU)
    (x,), _ = zoo.get_weights(TEACHERS[0]).golden()
    with torch.no_grad():
        bn, bln = (zoo.create_model(name.split(".")[0], weights="digits").eval()(x) for name in TEACHERS)
    expected = (torch.softmax(bn / 3, 1) + torch.softmax(bln / 3, 1)) / 2
    torch.testing.assert_close(teachers.probabilities([x], 3.0), expected)


def test_teachers_of_images_and_their_mirror_images() -> None:
    (x,), _ = zoo.get_weights("resnet20_bn.cifar10").golden()
    plain, mirrored = Teachers(["resnet20_bn.cifar10"]), Teachers(["resnet20_bn.cifar10"], mirror=True)
    expected = (plain.probabilities([x], 2.0) + plain.probabilities([x.flip(3)], 2.0)) / 2
    torch.testing.assert_close(mirrored.probabilities([x], 2.0), expected)
    with pytest.raises(
        ValueError, match=r"Mirrored inputs must be images, got teachers of \{'gru_ln.digits': 'sequence'"
    ):
        Teachers(["gru_ln.digits"], mirror=True)


@pytest.mark.parametrize("name", ["gru_ln.digits", "gru_bn.digits", "gru_bn.imdb", "resnet20_bn.cifar10"])
def test_teachers_of_any_kind(name: str) -> None:
    inputs, output = zoo.get_weights(name).golden()
    torch.testing.assert_close(Teachers([name]).probabilities(inputs, 1.0), output.softmax(1), atol=1e-5, rtol=1e-5)


def test_the_loss_by_its_definition() -> None:
    z, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    q = torch.softmax(torch.randn(6, 4, dtype=torch.float64), 1)
    p = torch.softmax(z / 2, 1)
    divergence = (q * (q.log() - p.log())).sum(1).mean()
    expected = 0.3 * F.cross_entropy(z, labels) + 0.7 * 4 * divergence
    torch.testing.assert_close(distillation_loss(z, labels, q, 0.7, 2.0), expected)
    torch.testing.assert_close(distillation_loss(z, labels, q, 0.0, 2.0), F.cross_entropy(z, labels))
    torch.testing.assert_close(distillation_loss(z, labels, p, 1.0, 2.0), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "Teachers must be a list of names"),
        ("cnn_bn.digits", "Teachers must be a list of names"),
        (["cnn_bn.digit"], "did you mean 'cnn_bn.digits'"),
        (["cnn_bn.digits", "gru_bn.imdb"], "the same classes, as outputs of two or more, got cnn_bn.digits: 0, 1"),
        (["cnn_bn.digits", "resnet20_bn.cifar10"], "the same classes"),
        (["paper_lstm_bln.imdb"], "as outputs of two or more"),
    ],
)
def test_teachers_that_cannot_be(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teachers(names)


def test_arguments_of_the_module() -> None:
    with pytest.raises(ValueError, match="distillation must be from 0 to 1"):
        LitClassifier("cnn_bln", teachers=TEACHERS, distillation=1.5)
    with pytest.raises(ValueError, match="temperature above 0"):
        LitClassifier("cnn_bln", teachers=TEACHERS, temperature=0.0)
    with pytest.raises(ValueError, match="mirror_teachers must come with teachers"):
        LitClassifier("cnn_bln", mirror_teachers=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 3, "teachers": TEACHERS}, "as many classes as the model, 3, got 10; pass num_classes=10"),
        ({"teachers": ["resnet20_bn.cifar10"]}, "the data's classes, 0, 1, .*, got airplane"),
    ],
)
def test_teachers_that_do_not_fit_are_an_error_when_training_begins(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **arguments)


def test_inputs_must_be_standardised_as_the_teachers_were() -> None:
    teachers = Teachers(["resnet20_bn.cifar10"])
    transform = zoo.get_weights("resnet20_bn.cifar10").transforms()
    data = SimpleNamespace(mean=transform.mean + 0.01, std=transform.std)
    teachers.check(10, data)
    data.mean = torch.zeros(3)
    with pytest.raises(ValueError, match="had another mean; give the data module"):
        teachers.check(10, data)
    data.mean = transform.mean.expand(3, 32, 32)
    with pytest.raises(ValueError, match="had another mean"):
        teachers.check(10, data)


def fit(
    folder: Path, *, precision: Any = None, callbacks: Any = None, ckpt_path: Path | None = None, **arguments: Any
) -> tuple[LitClassifier, pl.Trainer]:
    pl.seed_everything(1)
    module = LitClassifier("cnn_bln", optimizer="adam", lr=1e-2, bf16=False, **arguments)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run: dict[str, Any] = {"default_root_dir": folder, "precision": precision, "callbacks": callbacks, **quiet}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, **run)
    trainer.fit(module, Digits(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def assert_same(one: LitClassifier, other: LitClassifier) -> None:
    for name, value in one.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_student_learns_from_them_alone(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, teachers=TEACHERS, distillation=1.0)
    (tested,) = trainer.test(module, Digits(), verbose=False)
    assert tested["test_accuracy"] > 0.9
    # Of the student only, and the teachers are needed in training only.
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"model"}
    assert saved["hyper_parameters"]["teachers"] == TEACHERS
    LitClassifier.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_a_student_of_another_precision(precision: str, tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, precision=precision, teachers=TEACHERS)
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.8


def test_a_checkpoint_needs_no_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, teachers=TEACHERS)
    monkeypatch.setattr(_weights, "FOLDER", tmp_path)
    module = LitClassifier.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert module(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_two_trainings_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    one, other = (fit(tmp_path / name, teachers=TEACHERS, mirror_teachers=True)[0] for name in ("one", "other"))
    assert_same(one, other)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves no checkpoints
def test_resumed_in_the_middle_of_an_epoch_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=50, save_top_k=-1)
    whole, trainer = fit(tmp_path, teachers=TEACHERS, callbacks=every)
    resumed, rest = fit(tmp_path / "rest", teachers=TEACHERS, ckpt_path=tmp_path / "step=50.ckpt")
    assert rest.global_step == trainer.global_step == 74
    assert_same(whole, resumed)
