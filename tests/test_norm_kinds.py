"""Which classes are known, and what is known of each, checked against the classes themselves."""

import importlib

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_bln.norm_kinds import (
    FAMILIES,
    KINDS,
    NORM_BASES,
    layers_inside_metrics,
    norm_eps,
    norm_features,
    norm_shape,
    qualified_name,
    sample_dims_inside,
)

# The axis is read off sums of a few dozen float32 numbers.
TOLERANCE = 1e-4

# Sizes of an input by the rank that the class name asks for; 6 features everywhere.
CHANNELS_FIRST = {"1d": (5, 6, 4), "2d": (5, 6, 4, 3), "3d": (5, 6, 2, 3, 4)}


def class_of(name: str) -> type[nn.Module]:
    module, _, cls = name.rpartition(".")
    imported = pytest.importorskip(module)
    if module.startswith("timm") and not hasattr(imported, cls):
        pytest.skip(f"timm {importlib.import_module('timm').__version__} has no {cls}")
    return getattr(imported, cls)


def build(name: str) -> nn.Module:
    """A layer of 6 features whose activation, if it has one, does nothing."""
    cls, kind = class_of(name), KINDS[name]
    act = {"apply_act": False} if kind.act else {}
    if cls.__name__ == "SyncBatchNormAct":  # made by this conversion only
        layers = importlib.import_module("timm.layers")
        return layers.convert_sync_batchnorm(layers.BatchNormAct2d(6, **act))
    if kind.lazy:
        return cls()
    if kind.family != "group":
        return cls(6, **act)
    if "GroupNorm1" in name:
        return cls(6, **act)
    return cls(2, 6) if name.startswith("torch.") else cls(6, num_groups=2, **act)


def example(name: str) -> torch.Tensor:
    """An input whose mean and scale differ between all samples, features and positions."""
    rank = next((size for size in CHANNELS_FIRST if size in name), "2d")
    shape = CHANNELS_FIRST[rank] if KINDS[name].feature_dim == 1 else (5, 4, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x * (1 + torch.arange(5.0)).view(-1, *[1] * (len(shape) - 1)) + 3


@pytest.mark.parametrize("name", KINDS)
def test_every_known_class_exists_under_its_name(name):
    cls = class_of(name)
    assert qualified_name(cls) == name
    assert issubclass(cls, nn.Module)
    assert KINDS[name].family in FAMILIES
    assert KINDS[name].lazy == issubclass(cls, LazyModuleMixin)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_sizes_are_read_from_the_layer(name):
    layer = build(name)
    assert (set(dict(layer.named_children())) == {"drop", "act"}) == KINDS[name].act
    if KINDS[name].lazy:
        layer(example(name))
    assert norm_shape(layer) == (6,)
    assert norm_features(layer) == 6
    assert norm_eps(layer) > 0


# SyncBatchNorm trains on GPUs only.
@pytest.mark.parametrize("name", [name for name in KINDS if "Sync" not in name])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_the_feature_axis_is_the_one_the_class_normalizes_over(name):
    layer, kind, x = build(name), KINDS[name], example(name)
    features = kind.feature_dim
    if "Frozen" in name:
        layer.running_mean.copy_(torch.arange(6.0))
        y = layer(x)
        torch.testing.assert_close(y, (x - torch.arange(6.0).view(-1, 1, 1)) / (1 + layer.eps) ** 0.5)
        return
    y = layer(x)
    others = [axis for axis in range(x.ndim) if axis != features % x.ndim]
    if kind.family == "layer":
        zero = y.mean(features)
    elif kind.family == "rms":
        zero = y.square().mean(features) - 1
    elif kind.family == "batch":
        zero = y.mean(others)
    elif kind.family == "instance":
        zero = y.mean([axis for axis in others if axis != 0])
    else:
        zero = y.mean(list(range(1, x.ndim)))
    assert zero.abs().max() < TOLERANCE
    assert (x.mean(others) - y.mean(others)).abs().max() > 0.1


def test_families_are_those_that_swap_norms_names():
    assert FAMILIES == ("batch", "layer", "group", "instance", "rms")
    assert {kind.family for kind in KINDS.values()} == set(FAMILIES)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.InstanceNorm1d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm])
def test_a_subclass_is_not_known_but_is_recognized_as_a_normalization(cls):
    subclass = type("MyNorm", (cls,), {})
    assert qualified_name(cls) in KINDS
    assert qualified_name(subclass) not in KINDS
    assert issubclass(subclass, NORM_BASES)


@pytest.mark.parametrize(
    ("layer", "shape", "eps"),
    [
        (nn.LayerNorm((3, 5), eps=1e-4), (3, 5), 1e-4),
        (nn.BatchNorm1d(7, eps=1e-2, affine=False), (7,), 1e-2),
        (nn.GroupNorm(2, 8), (8,), 1e-5),
        (nn.RMSNorm(4), (4,), torch.finfo(torch.float32).eps),
        (nn.RMSNorm(4, dtype=torch.float64), (4,), torch.finfo(torch.float64).eps),
        (nn.RMSNorm(4, elementwise_affine=False), (4,), torch.finfo(torch.float32).eps),
    ],
    ids=str,
)
def test_shape_and_eps(layer, shape, eps):
    assert norm_shape(layer) == shape
    assert norm_features(layer) == torch.Size(shape).numel()
    assert norm_eps(layer) == eps


def test_a_layer_without_a_size_is_an_error_that_names_the_remedy():
    layer = nn.BatchNorm2d(4, track_running_stats=False)
    del layer.num_features
    layer.extra_repr = lambda: "a size that was removed"
    with pytest.raises(ValueError, match=r"must know its number of features, got BatchNorm2d.*exclude it by name"):
        norm_shape(layer)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_sample_axis_inside_transformers(batch_first):
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=batch_first)
    outside = nn.LayerNorm(8)
    found = sample_dims_inside(nn.ModuleList([model, outside, nn.BatchNorm1d(8)]))
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 7  # 2 in the encoder layer, 3 in the decoder layer, one behind each stack
    assert [found.get(id(norm), 0) for norm in norms] == [0 if batch_first else 1] * 7
    assert id(outside) not in found


def test_sample_axis_where_the_attention_was_replaced_by_one_that_does_not_say():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn = nn.Linear(8, 8)
    assert sample_dims_inside(layer) == {}


class NetworkMetric(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def update(self, x): ...

    def compute(self): ...


def test_layers_inside_metrics_at_any_depth():
    model = nn.Sequential(nn.BatchNorm1d(4), torchmetrics.MetricCollection([NetworkMetric()]))
    inside = layers_inside_metrics(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)}
    assert [id(norm) in inside for norm in norms.values()] == [False, True]
    assert layers_inside_metrics(nn.Sequential(nn.BatchNorm1d(4))) == set()
