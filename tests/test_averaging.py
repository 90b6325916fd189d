"""`align_averaged_copies`: copies made before the first batch."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_bln import BatchLayerNorm
from lightning_bln.averaging import align_averaged_copies, is_averaging


class WeightAveraging:
    """Stands for Lightning's: a callback with a copy of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._average_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def test_copies_take_shapes_and_counts_but_not_later_values() -> None:
    model = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4))
    callback = WeightAveraging(model)
    assert is_averaging(callback)
    assert not is_averaging(object())
    values = []
    for _ in range(4):
        model(torch.randn(7, 3))
        align_averaged_copies([callback, object()], model)
        callback._average_model.update_parameters(model)
        align_averaged_copies([callback], model)
        values.append(model[1].running_batch_mean.clone())
    twin = callback._average_model.module[1]
    expected = values[0]
    for value in values[1:]:
        expected = torch.lerp(expected, value, 0.1)
    torch.testing.assert_close(twin.running_batch_mean, expected)
    assert int(twin.num_samples) == int(model[1].num_samples) == 28
    assert int(twin.nominal_batch_size) == 7


def test_a_copy_without_the_layer_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    callback = WeightAveraging(model)
    swapped = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4))
    before = copy.deepcopy(callback._average_model.state_dict())
    align_averaged_copies([callback], swapped)
    after = callback._average_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
