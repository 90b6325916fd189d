"""`BatchLayerNorm`, the layer: parameters, population statistics and flags around `batch_layer_norm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.ops import Population, Statistics, check_eps, cpu, feature_axis, library
from lightning_bln.ops.reference import accumulation_dtype, expand_batch

RUNNING = ("running_batch_mean", "running_batch_var", "running_feature_mean", "running_feature_var")
"""Names of the population buffers, in the order of the flags."""

STATE = (*RUNNING, "num_samples", "nominal_batch_size")
"""Names of all buffers: the population and what it was taken over."""

_CHOICES = {
    "statistics": ("per_position", "per_channel"),
    "feature_population": ("pooled", "slot"),
    "population": ("epoch", "ema", "precise"),
}
# What must agree between a checkpoint and the layer it is loaded into; everything else is taken over from it.
_STRUCTURE = (
    "num_features",
    "feature_dim",
    "sample_dim",
    "affine",
    "bias",
    "statistics",
    "feature_population",
)
_ADOPTED = ("eps", "flags", "population", "momentum", "batch_size", "gain")


class BatchLayerNorm(nn.Module):
    """Batch Layer Normalization over the samples (axis 0) and over the features at once.

        x_b = (x - mu_b) / sqrt(var_b + eps)        x_f = (x - mu_f) / sqrt(var_f + eps)
        w_f = 1/B - 1e-4                            w_b = 1 - (1/B + 1e-4)
        y   = weight * (w_f * x_f + w_b * x_b) / sqrt(C) + bias

    Training uses the mini-batch's own statistics (biased variances) and keeps their average as the population's.
    At inference each of the four flags chooses, for its statistic, between the population's and the mini-batch's;
    a population statistic that does not exist yet is the mini-batch's whatever its flag.

    Population statistics: an average over the current epoch, weighted by the number of samples; variances multiplied
    by n/(n - 1) before (by 1 where n = 1; feature variances in slots are then the largest finite number, where the
    authors' layer has infinity), n being the samples B, for batch variances taken per channel the samples times the
    positions. `start_epoch` begins a new average; the last one stays until the next training batch replaces it. B at
    inference is the largest training batch of that epoch.

    Shapes: input (N, C), (N, C, ...) or, with ``feature_dim=-1``, (N, ..., C); output as input, in the input's dtype
    and memory format. weight, bias: (C,). running_batch_mean, running_batch_var: the input's shape without the sample
    axis (per_position) or (C,) (per_channel). running_feature_mean, running_feature_var: one value for each position,
    () for per_channel, (B, positions) for ``feature_population="slot"``. They have shape (0,) before the first
    training batch.

    Args:
        num_features: C, the size of the feature axis. A sequence means that the last axes of these sizes together are
            the features, as `nn.LayerNorm`'s ``normalized_shape``; weight and bias then have that shape.
        feature_dim: Axis of the features, default 1; -1 for channels-last. With a sequence of sizes it must be -1.
        eps: Added to each variance inside the root. Default 1e-3.
        affine: Learn weight and bias. Default True.
        bias: Learn the bias, if affine. Default True.
        flags: Default `StatFlags()`, that is True, True, False, False.
        statistics: "per_position" (default, the paper): batch statistics for each position and feature; population
            statistics then hold for one input size. "per_channel": one for each feature, over samples and positions
            as BatchNorm does; any input size.
        feature_population: "pooled" (default) keeps one value per position, averaged over the samples. "slot" keeps
            one for each sample slot and position, as the authors' layer: fixed batch size only.
        population: "epoch" (default, the paper); "ema", an exponential moving average with ``momentum``; "precise",
            only by `update_statistics` (`BLNSwap` calls it before each validation).
        momentum: Weight of the new value in "ema", as BatchNorm's. Default 0.1.
        batch_size: Fixes B; None (default) for the number of samples.
        sync: Take batch statistics and B over all processes, as SyncBatchNorm does. Default False.
        sample_dim: Axis of the samples, default 0; 1 for sequence-first input (T, N, C).
        device: Of the parameters and buffers.
        dtype: Of the parameters.

    Raises:
        ValueError: If an argument does not fit.

    Example:
        >>> layer = BatchLayerNorm(16)
        >>> layer(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
        >>> layer.running_batch_mean.shape, layer.running_feature_mean.shape
        (torch.Size([16, 4, 4]), torch.Size([4, 4]))

    Source: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898, and the authors' Keras layer.
    """

    running_batch_mean: Tensor
    running_batch_var: Tensor
    running_feature_mean: Tensor
    running_feature_var: Tensor
    num_samples: Tensor
    nominal_batch_size: Tensor

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        feature_dim: int = 1,
        eps: float = 1e-3,
        affine: bool = True,
        bias: bool = True,
        flags: FlagsLike = StatFlags(),  # noqa: B008  (frozen)
        statistics: str = "per_position",
        feature_population: str = "pooled",
        population: str = "epoch",
        momentum: float = 0.1,
        batch_size: int | None = None,
        sync: bool = False,
        sample_dim: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (num_features,) if isinstance(num_features, int) else tuple(num_features)
        chosen = {"statistics": statistics, "feature_population": feature_population, "population": population}
        _check_arguments(shape, chosen, eps, momentum, batch_size, feature_dim)
        self.num_features = num_features if isinstance(num_features, int) else shape
        self.feature_dim = feature_dim
        self.sample_dim = sample_dim
        self.eps = eps
        self.affine = affine
        self.flags = StatFlags.parse(flags)
        self.statistics = statistics
        self.feature_population = feature_population
        self.population = population
        self.momentum = momentum
        self.batch_size = batch_size
        self.sync = sync
        self.process_group: dist.ProcessGroup | None = None
        # A constant factor where there is no weight; surgery sets it to sqrt(C) so that the old scale is preserved.
        self.gain = 1.0
        # The epoch that the accumulation belongs to, as `start_epoch` was told; read by the host only.
        self.epoch: int | None = None

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.ones(shape, **factory)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape, **factory)) if affine and bias else None)
        kept = accumulation_dtype(dtype or torch.get_default_dtype())
        for name in RUNNING:
            self.register_buffer(name, torch.empty(0, device=device, dtype=kept))
        self.register_buffer("num_samples", torch.zeros((), device=device, dtype=torch.int64))
        self.register_buffer("nominal_batch_size", torch.full((), batch_size or 0, device=device, dtype=torch.int64))
        # This process's accumulation while several train together: DDP overwrites buffers with rank 0's.
        self._rank_statistics: dict[str, Tensor] | None = None
        # `update_statistics` sets it: accumulate whatever the policy is.
        self._refreshing = False

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, see the class."""
        view, axis = self._as_samples_first(x)
        weight, bias = self._affine(view, axis)
        if self.training:
            y = self._forward_training(view, axis, weight, bias)
        else:
            y = self._infer(view, axis, weight, bias, self._population_for(view, axis))
        return self._as_given(y, x)

    def own_statistics(self, x: Tensor) -> Statistics:
        """The mini-batch's statistics of x, for `normalize_with`.

        Args:
            x: As for `forward`.

        Returns:
            All four, with biased variances.
        """
        view, axis = self._as_samples_first(x)
        return Statistics(*library.run(*self._arguments(view, axis, None, None, Population(), None))[1:])

    def normalize_with(self, x: Tensor, own: Statistics) -> Tensor:
        """What `forward` returns in eval mode, the mini-batch's statistics being known: for several flags on one input.

        Gradients take these statistics for constants, which in `forward` they are not.

        Args:
            x: As for `forward`.
            own: Of this very x, by `own_statistics`.

        Returns:
            The normalised input.
        """
        view, axis = self._as_samples_first(x)
        chosen = self._population_for(view, axis)
        given = Population(*(mine if kept is None else kept for mine, kept in zip(own, chosen, strict=True)))
        return self._as_given(self._infer(view, axis, *self._affine(view, axis), given), x)

    def _infer(
        self, view: Tensor, axis: int, weight: Tensor | None, bias: Tensor | None, population: Population
    ) -> Tensor:
        nominal = _constant(self._buffer("nominal_batch_size"))
        return library.infer(*self._arguments(view, axis, weight, bias, population, nominal))

    def _buffer(self, name: str) -> Tensor:
        # An attribute takes longer to find than a small layer's sizes to check. A parametrized buffer is not there.
        found = self._buffers.get(name)
        return getattr(self, name) if found is None else found

    def _arguments(
        self,
        view: Tensor,
        axis: int,
        weight: Tensor | None,
        bias: Tensor | None,
        population: Population,
        batch_size: Tensor | None,
    ) -> tuple[Any, ...]:
        """Of the op itself: all that `batch_layer_norm` would check is checked, at a third of a small input's cost."""
        check_eps(self.eps)
        return view, weight, bias, *population, batch_size, axis, self.statistics == "per_channel", self.eps

    def _forward_training(self, x: Tensor, axis: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        batch_size = None if self.batch_size is None else _constant(self.nominal_batch_size)
        samples: int | Tensor = x.shape[0]
        values: int | Tensor = x.shape[0]
        if self.statistics == "per_channel":
            values = x.numel() // x.shape[axis]
        if self.sync and _world_size() > 1:
            from lightning_bln.ops.sync import sync_batch_layer_norm

            y, own, samples, values = sync_batch_layer_norm(
                x,
                weight,
                bias,
                feature_dim=axis,
                batch_size=batch_size,
                eps=self.eps,
                statistics=self.statistics,
                group=self.process_group,
            )
        else:
            y, *statistics = library.run(*self._arguments(x, axis, weight, bias, Population(), batch_size))
            own = Statistics(*statistics)
        if x.shape[0] == 0 and _world_size() > 1 and not self.has_population:
            self._make_buffers(own)
        if x.numel() > 0 and (self.population != "precise" or self._refreshing) and not recomputing():
            self._record(own, x, axis, samples, values)
        return y

    def _as_samples_first(self, x: Tensor) -> tuple[Tensor, int]:
        """A view of x with samples along axis 0 and one feature axis, and that axis."""
        if not isinstance(self.num_features, int):
            shape = self.num_features
            if tuple(x.shape[-len(shape) :]) != shape or x.ndim <= len(shape):
                raise ValueError(
                    f"The input must end in the feature axes {shape} after a sample axis, got shape {tuple(x.shape)}; "
                    f"pass shape (N, ..., {', '.join(map(str, shape))})."
                )
            x = x.flatten(-len(shape))
        features = math.prod(self.num_features) if isinstance(self.num_features, tuple) else self.num_features
        if self.sample_dim == 0:
            return x, feature_axis(x, self.feature_dim, features)
        sample = self.sample_dim + x.ndim if self.sample_dim < 0 else self.sample_dim
        feature = self.feature_dim + x.ndim if self.feature_dim < 0 else self.feature_dim
        if not 0 <= sample < x.ndim or sample == feature:
            raise ValueError(
                f"sample_dim must be an axis of the input other than the feature axis, got sample_dim="
                f"{self.sample_dim}, feature_dim={self.feature_dim} and an input of shape {tuple(x.shape)}; pass "
                f"(T, N, C) for sample_dim=1, feature_dim=-1."
            )
        x = x.transpose(0, sample)
        return x, feature_axis(x, sample if feature == 0 else feature, features)

    def _as_given(self, y: Tensor, x: Tensor) -> Tensor:
        if self.sample_dim != 0:
            y = y.transpose(0, self.sample_dim if self.sample_dim > 0 else self.sample_dim + x.ndim)
        if isinstance(self.num_features, int):
            return y
        y = y.reshape(x.shape)
        return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)

    def _affine(self, x: Tensor, axis: int) -> tuple[Tensor | None, Tensor | None]:
        weight = self.weight
        if weight is None:
            if self.gain == 1.0:
                return None, None
            return torch.full((x.shape[axis],), self.gain, dtype=accumulation_dtype(x.dtype), device=x.device), None
        bias, features = self.bias, x.shape[axis]
        for name, vector in (("weight", weight), ("bias", bias)):
            if vector is not None and vector.numel() != features:
                raise ValueError(
                    f"{name} must hold one value for each of the {features} features, got shape "
                    f"{tuple(vector.shape)}; assign nn.Parameter(torch.ones({features})), say."
                )
        if weight.ndim == 1:  # a view is not for nothing
            return weight, bias
        return weight.flatten(), None if bias is None else bias.flatten()

    def _population_for(self, x: Tensor, axis: int) -> Population:
        chosen: list[Tensor | None] = []
        for flag, name in zip(StatFlags.parse(self.flags), RUNNING, strict=True):
            stat = self._buffer(name) if flag else None
            if stat is not None and stat.numel() > 0:
                self._check_sizes(name, stat, x, axis)
                chosen.append(_constant(stat))
            else:
                chosen.append(None)
        return Population(*chosen)

    # ------------------------------------------------------------- accumulation

    @property
    def has_population(self) -> bool:
        """Whether at least the batch statistics of a population exist."""
        return self.running_batch_mean.numel() > 0

    def start_epoch(self, epoch: int | None = None) -> bool:
        """Begin a new accumulation with the next training batch; the statistics stay in place until then.

        Args:
            epoch: The epoch's number. If the current accumulation is already that epoch's, nothing happens. None
                (default) always begins a new one.

        Returns:
            Whether a new accumulation begins.
        """
        if epoch is not None and epoch == self.epoch:
            return False
        self.epoch = epoch
        with torch.no_grad():
            self.num_samples.zero_()
        self._rank_statistics = None
        return True

    def reset_statistics(self) -> None:
        """Forget the population: shape (0,) again, as in a fresh layer."""
        for name in RUNNING:
            setattr(self, name, getattr(self, name).new_empty(0))
        with torch.no_grad():
            self.num_samples.zero_()
            self.nominal_batch_size.fill_(self.batch_size or 0)
        self.epoch = None
        self._rank_statistics = None

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and no population."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_statistics()

    def _record(self, own: Statistics, x: Tensor, axis: int, samples: int | Tensor, values: int | Tensor) -> None:
        """Bring one mini-batch into the population statistics.

        Args:
            own: Its statistics, biased variances.
            x: The input.
            axis: The feature axis of x.
            samples: B, over all processes where the statistics were.
            values: How many values each batch statistic was taken over.
        """
        together = _world_size() > 1
        if together:
            self._restore_rank_statistics()
        # First without torch.no_grad(), which nothing there needs most often: it would take as long as the checks.
        if not self._record_at_once(own, x, samples, values):
            self._record_in_steps(own, x, axis, samples, values)
        if together:
            self._rank_statistics = {name: getattr(self, name).clone() for name in STATE}

    @torch.no_grad()
    def _record_in_steps(
        self, own: Statistics, x: Tensor, axis: int, samples: int | Tensor, values: int | Tensor
    ) -> None:
        dtype = own.batch_mean.dtype
        feature_mean, feature_var = own.feature_mean, own.feature_var
        if self.statistics == "per_channel":
            feature_mean, feature_var = feature_mean.mean(), feature_var.mean()
        elif self.feature_population == "pooled":
            feature_mean, feature_var = feature_mean.mean(0), feature_var.mean(0)
        elif isinstance(samples, int) and samples == 1:
            # Slots are for the authors' layer as it is: there n / (n - 1) is infinite at n = 1 and the feature part
            # vanishes. The largest finite number does the same.
            feature_var = torch.where(feature_var > 0, torch.finfo(dtype).max, feature_var)
        news = (
            own.batch_mean,
            own.batch_var * _unbiased(values, dtype),
            feature_mean,
            feature_var * _unbiased(samples, dtype),
        )
        # All four are looked at before any is written: a size that does not fit leaves the statistics as they were.
        buffers = [self._fitting_buffer(name, new, x, axis) for name, new in zip(RUNNING, news, strict=True)]
        if any(fit == "restart" for _, fit in buffers):
            self.num_samples.zero_()

        added: int | Tensor = x.shape[0]
        again = torch.ops.lightning_bln.recomputing(self.num_samples) if torch.compiler.is_compiling() else None
        if again is not None:
            added = torch.where(again, 0, added)
        first = self.num_samples == 0
        total = self.num_samples + added
        cumulative = self.population != "ema" or self._refreshing
        # In the statistics' dtype: counts above 65504 are infinite in float16, the default under "16-true".
        rate = added / total.to(dtype)
        for name, new, (running, fit) in zip(RUNNING, news, buffers, strict=True):
            setattr(self, name, running)
            new = new.to(running.dtype)
            if again is not None and fit == "fits":
                new = torch.where(again, running, new)
            if fit in ("new", "restart"):
                running.copy_(new)
            elif cumulative:
                # where, not a rate of 1: an epoch that overflowed must not poison the next one.
                running.copy_(torch.where(first, new, torch.lerp(running, new, rate.to(running.dtype))))
            else:
                running.lerp_(new, self.momentum)
        self.num_samples.copy_(total)
        if self.batch_size is None:
            largest = self.nominal_batch_size.clamp(min=samples)
            self.nominal_batch_size.copy_(torch.where(first, torch.zeros_like(largest) + samples, largest))

    def _record_at_once(self, own: Statistics, x: Tensor, samples: int | Tensor, values: int | Tensor) -> bool:
        """`_record` by a kernel, if there is one for this case: population statistics of the right sizes on one CPU.

        Its twenty small operations would take longer than the normalisation of a small input.
        """
        if torch.compiler.is_compiling() or not x.is_cpu or isinstance(samples, Tensor) or not cpu.load():
            return False
        buffers = [self._buffer(name) for name in RUNNING]
        dtype = own.batch_mean.dtype
        if self.feature_population == "slot" or [running.dtype for running in buffers] != [dtype] * 4:
            return False
        cumulative = self.population != "ema" or self._refreshing
        # As the buffers are to be: feature statistics without the samples, and per channel without the positions.
        of_batch = (own.batch_mean.shape, own.batch_mean.stride())
        of_feature: tuple[Any, Any] = ((), ())
        if self.statistics == "per_position":
            of_feature = (own.feature_mean.shape[1:], own.feature_mean.stride()[1:])
        layouts = (of_batch, of_batch, of_feature, of_feature)
        others = [i for i in range(4) if (buffers[i].shape, buffers[i].stride()) != layouts[i]]
        if others:
            cumulative = cumulative or all(running.numel() == 0 for running in buffers)
            # The first batch of an average overwrites what was there, whatever its size.
            overwrites = cumulative and int(self.num_samples) == 0
            if not overwrites and any(buffers[i].shape != layouts[i][0] for i in others):
                return False
            for i in others:
                # Fresh, or loaded, or of another memory format: in the layout of what comes from now on.
                running = buffers[i]
                with torch.no_grad(), torch.inference_mode(False):
                    buffers[i] = own.batch_mean.new_empty_strided(*layouts[i])
                    if running.shape == buffers[i].shape:
                        buffers[i].copy_(running)
                setattr(self, RUNNING[i], buffers[i])
        torch.ops.lightning_bln.accumulate_statistics.default(
            *buffers,
            self._buffer("num_samples"),
            self._buffer("nominal_batch_size"),
            *own,
            samples,
            values,
            -1.0 if cumulative else self.momentum,
            self.batch_size is not None,
        )
        return True

    @torch.no_grad()
    def _make_buffers(self, own: Statistics) -> None:
        """Buffers of the right shapes, counting nothing: DDP broadcasts them, so an empty shard needs them too."""
        feature_shape = own.feature_mean.shape[1:] if self.statistics == "per_position" else torch.Size()
        mean, var = own.feature_mean.new_zeros(feature_shape), own.feature_mean.new_ones(feature_shape)
        for name, value in zip(RUNNING, (own.batch_mean, own.batch_var, mean, var), strict=True):
            setattr(self, name, value.clone())

    def _fitting_buffer(self, name: str, new: Tensor, x: Tensor, axis: int) -> tuple[Tensor, str]:
        """The buffer ``name`` in ``new``'s shape, and "fits", "new", "spread" or "restart" (of another size before)."""
        running: Tensor = getattr(self, name)
        if running.shape == new.shape:
            return running, "fits"
        # A normal tensor even if the first training batch comes under inference_mode: it is updated in place later.
        with torch.inference_mode(False):
            dtype = torch.promote_types(running.dtype, new.dtype)
            fitting = torch.empty_like(new, dtype=dtype)  # in its memory layout too
            if running.numel() == 0:
                return fitting, "new"
            if running.ndim == 1 and "batch" in name and running.shape[0] == x.shape[axis]:
                # One value for each feature, carried over from a BatchNorm: the same at every position.
                return fitting.copy_(expand_batch(running, x.ndim, axis).squeeze(0).expand_as(fitting)), "spread"
        if self.flags != StatFlags(False, False, False, False) and int(self.num_samples) > 0:
            self._check_sizes(name, running, x, axis)
        return fitting, "restart"

    def _check_sizes(self, name: str, stat: Tensor, x: Tensor, axis: int) -> None:
        """Raise if a population statistic does not hold for the sizes of x."""
        per_position = self.statistics == "per_position"
        if stat.shape == x.shape[1:] and per_position and "batch" in name:
            return  # most often, so first
        positions = tuple(size for d, size in enumerate(x.shape) if d not in (0, axis))
        if "batch" in name:
            if stat.shape == (x.shape[axis],):
                return
            taken = tuple(size for d, size in enumerate(stat.shape, start=1) if d != axis)
        elif self.statistics == "per_channel":
            if stat.ndim == 0:
                return
            taken = tuple(stat.shape)
        elif self.feature_population == "slot":
            if tuple(stat.shape) == (x.shape[0], *positions):
                return
            if stat.ndim > 0 and tuple(stat.shape[1:]) == positions:
                raise ValueError(
                    f"feature_population='slot' keeps one statistic for each sample slot, so every batch must have the "
                    f"same size: {name} was taken over {stat.shape[0]} samples, this batch has {x.shape[0]}. Use "
                    f"DataLoader(..., drop_last=True) or BatchLayerNorm(..., feature_population='pooled')."
                )
            taken = tuple(stat.shape[1:])
        else:
            if tuple(stat.shape) == positions:
                return
            taken = tuple(stat.shape)
        raise ValueError(
            f"Per-position population statistics hold for one input size: {name} was taken at positions {taken}, this "
            f"input of shape {tuple(x.shape)} has positions {positions}. Use statistics='per_channel' "
            f"(BLNSwap(statistics='per_channel')), which takes any size, resize the input to {taken}, or use "
            f"mini-batch statistics only: set_flags_(model, 'FFFF')."
        )

    @torch.no_grad()
    def _restore_rank_statistics(self) -> None:
        for name, value in self.rank_statistics(dist.get_rank()).items():
            if getattr(self, name).shape == value.shape:
                getattr(self, name).copy_(value)
            else:
                setattr(self, name, value.clone())

    def rank_statistics(self, rank: int) -> dict[str, Tensor]:
        """This process's own accumulation, kept apart from the buffers, which DDP and a merge overwrite.

        Args:
            rank: Of this process. A partial epoch that was loaded counts once: rank 0 carries it.

        Returns:
            The values of all buffers, by name.
        """
        if self._rank_statistics is None:
            self._rank_statistics = {name: getattr(self, name).clone() for name in STATE}
            if rank != 0:
                self._rank_statistics["num_samples"].zero_()
        return self._rank_statistics

    # -------------------------------------------------------- state and moving

    def config(self) -> dict[str, Any]:
        """The layer's settings as plain types, as its checkpoint holds them."""
        size = self.num_features
        return {
            "num_features": size if isinstance(size, int) else list(size),
            "feature_dim": self.feature_dim,
            "sample_dim": self.sample_dim,
            "affine": self.affine,
            "bias": self.bias is not None,
            "statistics": self.statistics,
            "feature_population": self.feature_population,
            "eps": float(self.eps),
            "flags": self.flags.code,
            "population": self.population,
            "momentum": self.momentum,
            "batch_size": self.batch_size,
            "gain": self.gain,
            "sync": self.sync,
        }

    def get_extra_state(self) -> dict[str, Any]:
        """Settings and epoch in plain types, so that weights-only loading accepts them."""
        return {"config": self.config(), "epoch": self.epoch}

    def set_extra_state(self, state: Any) -> None:
        """Take over flags, eps, population policy, nominal batch size and epoch from a checkpoint."""
        config = state["config"]
        for name in _ADOPTED:
            setattr(self, name, StatFlags.parse(config[name]) if name == "flags" else config[name])
        self.epoch = state["epoch"]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        where = prefix.rstrip(".") or "the layer"
        foreign = [name for name in ("running_mean", "weight") if prefix + name in state_dict]
        if foreign and prefix + "running_batch_mean" not in state_dict:
            held = "BatchNorm" if foreign[0] == "running_mean" else "LayerNorm or the like"
            error_msgs.append(
                f"{where} is a BatchLayerNorm, but the checkpoint holds a {held} there ({foreign[0]} without "
                f"running_batch_mean); load the checkpoint first and swap then: model.load_state_dict(...); "
                f"swap_norms_(model)."
            )
        state = state_dict.get(prefix + "_extra_state")
        problem = self._mismatch(state) if prefix + "_extra_state" in state_dict else None
        if problem:
            error_msgs.append(f"{where}: {problem}")
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "_extra_state"}
        for name in RUNNING:
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor):
                continue
            if self._misfits(name, value):
                error_msgs.append(
                    f"{where}.{name} must be empty or hold {self.num_features} features, got shape "
                    f"{tuple(value.shape)}; load the checkpoint of a model with the same layer sizes."
                )
                continue
            own: Tensor = getattr(self, name)
            if own.shape != value.shape:
                # Population statistics take the sizes of the inputs they saw, so they load into any layer.
                with torch.inference_mode(False):
                    setattr(self, name, torch.empty(value.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._rank_statistics = None

    def _mismatch(self, state: Any) -> str | None:
        """Why a checkpoint's extra state does not belong to this layer, or None."""
        if not is_extra_state(state):
            return (
                f"_extra_state must be the dict that BatchLayerNorm writes, got {type(state).__name__} {state!r:.80}; "
                f"the checkpoint is damaged or of another layer."
            )
        config, own = state["config"], self.config()
        different = {name: (config[name], own[name]) for name in _STRUCTURE if config[name] != own[name]}
        if not different:
            try:
                StatFlags.parse(config["flags"])
            except ValueError as error:
                return f"the checkpoint's flags are damaged: {error}"
            return None
        listed = "; ".join(f"{name}={theirs!r} there, {ours!r} here" for name, (theirs, ours) in different.items())
        arguments = ", ".join(f"{name}={theirs!r}" for name, (theirs, _) in different.items())
        return (
            f"the checkpoint's BatchLayerNorm must have the structure of the layer it is loaded into, got {listed}; "
            f"build it with {arguments}, or rebuild the model with load_swapped_checkpoint(...)."
        )

    def _misfits(self, name: str, value: Tensor) -> bool:
        if value.numel() == 0 and value.ndim == 1:
            return False
        if "batch" not in name:
            return self.statistics == "per_channel" and value.ndim != 0
        features = self.num_features if isinstance(self.num_features, int) else math.prod(self.num_features)
        if self.statistics == "per_channel" or value.ndim < 2:
            return tuple(value.shape) != (features,)
        return features not in value.shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchLayerNorm:
        before = {name: getattr(self, name) for name in RUNNING}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Tensor = getattr(self, name)
            if new.dtype != accumulation_dtype(new.dtype):
                # model.bfloat16() and Lightning's "bf16-true" convert buffers too; statistics stay in float32.
                kept = accumulation_dtype(new.dtype)
                moved = torch.empty_like(new, dtype=kept) if old.is_meta else old.to(device=new.device, dtype=kept)
                setattr(self, name, moved)
        if self._rank_statistics is not None:
            self._rank_statistics = {
                name: value.to(getattr(self, name)) for name, value in self._rank_statistics.items()
            }
        return self

    def extra_repr(self) -> str:
        """Settings for repr()."""
        parts = [f"{self.num_features}", f"feature_dim={self.feature_dim}", f"eps={self.eps:g}"]
        if self.sample_dim != 0:
            parts.append(f"sample_dim={self.sample_dim}")
        if self.weight is None:
            parts.append("affine=False")
        parts += [f"flags={self.flags.code}", f"statistics={self.statistics}"]
        for name, default in (("feature_population", "pooled"), ("population", "epoch"), ("sync", False)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        if self.batch_size is not None:
            parts.append(f"batch_size={self.batch_size}")
        return ", ".join(parts)


def is_extra_state(state: Any) -> bool:
    """Whether a checkpoint's entry is what `BatchLayerNorm.get_extra_state` writes."""
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, dict) or "epoch" not in state or not {*_STRUCTURE, *_ADOPTED, "sync"} <= set(config):
        return False
    return isinstance(config["eps"], float) and isinstance(config["flags"], str)


def _check_arguments(
    shape: tuple[int, ...],
    chosen: dict[str, str],
    eps: float,
    momentum: float,
    batch_size: int | None,
    feature_dim: int,
) -> None:
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"num_features must be 1 or more, got {shape}; call for example BatchLayerNorm(64).")
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}.")
    if chosen["statistics"] == "per_channel" and chosen["feature_population"] == "slot":
        raise ValueError(
            "feature_population='slot' keeps one statistic for each sample slot and position, so it needs fixed sizes: "
            "got it with statistics='per_channel'; use statistics='per_position' or feature_population='pooled'."
        )
    check_eps(eps)
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum is the weight of the new value, above 0 and at most 1, got {momentum!r}; say 0.1.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None for the samples in the batch, got {batch_size!r}.")
    if len(shape) > 1 and feature_dim != -1:
        raise ValueError(
            f"Several feature axes {shape} are the last ones of the input, so feature_dim must be -1, got "
            f"{feature_dim}; call BatchLayerNorm({shape}, feature_dim=-1)."
        )


def _constant(buffer: Tensor) -> Tensor:
    """The buffer's present value; a copy where autograd keeps it, since DDP and training write into buffers."""
    return buffer.clone() if torch.is_grad_enabled() else buffer


def _unbiased(count: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """n / (n - 1), and 1 where n = 1, where the authors' layer divides by 0."""
    if isinstance(count, Tensor):
        count = count.to(dtype)
        return torch.where(count > 1, count / (count - 1).clamp(min=1), torch.ones_like(count))
    return count / (count - 1) if count > 1 else 1.0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def recomputing() -> bool:
    """Whether this forward is run again by the backward pass (activation checkpointing): it must not count twice.

    A compiled graph asks the op ``lightning_bln::recomputing`` each time it runs instead.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
