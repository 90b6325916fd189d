"""Run a model under many settings of its flags, sharing the work of settings that agree so far.

Flags act first where the first `BatchLayerNorm` is called. What a forward pass computes before that is the same for
every setting, and what it computes before the first layer in which two settings differ is the same for those two. So
the settings are run one after the other, sorted by the layers in the order of their calls, and each run is given what
the run before it computed up to there: every torch function called up to that point is answered from memory. The
model's own Python code runs each time, so nothing has to be known about it.

Where tensors are small, calling an operation costs more than computing it: then several settings run as one call, their
samples behind each other along the sample axis, and each `BatchLayerNorm` takes them apart. That is right only if
everything after the first layer treats each sample by itself, which is looked at with every new size of batch: the
results must be those of the settings run one by one, or they stay so.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.flags import StatFlags
from lightning_bln.layer import RUNNING, BatchLayerNorm
from lightning_bln.ops import Statistics
from lightning_bln.replay import map_tensors, tensors_in
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.memory import Memo
from lightning_bln.tuning.space import Setting, by_layer

log = logging.getLogger(__name__)

Call = Callable[[int, Any], Any]
"""What is run for each setting: called with its index and the batch."""

TOGETHER_BYTES = 5 << 20
"""As many settings run in one call as keep the input of the first layer where they part, once for each, below this: it
has to stay in the processor's cache."""

LEAST_TOGETHER = 4
"""Fewer settings than this are not worth one call."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""By how much results of settings in one call may differ, over the largest output: rounding only. A sample that saw
another one's would differ by far more. Other types are too coarse to tell."""


class InputChangedError(RuntimeError):
    """The model wrote into its input after the settings had parted; a later setting would see another input."""


class SharedForward:
    """Calls a function of the model under each of several settings, doing common work once.

    Args:
        model: With `BatchLayerNorm` layers, in eval mode when it is called.
        settings: Flags of all layers together, or by layer.
        inference: Let results be inference tensors, which cost a little less. Default False.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> model = nn.Sequential(nn.Linear(4, 4), BatchLayerNorm(4)).eval()
        >>> shared = SharedForward(model, [StatFlags(), StatFlags(False, False)])
        >>> with shared:
        ...     outputs = dict(shared.run(lambda cell, batch: model(batch), torch.randn(8, 4), [0, 1]))
        >>> sorted(outputs)
        [0, 1]
    """

    def __init__(self, model: nn.Module, settings: Sequence[Setting], *, inference: bool = False) -> None:
        self.layers = bln_layers(model)
        self.inference = inference
        self.flags = [by_layer(setting, self.layers) for setting in settings]
        self.memo = Memo()
        # Layers in the order of their first calls, learned in the first run.
        self._sequence: list[str] = []
        self._own: dict[str, list[tuple[bool, ...]]] = {}
        self._group: Sequence[int] = ()  # the settings that run now, in one call
        self._following: Sequence[int] = ()  # those of the next call
        self._merged = False  # whether the group's samples stand behind each other by now
        self._parted: tuple[Tensor, int] | None = None  # the input of the layer where settings parted, and its version
        self._parted_own: dict[str, Statistics] = {}  # its statistics, by layer, once a setting asked for them
        self._bytes_each = 0  # of the largest input of a layer where settings parted
        self._checked: dict[Any, bool] = {}  # sizes of a batch -> whether settings may run in one call
        self._copies = False  # each run needs an input of its own
        self._saved: dict[str, StatFlags] = {}

    # ------------------------------------------------------------------ context

    def __enter__(self) -> SharedForward:
        self._saved = {name: layer.flags for name, layer in self.layers.items()}
        self._own = {name: [_own(layer, flags[name]) for flags in self.flags] for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            # An attribute of these objects, removed again; the class and its forward stay what they are.
            layer.forward = partial(self._layer_forward, name, layer)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for name, layer in self.layers.items():
            del layer.forward
            layer.flags = self._saved[name]
        self.memo.clear()
        self._parted, self._parted_own = None, {}

    def use(self, cell: int) -> None:
        """Put the model under one setting, for what is called outside a run."""
        self._begin([cell], [])

    def paused(self) -> AbstractContextManager[None]:
        """Nothing inside is shared: for what belongs to one setting only, such as its metrics."""
        return self.memo.paused()

    # --------------------------------------------------------------------- runs

    def run(
        self, call: Call, batch: Any, cells: Sequence[int], *, errors: dict[int, Exception] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Call ``call(cell, batch)`` under each setting.

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
        batch = map_tensors(normal_tensor, batch)
        order = self._ordered(cells)
        may_copy = self._copies or not self._sequence
        yield from self._run_in_turn(call, batch, order, errors, _clone(batch) if may_copy else None)

    def run_together(self, call: Callable[[Any], Tensor], batch: Any, cells: Sequence[int]) -> Tensor | None:
        """Call ``call(batch)`` under the settings, several in one call, if that is worth while and gives the same.

        Args:
            call: Runs the model; returns one tensor with samples along axis 0.
            batch: Its argument.
            cells: Indices of the settings to run.

        Returns:
            The results (cells, samples, ...) in the order of ``cells``, or None: use `run`.
        """
        sizes = tuple(tensor.shape for tensor in tensors_in(batch))
        if (
            not self._sequence
            or not self.memo.enabled
            or self._copies
            or len(cells) < LEAST_TOGETHER
            or not self._checked.get(sizes, True)
            or TOGETHER_BYTES // max(self._bytes_each, 1) < LEAST_TOGETHER
        ):
            return None
        batch = map_tensors(normal_tensor, batch)
        try:
            if sizes in self._checked:
                return self._run_groups(call, batch, cells)
            results = self._run_both_ways(call, batch, cells)
        except InputChangedError:
            raise
        except Exception as error:
            # A model may fail in any way on more samples than it was given; and where it fails for one setting,
            # running them one by one shows for which.
            if self.memo.inputs_changed():
                raise _input_changed() from error
            log.info("settings run one by one, since the model cannot run several in one call: %s", error)
            results = None
        self._checked[sizes] = results is not None
        return results

    def _run_both_ways(self, call: Callable[[Any], Tensor], batch: Any, cells: Sequence[int]) -> Tensor | None:
        """The results, if settings in one call give what they give one by one."""
        together = self._run_groups(call, batch, cells)
        alone = dict(self._run_in_turn(lambda _, own: call(own), batch, self._ordered(cells), None, None))
        if all(_close(alone[cell], own) for cell, own in zip(cells, together, strict=True)):
            return together
        log.info("settings run one by one: in one call their samples would act on each other")
        return None

    def _run_groups(self, call: Callable[[Any], Tensor], batch: Any, cells: Sequence[int]) -> Tensor:
        order = self._ordered(cells)
        size = TOGETHER_BYTES // max(self._bytes_each, 1)
        size = -(-len(order) // -(-len(order) // size))  # groups of one size, but for the last
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        results: dict[int, Tensor] = {}
        self._begin_batch(batch)
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            self._begin(group, following)
            with self._mode(order, first=group is groups[0]), self.memo.run():
                output = call(batch)
            if self.memo.changed():
                if self.memo.inputs_changed():
                    raise _input_changed()
                raise RuntimeError("it writes into what settings share")
            # Where no layer of the model told the settings apart they have one result.
            parts = output.chunk(len(group)) if self._merged else (output,) * len(group)
            if self._merged and output.shape[0] != len(group) * (output.shape[0] // len(group)):
                raise RuntimeError(f"{output.shape[0]} results for {len(group)} settings")
            results |= zip(group, parts, strict=True)
        return torch.stack([results[cell] for cell in cells])

    def _run_in_turn(
        self, call: Call, batch: Any, order: list[int], errors: dict[int, Exception] | None, pristine: Any
    ) -> Iterator[tuple[int, Any]]:
        memo = self.memo
        self._begin_batch(batch)
        for i, cell in enumerate(order):
            if memo.changed():
                # An in-place operation after the settings had parted wrote into what they share.
                log.info("the model writes into shared tensors: settings are run without sharing")
                memo.enabled = False
                self._copies = self._copies or memo.inputs_changed()
                if self._copies and pristine is None:
                    raise _input_changed()
                self._begin_batch(batch)
            if self._copies and i > 0:
                batch = _clone(pristine)
                self._begin_batch(batch)
            self._begin([cell], order[i + 1 : i + 2])
            try:
                with self._mode(order, first=i == 0), memo.run():
                    result = call(cell, batch)
            except Exception as error:
                if errors is None:
                    raise
                errors[cell] = error
            else:
                yield cell, result

    def _mode(self, order: Sequence[int], *, first: bool) -> AbstractContextManager[Any]:
        """Inference mode for runs that leave nothing in memory: those after the first, if all part in one layer."""
        if not self.inference or first or not self._sequence:
            return contextlib.nullcontext()
        codes = self._own[self._sequence[0]]
        parted = len({codes[cell] for cell in order}) == len(order)
        return torch.inference_mode() if parted else contextlib.nullcontext()

    def _begin(self, group: Sequence[int], following: Sequence[int]) -> None:
        self._group, self._following, self._merged = group, following, False
        for name, layer in self.layers.items():
            layer.flags = self.flags[group[0]][name]

    def _ordered(self, cells: Sequence[int]) -> list[int]:
        """Settings that agree in the layers called first stand side by side."""
        names = [*self._sequence, *(name for name in self.layers if name not in self._sequence)]
        return sorted(cells, key=lambda cell: [self._own[name][cell] for name in names])

    def _layer_forward(self, name: str, layer: BatchLayerNorm, x: Tensor) -> Tensor:
        if name not in self._sequence:
            self._sequence.append(name)
        codes, memo = self._own[name], self.memo
        own = codes[self._group[0]]
        alike = all(codes[cell] == own for cell in self._group)
        stays = alike and bool(self._following) and all(codes[cell] == own for cell in self._following)
        if memo.recording and not stays:
            memo.keep_no_more()
        known = memo.layer_output(name, own) if alike else None
        if known is not None:
            return known
        if memo.recording and not stays:
            memo.part()
            self._bytes_each = max(self._bytes_each, x.nbytes)
            self._part_at(x)
        with memo.paused():
            if self._merged or not alike:
                return self._each(name, layer, x)
            y = self._forward(name, layer, x, self._group[0])
        memo.keep_layer_output(name, own, y)
        return y

    def _each(self, name: str, layer: BatchLayerNorm, x: Tensor) -> Tensor:
        """The layer for each setting of the group, on its own samples."""
        count, axis = len(self._group), layer.sample_dim
        if self._merged and x.shape[axis] % count:
            raise RuntimeError(f"{x.shape[axis]} samples for {count} settings in layer {name!r}")
        inputs = x.chunk(count, axis) if self._merged else (x,) * count
        outputs = []
        for cell, part in zip(self._group, inputs, strict=True):
            layer.flags = self.flags[cell][name]
            outputs.append(self._forward(name, layer, part, cell))
        self._merged = True
        return torch.cat(outputs, axis)

    def _begin_batch(self, batch: Any) -> None:
        self.memo.begin_batch(batch)
        self._parted, self._parted_own = None, {}  # a loader may fill the same memory again, and no version tells

    def _part_at(self, x: Tensor) -> None:
        """Several settings part at this input, one after the other: its statistics need to be taken once."""
        if not self._parts_at(x):
            self._parted, self._parted_own = (x, x._version), {}

    def _parts_at(self, x: Tensor) -> bool:
        return self._parted is not None and x is self._parted[0] and x._version == self._parted[1]

    def _forward(self, name: str, layer: BatchLayerNorm, x: Tensor, cell: int) -> Tensor:
        # A subclass may do more in its forward; and gradients go through the statistics.
        plain = type(layer).forward is BatchLayerNorm.forward and not layer.training and not torch.is_grad_enabled()
        if not plain or not self._parts_at(x):
            return type(layer).forward(layer, x)
        # Those of samples take another pass over x; it is worth its while if several settings want them.
        takers = {own for own in self._own[name] if any(own[:2])}
        if len(takers) < 2 or self._own[name][cell] not in takers:
            return type(layer).forward(layer, x)
        if name not in self._parted_own:
            self._parted_own[name] = layer.own_statistics(x)
        return layer.normalize_with(x, self._parted_own[name])


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


def normal_tensor(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made under inference_mode, which would not tell when it is written to."""
    return tensor.clone() if tensor.is_inference() else tensor


def _clone(batch: Any) -> Any:
    return map_tensors(Tensor.clone, batch)


def _close(alone: Tensor, together: Tensor) -> bool:
    """Whether the two are the same but for rounding."""
    if alone.shape != together.shape or alone.dtype not in TOLERANCE:
        return False
    finite = alone.isfinite()
    if not torch.equal(finite, together.isfinite()):
        return False
    a, b = alone[finite], together[finite]
    return a.numel() == 0 or bool((a - b).abs().max() <= TOLERANCE[alone.dtype] * a.abs().max())
