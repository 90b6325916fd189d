"""The paper's networks: sizes, start, norms. That they run and round-trip is tested with every listed model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from lightning_bln import BatchLayerNorm
from zoo.paper import DropoutLSTM, PaperCNN, PaperLSTM


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


def test_sizes_of_the_lstm() -> None:
    model = PaperLSTM()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim > 1}
    assert shapes == {
        "embedding.weight": (20_000, 512),
        "lstm1.input_weight": (512, 512),
        "lstm1.hidden_weight": (512, 128),
        "lstm2.input_weight": (256, 128),
        "lstm2.hidden_weight": (256, 64),
        "fc1.weight": (32, 64),
        "fc2.weight": (1, 32),
    }
    layers = [module for module in model.modules() if isinstance(module, BatchLayerNorm)]
    assert [(layer.num_features, layer.eps) for layer in layers] == [(128, 1e-3), (64, 1e-3), (32, 1e-3)]
    limit = (6 / 20_512) ** 0.5
    assert 0.9 * limit < model.embedding.weight.abs().max() <= limit
    assert model.lstm1.bias.view(4, 128).mean(1).tolist() == [0, 1, 0, 0]
    model(torch.randint(0, 20_000, (5, 7)))
    assert model.norm1.running_batch_mean.shape == (128, 7)  # for each time step
    assert model.norm2.running_batch_mean.shape == (64,)


def test_without_dropout_the_lstm_is_that_of_torch() -> None:
    ours, theirs = DropoutLSTM(6, 8, 0.0, 0.0), nn.LSTM(6, 8, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input_weight)
        theirs.weight_hh_l0.copy_(ours.hidden_weight)
        theirs.bias_ih_l0.copy_(ours.bias)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(3, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x)[0])
    with_dropout = DropoutLSTM(6, 8).eval()
    with_dropout.load_state_dict(ours.state_dict())
    torch.testing.assert_close(with_dropout(x), ours(x))


def test_dropout_masks_hold_for_all_steps() -> None:
    model = DropoutLSTM(1, 8, dropout=0.5, recurrent_dropout=0.0)
    x = torch.ones(64, 1, 1).repeat(1, 5, 1)
    torch.manual_seed(0)
    first = model(x)
    kept = [DropoutLSTM(1, 8, 0.0, 0.0), DropoutLSTM(1, 8, 0.0, 0.0)]
    for other in kept:
        other.load_state_dict(model.state_dict())
    none, all_steps = kept[0](torch.zeros_like(x)), kept[1](2 * x)
    dropped = torch.isclose(first, none).all(2).all(1)
    assert 0 < int(dropped.sum()) < 64
    torch.testing.assert_close(first[~dropped], all_steps[~dropped])  # an input that is kept is kept in all steps
    recurrent = DropoutLSTM(1, 8, dropout=0.0, recurrent_dropout=0.99)
    recurrent.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    masked = recurrent(x)
    torch.testing.assert_close(masked[:, 0], kept[0](x)[:, 0])  # the first state is zero, whatever its mask
    assert not torch.allclose(masked[:, 1], kept[0](x)[:, 1])


@pytest.mark.parametrize("norm", ["bln", "bn", "ln"])
def test_lstm_with_every_norm(norm: str) -> None:
    model = PaperLSTM(norm, vocabulary_size=20)
    model(torch.randint(0, 20, (4, 6))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert PaperLSTM(norm, num_classes=0, vocabulary_size=20)(torch.randint(0, 20, (4, 6))).shape == (4, 32)
