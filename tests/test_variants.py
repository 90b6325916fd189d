"""The lazy layer and the layer with an activation inside."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_bln.layer import BatchLayerNorm
from lightning_bln.variants import BatchLayerNormAct, LazyBatchLayerNorm

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

LAYOUTS = {
    "dense": ((5, 6), 1),
    "image": ((5, 6, 3, 4), 1),
    "channels last": ((5, 3, 4, 6), -1),
}


def example(shape=(5, 6), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("shape", "feature_dim"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("preserve_scale", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_lazy_becomes_the_layer_of_its_first_input(shape, feature_dim, preserve_scale, affine):
    lazy = LazyBatchLayerNorm(affine=affine, preserve_scale=preserve_scale, feature_dim=feature_dim)
    assert lazy.has_uninitialized_params() == affine
    plain = BatchLayerNorm(6, affine=affine, feature_dim=feature_dim)
    scale = math.sqrt(6) if preserve_scale else 1.0
    x = example(shape)
    # Scaling the plain layer's output is an independent way to the same values: its bias is 0.
    torch.testing.assert_close(lazy(x), plain(x) * scale)
    assert type(lazy) is BatchLayerNorm
    assert lazy.num_features == 6
    for training in (True, False):
        lazy.train(training), plain.train(training)
        torch.testing.assert_close(lazy(x + 1), plain(x + 1) * scale)
    assert {name: value.shape for name, value in lazy.named_buffers()} == {
        name: value.shape for name, value in plain.named_buffers()
    }


def test_lazy_first_forward_can_be_inference():
    lazy, plain = LazyBatchLayerNorm().eval(), BatchLayerNorm(6).eval()
    with torch.no_grad():
        torch.testing.assert_close(lazy(example()), plain(example()))
    assert type(lazy) is BatchLayerNorm
    assert not lazy.training


def test_lazy_keeps_the_parameter_objects_that_it_was_made_with():
    lazy = LazyBatchLayerNorm(dtype=torch.float64)
    before = list(lazy.parameters())
    assert all(isinstance(parameter, UninitializedParameter) for parameter in before)
    lazy(example(dtype=torch.float64)).square().sum().backward()
    assert [id(parameter) for parameter in lazy.parameters()] == [id(parameter) for parameter in before]
    assert [tuple(parameter.shape) for parameter in before] == [(6,), (6,)]
    assert all(parameter.dtype == torch.float64 and parameter.grad is not None for parameter in before)
    assert lazy.running_batch_mean.dtype == torch.float64


def test_lazy_settings_reach_the_layer():
    lazy = LazyBatchLayerNorm(eps=1e-2, flags="FFTT", statistics="per_channel", population="ema", batch_size=8)
    lazy(example((5, 6, 3)))
    assert lazy.config() == {
        **BatchLayerNorm(6, eps=1e-2, flags="FFTT", statistics="per_channel", population="ema", batch_size=8).config(),
    }


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_lazy_layer_take_their_own_sizes(duplicate):
    first = LazyBatchLayerNorm()
    second = duplicate(first)
    first(example((5, 6)))
    second(example((5, 3)))
    assert (first.num_features, second.num_features) == (6, 3)
    assert (tuple(first.weight.shape), tuple(second.weight.shape)) == ((6,), (3,))


@pytest.mark.parametrize("affine", [False, True], ids=["", "affine"])
@pytest.mark.parametrize("used", [False, True], ids=["not yet used", "used"])
def test_lazy_state_dict_round_trip_into_a_lazy_layer(used, affine):
    first = LazyBatchLayerNorm(eps=1e-2, affine=affine, preserve_scale=True)
    second = LazyBatchLayerNorm(affine=affine, preserve_scale=not used)
    if used:
        first(example())
    second.load_state_dict(first.state_dict())
    assert second.eps == first.eps
    x = example(seed=1)
    torch.testing.assert_close(second.eval()(x), first.eval()(x), rtol=0, atol=0)


def test_a_used_layer_no_longer_fits_another_number_of_features():
    lazy = LazyBatchLayerNorm()
    lazy(example())
    with pytest.raises(ValueError, match="6"):
        lazy(example((5, 7)))


@pytest.mark.parametrize(("shape", "feature_dim"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_act_normalizes_then_drops_then_activates(shape, feature_dim, training):
    x = example(shape)
    calls = []

    class Logged(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, y):
            calls.append(self.name)
            return y - 0.1 if self.name == "drop" else y.relu()

    plain = BatchLayerNorm(6, feature_dim=feature_dim).train(training)
    layer = BatchLayerNormAct(6, feature_dim=feature_dim, drop=Logged("drop"), act=Logged("act")).train(training)
    torch.testing.assert_close(layer(x), (plain(x) - 0.1).relu(), rtol=0, atol=0)
    assert calls == ["drop", "act"]


def test_act_defaults_to_the_plain_layer():
    x = example()
    torch.testing.assert_close(BatchLayerNormAct(6)(x), BatchLayerNorm(6)(x), rtol=0, atol=0)


def test_act_dropout_acts_in_training_only():
    layer = BatchLayerNormAct(64, drop=nn.Dropout(0.5))
    x = example((8, 64))
    assert 0.3 < (layer(x) == 0).float().mean() < 0.7
    assert (layer.eval()(x) == 0).sum() == 0


def test_act_in_place_activation_leaves_the_input_and_the_gradients_alone():
    x = example((5, 6, 3, 4)).requires_grad_()
    given = x.detach().clone()
    outputs = []
    for inplace in (False, True):
        layer = BatchLayerNormAct(6, act=nn.ReLU(inplace=inplace))
        y = layer(x)
        outputs.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])))
    for separate, in_place in zip(*outputs, strict=True):
        torch.testing.assert_close(in_place, separate, rtol=0, atol=0)
    assert torch.equal(x, given)


def test_act_state_dict_names_are_those_of_the_plain_layer():
    plain, act = BatchLayerNorm(6), BatchLayerNormAct(6, act=nn.ReLU())
    assert list(act.state_dict()) == list(plain.state_dict())
    plain(example())
    act.load_state_dict(plain.state_dict())
    x = example(seed=1)
    torch.testing.assert_close(act.eval()(x), plain.eval()(x).relu(), rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_the_act_layer_keep_activation_and_statistics(duplicate):
    layer = BatchLayerNormAct(6, act=nn.ReLU())
    layer(example())
    twin = duplicate(layer).eval()
    x = example(seed=1)
    torch.testing.assert_close(twin(x), layer.eval()(x), rtol=0, atol=0)
    assert twin.act is not layer.act
