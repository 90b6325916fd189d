"""Run the last training batches through a model again, knowing nothing about how its training step calls it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_bln.layer import BatchLayerNorm, recomputing

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class CallRecorder:
    """Remembers the outermost calls of a model's modules in each of the last training batches, to make them again.

    A training step may call ``self(x)``, ``self.net(x)`` or several modules in turn; each call of a module that holds
    a `BatchLayerNorm`, made from outside any other such module, is kept with its (detached) arguments. Where a step
    makes several such calls in turn, the later ones are made again with the inputs that they had, which came from the
    weights of that time: a warning says so.

    Args:
        model: The model, after the swap.
        batches: How many batches to remember; their inputs stay on their device.

    Attributes:
        batches: The calls of each batch.
        modes: Train or eval mode of each module when the last batch began; frozen layers stay frozen in a replay.
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.model = model
        self.batches: deque[list[Call]] = deque(maxlen=batches)
        self.modes: dict[nn.Module, bool] = {}
        self._inside: list[bool] = []
        self._listening = False
        self._warned = False
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if any(isinstance(child, BatchLayerNorm) for child in module.modules()):
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def begin_batch(self) -> None:
        """Listen to the calls of one training batch."""
        self.batches.append([])
        self.modes = {module: module.training for module in self.model.modules()}
        self._inside.clear()
        self._listening = True

    def end_batch(self) -> None:
        """Stop listening; calls of a validation are not training batches."""
        self._listening = False
        if self.batches and len(self.batches[-1]) > 1 and not self._warned:
            self._warned = True
            names = ", ".join(type(module).__name__ for module, _, _ in self.batches[-1])
            warnings.warn(
                "Recomputing statistics exactly needs a training step that calls the model once, such as self(x), got "
                f"calls of {names} in turn: the later ones are made again with inputs of the weights at that time. "
                "Put the calls into forward, or use population='epoch' or 'ema'.",
                stacklevel=2,
            )

    def replay(self, calls: list[Call]) -> None:
        """Make the calls of one batch again."""
        for module, args, kwargs in calls:
            module(*args, **kwargs)

    def close(self) -> None:
        """Remove the hooks and forget the batches."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.batches.clear()
        self.modes.clear()
        self._listening = False

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A strategy may route a training step through the module's forward (DDP): that is no call of the model.
        own = vars(module).get("forward")
        counts = own is None or getattr(own, "__func__", None) is type(module).forward
        # A forward that the backward pass runs again (activation checkpointing) is not another call either.
        if self._listening and counts and not any(self._inside) and not recomputing():
            self.batches[-1].append((module, map_tensors(Tensor.detach, args), map_tensors(Tensor.detach, kwargs)))
        self._inside.append(counts)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop()


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with every tensor in it, in tuples, lists and dicts too, replaced by ``function`` of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its items one by one
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in ``value``, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
