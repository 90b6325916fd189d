"""Learning from trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

import zoo
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


def test_teachers_of_sequences() -> None:
    teachers = Teachers(["gru_ln.digits"])
    teachers.load_(CPU)
    inputs, output = zoo.get_weights("gru_ln.digits").golden()
    torch.testing.assert_close(teachers.probabilities(inputs, 1.0), output.softmax(1))


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
        (["cnn_bn.digits", "gru_bn.imdb"], "one number of classes"),
    ],
)
def test_teachers_that_cannot_be(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teachers(names)


def test_arguments_of_the_module() -> None:
    with pytest.raises(ValueError, match="must have num_classes=3 as the model has, got 10"):
        LitClassifier("cnn_bln", num_classes=3, teachers=TEACHERS)
    with pytest.raises(ValueError, match="distillation must be from 0 to 1"):
        LitClassifier("cnn_bln", teachers=TEACHERS, distillation=1.5)
    with pytest.raises(ValueError, match="temperature above 0"):
        LitClassifier("cnn_bln", teachers=TEACHERS, temperature=0.0)


def fit(folder: Path, **arguments: Any) -> tuple[LitClassifier, pl.Trainer]:
    pl.seed_everything(1)
    module = LitClassifier("cnn_bln", optimizer="adam", lr=1e-2, bf16=False, **arguments)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=folder, **quiet)
    trainer.fit(module, Digits())
    return module, trainer


def test_a_student_learns_from_them_alone(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, teachers=TEACHERS, distillation=1.0)
    (tested,) = trainer.test(module, Digits(), verbose=False)
    assert tested["test_accuracy"] > 0.9
    # Of the student only, and the teachers are needed in training only.
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"model"}
    assert saved["hyper_parameters"]["teachers"] == TEACHERS
    LitClassifier.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")), weights_only=True)


def test_two_trainings_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    one, other = (fit(tmp_path / name, teachers=TEACHERS)[0] for name in ("one", "other"))
    for name, value in one.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other.model.state_dict()[name]), name
