"""Every model that the zoo lists: it runs, trains, is saved and loaded, is swapped, compiled, and gives features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zoo
from lightning_bln import BatchLayerNorm, swap_norms_
from tests.tolerances import assert_close

NAMES = zoo.list_models()
# Every depth of a family has the same layers, and the large ones have those of the small ones.
FAMILIES = ("resnet20", "cifarnet", "cnn", "paper_cnn", "paper_lstm", "gru")
COMPILED = [
    name for name in NAMES if name.rpartition("_")[0] in FAMILIES or name in ("resnet18_bln", "gru_recurrent_bln")
]
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def example_input(name: str) -> tuple[Tensor, ...]:
    """A small mini-batch of 3 samples for a model of the zoo."""
    if name.startswith("gru_"):
        return torch.randint(1, 50, (3, 4)), torch.tensor([3, 4, 2])
    if name.startswith("paper_lstm_"):
        return (torch.randint(1, 50, (3, 4)),)
    if name.startswith("cnn_"):
        return (torch.randn(3, 1, 8, 8),)
    # The widest networks, at 1/8 of the resolution in the end.
    size = 16 if "_cifar_" in name else 32
    return (torch.randn(3, 3, size, size),)


def norm_of(name: str) -> str:
    return name.rpartition("_")[2]


@torch.no_grad()
def infer(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return model.eval()(*inputs)


@pytest.mark.parametrize(("family", "size"), [("resnet20", 16), ("cifarnet", 32)])
def test_a_swapped_twin_equals_the_bln_model(family: str, size: int) -> None:
    torch.manual_seed(0)
    model = zoo.create_model(f"{family}_bln")
    torch.manual_seed(0)
    swapped = zoo.create_model(f"{family}_bn")
    swap_norms_(swapped)
    x = torch.randn(4, 3, size, size)
    assert torch.equal(model(x), swapped(x))


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_its_state_is_all_there_is(name: str) -> None:
    model = zoo.create_model(name, num_classes=7)
    inputs = example_input(name)
    y = model(*inputs)
    assert y.shape == (3, 7)
    y.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    twin = zoo.create_model(name, num_classes=7)
    twin.load_state_dict(model.state_dict())
    y = infer(model, inputs)
    assert y.isfinite().all()
    assert torch.equal(y, infer(twin, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_what_the_classifier_sees(name: str) -> None:
    model, headless = zoo.create_model(name, num_classes=7), zoo.create_model(name, num_classes=0)
    assert isinstance(getattr(headless, model.classifier), nn.Identity)
    prefix = f"{model.classifier}."
    headless.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith(prefix)})
    inputs = example_input(name)
    features = infer(headless, inputs)
    assert torch.equal(getattr(model, model.classifier)(features), infer(model, inputs))


@pytest.mark.parametrize("name", [name for name in NAMES if norm_of(name) != "bln"])
def test_every_norm_can_be_swapped(name: str) -> None:
    model = zoo.create_model(name)
    norms = [n for n, module in model.named_modules() if isinstance(module, NORMS)]
    report = swap_norms_(model, norms=("batch", "layer", "group"))
    assert [entry.name for entry in report.swapped] == norms != []
    assert not any(isinstance(module, NORMS) for module in model.modules())
    inputs = example_input(name)
    model(*inputs).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert infer(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if norm_of(name) == "bln"])
def test_a_swap_finds_a_bln_model_as_it_is_to_be(name: str) -> None:
    model = zoo.create_model(name)
    inputs = example_input(name)
    model(*inputs)
    twin = copy.deepcopy(model)
    report = swap_norms_(model)
    assert report.swapped == ()
    assert {entry.old for entry in report.skipped} == {"BatchLayerNorm"}
    assert len(report.skipped) == sum(isinstance(module, BatchLayerNorm) for module in twin.modules())
    assert repr(model) == repr(twin)
    assert torch.equal(infer(model, inputs), infer(twin, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_is_what_it_is_without(name: str) -> None:
    torch._dynamo.reset()
    model = zoo.create_model(name)
    inputs = example_input(name)
    # The first batch gives the population statistics their shapes, and a compiled model is compiled again then.
    model(*inputs)
    twin = copy.deepcopy(model)
    # torch.compile leaves pack_padded_sequence to Python: a GRU classifier is several graphs.
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=not name.startswith("gru_"))
    outputs = []
    for candidate in (model, compiled):
        torch.manual_seed(1)  # of dropout
        outputs.append(candidate(*inputs))
        outputs[-1].square().mean().backward()
    assert_close(outputs[1], outputs[0])
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    assert_close(infer(compiled, inputs), infer(model, inputs))
