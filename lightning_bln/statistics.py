"""Population statistics of a whole model: begin an epoch, merge the processes' averages, recompute them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bln.layer import RUNNING, STATE, BatchLayerNorm
from lightning_bln.surgery import bln_layers


def _layers(model: nn.Module, call: str) -> list[BatchLayerNorm]:
    layers = list(bln_layers(model).values())
    if not layers:
        raise ValueError(
            f"{call} needs a model with BatchLayerNorm layers, got a {type(model).__name__} without any; call "
            f"swap_norms_(model) first."
        )
    return layers


def start_epoch(model: nn.Module, epoch: int | None = None) -> bool:
    """Begin a new accumulation of population statistics in every `BatchLayerNorm` of a plain PyTorch loop.

    Call it at the start of each training epoch; `BLNSwap` does so for Lightning. The last epoch's statistics stay in
    place until the next training batch replaces them, so inference in between never sees empty ones.

    Args:
        model: With `BatchLayerNorm` layers.
        epoch: The epoch's number; calling again with the same number does nothing, so that a run resumed in the
            middle of an epoch goes on accumulating. None (default) always begins anew.

    Returns:
        Whether a new accumulation begins in any layer.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`.

    Example:
        >>> model = nn.Sequential(BatchLayerNorm(4))
        >>> start_epoch(model, 0), start_epoch(model, 0), start_epoch(model, 1)
        (True, False, True)
    """
    began = [layer.start_epoch(epoch) for layer in _layers(model, "start_epoch(model)")]
    return any(began)


def merge_ranks_(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make the population statistics those of all processes' samples together, on every process.

    Count-weighted: sum over processes of n_r * average_r, over sum of n_r; the nominal batch size becomes the largest.
    A collective: every process must call it. Each process keeps its own accumulation and goes on with it. `BLNSwap`
    calls it before validation and at the end of each epoch; without `torch.distributed` it does nothing.

    Args:
        model: With `BatchLayerNorm` layers, the same on every process.
        group: Processes; default all.

    Raises:
        ValueError: If a layer saw inputs of different sizes on different processes.
    """
    layers = bln_layers(model)
    if not layers or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    own = {name: layer.rank_statistics(dist.get_rank(group)) for name, layer in layers.items()}
    gathered: list[Any] = [None] * dist.get_world_size(group)
    own_shapes = {(name, running): tuple(own[name][running].shape) for name in layers for running in RUNNING}
    dist.all_gather_object(gathered, own_shapes, group=group)
    device = next(iter(layers.values())).num_samples.device
    with torch.no_grad():
        counts = torch.stack([own[name]["num_samples"].to(device) for name in layers])
        sizes = torch.stack([own[name]["nominal_batch_size"].to(device) for name in layers])
        totals = counts.clone()
        dist.all_reduce(totals, group=group)
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=group)
        if not bool((totals > 0).any()):
            return  # nothing was accumulated since the epoch began: what is in place stays
        shapes = {key: _common_shape(".".join(key), [other[key] for other in gathered]) for key in own_shapes}
        parts: list[Tensor] = []
        for name, count in zip(layers, counts, strict=True):
            for running in RUNNING:
                value = (
                    own[name][running].double() * count if count > 0 else torch.zeros(shapes[name, running]).double()
                )
                parts.append(value.to(device).flatten())
        merged = torch.cat(parts)
        dist.all_reduce(merged, group=group)
        sums = dict(zip(shapes, merged.split([part.numel() for part in parts]), strict=True))
        for (name, layer), total, size in zip(layers.items(), totals, sizes, strict=True):
            if total > 0:
                for running in RUNNING:
                    _publish(layer, running, sums[name, running].reshape(shapes[name, running]) / total)
                layer.num_samples.copy_(total)
                layer.nominal_batch_size.copy_(size)


def _publish(layer: BatchLayerNorm, name: str, value: Tensor) -> None:
    buffer: Tensor = getattr(layer, name)
    if buffer.shape == value.shape:
        buffer.copy_(value)
    else:
        setattr(layer, name, value.to(buffer))


def _common_shape(name: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    taken = {shape for shape in shapes if shape != (0,)}
    if len(taken) > 1:
        raise ValueError(
            f"Population statistics can be merged only if every process saw inputs of the same sizes, got {name} of "
            f"shapes {', '.join(map(str, shapes))}; use statistics='per_channel', which takes any size."
        )
    return taken.pop() if taken else (0,)


def update_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    device: torch.device | str | None = None,
) -> int:
    """Recompute every `BatchLayerNorm`'s population statistics with the present weights, from some batches.

    The counterpart of `torch.optim.swa_utils.update_bn`, for weights that changed since the statistics were taken
    (averaged weights, a high learning rate). The batches run through the model in train mode without gradients;
    statistics are averaged weighted by the number of samples, whatever the layers' population policy. Train or eval
    mode, the random state and BatchNorm statistics of other layers are as before afterwards; after an exception the
    population is too. Without any batch the statistics stay as they are. Under `torch.distributed` every process runs
    its own batches and the averages are merged.

    Args:
        model: With `BatchLayerNorm` layers.
        batches: Inputs: tensors, or tuples or lists whose first item is the input.
        forward: Called with each batch instead, if the model's input is not a single tensor.
        device: Tensors are moved there first. Default: they stay.

    Returns:
        The number of batches.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`.

    Example:
        >>> model = nn.Sequential(BatchLayerNorm(4))
        >>> update_statistics(model, [torch.randn(8, 4) for _ in range(3)])
        3
        >>> model[0].num_samples.item()
        24
    """

    def run(batch: Any) -> None:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        model(x if device is None else x.to(device))

    layers = _layers(model, "update_statistics(model, batches)")
    return recompute_statistics(model, layers, batches, forward or run, dict.fromkeys(model.modules(), True))


def recompute_statistics(
    model: nn.Module,
    layers: list[BatchLayerNorm],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    modes: Mapping[nn.Module, bool],
) -> int:
    """What `update_statistics` does, for some layers and with each module in a given mode.

    Args:
        model: The model.
        layers: Whose statistics are recomputed.
        batches: What ``forward`` takes.
        forward: Runs one batch through the model.
        modes: True for train mode, False for eval mode, by module.

    Returns:
        The number of batches.
    """
    count = 0
    with torch.no_grad(), _refreshing(model, layers, modes):
        for batch in batches:
            if count == 0:
                _begin_anew(layers)
            forward(batch)
            count += 1
    if dist.is_available() and dist.is_initialized():
        most = torch.tensor(count, device=layers[0].num_samples.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if count == 0 and int(most) > 0:  # the other processes' batches count alone
            _begin_anew(layers)
            for layer in layers:
                layer.nominal_batch_size.fill_(layer.batch_size or 0)
    merge_ranks_(model)
    return count


def _begin_anew(layers: list[BatchLayerNorm]) -> None:
    with torch.no_grad():
        for layer in layers:
            layer.num_samples.zero_()
            layer._rank_statistics = None


@contextlib.contextmanager
def _refreshing(model: nn.Module, layers: list[BatchLayerNorm], modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """The given modes with some layers accumulating; all but their population as before at the end.

    After an exception the population is as before too.
    """
    before = [(module, module.training) for module in model.modules()]
    populations = [
        (layer, {name: getattr(layer, name).clone() for name in STATE}, layer._rank_statistics) for layer in layers
    ]
    others = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    ]
    cuda = [layer.num_samples.device for layer in layers if layer.num_samples.is_cuda]
    try:
        with torch.random.fork_rng(devices=list(dict.fromkeys(cuda))):
            for module, mode in modes.items():
                module.training = mode
            for layer in layers:
                layer._refreshing = True
            yield
    except BaseException:
        for layer, population, own in populations:
            for name, value in population.items():
                setattr(layer, name, value)
            layer._rank_statistics = own
        raise
    finally:
        for layer in layers:
            layer._refreshing = False
        for module, mode in before:
            module.training = mode
        for buffer, value in others:
            buffer.copy_(value)
