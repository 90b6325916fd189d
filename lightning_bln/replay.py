"""Run the last training batches through a model again, knowing nothing about how its training step calls it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_bln.layer import BatchLayerNorm


class CallRecorder:
    """Remembers the outermost calls of a model's modules in each of the last training batches, to make them again.

    A training step may call ``self(x)``, ``self.net(x)`` or several modules in turn; each call of a module that holds
    a `BatchLayerNorm`, made from outside any other such module, is kept with its (detached) arguments. Arguments that
    came from an earlier call in the same step are replayed as they were then.

    Args:
        model: The model, after the swap.
        batches: How many batches to remember; their inputs stay on their device.
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.batches: deque[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = deque(maxlen=batches)
        self._depth = 0
        self._listening = False
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if any(isinstance(child, BatchLayerNorm) for child in module.modules()):
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def begin_batch(self) -> None:
        """Listen to the calls of one training batch."""
        self.batches.append([])
        self._depth = 0
        self._listening = True

    def end_batch(self) -> None:
        """Stop listening; calls of a validation are not training batches."""
        self._listening = False

    def replay(self, calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]) -> None:
        """Make the calls of one batch again."""
        for module, args, kwargs in calls:
            module(*args, **kwargs)

    def close(self) -> None:
        """Remove the hooks and forget the batches."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.batches.clear()
        self._listening = False

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listening and self._depth == 0 and torch.is_grad_enabled():
            self.batches[-1].append((module, _detach(args), _detach(kwargs)))
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detach(item) for item in value)
    if isinstance(value, dict):
        return {key: _detach(item) for key, item in value.items()}
    return value
