"""`CallRecorder`: the outermost calls of a step, whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bln import BatchLayerNorm, update_statistics
from lightning_bln.replay import CallRecorder


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4, population="precise"))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return self.head(self.body(x if scale is None else x * scale))


def test_only_outermost_calls_are_kept_with_detached_arguments() -> None:
    model = Model()
    recorder = CallRecorder(model, 2)
    x = torch.randn(5, 3, requires_grad=True)
    for step in range(3):
        recorder.begin_batch()
        model(x + step, scale=torch.tensor(2.0))
        recorder.end_batch()
        model(x)  # a validation, say
    assert [len(calls) for calls in recorder.batches] == [1, 1]
    module, args, kwargs = recorder.batches[-1][0]
    assert module is model
    assert not args[0].requires_grad
    torch.testing.assert_close(args[0], (x + 2).detach())
    assert kwargs["scale"] == 2


def test_a_part_that_the_step_calls_by_itself_is_replayed() -> None:
    model = Model()
    recorder = CallRecorder(model, 4)
    recorder.begin_batch()
    x = torch.randn(6, 3)
    model.head(model.body(x))
    recorder.end_batch()
    assert [call[0] for call in recorder.batches[0]] == [model.body]
    with torch.no_grad():
        model.body[0].bias += 3
    assert update_statistics(model, list(recorder.batches), forward=recorder.replay) == 1
    torch.testing.assert_close(model.body[1].running_batch_mean, model.body[0](x).mean(0).detach())


def test_close_removes_every_hook() -> None:
    model = Model()
    recorder = CallRecorder(model, 1)
    recorder.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model(torch.randn(4, 3))
    assert len(recorder.batches) == 0


def test_a_call_that_raises_leaves_the_recorder_ready() -> None:
    model = Model()
    recorder = CallRecorder(model, 2)
    recorder.begin_batch()
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 99))
    recorder.begin_batch()
    model(torch.randn(4, 3))
    assert [call[0] for call in recorder.batches[-1]] == [model]


def test_a_checkpointed_forward_is_one_call() -> None:
    model = Model()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    outer = Outer()
    recorder = CallRecorder(outer, 1)
    recorder.begin_batch()
    outer(torch.randn(4, 3)).sum().backward()
    recorder.end_batch()
    assert [call[0] for call in recorder.batches[0]] == [outer]


def test_a_forward_that_was_replaced_is_not_a_call() -> None:
    # As a strategy does to route a training step through the wrapper's forward.
    model = Model()
    recorder = CallRecorder(model, 1)
    recorder.begin_batch()
    original = model.forward

    def step(*args: Tensor) -> Tensor:
        model.forward = original
        return model(args[0])

    model.forward = step
    model(torch.randn(4, 3), torch.zeros(4))
    recorder.end_batch()
    assert [len(call[1]) for call in recorder.batches[0]] == [1]
