"""Run a model under many settings of its flags, sharing the work of settings that agree so far.

Flags act first where the first `BatchLayerNorm` is called. What a forward pass computes before that is the same for
every setting, and what it computes before the first layer in which two settings differ is the same for those two. So
the settings are run one after the other, sorted by the layers in the order of their calls, and each run is given what
the run before it computed up to there: every torch function called up to that point is answered from memory. The
model's own Python code runs each time, so nothing has to be known about it.

Where tensors are small, several settings run as one call by `torch.vmap`: its rules give each setting what it would
have got alone, and a model that vmap cannot run is run setting by setting.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from lightning_bln.flags import StatFlags
from lightning_bln.layer import RUNNING, BatchLayerNorm
from lightning_bln.replay import map_tensors, tensors_in
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.space import Setting, by_layer

log = logging.getLogger(__name__)

Call = Callable[[int, Any], Any]
"""What is run for each setting: called with its index and the batch."""

STACK_BYTES = {"cpu": 5 << 18, "cuda": 256 << 20}
"""Settings are run in one call as long as the input of the first layer where they part, once for each of them, is not
larger: on a CPU it has to stay in the cache, on a GPU one larger kernel replaces many small ones."""

LEAST_STACK = 4
"""Fewer settings than this are not worth one call."""


class InputChangedError(RuntimeError):
    """The model wrote into its input after the settings had parted; a later setting would see another input."""


class SharedForward:
    """Calls a function of the model under each of several settings, doing common work once.

    Args:
        model: With `BatchLayerNorm` layers, in eval mode when it is called.
        settings: Flags of all layers together, or by layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), BatchLayerNorm(4)).eval()
        >>> shared = SharedForward(model, [StatFlags(), StatFlags(False, False)])
        >>> with shared:
        ...     outputs = dict(shared.run(lambda cell, batch: model(batch), torch.randn(8, 4), [0, 1]))
        >>> sorted(outputs)
        [0, 1]
    """

    def __init__(self, model: nn.Module, settings: Sequence[Setting]) -> None:
        self.layers = bln_layers(model)
        self.flags = [by_layer(setting, self.layers) for setting in settings]
        self._names = {layer: name for name, layer in self.layers.items()}
        # Layers in the order of their first calls, learned in the first run; until then in the model's order.
        self._sequence: list[str] = []
        self._memo = _Memo()
        self._group: list[int] = []  # the settings of the run in progress
        self._next: list[int] = []  # those of the run after it
        self._index: Tensor | None = None  # vmap's argument, which makes every layer's output depend on the setting
        self._bytes_per_setting: int | None = None
        self._stackable = True
        self._copies = False  # each run needs an input of its own
        self._saved: list[tuple[BatchLayerNorm, StatFlags]] = []
        self._own: dict[str, list[tuple[bool, ...]]] = {}

    # ------------------------------------------------------------------ context

    def __enter__(self) -> SharedForward:
        self._saved = [(layer, layer.flags) for layer in self.layers.values()]
        self._own = {name: [_own(layer, flags[name]) for flags in self.flags] for name, layer in self.layers.items()}
        for layer in self.layers.values():
            # An attribute of these objects, removed again; the class and its forward stay what they are.
            layer.forward = partial(self._layer_forward, layer)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for layer, flags in self._saved:
            del layer.forward
            layer.flags = flags
        self._saved = []
        self._memo.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is shared: for what belongs to one setting only, such as its metrics."""
        with self._memo.paused():
            yield

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
        order = self._ordered(cells)
        may_copy = self._copies or not self._sequence
        batch = map_tensors(_normal, batch)
        pristine = map_tensors(Tensor.clone, batch) if may_copy else None
        own = batch
        self._memo.begin_batch(own)
        for i, cell in enumerate(order):
            if self._memo.changed():
                # An in-place operation after the settings had parted wrote into what they share.
                log.info("the model writes into shared tensors: settings are run without sharing")
                self._memo.enabled = False
                self._copies = self._copies or self._memo.inputs_changed()
                if self._copies and not may_copy:
                    raise _input_changed()
                self._memo.begin_batch(own)
            if self._copies and i > 0:
                own = map_tensors(Tensor.clone, pristine)
                self._memo.begin_batch(own)
            try:
                result = self._run_group([cell], order[i + 1 : i + 2], partial(call, cell, own))
            except Exception as error:
                if errors is None:
                    raise
                errors[cell] = error
                continue
            yield cell, result

    def run_stacked(
        self, call: Callable[[Any], Any], batch: Any, cells: Sequence[int]
    ) -> Iterator[tuple[list[int], Any]]:
        """Call ``call(batch)`` under the settings, several in one call where tensors are small.

        Args:
            call: Runs the model; its result must be tensors.
            batch: Its argument.
            cells: Indices of the settings to run.

        Yields:
            (cells, result): the result with a new first axis for these settings.

        Raises:
            CannotStackError: If the model cannot be run so, before anything was yielded; use `run`.
        """
        order = self._ordered(cells)
        size = self._stack_size()
        if min(size, len(order)) < LEAST_STACK:
            raise CannotStackError
        size = -(-len(order) // -(-len(order) // size))  # groups of one size, but for the last
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        batch = map_tensors(_normal, batch)
        self._memo.begin_batch(batch)
        results = []
        try:
            for group, following in zip(groups, [*groups[1:], []], strict=True):
                result = self._run_group(group, following, partial(call, batch))
                if len(group) == 1:
                    result = map_tensors(lambda tensor: tensor.unsqueeze(0), result)
                results.append((group, result))
                if self._memo.changed():
                    raise CannotStackError("the model writes into shared tensors")
        except Exception as error:
            self._stackable = False
            if self._memo.inputs_changed():
                raise _input_changed() from error
            log.info("settings are run one by one, since torch.vmap cannot run the model: %s", error)
            raise CannotStackError from error
        yield from results

    @property
    def may_stack(self) -> bool:
        """Whether `run_stacked` is worth trying; known after the first `run`."""
        return self._stackable and self._memo.enabled and self._bytes_per_setting is not None

    def use(self, cell: int) -> None:
        """Put the model under one setting, for what is called outside a run."""
        self._group, self._next = [cell], []
        for name, layer in self.layers.items():
            layer.flags = self.flags[cell][name]

    def _stack_size(self) -> int:
        if not self.may_stack or self._copies:
            return 0
        room = STACK_BYTES["cpu" if self._device().type == "cpu" else "cuda"]
        return room // max(self._bytes_per_setting or 0, 1)

    def _run_group(self, group: list[int], following: list[int], call: Callable[[], Any]) -> Any:
        self.use(group[0])
        self._group, self._next = group, following

        def run(index: Tensor | None) -> Any:
            self._index = index
            with self._memo.run():
                return call()

        if len(group) == 1:
            return run(None)
        with warnings.catch_warnings():
            # An operation that vmap has no rule for runs piece by piece, slower than setting by setting.
            warnings.filterwarnings("error", message="There is a performance drop")
            return torch.vmap(run, randomness="same")(torch.arange(len(group), device=self._device()))

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).num_samples.device

    def _ordered(self, cells: Sequence[int]) -> list[int]:
        """Settings that agree in the layers called first stand side by side."""
        sequence = self._sequence or list(self.layers)
        position = {name: i for i, name in enumerate(sequence)}
        names = sorted(self.layers, key=lambda name: position.get(name, len(position)))
        return sorted(cells, key=lambda cell: [self._own[name][cell] for name in names])

    # ------------------------------------------------------------------- layers

    def _layer_forward(self, layer: BatchLayerNorm, x: Tensor) -> Tensor:
        name = self._names[layer]
        if name not in self._sequence:
            self._sequence.append(name)
        codes = self._own[name]
        own = codes[self._group[0]]
        alike = all(codes[cell] == own for cell in self._group)
        stays = alike and bool(self._next) and all(codes[cell] == own for cell in self._next)
        if self._memo.recording and not stays:
            self._memo.keep_no_more()
        known = self._memo.layer_output(layer, own) if alike else None
        if known is not None:
            return known
        if self._memo.recording and not stays:
            self._memo.part()
            self._bytes_per_setting = max(x.numel() * x.element_size(), self._bytes_per_setting or 0)
        with self._memo.paused():
            if len(self._group) == 1:
                y = type(layer).forward(layer, x)
            else:
                flags = [self.flags[cell][name] for cell in self._group]
                y = _EachSetting.apply(x, self._index, layer, flags)
        self._memo.keep_layer_output(layer, own, y)
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


class CannotStackError(Exception):
    """Several settings cannot be run in one call."""


class _EachSetting(torch.autograd.Function):
    """A layer under several settings at once: a function with a rule of its own for `torch.vmap`."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, layer: BatchLayerNorm, flags: list[StatFlags]) -> Tensor:
        raise RuntimeError("is called under torch.vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """No gradients: this is inference."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        index: Tensor,
        layer: BatchLayerNorm,
        flags: list[StatFlags],
    ) -> tuple[Tensor, int | None]:
        """Run the layer for each setting on its own samples."""
        if in_dims[0] is None and all(setting == flags[0] for setting in flags):
            layer.flags = flags[0]
            return type(layer).forward(layer, x), None
        inputs = [x] * len(flags) if in_dims[0] is None else x.unbind(in_dims[0])
        outputs = []
        for setting, own in zip(flags, inputs, strict=True):
            layer.flags = setting
            outputs.append(type(layer).forward(layer, own))
        return torch.stack(outputs), 0


# ------------------------------------------------------------------------- memory


@dataclass
class _Entry:
    """One torch function, or one layer with those of its own statistics that it took, and what it returned."""

    what: Any
    own: tuple[bool, ...] | None
    result: Any


_INPLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_INPLACE |= {"__setitem__", "__ilshift__", "__irshift__"}


class _Memo(TorchFunctionMode):
    """Remembers what torch functions returned in one run and answers with it in the next ones.

    A run goes through three states: it is answered from memory; from where memory ends, it is remembered; from where
    the next run will part from it, it just runs.

    Attributes:
        enabled: Whether anything is remembered at all.
        recording: Whether the run in progress is answered or remembered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.recording = False
        self._inputs: list[Tensor] = []
        self._entries: list[_Entry] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._at = 0
        self._keeps = True
        self._entered = contextlib.ExitStack()
        self._pauses = 0

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._versions.clear()
        self._inputs = []

    def begin_batch(self, batch: Any) -> None:
        """Forget everything; runs begin with these inputs."""
        self.clear()
        self._inputs = list(tensors_in(batch))
        self._note_versions()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """One run, from the beginning."""
        self._at = 0
        self._keeps = True
        self.recording = self.enabled
        with contextlib.ExitStack() as self._entered:
            if self.enabled:
                self._entered.enter_context(self)
            yield
        if self.recording:
            self.part()

    def keep_no_more(self) -> None:
        """The next run differs from here on; this one may still be answered."""
        self._keeps = False

    def part(self) -> None:
        """Neither answer nor remember for the rest of this run."""
        del self._entries[self._at :]
        self.recording = False
        self._note_versions()
        if _get_current_function_mode() is self:  # not inside another mode, nor in the middle of a function
            self._entered.close()  # every call of a function costs some microseconds in here

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Neither answer nor remember."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def changed(self) -> bool:
        """Whether a shared tensor was written to since the runs parted."""
        return any(tensor._version != version for tensor, version in self._versions)

    def inputs_changed(self) -> bool:
        """Whether an input was."""
        return any(tensor._version != version for tensor, version in self._versions[: len(self._inputs)])

    def layer_output(self, layer: BatchLayerNorm, own: tuple[bool, ...]) -> Tensor | None:
        """The layer's output with these of its own statistics, if it is known at this point of the run."""
        if self._pauses or not self.recording:
            return None
        known = self._answer(layer, own)
        return None if known is None else known.result

    def keep_layer_output(self, layer: BatchLayerNorm, own: tuple[bool, ...], y: Tensor) -> None:
        """Remember a layer's output, which the next run has too."""
        if self.recording and self._keeps and not self._pauses:
            self._keep(_Entry(layer, own, y))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pauses or not self.recording:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # shape, device and the like
            return func(*args, **kwargs)
        inplace = name in _INPLACE or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        if inplace and not self._shares(kwargs.get("out", args[0] if args else None)):
            # It writes into something of the model's own, which each run must do by itself.
            return func(*args, **kwargs)
        known = self._answer(func, None)
        if known is not None:
            return known.result
        if not self._keeps:
            self.part()
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        if any(tensor.is_inference() for tensor in made):
            self.part()  # such tensors do not tell when they are written to
        elif made or name == "__setitem__":
            self._keep(_Entry(func, None, result))
        # Any other function sets a state or reads a value: it is called again in each run.
        return result

    def _answer(self, what: Any, own: tuple[bool, ...] | None) -> _Entry | None:
        if self._at == len(self._entries):
            return None
        entry = self._entries[self._at]
        if entry.what == what and entry.own == own:
            self._at += 1
            return entry
        # The run goes another way than the one before: nothing that came after this point there is of use.
        del self._entries[self._at :]
        return None

    def _keep(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._at = len(self._entries)

    def _shared(self) -> list[Tensor]:
        return [*self._inputs, *(tensor for entry in self._entries for tensor in tensors_in(entry.result))]

    def _shares(self, target: Any) -> bool:
        """Whether a tensor's memory is that of an input or of a remembered result."""
        if not isinstance(target, Tensor):
            return False
        memory = target.untyped_storage().data_ptr()
        return any(tensor.untyped_storage().data_ptr() == memory for tensor in self._shared())

    def _note_versions(self) -> None:
        self._versions = [(tensor, tensor._version) for tensor in self._shared()]
