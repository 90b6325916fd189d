"""Exported models answer as the models do, at batch sizes that they were not exported with."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import zoo
from lightning_bln import set_flags_
from zoo.export import export_onnx, export_program

EXPORTED, OTHERS = 4, (1, 2, 7)
# None: a model without flags. FFFF takes every statistic from the mini-batch, so that each output depends on all of it.
CASES = [
    ("resnet20_bln", "TTFF"),
    ("resnet20_bn", None),
    ("paper_cnn_bln", "TTFF"),
    ("paper_cnn_bln", "TTTT"),
    ("paper_cnn_bln", "FFFF"),
]


def trained(name: str, flags: str | None) -> nn.Module:
    """After some batches: with population statistics, and a nominal batch size that is none of those above."""
    model = zoo.create_model(name)
    for _ in range(2):
        model(torch.randn(8, 3, 32, 32))
    if flags is not None:
        set_flags_(model, flags)
    return model.eval()


def images(samples: int) -> Tensor:
    """Images that differ in mean and scale, as those of one mini-batch do."""
    return torch.randn(samples, 3, 32, 32) * torch.linspace(0.5, 2, samples).view(-1, 1, 1, 1) + 0.3


def assert_same(actual: Tensor, expected: Tensor) -> None:
    # Other kernels for the convolutions, and no fused normalisation: float32 through 20 layers.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "flags"), CASES)
@torch.no_grad()
def test_a_program_for_any_batch_size(name: str, flags: str | None) -> None:
    model = trained(name, flags)
    program = export_program(model, [images(EXPORTED)])
    assert not any("lightning_bln" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for samples in (EXPORTED, *OTHERS):
        x = images(samples)
        assert_same(module(x), model(x))


@torch.no_grad()
def test_torch_export_by_itself_keeps_the_layers_whole() -> None:
    model = trained("resnet20_bln", "TTFF")
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (images(EXPORTED),), dynamic_shapes=dynamic)
    operation = torch.ops.lightning_bln.batch_layer_norm.default
    assert sum(node.target is operation for node in program.graph.nodes) == 19
    for samples in OTHERS:
        x = images(samples)
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), CASES)
@torch.no_grad()
def test_onnxruntime_gives_what_the_model_gives(name: str, flags: str | None, tmp_path: Path) -> None:
    model = trained(name, flags)
    path = tmp_path / "model.onnx"
    export_onnx(model, [images(EXPORTED)], path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path)
    [given], [returned] = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("x", ["batch", 3, 32, 32])
    assert (returned.name, returned.shape) == ("output", ["batch", 10])
    for samples in (EXPORTED, *OTHERS):
        x = images(samples)
        [y] = session.run(None, {"x": x.numpy()})
        assert_same(torch.from_numpy(y), model(x))


@torch.no_grad()
def test_the_cases_tell_a_wrong_export_from_a_right_one() -> None:
    # Were a mini-batch statistic or B that of the exported batch, the outputs would differ by more than is allowed.
    model = trained("paper_cnn_bln", "FFFF")
    x = images(7)
    with pytest.raises(AssertionError):
        assert_same(model(x)[:EXPORTED], model(x[:EXPORTED]))
    other = copy.deepcopy(model)
    for layer in (other.norm1, other.norm2, other.norm3, other.norm4):
        layer.nominal_batch_size.fill_(EXPORTED)
    with pytest.raises(AssertionError):
        assert_same(model(x), other(x))


def test_a_fresh_model_takes_its_statistics_and_b_from_the_batch() -> None:
    model = zoo.create_model("paper_cnn_bln").eval()
    module = export_program(model, [images(EXPORTED)]).module()
    for samples in (2, 7):
        x = images(samples)
        assert_same(module(x), model(x))


def test_bad_arguments() -> None:
    model = zoo.create_model("paper_cnn_bln")
    with pytest.raises(ValueError, match=r"must be in eval mode .*; call model.eval\(\) first"):
        export_program(model, [images(2)])
    model.eval()
    model.norm1.train()
    with pytest.raises(ValueError, match="must be in eval mode"):
        export_program(model, [images(2)])
    model.eval()
    with pytest.raises(ValueError, match=r"at least 2 .* got \[1\]; pass"):
        export_program(model, [images(1)])
