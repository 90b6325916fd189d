"""The paper's CNN: its sizes, its start, its norms. That it runs and round-trips is tested with every listed model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from lightning_bln import BatchLayerNorm
from zoo.paper import PaperCNN


def test_sizes() -> None:
    model = PaperCNN()
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 576), (84, 120), (10, 84)]
    layers = [module for module in model.modules() if isinstance(module, BatchLayerNorm)]
    assert [(layer.num_features, layer.eps) for layer in layers] == [(6, 1e-3), (16, 1e-3), (120, 1e-3), (84, 1e-3)]
    assert all((layer.weight == 1).all() and (layer.bias == 0).all() for layer in layers)
    model(torch.randn(25, 3, 32, 32))
    assert model.norm1.running_batch_mean.shape == (6, 16, 16)
    assert model.norm2.running_feature_mean.shape == (6, 6)


def test_start_values() -> None:
    model = PaperCNN()
    weight = model.fc1.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(120), atol=1e-5, rtol=0)
    limit = (6 / (25 * (3 + 6))) ** 0.5
    assert 0.9 * limit < model.conv1.weight.abs().max() <= limit
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def test_norms() -> None:
    kinds = {name: type(zoo.create_model(f"paper_cnn_{name}").norm4) for name in ("bln", "bn", "ln")}
    assert kinds == {"bln": BatchLayerNorm, "bn": nn.BatchNorm1d, "ln": nn.LayerNorm}
    assert zoo.create_model("paper_cnn_bn").norm1.momentum == 0.01  # Keras' momentum 0.99
    assert isinstance(PaperCNN(norm=nn.Identity).norm1, nn.Identity)
    with pytest.raises(ValueError, match="one of 'bln', 'bn', 'ln', as in the paper, or a callable, got 'gn'"):
        PaperCNN(norm="gn")
