"""torchvision's ResNets with other norms: what is torchvision's, what is the zoo's."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision import models

import zoo
from lightning_bln import BatchLayerNorm, swap_norms_
from zoo.torchvision_resnet import resnet18, resnet34, resnet50

SIZES = [("resnet18", 18, 11.7), ("resnet34", 34, 21.8), ("resnet50", 50, 25.6)]


def bln_layers(model: nn.Module) -> list[BatchLayerNorm]:
    return [module for module in model.modules() if isinstance(module, BatchLayerNorm)]


@pytest.mark.parametrize(("name", "depth", "millions"), SIZES)
def test_with_batchnorm_it_is_torchvisions_own(name: str, depth: int, millions: float) -> None:
    torch.manual_seed(0)
    ours = zoo.create_model(f"{name}_bn")
    torch.manual_seed(0)
    theirs = getattr(models, name)()
    assert type(ours) is models.ResNet
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == millions
    layers = [n for n, m in ours.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(layers) == depth


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_bln_starts_at_the_scale_and_eps_of_the_others(stem: str) -> None:
    model = resnet50(stem=stem)
    layers = bln_layers(model)
    assert len(layers) == 53
    assert {layer.eps for layer in layers} == {1e-5}
    for layer in layers:
        assert torch.equal(layer.weight, torch.full_like(layer.weight, math.sqrt(layer.num_features)))
        assert not layer.bias.any()


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_swapped_twin_equals_the_bln_model(stem: str) -> None:
    torch.manual_seed(0)
    model = resnet18(stem=stem)
    torch.manual_seed(0)
    swapped = resnet18("bn", stem=stem)
    swap_norms_(swapped)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), swapped(x))


def test_all_norms_give_the_same_network_around_them() -> None:
    shapes = [[p.shape for p in resnet34(norm, stem="cifar").parameters()] for norm in ("bln", "bn", "ln", "gn")]
    assert all(other == shapes[0] for other in shapes)


def test_stems() -> None:
    assert resnet18().fc.out_features == 1000
    assert resnet18().bn1(resnet18().conv1(torch.randn(2, 3, 64, 64))).shape == (2, 64, 32, 32)
    model = zoo.create_model("resnet18_cifar_bln")
    assert model.fc.out_features == 10
    seen: list[torch.Size] = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(torch.randn(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_new_stem_starts_as_torchvisions(stem: str) -> None:
    convolution = resnet18(stem=stem, in_channels=1).conv1
    assert convolution.in_channels == 1
    assert convolution.bias is None
    # Kaiming's: sqrt(2 / (64 k k)); 64 k k draws, so that the deviation is known to some 5 %.
    deviation = math.sqrt(2 / (64 * convolution.kernel_size[0] ** 2))
    assert convolution.weight.std().item() == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize(("builder", "features"), [(resnet18, 512), (resnet34, 512), (resnet50, 2048)])
def test_features(builder, features: int) -> None:
    model = builder("bn", num_classes=0)
    assert model.classifier == "fc"
    assert isinstance(model.fc, nn.Identity)
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, features)


def test_population_statistics_at_imagenets_size() -> None:
    model = resnet18()
    model(torch.randn(2, 3, 224, 224))
    kept = sum(layer.running_batch_mean.numel() + layer.running_batch_var.numel() for layer in bln_layers(model))
    assert round(kept / 1e6) == 5


@pytest.mark.parametrize("way", ["swapped", "built"])
def test_statistics_per_channel_take_any_size(way: str) -> None:
    if way == "swapped":
        model = resnet18("bn", stem="cifar")
        swap_norms_(model, statistics="per_channel")
    else:
        model = zoo.create_model("resnet18_cifar_bln", statistics="per_channel")
    model(torch.randn(4, 3, 16, 16))
    model.eval()
    for size in (16, 24):
        assert model(torch.randn(2, 3, size, size)).isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="stem must be 'imagenet' or 'cifar', got 'deep'"):
        resnet18(stem="deep")
    with pytest.raises(ValueError, match="norm must be one of 'bln'"):
        resnet18("batch")
    with pytest.raises(ValueError, match="statistics must be 'per_position' or 'per_channel', got 'channel'"):
        resnet18(statistics="channel")


def test_importing_the_zoo_does_not_import_torchvision() -> None:
    code = "import sys, zoo.torchvision_resnet; print([n for n in ('torchvision', 'lightning') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
