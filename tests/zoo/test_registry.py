"""Every model that the zoo lists, and how it answers names that it does not have."""

from __future__ import annotations

import pytest
import torch

import zoo


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_listed_model_runs_trains_and_round_trips(name: str) -> None:
    model = zoo.create_model(name, num_classes=7)
    x = torch.randn(3, 3, 32, 32)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = zoo.create_model(name, num_classes=7)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        y = model.eval()(x)
        assert y.shape == (3, 7)
        assert torch.equal(y, twin.eval()(x))


def test_names_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"no model named 'resnet20_blm'; did you mean 'resnet20_bln'"):
        zoo.create_model("resnet20_blm")
    with pytest.raises(ValueError, match=r"no model named 'xyz'; zoo.list_models\(\)"):
        zoo.create_model("xyz")
