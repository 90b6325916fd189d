"""Exported GRU classifiers answer as the models do, for any lengths of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import zoo
from lightning_bln import BatchLayerNorm, set_flags_
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
        torch.testing.assert_close(
            program.module()(tokens, lengths.clamp(max=3)), model(tokens, lengths.clamp(max=3)), rtol=1e-5, atol=1e-6
        )


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
    def raises(model: nn.Module, layer: str) -> None:
        with pytest.raises(ValueError, match=rf"got {layer}.* that takes .* set_flags_\(model, 'TTFF'\)"):
            export_program(model, texts(4))

    model = trained("gru_bln", "FTFF")
    raises(model, "BatchLayerNorm")
    set_flags_(model, "TFFF")
    raises(model, "BatchLayerNorm")
    raises(zoo.create_model("gru_bln", vocabulary_size=30).eval(), "BatchLayerNorm")
    plain = zoo.create_model("gru_bn", vocabulary_size=30).eval()
    plain.norms[1] = nn.BatchNorm1d(64, track_running_stats=False).eval()
    raises(plain, "BatchNorm1d")
    with pytest.raises(ValueError, match="got BatchNorm inside the gates"):
        export_program(trained("gru_recurrent_bn"), texts(4))
    # Steps that no training sequence was long enough for have no statistics, and are not used.
    longer = trained("gru_recurrent_bln", max_steps=STEPS + 2)
    assert not all(layer.has_population for layer in bln_layers(longer).values())
    assert isinstance(longer.layers[0].cells[0].step_norms[-1], BatchLayerNorm)
    export_program(longer, texts(4))
