"""A loss for each sample out of a loss for a batch, where that can be had."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]


class SampleLosses:
    """Losses of single samples from a loss function of (output, target), if it has them.

    A function or module with a ``reduction`` is called with ``reduction="none"``; one that returns a value for each
    sample is taken as it is. Whether their mean really is what the loss returns for a batch is looked at with the first
    batch: a loss with class weights or ignored targets, say, is another mean, and then only batches have losses.

    Args:
        loss: Called with (output, target); returns a scalar or values with samples along axis 0.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self._unreduced = _unreduced(loss)
        self._checked = False

    def of_batch(self, output: Any, target: Any) -> Tensor:
        """The loss of a batch, a scalar: of several values their mean."""
        return self.loss(output, target).float().mean()

    def of_samples(self, output: Any, target: Any, samples: int) -> Tensor | None:
        """One loss a sample, shape (samples,), or None if the loss has none."""
        if self._unreduced is None:
            return None
        each = self._unreduced(output, target)
        if each.ndim == 0 or each.shape[0] != samples:
            self._unreduced = None
            return None
        each = each.float().flatten(1).mean(1) if each.ndim > 1 else each.float()
        if not self._checked:
            self._checked = True
            if not torch.allclose(each.mean(), self.of_batch(output, target), rtol=1e-4, atol=1e-6, equal_nan=True):
                self._unreduced = None
                return None
        return each


def _unreduced(loss: Loss) -> Loss | None:
    if isinstance(loss, nn.Module):
        if not hasattr(loss, "reduction"):
            return loss
        each = copy.copy(loss)
        each.reduction = "none"  # type: ignore[assignment]
        return each
    try:
        parameters = inspect.signature(loss).parameters
    except ValueError:  # a builtin without a signature
        return loss
    if "reduction" not in parameters:
        return loss
    reducing: Any = loss  # that it takes a reduction is not in its type
    return partial(reducing, reduction="none")
