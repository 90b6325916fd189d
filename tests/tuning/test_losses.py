"""Losses of single samples out of losses of batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bln.tuning.losses import SampleLosses

OUTPUT, TARGET = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
EACH = F.cross_entropy(OUTPUT, TARGET, reduction="none")


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        partial(F.cross_entropy, reduction="mean"),
        partial(F.cross_entropy, reduction="none"),
        lambda output, target: F.cross_entropy(output, target, reduction="none"),
    ],
)
def test_one_loss_a_sample(loss) -> None:
    losses = SampleLosses(loss)
    torch.testing.assert_close(losses.of_samples(OUTPUT, TARGET, 6), EACH)
    torch.testing.assert_close(losses.of_batch(OUTPUT, TARGET), EACH.mean())


def test_several_values_a_sample_are_averaged() -> None:
    losses = SampleLosses(nn.MSELoss())
    output, target = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    torch.testing.assert_close(losses.of_samples(output, target, 3), ((output - target) ** 2).mean((1, 2)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: F.cross_entropy(output, target),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0, 1.0])),
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, ignore_index=2),
    ],
    ids=["no reduction", "class weights", "sum", "ignored"],
)
def test_where_the_batch_is_another_mean_only_batches_have_losses(loss) -> None:
    losses = SampleLosses(loss)
    assert losses.of_samples(OUTPUT, TARGET, 6) is None
    torch.testing.assert_close(losses.of_batch(OUTPUT, TARGET), loss(OUTPUT, TARGET))
    assert losses.of_samples(OUTPUT, TARGET, 6) is None


def test_the_users_loss_is_not_changed() -> None:
    loss = nn.CrossEntropyLoss()
    SampleLosses(loss).of_samples(OUTPUT, TARGET, 6)
    assert loss.reduction == "mean"


def test_half_precision_is_summed_in_single() -> None:
    losses = SampleLosses(nn.MSELoss(reduction="none"))
    assert losses.of_samples(OUTPUT.bfloat16(), OUTPUT.bfloat16() + 1, 6).dtype == torch.float32
