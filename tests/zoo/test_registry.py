"""The registry: names, trained models by name and tag, and how it answers names that it does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from lightning_bln import BatchLayerNorm
from tests.zoo.example_weights import write_example
from zoo import _weights
from zoo._registry import register

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model, in eval mode, whose weights are the only ones in the zoo."""
    monkeypatch.setattr(_weights, "FOLDER", tmp_path)
    return write_example(tmp_path, flags="FTTF")


def test_importing_the_zoo_is_light() -> None:
    heavy = ("lightning", "torchvision", "torchmetrics", "optuna", "jsonargparse", "sklearn", "PIL", "pandas")
    code = f"import sys, torch; import zoo; print([name for name in {heavy!r} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_names_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"no model named 'resnet20_blm'; did you mean 'resnet20_bln'"):
        zoo.create_model("resnet20_blm")
    with pytest.raises(ValueError, match=r"no model named 'resnet20_blm'; did you mean 'resnet20_bln'"):
        zoo.create_model("resnet20_blm.cifar10")
    with pytest.raises(ValueError, match=r"no model named 'resnet20_bln\.'; did you mean 'resnet20_bln'"):
        zoo.create_model("resnet20_bln.")
    with pytest.raises(
        TypeError, match=r"chosen by their tag, got pretrained=True; call zoo.create_model\('resnet20_bln'"
    ):
        zoo.create_model("resnet20_bln", pretrained=True)
    with pytest.raises(ValueError, match=r"no model named 'xyz'; zoo.list_models\(\)"):
        zoo.create_model("xyz")


def test_a_name_that_is_there_already() -> None:
    with pytest.raises(ValueError, match=r"must be new, got 'resnet20_bln' for a second one; list_models\(\)"):
        register("resnet20_bln", nn.Identity)


def test_lists(trained: nn.Module, tmp_path: Path) -> None:
    write_example(tmp_path, "resnet20_bn.noise")
    assert zoo.list_models("paper_cnn*") == ["paper_cnn_bln", "paper_cnn_bn", "paper_cnn_ln"]
    assert zoo.list_models(pretrained=True) == ["paper_cnn_bln.noise", "resnet20_bn.noise"]
    assert zoo.list_models("paper_cnn_bln", pretrained=True) == ["paper_cnn_bln.noise"]
    assert zoo.list_models("*.noise", pretrained=True) == ["paper_cnn_bln.noise", "resnet20_bn.noise"]
    assert zoo.list_models("gru*", pretrained=True) == []


@pytest.mark.parametrize(("name", "weights"), [("paper_cnn_bln", "noise"), ("paper_cnn_bln.noise", None)])
def test_a_trained_model(trained: nn.Module, name: str, weights: str | None) -> None:
    model = zoo.create_model(name, weights=weights)
    assert model.training
    layers = [module for module in model.modules() if isinstance(module, BatchLayerNorm)]
    assert {layer.flags.code for layer in layers} == {"FTTF"}
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), trained(x))


def test_without_weights_it_is_a_new_one(trained: nn.Module) -> None:
    model = zoo.create_model("paper_cnn_bln")
    assert not torch.equal(model.conv1.weight, trained.conv1.weight)
    assert model.norm1.flags.code == "TTFF"


def test_another_number_of_classes_starts_with_a_fresh_classifier(trained: nn.Module) -> None:
    model = zoo.create_model("paper_cnn_bln", weights="noise", num_classes=7)
    assert model.fc3.weight.shape == (7, 84)
    assert (model.fc3.bias == 0).all()
    features = zoo.create_model("paper_cnn_bln", weights="noise", num_classes=0)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        y = features.eval()(x)
        assert torch.equal(trained.fc3(y), trained(x))
        assert torch.equal(model.fc3(y), model.eval()(x))
    assert model.norm1.flags.code == "FTTF"


def test_the_arguments_of_the_training_are_those_of_the_model(trained: nn.Module, tmp_path: Path) -> None:
    write_example(tmp_path, "resnet20_ln.five", arguments={"num_classes": 5})
    assert zoo.create_model("resnet20_ln", weights="five").fc.weight.shape == (5, 64)
    assert zoo.create_model("resnet20_ln", weights="five", num_classes=10).fc.weight.shape == (10, 64)
    with pytest.raises(ValueError, match=r"(?s)must have the shapes of the model.*size mismatch for conv1.weight"):
        zoo.create_model("resnet20_ln", weights="five", in_channels=1)
    with pytest.raises(ValueError, match=r"a CifarResNet, got them without norm1.num_batches_tracked, .* besides"):
        zoo.create_model("resnet20_ln", weights="five", norm="bn")


def test_flags_of_each_layer(trained: nn.Module, tmp_path: Path) -> None:
    flags = {"norm1": "FFFF", "norm2": "TTTT", "norm3": "TTFF", "norm4": "FTFT"}
    write_example(tmp_path, "paper_cnn_bln.layers", flags=flags)
    model = zoo.create_model("paper_cnn_bln.layers")
    assert {name: model.get_submodule(name).flags.code for name in flags} == flags


def test_tags_that_are_not_there(trained: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"no weights named 'paper_cnn_bln.noize'; did you mean 'paper_cnn_bln.noise'\?"
    ):
        zoo.create_model("paper_cnn_bln", weights="noize")
    with pytest.raises(
        ValueError, match=r"tag in the name and weights must agree, got 'paper_cnn_bln.noise' and weights='x"
    ):
        zoo.create_model("paper_cnn_bln.noise", weights="x")
    assert isinstance(zoo.create_model("paper_cnn_bln.noise", weights="noise"), zoo.paper.PaperCNN)
