"""Exported GRU classifiers answer as the models do, for any lengths of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import zoo
from lightning_bln import set_flags_
from lightning_bln.surgery import bln_layers
from zoo.export import export_onnx, export_program

STEPS = 6
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gru_bln", {}),
    ("gru_bln", {"bidirectional": True}),
    ("gru_bn", {}),
    ("gru_ln", {"bidirectional": True}),
    ("gru_recurrent_bln", {}),
    ("gru_recurrent_bln", {"bidirectional": True}),
]


def texts(samples: int) -> tuple[Tensor, Tensor]:
    """Tokens, with other ones in place of padding, and lengths, the shortest and the longest among them."""
    lengths = torch.randint(1, STEPS + 1, (samples,))
    lengths[0], lengths[-1] = STEPS, 1
    return torch.randint(1, 30, (samples, STEPS)), lengths


def trained(name: str, flags: str = "TTFF", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"vocabulary_size": 30, "embedding_size": 6, "hidden_size": 5, "batch_size": 16, "max_steps": STEPS}
    model = zoo.create_model(name, **{**small, **kwargs})
    for _ in range(2):
        model(*texts(16))
    if name.endswith("bln"):
        set_flags_(model, flags)
    return model.eval()


@pytest.mark.parametrize(("name", "kwargs"), CASES)
@torch.no_grad()
def test_a_program_for_any_number_of_sequences(name: str, kwargs: dict[str, Any]) -> None:
    model = trained(name, **kwargs)
    program = export_program(model, texts(4))
    assert not any("lightning_bln" in str(node.target) for node in program.graph.nodes)
    for samples in (4, 2, 7, 1):
        tokens, lengths = texts(samples)
        torch.testing.assert_close(program.module()(tokens, lengths), model(tokens, lengths), rtol=1e-5, atol=1e-6)
        shorter = lengths.clamp(max=3)
        torch.testing.assert_close(program.module()(tokens, shorter), model(tokens, shorter), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), CASES[:-1])  # unrolled in both directions, the last one takes long
@torch.no_grad()
def test_onnxruntime_gives_what_the_model_gives(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = trained(name, **kwargs)
    path = tmp_path / "model.onnx"
    export_onnx(model, texts(4), path)
    session = onnxruntime.InferenceSession(path)
    assert [(given.name, given.shape) for given in session.get_inputs()] == [
        ("tokens", ["batch", STEPS]),
        ("lengths", ["batch"]),
    ]
    for samples in (4, 2, 7, 1):
        tokens, lengths = texts(samples)
        [y] = session.run(None, {"tokens": tokens.numpy(), "lengths": lengths.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(tokens, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gru_bln", "gru_recurrent_bln"])
@torch.no_grad()
def test_nothing_behind_a_sequence_matters(name: str) -> None:
    settings: dict[str, Any] = {"vocabulary_size": None, "bidirectional": True}
    torch.manual_seed(0)
    model = zoo.create_model(name, embedding_size=6, hidden_size=5, batch_size=16, max_steps=STEPS, **settings)
    model(torch.randn(16, STEPS, 6))
    x, lengths = torch.randn(4, STEPS, 6), torch.tensor([STEPS, 3, 2, 1])
    module = export_program(model.eval(), [x, lengths]).module()
    expected = model(x, lengths)
    x[torch.arange(STEPS) >= lengths.unsqueeze(1)] = float("nan")
    torch.testing.assert_close(module(x, lengths), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_features_without_lengths_and_feature_statistics_of_the_population() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("gru_bln", vocabulary_size=None, embedding_size=6, hidden_size=5, batch_size=16)
    for _ in range(2):
        model(torch.randn(16, STEPS, 6))
    set_flags_(model, "TTTT")
    module = export_program(model.eval(), [torch.randn(4, STEPS, 6)]).module()
    x = torch.randn(7, STEPS, 6)
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_padding_would_enter() -> None:
    def raises(model: nn.Module, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export_program(model, texts(4))

    unknown = r"got BatchLayerNorm.*, which takes them from the mini-batch; train the model, or call set_flags_"
    model = trained("gru_bln", "FTFF")
    raises(model, unknown)
    set_flags_(model, "TFFF")
    raises(model, unknown)
    raises(zoo.create_model("gru_bln", vocabulary_size=30).eval(), unknown)
    plain = zoo.create_model("gru_bn", vocabulary_size=30).eval()
    plain.norms[1] = nn.BatchNorm1d(64, track_running_stats=False).eval()
    raises(plain, r"got BatchNorm1d.*; make the layer with track_running_stats=True")
    raises(trained("gru_recurrent_bn"), "got BatchNorm inside the gates")
    with pytest.raises(ValueError, match="must be in eval mode to be exported"):
        torch.export.export(trained("gru_bln").train(), texts(4))


@torch.no_grad()
def test_steps_that_no_training_sequence_was_long_enough_for() -> None:
    torch.manual_seed(0)
    model = trained("gru_recurrent_bln", max_steps=STEPS + 2)
    for _ in range(2):
        model.train()(torch.randint(1, 30, (16, STEPS - 2)))
    layers = list(bln_layers(model.eval()).values())
    assert not all(layer.has_population for layer in layers)
    tokens, lengths = torch.randint(1, 30, (4, STEPS + 3)), torch.tensor([STEPS + 3, 5, 3, 1])
    module = export_program(model, [tokens, lengths]).module()
    torch.testing.assert_close(module(tokens, lengths), model(tokens, lengths), rtol=1e-5, atol=1e-6)
