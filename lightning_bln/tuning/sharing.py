"""Run a model under many settings of its flags, sharing the work of settings that agree so far.

Flags act first where the first `BatchLayerNorm` is called. What a forward pass computes before that is the same for
every setting, and what it computes before the first layer in which two settings differ is the same for those two. So
the settings are run one after the other, sorted by the layers in the order of their calls, and each run is given what
the run before it computed up to there: every torch function called up to that point is answered from memory. The
model's own Python code runs each time, so nothing has to be known about it.

On a CPU several threads share the settings, each with one part of the processor and a replica of the model that has
the same tensors: small networks make better use of it so than by splitting every operation.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.flags import StatFlags
from lightning_bln.layer import RUNNING, BatchLayerNorm
from lightning_bln.replay import map_tensors
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.memory import Memo
from lightning_bln.tuning.space import Setting, by_layer

log = logging.getLogger(__name__)

Call = Callable[[nn.Module, int, Any], Any]
"""What is run for each setting: called with the model or its replica, the setting's index and the batch."""


class InputChangedError(RuntimeError):
    """The model wrote into its input after the settings had parted; a later setting would see another input."""


class SharedForward:
    """Calls a function of the model under each of several settings, doing common work once.

    Args:
        model: With `BatchLayerNorm` layers, in eval mode when it is called.
        settings: Flags of all layers together, or by layer.
        threads: Let several threads share the settings where that is possible. Default False.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), BatchLayerNorm(4)).eval()
        >>> shared = SharedForward(model, [StatFlags(), StatFlags(False, False)])
        >>> with shared:
        ...     outputs = dict(shared.run(lambda model, cell, batch: model(batch), torch.randn(8, 4), [0, 1]))
        >>> sorted(outputs)
        [0, 1]
    """

    def __init__(self, model: nn.Module, settings: Sequence[Setting], *, threads: bool = False) -> None:
        self.model = model
        self.flags = [by_layer(setting, bln_layers(model)) for setting in settings]
        self._runner = _Runner(model, self.flags)
        self._wants_threads = threads
        self._team: list[_Runner] = []
        self._pool: ThreadPoolExecutor | None = None
        self._copies = False  # each run needs an input of its own

    # ------------------------------------------------------------------ context

    def __enter__(self) -> SharedForward:
        self._runner.attach()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(torch.get_num_threads())  # threads to come take the number of the last that set it
        self._team = []
        self._runner.detach()

    def use(self, cell: int) -> None:
        """Put the model under one setting, for what is called outside a run."""
        self._runner.use(cell, [])

    def paused(self) -> AbstractContextManager[None]:
        """Nothing inside is shared: for what belongs to one setting only, such as its metrics."""
        return self._runner.memo.paused()

    # --------------------------------------------------------------------- runs

    def run(
        self, call: Call, batch: Any, cells: Sequence[int], *, errors: dict[int, Exception] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Call ``call(model, cell, batch)`` under each setting.

        Args:
            call: Runs the model.
            batch: Its argument.
            cells: Indices of the settings to run.
            errors: Takes the exceptions of settings that raise; None (default) raises them.

        Yields:
            (cell, result), in the order in which sharing is best.

        Raises:
            InputChangedError: If the model writes into its input; it may, if it does so from the first batch on.
        """
        batch = map_tensors(_normal, batch)
        order = self._runner.ordered(cells)
        if not self._runner.sequence:
            # The first batch shows in which order layers are called, and what the model writes into.
            versions = _versions(self.model)
            yield from self._run_in_turn(call, batch, order, errors, map_tensors(Tensor.clone, batch))
            if self._wants_threads and not self._copies and _versions(self.model) == versions:
                self._start_team(len(order))
        elif self._copies:
            yield from self._run_in_turn(call, batch, order, errors, map_tensors(Tensor.clone, batch))
        elif self._pool is None:
            yield from self._run_in_turn(call, batch, order, errors, None)
        else:
            yield from self._run_by_team(call, batch, order, errors)

    def _run_in_turn(
        self, call: Call, batch: Any, order: list[int], errors: dict[int, Exception] | None, pristine: Any
    ) -> Iterator[tuple[int, Any]]:
        memo = self._runner.memo
        memo.begin_batch(batch)
        for i, cell in enumerate(order):
            if memo.changed():
                # An in-place operation after the settings had parted wrote into what they share.
                log.info("the model writes into shared tensors: settings are run without sharing")
                memo.enabled = False
                self._copies = self._copies or memo.inputs_changed()
                if self._copies and pristine is None:
                    raise _input_changed()
                memo.begin_batch(batch)
            if self._copies and i > 0:
                batch = map_tensors(Tensor.clone, pristine)
                memo.begin_batch(batch)
            yield from self._runner.run(call, batch, [cell], order[i + 1 : i + 2], errors)

    def _run_by_team(
        self, call: Call, batch: Any, order: list[int], errors: dict[int, Exception] | None
    ) -> Iterator[tuple[int, Any]]:
        assert self._pool is not None
        memo = self._runner.memo
        memo.begin_batch(batch)
        # The first run leaves in memory what all have in common, computed with the whole processor.
        results = list(self._runner.run(call, batch, order[:1], order[1:], errors))
        size = -(-len(order[1:]) // len(self._team))
        parts = [order[i : i + size] for i in range(1, len(order), max(size, 1))]
        jobs = []
        for runner, part in zip(self._team, parts, strict=False):
            runner.memo.follow(memo)
            jobs.append(self._pool.submit(lambda own, part: list(own.run(call, batch, part, [], errors)), runner, part))
        for job in jobs:
            results += job.result()
        if memo.changed():
            if memo.inputs_changed():
                raise _input_changed()
            log.info("the model writes into shared tensors: settings are run without sharing")
            memo.enabled = False
            self._pool.shutdown()
            self._pool = None
            results = list(self._run_in_turn(call, batch, order, errors, None))
        yield from results

    def _start_team(self, cells: int) -> None:
        """Replicas and threads, if this model can have them."""
        threads = torch.get_num_threads()
        count = min(threads, cells - 1)
        if count < 2 or not self._runner.memo.enabled or any(t.device.type != "cpu" for t in _tensors(self.model)):
            return
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules()):
            return  # a hook may write to one place, whichever replica calls it
        self._runner.detach()
        try:
            replicas = [_replica(self.model) for _ in range(count)]
        except Exception as error:  # whatever an attribute's own copying raises
            log.info("settings are run by one thread, since the model cannot be copied: %s", error)
            return
        finally:
            self._runner.attach()
        self._team = [_Runner(replica, self.flags) for replica in replicas]
        for runner in self._team:
            runner.sequence = self._runner.sequence
            runner.attach()
        share = threads // count
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,))


class _Runner:
    """One model, or a replica, with what it remembers between its runs."""

    def __init__(self, model: nn.Module, flags: Sequence[dict[str, StatFlags]]) -> None:
        self.model = model
        self.layers = bln_layers(model)
        self.flags = flags
        self.memo = Memo()
        # Layers in the order of their first calls, learned in the first run.
        self.sequence: list[str] = []
        self._own: dict[str, list[tuple[bool, ...]]] = {}
        self._cell = 0
        self._following: Sequence[int] = ()
        self._saved: dict[str, StatFlags] = {}

    def attach(self) -> None:
        """Take over the layers' forward."""
        self._saved = {name: layer.flags for name, layer in self.layers.items()}
        self._own = {name: [_own(layer, flags[name]) for flags in self.flags] for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            # An attribute of these objects, removed again; the class and its forward stay what they are.
            layer.forward = partial(self._layer_forward, name, layer)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give it back, and the flags."""
        for name, layer in self.layers.items():
            del layer.forward
            layer.flags = self._saved[name]
        self.memo.clear()

    def use(self, cell: int, following: Sequence[int]) -> None:
        """Put the layers under a setting; the settings that follow decide what is to be remembered."""
        self._cell, self._following = cell, following
        for name, layer in self.layers.items():
            layer.flags = self.flags[cell][name]

    def ordered(self, cells: Sequence[int]) -> list[int]:
        """Settings that agree in the layers called first stand side by side."""
        names = [*self.sequence, *(name for name in self.layers if name not in self.sequence)]
        return sorted(cells, key=lambda cell: [self._own[name][cell] for name in names])

    def run(
        self,
        call: Call,
        batch: Any,
        cells: Sequence[int],
        following: Sequence[int],
        errors: dict[int, Exception] | None,
    ) -> Iterator[tuple[int, Any]]:
        """Run the settings, which ``following`` will come after."""
        for i, cell in enumerate(cells):
            self.use(cell, cells[i + 1 : i + 2] or following)
            try:
                with self.memo.run():
                    result = call(self.model, cell, batch)
            except Exception as error:
                if errors is None:
                    raise
                errors[cell] = error
            else:
                yield cell, result

    def _layer_forward(self, name: str, layer: BatchLayerNorm, x: Tensor) -> Tensor:
        if name not in self.sequence:
            self.sequence.append(name)
        codes = self._own[name]
        own = codes[self._cell]
        stays = bool(self._following) and all(codes[cell] == own for cell in self._following)
        memo = self.memo
        if memo.recording and not stays:
            memo.keep_no_more()
        known = memo.layer_output(name, own)
        if known is not None:
            return known
        if memo.recording and not stays:
            memo.part()
        with memo.paused():
            y = type(layer).forward(layer, x)
        memo.keep_layer_output(name, own, y)
        return y


def _input_changed() -> InputChangedError:
    return InputChangedError(
        "A model that is run under several settings must leave its input as it is, got one that wrote into it, but not "
        "in the first batch; clone the input before writing into it."
    )


def _own(layer: BatchLayerNorm, flags: StatFlags) -> tuple[bool, ...]:
    """Which statistics a layer really takes from the mini-batch under these flags."""
    return tuple(
        layer.training or not flag or getattr(layer, running).numel() == 0
        for flag, running in zip(flags, RUNNING, strict=True)
    )


def _normal(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made under inference_mode, which would not tell when it is written to."""
    return tensor.clone() if tensor.is_inference() else tensor


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _versions(model: nn.Module) -> list[int]:
    """How often each tensor of the model was written to."""
    return [tensor._version for tensor in _tensors(model) if not tensor.is_inference()]


def _replica(model: nn.Module) -> nn.Module:
    """The model once more, with the same parameters and buffers, but modules and Python attributes of its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})
