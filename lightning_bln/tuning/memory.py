"""What the runs of a model under several settings have in common, kept from one run to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from lightning_bln.replay import tensors_in


@dataclass
class _Entry:
    """One torch function, or one layer with those of its own statistics that it took, and what it returned."""

    what: Any
    own: tuple[bool, ...] | None
    result: Any


_INPLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_INPLACE |= {"__setitem__", "__ilshift__", "__irshift__"}


class Memo(TorchFunctionMode):
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

    def layer_output(self, layer: str, own: tuple[bool, ...]) -> Tensor | None:
        """The layer's output with these of its own statistics, if it is known at this point of the run."""
        if self._pauses or not self.recording:
            return None
        known = self._answer(layer, own)
        return None if known is None else known.result

    def keep_layer_output(self, layer: str, own: tuple[bool, ...], y: Tensor) -> None:
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
