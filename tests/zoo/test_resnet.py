"""CIFAR ResNets: the paper's sizes, every norm, the swap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from lightning_bln import BatchLayerNorm


@pytest.mark.parametrize(("name", "millions"), [("20", 0.27), ("32", 0.46), ("44", 0.66), ("56", 0.85)])
def test_sizes_are_those_of_the_paper(name: str, millions: float) -> None:
    model = zoo.create_model(f"resnet{name}_bn")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == int(name)


def test_all_norms_give_the_same_network_around_them() -> None:
    shapes = {
        norm: [p.shape for p in zoo.create_model(f"resnet20_{norm}").parameters()] for norm in ("bln", "bn", "ln", "gn")
    }
    assert shapes["bln"] == shapes["bn"] == shapes["ln"] == shapes["gn"]


def test_a_norm_of_ones_own() -> None:
    model = zoo.resnet.resnet20(norm=lambda channels: BatchLayerNorm(channels, statistics="per_channel"))
    assert model.norm1.statistics == "per_channel"


def test_statistics_per_channel_take_any_size() -> None:
    model = zoo.create_model("resnet20_bln", statistics="per_channel")
    model(torch.randn(4, 3, 16, 16))
    assert model.norm1.running_batch_mean.shape == (16,)
    assert model.eval()(torch.randn(2, 3, 24, 40)).shape == (2, 10)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'bln'"):
        zoo.resnet.resnet20(norm="batch")
    with pytest.raises(ValueError, match="depth must be 6n"):
        zoo.resnet.CifarResNet(21)
