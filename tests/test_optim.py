"""Learning rates of gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_bln import BatchLayerNorm, swap_norms_
from lightning_bln.optim import matched_gain_groups


def step(make: Any, optimizer: type[torch.optim.Optimizer], **kwargs: Any) -> torch.Tensor:
    """How far one step moves the gain of a norm layer between two linear ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16, eps=1e-3), nn.Linear(16, 3)).double()
    x, y = torch.randn(4096, 5).double(), torch.randint(3, (4096,))
    groups = make(model)
    norm: Any = model[1]
    scale = 4.0 if isinstance(norm, BatchLayerNorm) else 1.0  # sqrt(16)
    before = norm.weight.detach() / scale
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer(groups, **kwargs).step()
    return norm.weight.detach() / scale - before


def swapped(model: nn.Module) -> list[dict[str, Any]]:
    swap_norms_(model)
    return [{"params": list(model.parameters())}]


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "slower"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 16),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 16),
        (torch.optim.Adam, {"lr": 0.01}, 4),
    ],
)
def test_gains_learn_as_fast_as_those_of_batchnorm(
    optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], slower: int
) -> None:
    expected = step(lambda model: model.parameters(), optimizer, **kwargs)
    adaptive = optimizer is torch.optim.Adam

    def matched(model: nn.Module) -> list[dict[str, Any]]:
        return matched_gain_groups(model, swapped(model), lr=kwargs["lr"], adaptive=adaptive)

    # With 4096 samples BLN's output is BatchNorm's but for 1 / B and delta = 1e-4.
    torch.testing.assert_close(step(matched, optimizer, **kwargs), expected, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(step(swapped, optimizer, **kwargs) * slower, expected, rtol=0.02, atol=1e-6)


def test_groups_keep_their_settings_and_each_parameter_is_in_one() -> None:
    model = nn.Sequential(BatchLayerNorm(4), nn.Linear(4, 9), BatchLayerNorm(9), BatchLayerNorm(9, affine=False))
    decayed = {"params": [model[1].weight], "weight_decay": 0.1}
    rest = {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.5}
    groups = matched_gain_groups(model, [decayed, rest], lr=2.0)
    kept = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    assert kept == [{"weight_decay": 0.1, "lr": 2.0}, {"lr": 2.0}, {"lr": 0.5}, {"lr": 4.5}]
    assert [id(p) for group in groups for p in group["params"]] == [
        id(p) for p in (model[1].weight, model[0].weight, model[0].bias, model[1].bias, model[2].bias, model[2].weight)
    ]
    assert "lr" not in decayed
    assert len(rest["params"]) == 5


def test_forms_of_parameters_that_optimizers_take() -> None:
    model = nn.Sequential(nn.Linear(4, 9), BatchLayerNorm(9))
    model[0].requires_grad_(False)
    assert [len(group["params"]) for group in matched_gain_groups(model, lr=1.0)] == [1, 1]  # gain, bias
    named = matched_gain_groups(model, [{"params": model.named_parameters()}], lr=1.0, adaptive=True)
    assert [(group["params"][-1][0], group["lr"]) for group in named] == [("1.bias", 1.0), ("1.weight", 3.0)]
    torch.optim.SGD(named)
    (alone,) = matched_gain_groups(model, [{"params": model[1].weight}], lr=1.0)
    assert alone["params"][0] is model[1].weight
    assert alone["lr"] == 9.0


def test_no_weights_of_bln_layers() -> None:
    with pytest.raises(ValueError, match=r"got 0 such layers in a Linear .* call swap_norms_\(model\) first"):
        matched_gain_groups(nn.Linear(2, 2), lr=0.1)
    model = nn.Sequential(nn.Linear(4, 9), BatchLayerNorm(9))
    with pytest.raises(ValueError, match="got 1 such layers in a Sequential and none of their weights"):
        matched_gain_groups(model, [{"params": model[0].parameters()}], lr=0.1)
