"""A model that begins with the weights of its twin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bln import BatchLayerNorm
from zoo import create_model, get_weights
from zoo.lit import LitClassifier
from zoo.twins import load_twin_


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.train()(x)  # the mini-batch's statistics: those of the population are not taken over


def test_bln_from_batchnorm_is_nearly_the_same_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3, 16, 16)
    twin, model = create_model("resnet20_bn", weights="cifar10"), create_model("resnet20_bln", statistics="per_channel")
    expected = outputs(twin, x)
    assert (outputs(model, x) - expected).norm() > 0.5 * expected.norm()
    load_twin_(model, "resnet20_bn.cifar10")
    # BLN takes 1 / B + 1e-4 of the batch-normalised value away.
    assert (outputs(model, x) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_there_and_back_are_the_same_parameters(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cnn_{norm}.digits"
    original = create_model(name)
    there = create_model("cnn_bln")
    load_twin_(there, name)
    with monkeypatch.context() as patch:
        patch.setattr("zoo.twins.create_model", lambda *_, **__: there)
        patch.setattr("zoo.twins.get_weights", lambda _: SimpleNamespace(arch="cnn_bln"))
        back = create_model(f"cnn_{norm}")
        load_twin_(back, "cnn_bln.there")
    for (key, value), expected in zip(back.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(value, expected, msg=key)
    scales = [
        (layer.weight / there_layer.weight).detach()
        for layer, there_layer in zip(original.modules(), there.modules(), strict=True)
        if isinstance(there_layer, BatchLayerNorm)
    ]
    assert len(scales) == 3
    for scale in scales:
        torch.testing.assert_close(scale, torch.full_like(scale, len(scale) ** -0.5))


def test_another_network_leaves_the_model_as_it_was() -> None:
    model = create_model("gru_bln", vocabulary_size=None, embedding_size=8, hidden_size=12)
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=r"same network with other norms, got cnn_bn\.digits, where \d+ parameters"):
        load_twin_(model, "cnn_bn.digits")
    with pytest.raises(ValueError, match="no weights"):
        load_twin_(model, "gru_gn")  # a model without a tag: it must not be a fresh one
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_training_may_begin_with_them() -> None:
    module = LitClassifier("cnn_bln", weights="cnn_bn.digits")
    expected = create_model("cnn_bln")
    load_twin_(expected, "cnn_bn.digits")
    for value, wanted in zip(module.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, wanted)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["zoo_start"] == "cnn_bn.digits"
    # With the model's own name it is a tag like any other: statistics and flags come too.
    own = LitClassifier("cnn_bln", weights="cnn_bln.digits").model.eval()
    inputs, output = get_weights("cnn_bln.digits").golden()
    torch.testing.assert_close(own(*inputs), output, rtol=1e-5, atol=1e-5)
