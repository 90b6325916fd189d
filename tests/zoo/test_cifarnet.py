"""The wide and shallow network: its size, its start, every norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from lightning_bln import BatchLayerNorm
from zoo.cifarnet import CifarNet


def test_its_size_is_that_of_the_source() -> None:
    model = zoo.create_model("cifarnet_bn")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        (3, 24),
        (24, 64),
        (64, 64),
        (64, 256),
        (256, 256),
        (256, 256),
        (256, 256),
    ]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 1.97


def test_resolutions() -> None:
    model = zoo.create_model("cifarnet_bn", num_classes=0)
    shapes: list[torch.Size] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *arguments: shapes.append(arguments[2].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 256)
    assert [tuple(shape[1:]) for shape in shapes] == [(64, 15, 15), (256, 7, 7), (256, 3, 3)]


def test_blocks_start_as_the_identity() -> None:
    block = CifarNet("bn").blocks[1]
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(block.conv1(x)[:, :64], x)
    y = torch.randn(2, 256, 8, 8)
    torch.testing.assert_close(block.conv2(y), y)


def test_statistics_per_channel_take_any_size() -> None:
    model = zoo.create_model("cifarnet_bln", statistics="per_channel")
    model(torch.randn(4, 3, 32, 32))
    assert model.eval()(torch.randn(2, 3, 24, 40)).shape == (2, 10)


def test_a_norm_of_ones_own() -> None:
    model = CifarNet(norm=lambda channels: BatchLayerNorm(channels, statistics="per_channel"))
    assert model.blocks[0].norm1.statistics == "per_channel"
    with pytest.raises(ValueError, match="norm must be one of 'bln'"):
        CifarNet("batch")
