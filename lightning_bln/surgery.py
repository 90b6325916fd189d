"""`swap_norms_`: put `BatchLayerNorm` in the place of a model's normalization layers, keeping what can be kept."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.layer import BatchLayerNorm, is_extra_state
from lightning_bln.norm_kinds import (
    FAMILIES,
    KINDS,
    NORM_BASES,
    NormKind,
    layers_inside_metrics,
    norm_eps,
    norm_features,
    norm_shape,
    qualified_name,
    sample_dims_inside,
    uncompiled,
)
from lightning_bln.swap_report import SwapEntry, SwapReport
from lightning_bln.variants import BatchLayerNormAct, LazyBatchLayerNorm


@dataclass(frozen=True)
class _Settings:
    """How the new layers are made; the arguments of `BatchLayerNorm` that a swap chooses."""

    affine: str = "preserve"
    sync: bool | str = "auto"
    layer: Mapping[str, Any] = field(default_factory=dict)


def swap_norms_(
    model: nn.Module,
    *,
    flags: FlagsLike = StatFlags(),  # noqa: B008  (frozen)
    statistics: str = "per_position",
    feature_population: str = "pooled",
    population: str = "epoch",
    momentum: float = 0.1,
    batch_size: int | None = None,
    sync: bool | str = "auto",
    affine: str = "preserve",
    eps: float | None = None,
    norms: Sequence[str] = ("batch", "layer"),
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    dry_run: bool = False,
    missing_ok: bool = False,
) -> SwapReport:
    """Turn the model's normalization layers into `BatchLayerNorm`, in place.

    Each layer object stays the same object and becomes a `BatchLayerNorm`, so everything that refers to it (several
    parents, Python lists, a compiled wrapper, the caller's own variable) sees the new layer. The `Parameter` objects
    stay the same too, so an optimizer made before the swap still trains them; kept are device, dtype, ``training``,
    ``requires_grad``, forward hooks, and whether there is a weight and a bias. Calling it again is harmless.

    Swapped are `nn.BatchNorm1d/2d/3d`, their Lazy forms, `nn.SyncBatchNorm`, `nn.LayerNorm` (over several trailing
    dimensions too), torchvision's ``LayerNorm2d`` and ``FrozenBatchNorm2d`` (its affine stays frozen), timm's
    ``LayerNorm``, ``LayerNorm2d``, and its ``BatchNormAct2d`` and ``LayerNormAct`` with their activation; on request
    group, instance and RMS normalization. Subclasses that are not known are skipped and reported.

    Inside `nn.TransformerEncoderLayer` the fused inference path, which would compute the old LayerNorm, is switched
    off, and layers with ``batch_first=False`` take their samples along axis 1.

    Args:
        model: Changed in place.
        flags: Inference flags of the new layers. Default `StatFlags()`.
        statistics: As in `BatchLayerNorm`. Default "per_position".
        feature_population: As in `BatchLayerNorm`. Default "pooled".
        population: As in `BatchLayerNorm`. Default "epoch".
        momentum: As in `BatchLayerNorm`. Default 0.1.
        batch_size: As in `BatchLayerNorm`. Default None.
        sync: Batch statistics over all processes; "auto" (default) where the old layer was a SyncBatchNorm.
        affine: "preserve" (default): the weight is multiplied by sqrt(C), which cancels the layer's 1/sqrt(C), and the
            old eps and, of BatchNorm, running statistics are kept, so that the layer starts close to the one it
            replaces. "paper": weight 1, bias 0, eps 1e-3.
        eps: Of all new layers, added to each variance inside the root. None (default): as ``affine`` says, the old
            layer's or 1e-3.
        norms: Families to swap, of "batch", "layer", "group", "instance", "rms". Default batch and layer.
        include: Swap only layers whose name in the model, or that of a module around them, matches one of these shell
            patterns ("layer4", "*.norm1").
        exclude: Leave layers that match one of these, likewise.
        filter_fn: Called with (name, layer); a layer is swapped only where it returns True.
        dry_run: Report what would be done and change nothing. Default False.
        missing_ok: Accept a model in which nothing is to be swapped, or not yet. Default False.

    Returns:
        A `SwapReport` of (name, old, new, why).

    Raises:
        ValueError: If nothing is swapped and the model has no `BatchLayerNorm` yet, or an argument does not fit. The
            model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> swap_norms_(model).summary()
        '1 layer swapped (1 BatchNorm1d)'
        >>> model[1]
        BatchLayerNorm(8, feature_dim=1, eps=1e-05, flags=TTFF, statistics=per_position)
    """
    unknown = [family for family in norms if family not in FAMILIES]
    if isinstance(norms, str) or unknown or not norms:
        raise ValueError(f"norms must be a sequence of {', '.join(map(repr, FAMILIES))}, got {norms!r}.")
    if affine not in ("preserve", "paper"):
        raise ValueError(f"affine must be 'preserve' or 'paper', got {affine!r}.")
    if sync not in (True, False, "auto"):
        raise ValueError(f"sync must be True, False or 'auto', got {sync!r}.")
    layer: dict[str, Any] = {
        "flags": StatFlags.parse(flags),
        "statistics": statistics,
        "feature_population": feature_population,
        "population": population,
        "momentum": momentum,
        "batch_size": batch_size,
    }
    if eps is not None:
        layer["eps"] = float(eps)
    BatchLayerNorm(1, **layer)  # raises for settings that do not fit before anything is looked at
    settings = _Settings(affine, sync, layer)

    included, excluded = (_patterns(value) for value in (include, exclude))
    if not missing_ok:
        names = [name for name, module in model.named_modules(remove_duplicate=False) if _is_norm(module)]
        _check_patterns("include", included, names)
        _check_patterns("exclude", excluded, names)

    def why_not(name: str, aliases: list[str], module: nn.Module, kind: NormKind) -> str | None:
        def matches(patterns: list[str]) -> bool:
            return any(_matches(alias, pattern) for pattern in patterns for alias in aliases)

        if kind.family not in norms:
            return f"{kind.family} normalization is swapped on request: norms={(*norms, kind.family)}"
        if included and not matches(included):
            return "not in include"
        if matches(excluded):
            return "in exclude"
        if filter_fn is not None and not filter_fn(name, module):
            return "filter_fn returned False"
        return None

    # Normal tensors even under inference_mode: the new layers' statistics are updated in place later.
    with torch.inference_mode(False):
        plan, entries = _plan(model, settings, why_not)
    _check_shared_parameters(model, plan)
    if not plan and not missing_ok and not bln_layers(model):
        raise ValueError(_nothing_to_swap(model, entries))
    if not dry_run:
        _commit(model, plan, affine)
    return SwapReport(tuple(entries), dry_run)


def restore_swaps_(model: nn.Module, state_dict: Mapping[str, Any]) -> SwapReport:
    """Swap just the layers that a swapped model's state_dict holds as `BatchLayerNorm`, with their settings.

    Load the state_dict afterwards; the parameters' values are not touched here.

    Args:
        model: The model before the swap; layers that are `BatchLayerNorm` already stay.
        state_dict: Of the swapped model.

    Returns:
        A `SwapReport`.

    Raises:
        ValueError: If the state_dict holds no `BatchLayerNorm`, or one where the model has no normalization layer.
            The model is then unchanged.
    """
    # A layer is told by its population; the root module's own entries have no prefix.
    suffix = "running_batch_mean"
    prefixes = [key[: -len(suffix)] for key in state_dict if key == suffix or key.endswith("." + suffix)]
    states = {prefix.rstrip("."): state_dict.get(prefix + "_extra_state") for prefix in prefixes}
    damaged = [name for name, state in states.items() if not is_extra_state(state)]
    if damaged:
        raise ValueError(
            f"Every BatchLayerNorm of a checkpoint must have its settings beside its tensors, got {damaged[0]!r} with "
            f"_extra_state {states[damaged[0]]!r:.80}; the checkpoint is damaged, load another one."
        )
    configs = {name: state["config"] for name, state in states.items() if state is not None}
    if not configs:
        raise ValueError(
            "The state_dict must be of a model swapped to BatchLayerNorm, got one that holds none "
            f"({len(state_dict)} entries); load it with the model's own load_from_checkpoint(...)."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    plan: list[_Step] = []
    entries: list[SwapEntry] = []
    done: set[int] = set()
    for name, config in configs.items():
        module = modules.get(name)
        if isinstance(module, BatchLayerNorm) or id(module) in done:
            continue
        kind = None if module is None else KINDS.get(qualified_name(type(module)))
        if module is None or kind is None:
            found = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"The checkpoint holds a BatchLayerNorm at {name!r}, the model has {found} there; build the model that "
                f"was trained, with the same arguments."
            )
        done.add(id(module))
        with torch.inference_mode(False):
            new = _new_layer(module, kind, config, _device(module, model))
        plan.append(_Step(name, module, new, None))
        entries.append(SwapEntry(name, type(module).__name__, type(new).__name__, "in the checkpoint"))
    _commit(model, plan, affine="keep")
    return SwapReport(tuple(entries))


def bln_layers(model: nn.Module) -> dict[str, BatchLayerNorm]:
    """The model's `BatchLayerNorm` layers by name; a shared layer once, under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchLayerNorm)}


def set_flags_(model: nn.Module, flags: FlagsLike | Mapping[str, FlagsLike]) -> dict[str, StatFlags]:
    """Set the inference flags of all `BatchLayerNorm` layers, or of some by name.

    Args:
        model: Changed in place.
        flags: One setting for all layers (`StatFlags`, "TTFF", four bools), or a mapping of layer names to settings;
            layers that it leaves out keep theirs.

    Returns:
        The flags of every layer now, by name; such a mapping can be passed again.

    Raises:
        ValueError: If the model has no `BatchLayerNorm`, a name is not one of its layers, or a setting cannot be read.
            No layer is changed then.

    Example:
        >>> model = nn.Sequential(BatchLayerNorm(4), BatchLayerNorm(4))
        >>> set_flags_(model, {"1": "FFFF"})
        {'0': StatFlags('TTFF'), '1': StatFlags('FFFF')}
    """
    layers = bln_layers(model)
    if not layers:
        raise ValueError(
            f"Flags belong to BatchLayerNorm layers, got a {type(model).__name__} without any; call swap_norms_(model) "
            f"first."
        )
    if isinstance(flags, Mapping) and (not flags or not set(flags) <= set(StatFlags.names())):
        unknown = [name for name in flags if name not in layers]
        if unknown:
            raise ValueError(
                f"Flags by layer need names of this model's BatchLayerNorm layers, got "
                f"{', '.join(map(repr, unknown))}; its layers are {_listed(layers)}."
            )
        chosen = {name: StatFlags.parse(value) for name, value in flags.items()}  # type: ignore[arg-type]
    else:
        setting = StatFlags.parse(flags)  # type: ignore[arg-type]
        chosen = dict.fromkeys(layers, setting)
    for name, setting in chosen.items():
        layers[name].flags = setting
    return {name: layer.flags for name, layer in layers.items()}


# ------------------------------------------------------------------------ plan


@dataclass(frozen=True)
class _Step:
    name: str
    old: nn.Module
    new: BatchLayerNorm
    scale: float | None


def _plan(
    model: nn.Module, settings: _Settings, why_not: Callable[[str, list[str], nn.Module, NormKind], str | None]
) -> tuple[list[_Step], list[SwapEntry]]:
    """Every new layer, made without touching the model, and an entry for each normalization layer."""
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    sample_dims = sample_dims_inside(model)
    metrics = layers_inside_metrics(model)
    plan: list[_Step] = []
    entries: list[SwapEntry] = []
    for name, module in model.named_modules():
        old = type(module).__name__
        kind = KINDS.get(qualified_name(type(module)))
        if isinstance(module, BatchLayerNorm):
            entries.append(SwapEntry(name, old, None, "is a BatchLayerNorm already"))
        elif kind is not None:
            why = why_not(name, aliases[id(module)], module, kind)
            if id(module) in metrics:
                why = "part of a metric, which must stay what it is"
            elif not _owns_its_affine(module):
                why = "its weight is computed by a hook (pruning, weight norm): remove that first"
            if why is not None:
                entries.append(SwapEntry(name, old, None, why))
                continue
            arguments = dict(settings.layer)
            arguments["feature_dim"] = kind.feature_dim
            arguments["sample_dim"] = sample_dims.get(id(module), 0)
            arguments["sync"] = settings.sync is True or (
                settings.sync == "auto" and isinstance(module, nn.SyncBatchNorm)
            )
            if settings.affine == "preserve" and "eps" not in arguments:
                arguments["eps"] = norm_eps(module)
            try:
                new = _new_layer(module, kind, arguments, _device(module, model))
            except ValueError as error:
                raise ValueError(f"Layer {name!r} ({old}) cannot be swapped: {error} Or leave it: exclude.") from error
            scale = None
            if settings.affine == "preserve":
                scale = math.sqrt(norm_features(module)) if not kind.lazy else None
                _carry_population(module, new)
                if kind.lazy:
                    new.preserve_scale = True  # type: ignore[assignment]
                elif new.weight is None:
                    new.gain = scale  # type: ignore[assignment]
            plan.append(_Step(name, module, new, scale))
            shared = aliases[id(module)][1:]
            why = f"{kind.family} normalization" + (f", shared with {', '.join(shared)}" if shared else "")
            entries.append(SwapEntry(name, old, type(new).__name__, why))
        elif isinstance(module, NORM_BASES):
            why = "not a class that is known to only normalize: replace it by hand with BatchLayerNorm(...)"
            entries.append(SwapEntry(name, old, None, why))
    return plan, entries


def _check_shared_parameters(model: nn.Module, plan: list[_Step]) -> None:
    """A parameter that is scaled must not belong to a layer that stays what it is."""
    swapped = {id(step.old) for step in plan}
    changed = {id(parameter): step.name for step in plan for parameter in step.new.parameters(recurse=False)}
    for name, module in model.named_modules():
        if id(module) in swapped or isinstance(module, BatchLayerNorm):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in changed:
                raise ValueError(
                    f"A swapped layer must not share its weight or bias with a layer that stays, got "
                    f"{changed[id(parameter)]!r}, which shares with {name!r} ({type(module).__name__}); swap or "
                    f"exclude both."
                )


def _new_layer(
    old: nn.Module, kind: NormKind, arguments: Mapping[str, Any], device: torch.device | None
) -> BatchLayerNorm:
    """The layer for ``old``, with its Parameter objects, dtype, device and mode."""
    arguments = dict(arguments)
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    gain = arguments.pop("gain", 1.0)
    for name in ("num_features", "affine", "bias"):
        arguments.pop(name, None)
    like = weight if isinstance(weight, Tensor) else getattr(old, "running_mean", None)
    dtype = like.dtype if isinstance(like, Tensor) else None
    new: BatchLayerNorm
    if kind.lazy:
        new = LazyBatchLayerNorm(affine=weight is not None, device=device, dtype=dtype, **arguments)
    else:
        shape = norm_shape(old)
        size = shape[0] if len(shape) == 1 else shape
        if kind.act:
            new = BatchLayerNormAct(
                size,
                affine=False,
                device=device,
                dtype=dtype,
                drop=old.get_submodule("drop"),
                act=old.get_submodule("act"),
                **arguments,
            )
        else:
            new = BatchLayerNorm(size, affine=False, device=device, dtype=dtype, **arguments)
    new.affine = weight is not None
    for name, parameter in (("weight", weight), ("bias", bias)):
        if isinstance(parameter, nn.Parameter):
            setattr(new, name, parameter)
        elif isinstance(parameter, Tensor):  # a frozen layer keeps its affine in buffers
            setattr(new, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        else:
            new.register_parameter(name, None)
    new.gain = gain
    new.process_group = getattr(old, "process_group", None)
    new.training = old.training
    return new


def _device(old: nn.Module, model: nn.Module) -> torch.device | None:
    for tensor in (*old.parameters(), *old.buffers(), *model.parameters(), *model.buffers()):
        return tensor.device
    return None


def _carry_population(old: nn.Module, new: BatchLayerNorm) -> None:
    """Take over a BatchNorm's running statistics, unless they are still the start values 0 and 1."""
    mean, var = getattr(old, "running_mean", None), getattr(old, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return
    if isinstance(mean, nn.parameter.UninitializedBuffer) or mean.is_meta:
        return
    if bool((mean == 0).all()) and bool((var == 1).all()):
        return
    dtype = new.running_batch_mean.dtype
    new.running_batch_mean = mean.detach().to(dtype).clone()
    new.running_batch_var = var.detach().to(dtype).clone()


def _owns_its_affine(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return all(name in own or getattr(module, name, None) is None for name in ("weight", "bias"))


def _patterns(patterns: str | Iterable[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _check_patterns(argument: str, patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(
                f"Every {argument} pattern must match a normalization layer, got {pattern!r}, which matches none of "
                f"{_listed(names)}; patterns are as in a shell, such as 'layer4' or '*.norm1'."
            )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (BatchLayerNorm, *NORM_BASES)) or qualified_name(type(module)) in KINDS


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = [name for name in names if name]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest


def _nothing_to_swap(model: nn.Module, entries: list[SwapEntry]) -> str:
    types = Counter(type(module).__name__ for module in model.modules())
    listed = ", ".join(f"{name} x{count}" for name, count in types.most_common())
    skipped = "; ".join(f"{entry.name} ({entry.old}): {entry.why}" for entry in entries)
    return (
        f"A swap must find at least one normalization layer to replace, got a {type(model).__name__} with the layers "
        f"{listed}. " + (f"Skipped: {skipped}. " if skipped else "") + "Swapped by default are batch and layer "
        "normalization; call swap_norms_(model, norms=('batch', 'layer', 'group', 'instance', 'rms')) for others."
    )


# ---------------------------------------------------------------------- commit

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_compiled_call_impl",
)

# torch's lazy modules infer their sizes in hooks of their own, bound to the layer object, which stays.
_LAZY_HOOKS = ("_initialize_hook", "_load_hook", "_load_state_dict_pre_hooks")


def _commit(model: nn.Module, plan: list[_Step], affine: str) -> None:
    """Make every step take effect, or none."""
    classes = [(step.old, step.old.__class__, dict(step.old.__dict__)) for step in plan]
    values: list[tuple[Tensor, Tensor]] = []
    attributes: list[tuple[nn.Module, str, Any]] = []
    try:
        for tensor, change in _new_values(plan, affine):
            values.append((tensor, tensor.detach().clone()))
            with torch.no_grad():
                change(tensor)
        for step in plan:
            state = dict(step.new.__dict__)
            kept = _HOOKS + _LAZY_HOOKS if isinstance(step.new, LazyBatchLayerNorm) else _HOOKS
            state |= {name: step.old.__dict__[name] for name in kept if name in step.old.__dict__}
            # The same object, so that every reference to the layer sees the swap; torch's lazy modules do the same.
            step.old.__class__ = step.new.__class__
            step.old.__dict__.clear()
            step.old.__dict__.update(state)
        for module, name, value in _fused_paths(model):
            attributes.append((module, name, getattr(module, name)))
            setattr(module, name, value)
    except BaseException:
        for module, cls, state in classes:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(state)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for module, name, value in attributes:
            setattr(module, name, value)
        raise


def _new_values(plan: list[_Step], affine: str) -> Iterator[tuple[Tensor, Callable[[Tensor], Any]]]:
    """Each parameter that changes, once even if layers share it, and how."""
    seen: set[int] = set()
    for step in plan:
        for name, parameter in (("weight", step.new.weight), ("bias", step.new.bias)):
            if parameter is None or isinstance(parameter, UninitializedParameter) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if affine == "paper":
                yield parameter, nn.init.ones_ if name == "weight" else nn.init.zeros_
            elif affine == "preserve" and name == "weight" and step.scale is not None:
                yield parameter, partial(torch.Tensor.mul_, other=step.scale)


def _fused_paths(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Public switches of PyTorch's transformers whose fused inference kernels compute LayerNorm by themselves."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(uncompiled(child), BatchLayerNorm) for child in module.children()
        ):
            yield module, "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, BatchLayerNorm) for child in module.modules()
        ):
            yield module, "use_nested_tensor", False
