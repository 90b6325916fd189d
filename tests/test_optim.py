"""Learning rates of gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_bln import BatchLayerNorm, swap_norms_
from lightning_bln.optim import matched_gain_groups


def steps(make: Any, optimizer: type[torch.optim.Optimizer], **kwargs: Any) -> torch.Tensor:
    """The gain of a norm layer after several steps, with one gradient for each whatever the layer is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16)).double()
    groups = make(model)
    norm: Any = model[1]
    chosen = optimizer(groups, **kwargs)
    scale = 4.0 if isinstance(norm, BatchLayerNorm) else 1.0  # sqrt(16)
    for _ in range(6):
        norm.weight.grad = torch.randn(16).double() / scale  # dL/dg / sqrt(C), for the gain g = weight / sqrt(C)
        chosen.step()
    return norm.weight.detach() / scale


def swapped(model: nn.Module) -> list[dict[str, Any]]:
    swap_norms_(model)
    return [{"params": list(model.parameters())}]


def decayed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "weight_decay": 0.5} for group in groups]


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "slower"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 16),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 16),
        (torch.optim.Adam, {"lr": 0.01}, 4),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}, 4),
        (torch.optim.RMSprop, {"lr": 0.01}, 4),
    ],
)
def test_gains_learn_as_fast_as_those_of_batchnorm(
    optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], slower: int
) -> None:
    expected = steps(lambda model: model.parameters(), optimizer, **kwargs)
    adaptive = optimizer is not torch.optim.SGD

    def matched(model: nn.Module) -> list[dict[str, Any]]:
        return matched_gain_groups(model, swapped(model), lr=kwargs["lr"], adaptive=adaptive)

    torch.testing.assert_close(steps(matched, optimizer, **kwargs), expected, rtol=1e-6, atol=1e-6)
    slow = steps(swapped, optimizer, **kwargs)
    torch.testing.assert_close((slow - 1) * slower, expected - 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_gains_decay_as_those_of_batchnorm(optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any]) -> None:
    expected = steps(lambda model: decayed([{"params": list(model.parameters())}]), optimizer, **kwargs)
    settings = {"lr": kwargs["lr"], "adaptive": optimizer is not torch.optim.SGD}

    def matched(model: nn.Module) -> list[dict[str, Any]]:
        return matched_gain_groups(model, decayed(swapped(model)), **settings)

    def undecayed(model: nn.Module) -> list[dict[str, Any]]:
        return matched_gain_groups(model, swapped(model), **settings)

    torch.testing.assert_close(steps(matched, optimizer, **kwargs), expected, rtol=1e-6, atol=1e-6)
    # The optimizer's own decay is not known here, and at these rates it would be too much.
    by_default = steps(undecayed, optimizer, **kwargs, weight_decay=0.5)
    torch.testing.assert_close(by_default, steps(undecayed, optimizer, **kwargs, weight_decay=0.0))
    assert not torch.allclose(by_default, expected, rtol=1e-3)


def test_groups_keep_their_settings_and_each_parameter_is_in_one() -> None:
    model = nn.Sequential(BatchLayerNorm(4), nn.Linear(4, 9), BatchLayerNorm(9), BatchLayerNorm(9, affine=False))
    first = {"params": [model[1].weight], "weight_decay": 0.1}
    rest = {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.5}
    groups = matched_gain_groups(model, [first, rest], lr=2.0)
    kept = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    assert kept == [
        {"weight_decay": 0.1, "lr": 2.0},
        {"lr": 2.0, "weight_decay": 0.0},
        {"lr": 0.5},
        {"lr": 4.5, "weight_decay": 0.0},
    ]
    assert [id(p) for group in groups for p in group["params"]] == [
        id(p) for p in (model[1].weight, model[0].weight, model[0].bias, model[1].bias, model[2].bias, model[2].weight)
    ]
    assert "lr" not in first
    assert len(rest["params"]) == 5


def test_forms_of_parameters_that_optimizers_take() -> None:
    model = nn.Sequential(nn.Linear(4, 9), BatchLayerNorm(9))
    model[0].requires_grad_(False)
    assert [len(group["params"]) for group in matched_gain_groups(model, lr=1.0)] == [1, 1]  # gain, bias
    named = matched_gain_groups(model, [{"params": model.named_parameters()}], lr=1.0, adaptive=True)
    assert [(group["params"][-1][0], group["lr"]) for group in named] == [("1.bias", 1.0), ("1.weight", 3.0)]
    torch.optim.SGD(named)
    plain = matched_gain_groups(model, model.parameters(), lr=1.0)
    assert [(len(group["params"]), group["lr"]) for group in plain] == [(3, 1.0), (1, 9.0)]
    (alone,) = matched_gain_groups(model, [{"params": model[1].weight}], lr=1.0)
    assert alone["params"][0] is model[1].weight
    assert alone["lr"] == 9.0


def test_several_feature_axes() -> None:
    model = nn.Sequential(BatchLayerNorm((3, 4), feature_dim=-1))
    assert [group["lr"] for group in matched_gain_groups(model, lr=1.0)] == [12.0, 1.0]


def test_no_weights_of_bln_layers() -> None:
    with pytest.raises(ValueError, match=r"got none of those of 0 such layers in a Linear; swap first"):
        matched_gain_groups(nn.Linear(2, 2), lr=0.1)
    model = nn.Sequential(nn.Linear(4, 9), BatchLayerNorm(9))
    with pytest.raises(ValueError, match=r"none of those of 1 such layers in a Sequential; .* or it is frozen"):
        matched_gain_groups(model, [{"params": model[0].parameters()}], lr=0.1)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    swap_norms_(lazy)
    with pytest.raises(ValueError, match=r"got 1, a lazy layer .* run one batch through the model first"):
        matched_gain_groups(lazy, lr=0.1)
    lazy(torch.randn(8, 3))
    assert {group["lr"] for group in matched_gain_groups(lazy, lr=0.1)} == {0.1, 0.4}
