"""`BatchLayerNorm`: population statistics and epochs, buffers and checkpoints, layouts, compilers, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import Layout
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bln import BatchLayerNorm, StatFlags, batch_layer_norm
from lightning_bln.layer import RUNNING


def running(layer: BatchLayerNorm) -> list[Tensor]:
    return [getattr(layer, name).clone() for name in RUNNING]


def assert_same_statistics(layer: BatchLayerNorm, expected: list[Tensor]) -> None:
    for name, now, was in zip(RUNNING, running(layer), expected, strict=True):
        assert now.dtype == was.dtype, name
        assert torch.equal(now, was), name


def trained(*batches: Tensor, **keywords: object) -> BatchLayerNorm:
    """A layer that saw the batches in train mode, now in eval mode."""
    axis = keywords.get("feature_dim", 1)
    layer = BatchLayerNorm(batches[0].shape[axis], **keywords)
    for x in batches:
        layer(x)
    return layer.eval()


def expected_statistics(batches: list[Tensor], *, per_channel: bool = False, slot: bool = False) -> list[Tensor]:
    """As the class docstring says, for batches (N, C, ...): an average weighted by samples, variances corrected."""
    sums: list[Tensor | float] = [0.0] * 4
    for x in batches:
        B, C = x.shape[:2]
        over = [d for d in range(x.ndim) if d != 1] if per_channel else [0]
        n = x.numel() // C if per_channel else B
        of_batch, of_features = (m / (m - 1) if m > 1 else 1.0 for m in (n, B))
        values = [
            x.mean(over),
            x.var(over, correction=0) * of_batch,
            x.mean(1),
            x.var(1, correction=0) * of_features,
        ]
        if per_channel:
            values[2:] = [value.mean() for value in values[2:]]
        elif not slot:
            values[2:] = [value.mean(0) for value in values[2:]]
        sums = [total + B * value for total, value in zip(sums, values, strict=True)]
    return [total / sum(x.shape[0] for x in batches) for total in sums]


class TestPopulation:
    @pytest.mark.parametrize("sizes", [(4, 4, 4), (8, 8, 3), (1, 1), (1, 5)], ids=str)
    @pytest.mark.parametrize("positions", [(), (5,), (3, 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_is_the_average_weighted_by_samples_of_corrected_statistics(
        self, sizes: tuple[int, ...], positions: tuple[int, ...], statistics: str, dtype: torch.dtype
    ):
        batches = [torch.randn(n, 6, *positions, dtype=dtype) * (i + 1) + i for i, n in enumerate(sizes)]
        layer = trained(*batches, statistics=statistics)
        expected = expected_statistics(batches, per_channel=statistics == "per_channel")
        for name, actual, value in zip(RUNNING, running(layer), expected, strict=True):
            assert actual.dtype == dtype, name
            assert_close(actual, value)
        assert layer.num_samples == sum(sizes)

    def test_slots_are_averaged_one_by_one(self):
        batches = [torch.randn(4, 6, 3) for _ in range(3)]
        layer = trained(*batches, feature_population="slot")
        assert layer.running_feature_mean.shape == (4, 3)
        for actual, value in zip(running(layer), expected_statistics(batches, slot=True), strict=True):
            assert_close(actual, value)

    def test_ema_gives_momentum_to_the_new_value(self):
        batches = [torch.randn(4, 6, 3) for _ in range(3)]
        layer = BatchLayerNorm(6, population="ema", momentum=0.3)
        expected = expected_statistics(batches[:1])
        layer(batches[0])
        assert_same_statistics(layer, [value.clone() for value in running(trained(batches[0]))])
        layer.start_epoch()
        for x in batches[1:]:
            layer(x)
            expected = [0.7 * old + 0.3 * new for old, new in zip(expected, expected_statistics([x]), strict=True)]
        for actual, value in zip(running(layer), expected, strict=True):
            assert_close(actual, value)

    def test_precise_is_left_to_update_statistics(self):
        layer = trained(torch.randn(4, 6), population="precise")
        assert not layer.has_population
        assert layer.nominal_batch_size == 0

    def test_the_last_average_stays_until_the_first_batch_of_the_new_epoch_replaces_it(self):
        first, second = torch.randn(2, 8, 6)
        layer = trained(first)
        before = running(layer)
        assert layer.train().start_epoch()
        assert_same_statistics(layer, before)
        assert layer.nominal_batch_size == 8
        layer.eval()(second)
        assert_same_statistics(layer, before)
        layer.train()(second[:3])
        assert_same_statistics(layer, running(trained(second[:3])))
        assert (layer.num_samples, layer.nominal_batch_size) == (3, 3)

    def test_an_epochs_number_begins_it_once(self):
        layer = BatchLayerNorm(6)
        x = torch.randn(4, 6)
        assert layer.start_epoch(0)
        layer(x)
        assert not layer.start_epoch(0)
        layer(x)
        assert layer.num_samples == 8
        assert layer.start_epoch(1)
        layer(x)
        assert layer.num_samples == 4
        # Without a number each call begins one.
        assert layer.start_epoch()
        assert layer.start_epoch()

    def test_nominal_batch_size_is_the_largest_of_the_epoch_and_before_training_the_current(self):
        layer = BatchLayerNorm(6, flags="FFFF", affine=False)
        x = torch.randn(5, 6)
        assert torch.equal(layer.eval()(x), batch_layer_norm(x))
        layer.train()
        for size in (4, 8, 3):
            layer(torch.randn(size, 6))
        assert torch.equal(layer.eval()(x), batch_layer_norm(x, batch_size=8))
        layer.train().start_epoch()
        layer(torch.randn(2, 6))
        assert torch.equal(layer.eval()(x), batch_layer_norm(x, batch_size=2))

    def test_a_fixed_batch_size_holds_in_training_and_inference(self):
        layer = BatchLayerNorm(6, flags="FFFF", affine=False, batch_size=25)
        x = torch.randn(5, 6)
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(x), batch_layer_norm(x, batch_size=25))
        assert layer.nominal_batch_size == 25

    @pytest.mark.parametrize("population", ["epoch", "ema", "precise"])
    def test_without_a_population_inference_uses_the_mini_batch_whatever_the_flags(self, population: str):
        x = torch.randn(5, 6, 3)
        expected = batch_layer_norm(x, torch.ones(6), torch.zeros(6))
        for flags in StatFlags.all():
            layer = BatchLayerNorm(6, flags=flags, population=population).eval()
            assert torch.equal(layer(x), expected)
            assert not layer.has_population

    def test_inference_uses_the_population_that_its_flags_name(self, layout: Layout, statistics: str):
        layer = BatchLayerNorm(7, feature_dim=layout.feature_dim, statistics=statistics)
        layer(layout.input())
        layer(layout.input(N=3))
        layer.eval()
        before = running(layer)
        x = layout.input(N=2)
        for flags in StatFlags.all():
            layer.flags = flags
            expected = batch_layer_norm(
                x,
                layer.weight,
                layer.bias,
                feature_dim=layout.feature_dim,
                flags=flags,
                population=before,
                training=False,
                batch_size=5,
                statistics=statistics,
            )
            assert torch.equal(layer(x), expected)
        assert_same_statistics(layer, before)

    @settings(deadline=None, max_examples=40)
    @given(
        shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
        flags=st.sampled_from(list(StatFlags.all())),
        spread=st.sampled_from([0.0, 1e-20, 1.0, 1e15]),
        trained_before=st.booleans(),
        mode=st.sampled_from(["per_position", "per_channel"]),
    )
    def test_inference_is_finite_fresh_or_trained(self, shape, flags, spread, trained_before, mode):
        layer = BatchLayerNorm(shape[1], flags=flags, statistics=mode)
        if trained_before:
            layer(torch.randn(shape) * spread)
        assert layer.eval()(torch.randn(shape) * spread).isfinite().all()

    def test_an_epoch_with_nan_does_not_poison_the_next(self):
        layer = trained(torch.full((4, 6), torch.nan), torch.randn(4, 6)).train()
        assert layer.running_batch_mean.isnan().all()
        layer.start_epoch()
        x = torch.randn(4, 6)
        layer(x)
        assert_same_statistics(layer, running(trained(x)))

    @pytest.mark.parametrize("shape", [(0, 6, 3), (4, 6, 0)], ids=str)
    def test_an_empty_batch_leaves_the_statistics(self, shape: tuple[int, ...]):
        layer = BatchLayerNorm(6)
        layer(torch.randn(shape)).sum().backward()
        assert not layer.has_population
        layer(torch.randn(4, 6, 3))
        before = running(layer)
        assert layer(torch.randn(0, 6, 3)).shape == (0, 6, 3)
        assert_same_statistics(layer, before)
        assert (layer.num_samples, layer.nominal_batch_size) == (4, 4)
        assert layer.eval()(torch.randn(0, 6, 3)).shape == (0, 6, 3)

    def test_gradient_accumulation_counts_every_micro_batch(self):
        batches = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
        layer = BatchLayerNorm(6)
        for x in batches:
            layer(x).sum().backward()
        assert layer.num_samples == 12
        assert_close(layer.running_batch_mean, torch.cat(batches).mean(0))

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
    def test_activation_checkpointing_counts_a_batch_once(self, reentrant: bool):
        x = torch.randn(4, 6, requires_grad=True)
        layer, plain = BatchLayerNorm(6), BatchLayerNorm(6)
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        grad, x.grad = x.grad, None
        plain(x).square().sum().backward()
        assert layer.num_samples == 4
        assert_same_statistics(layer, running(plain))
        assert_close(grad, x.grad)

    def test_activation_checkpointing_counts_a_batch_of_a_compiled_layer_once(self):
        torch._dynamo.reset()
        layer = BatchLayerNorm(6)
        layer(torch.randn(4, 6))
        layer.start_epoch()
        compiled = torch.compile(layer, backend="aot_eager")
        checkpoint(compiled, torch.randn(4, 6, requires_grad=True), use_reentrant=False).square().sum().backward()
        assert layer.num_samples == 4

    def test_a_training_forward_under_inference_mode_does_not_spoil_training(self):
        x = torch.randn(4, 6)
        layer = BatchLayerNorm(6)
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
        assert layer.num_samples == 8
        assert not any(stat.is_inference() for stat in layer.buffers())
        with torch.inference_mode():
            layer.eval()(x)
            layer.start_epoch()
        assert_close(layer.running_batch_mean, x.mean(0))

    @pytest.mark.parametrize("first_training", [True, False], ids=["train", "eval"])
    def test_two_forwards_before_one_backward(self, first_training: bool):
        a, b = torch.randn(2, 4, 6)
        layer = trained(torch.randn(4, 6)).requires_grad_()
        twin = copy.deepcopy(layer)
        (layer.train(first_training)(a).square().sum() + layer.train()(b).square().sum()).backward()
        twin.train(first_training)(a).square().sum().backward()
        twin.train()(b).square().sum().backward()
        assert_close(layer.weight.grad, twin.weight.grad)

    def test_inference_changes_nothing(self):
        layer = trained(torch.randn(4, 6), torch.randn(3, 6))
        before = {name: value.clone() for name, value in layer.state_dict().items() if isinstance(value, Tensor)}
        layer(torch.randn(9, 6))
        after = layer.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_reset_statistics_and_reset_parameters(self):
        layer = trained(torch.randn(4, 6))
        nn.init.normal_(layer.weight)
        layer.reset_statistics()
        assert all(stat.shape == (0,) for stat in running(layer))
        assert (layer.num_samples, layer.nominal_batch_size, layer.epoch) == (0, 0, None)
        assert not torch.equal(layer.weight, torch.ones(6))
        layer.reset_parameters()
        assert torch.equal(layer.weight, torch.ones(6))


class TestShapes:
    def test_buffers_are_empty_before_the_first_training_batch(self):
        layer = BatchLayerNorm(6)
        assert all(stat.shape == (0,) for stat in running(layer))
        layer.eval()(torch.randn(4, 6))
        assert all(stat.shape == (0,) for stat in running(layer))

    def test_buffers_have_the_documented_shapes(self, layout: Layout, statistics: str):
        x = layout.input()
        layer = BatchLayerNorm(7, feature_dim=layout.feature_dim, statistics=statistics)
        y = layer(x)
        assert (y.shape, y.stride()) == (x.shape, x.stride())
        positions = tuple(size for d, size in enumerate(x.shape) if d not in (0, layout.axis))
        per_channel = statistics == "per_channel"
        for name in RUNNING:
            batch, feature = ((7,), ()) if per_channel else (tuple(x.shape[1:]), positions)
            assert getattr(layer, name).shape == (batch if "batch" in name else feature), name

    @pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 5, 6)], ids=str)
    @pytest.mark.parametrize("leading", [(), (3,)], ids=str)
    def test_several_feature_axes_are_one(self, shape: tuple[int, ...], leading: tuple[int, ...]):
        C = torch.Size(shape).numel()
        x = torch.randn(8, *leading, *shape)
        layer = BatchLayerNorm(shape, feature_dim=-1)
        flat = BatchLayerNorm(C, feature_dim=-1)
        assert layer.weight.shape == layer.bias.shape == shape
        for module in (layer, flat):
            with torch.no_grad():
                module.weight.copy_(torch.linspace(-1, 2, C).reshape(module.weight.shape))
                module.bias.copy_(torch.linspace(1, 3, C).reshape(module.bias.shape))
        for mode in (True, False):
            expected = flat.train(mode)(x.reshape(8, *leading, C)).reshape(x.shape)
            assert torch.equal(layer.train(mode)(x), expected)
        assert_same_statistics(layer, running(flat))

    def test_several_feature_axes_keep_the_memory_format(self):
        x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        y = BatchLayerNorm((3, 4, 5), feature_dim=-1)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("sample_dim", [1, -2])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_samples_along_another_axis(self, sample_dim: int, training: bool):
        x = torch.randn(5, 8, 6)
        layer = BatchLayerNorm(6, feature_dim=-1, sample_dim=sample_dim)
        plain = BatchLayerNorm(6, feature_dim=-1)
        layer(x * 2)
        plain(x.transpose(0, 1) * 2)
        y = layer.train(training)(x)
        assert_close(y, plain.train(training)(x.transpose(0, 1)).transpose(0, 1))
        assert y.stride() == x.stride()
        assert_same_statistics(layer, running(plain))
        assert layer.nominal_batch_size == 8

    def test_features_along_the_first_axis(self):
        x = torch.randn(6, 8, 5)
        y = BatchLayerNorm(6, feature_dim=0, sample_dim=1)(x)
        assert_close(y, BatchLayerNorm(6)(x.transpose(0, 1)).transpose(0, 1))

    def test_settings_that_were_changed_later_are_checked_at_inference(self):
        x = torch.randn(4, 3, 5)
        layer = BatchLayerNorm(3)
        layer(x)
        expected = layer.eval()(x)
        layer.flags = "TTFF"
        assert torch.equal(layer(x), expected)
        layer.flags = "FFFF"
        assert not torch.equal(layer(x), expected)
        layer.eps = 0.0
        with pytest.raises(ValueError, match=r"eps must be above 0, got 0\.0"):
            layer(x)
        layer.eps, layer.flags, layer.statistics = 1e-3, StatFlags(), "per_channel"
        with pytest.raises(ValueError, match=r"running_batch_mean was taken at positions \(5,\)"):
            layer(x)

    def test_one_input_under_several_flags(self, layout: Layout):
        x = layout.input()
        layer = BatchLayerNorm(7, feature_dim=layout.feature_dim)
        layer(x)
        layer.eval()
        with torch.no_grad():
            other = x * 2 + 1
            own = layer.own_statistics(other)
            for flags in StatFlags.all():
                layer.flags = flags
                assert_close(layer.normalize_with(other, own), layer(other))

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @pytest.mark.parametrize("training", [True, False])
    def test_a_parameter_of_another_size_is_named(self, name: str, training: bool):
        layer = BatchLayerNorm(3)
        layer(torch.randn(4, 3, 5))
        setattr(layer, name, nn.Parameter(torch.ones(4)))
        with pytest.raises(
            ValueError, match=rf"{name} must hold one value for each of the 3 features, got shape \(4,\)"
        ):
            layer.train(training)(torch.randn(4, 3, 5))

    def test_without_weight_or_bias(self):
        x = torch.randn(4, 6)
        plain, scaled = BatchLayerNorm(6, affine=False), BatchLayerNorm(6, bias=False)
        assert (plain.weight, plain.bias, scaled.bias) == (None, None, None)
        assert torch.equal(plain(x), batch_layer_norm(x))
        assert list(plain.parameters()) == []
        scaled(x).sum().backward()
        assert scaled.weight.grad is not None

    def test_changed_image_size_is_an_error_that_names_the_remedies(self):
        layer = trained(torch.randn(4, 6, 5, 5))
        text = (
            r"running_batch_mean was taken at positions \(5, 5\), this input of shape \(4, 6, 3, 3\) has positions "
            r"\(3, 3\)\. Use statistics='per_channel' .*resize .*set_flags_\(model, 'FFFF'\)"
        )
        for mode in (True, False):
            with pytest.raises(ValueError, match=text):
                layer.train(mode)(torch.randn(4, 6, 3, 3))
        layer.eval().flags = StatFlags.parse("FFTF")
        with pytest.raises(ValueError, match=r"running_feature_mean was taken at positions \(5, 5\)"):
            layer(torch.randn(4, 6, 3, 3))

    def test_changed_image_size_is_fine_without_population_flags(self):
        layer = trained(torch.randn(4, 6, 5, 5), flags="FFFF")
        for mode in (False, True):
            assert layer.train(mode)(torch.randn(4, 6, 3, 3)).isfinite().all()

    def test_changed_image_size_without_population_flags_restarts_the_average(self):
        layer = trained(torch.randn(4, 6, 5, 5), flags="FFFF").train()
        batches = [torch.randn(n, 6, 3, 3) for n in (3, 2)]
        for x in batches:
            layer(x)
        for actual, value in zip(running(layer), expected_statistics(batches), strict=True):
            assert_close(actual, value)
        assert (layer.num_samples, layer.nominal_batch_size) == (5, 3)

    def test_changed_image_size_is_fine_in_a_new_epoch(self):
        layer = trained(torch.randn(4, 6, 5, 5)).train()
        layer.start_epoch()
        x = torch.randn(4, 6, 3, 3)
        layer(x)
        assert_same_statistics(layer, running(trained(x)))

    def test_per_channel_takes_any_size(self):
        layer = BatchLayerNorm(6, statistics="per_channel", flags="TTTT")
        for size in (5, 3, 1):
            layer.train()(torch.randn(4, 6, size, size))
            assert layer.eval()(torch.randn(2, 6, size + 1, size)).isfinite().all()
        assert layer.num_samples == 12

    def test_a_partial_batch_in_slots_is_an_error_that_changes_nothing(self):
        layer = trained(torch.randn(4, 6, 3), feature_population="slot", flags="TTTT")
        before = running(layer)
        text = r"taken over 4 samples, this batch has 2\. Use DataLoader\(..., drop_last=True\) or .*'pooled'"
        for mode in (False, True):
            with pytest.raises(ValueError, match=text):
                layer.train(mode)(torch.randn(2, 6, 3))
            assert_same_statistics(layer, before)

    def test_slots_are_not_looked_at_without_their_flags(self):
        layer = trained(torch.randn(4, 6), feature_population="slot")
        assert layer(torch.randn(2, 6)).isfinite().all()


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


class TestState:
    def test_a_population_statistic_may_be_parametrized(self):
        x = torch.randn(4, 6, 3)
        layer, expected = trained(x, flags="TTTT"), trained(x, flags="TTTT")
        with torch.no_grad():
            for name in RUNNING:
                getattr(expected, name).mul_(2)
                nn.utils.parametrize.register_parametrization(layer, name, Doubled())
            assert torch.equal(layer(x), expected(x))

    @pytest.mark.parametrize("route", ["state_dict", "weights_only file", "deepcopy", "pickle", "torch.save", "assign"])
    @pytest.mark.parametrize("feature_population", ["pooled", "slot"])
    def test_a_copy_is_the_same_layer(self, route: str, feature_population: str):
        keywords = {"feature_population": feature_population}
        layer = BatchLayerNorm(6, flags="TFTF", eps=1e-2, population="ema", momentum=0.2, **keywords)
        nn.init.normal_(layer.weight)
        layer.start_epoch(7)
        layer(torch.randn(4, 6, 3))
        layer(torch.randn(4, 6, 3))
        file = io.BytesIO()
        if route == "deepcopy":
            twin = copy.deepcopy(layer)
        elif route == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        elif route == "torch.save":
            torch.save(layer, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            state = layer.state_dict()
            if route == "weights_only file":
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
            device = "meta" if route == "assign" else "cpu"
            twin = BatchLayerNorm(6, device=device, **keywords)
            state = {name: copy.deepcopy(value) for name, value in state.items()}
            assert str(twin.load_state_dict(state, assign=route == "assign")) == "<All keys matched successfully>"
        x = torch.randn(4, 6, 3)
        assert_same_statistics(twin, running(layer))
        assert (twin.flags, twin.eps, twin.population, twin.momentum, twin.epoch) == (
            layer.flags,
            layer.eps,
            layer.population,
            layer.momentum,
            7,
        )
        assert torch.equal(twin.eval()(x), layer.eval()(x))
        # And goes on alike, on its own memory.
        before = running(layer)
        twin.train()(x)
        assert_same_statistics(layer, before)
        layer.train()(x)
        assert_same_statistics(twin, running(layer))
        assert (twin.num_samples, twin.nominal_batch_size) == (12, 4)
        assert not twin.start_epoch(7)

    def test_extra_state_holds_plain_types_only(self):
        def plain(value: object) -> bool:
            if isinstance(value, dict):
                return all(isinstance(key, str) and plain(item) for key, item in value.items())
            if isinstance(value, list):
                return all(plain(item) for item in value)
            return value is None or type(value) in (bool, int, float, str)

        assert plain(BatchLayerNorm((4, 6), feature_dim=-1, flags="FFFF").get_extra_state())

    def test_an_empty_population_loads_too(self):
        layer = trained(torch.randn(4, 6))
        layer.load_state_dict(BatchLayerNorm(6).state_dict())
        assert not layer.has_population

    def test_a_population_of_another_size_replaces_what_is_there(self):
        source, target = trained(torch.randn(4, 6, 5)), trained(torch.randn(4, 6, 3))
        target.load_state_dict(source.state_dict())
        assert_same_statistics(target, running(source))

    def test_a_layer_that_was_loaded_under_inference_mode_can_train(self):
        layer = BatchLayerNorm(6)
        with torch.inference_mode():
            layer.load_state_dict(trained(torch.randn(4, 6, 5)).state_dict())
        layer(torch.randn(4, 6, 5)).sum().backward()
        assert layer.num_samples == 8

    @pytest.mark.parametrize(
        "move",
        [
            lambda layer: layer.to(torch.bfloat16),
            lambda layer: layer.bfloat16(),
            lambda layer: layer.half(),
            lambda layer: layer.to("cpu", torch.float16),
        ],
        ids=["to bf16", "bfloat16", "half", "to fp16"],
    )
    def test_statistics_and_counts_keep_their_precision_in_a_half_model(self, move):
        layer = trained(torch.randn(300, 6, 3), torch.randn(1, 6, 3)).train()
        before = running(layer)
        move(layer)
        dtype = layer.weight.dtype
        assert dtype.itemsize == 2
        assert_same_statistics(layer, before)
        assert (layer.num_samples.dtype, layer.num_samples.item()) == (torch.int64, 301)
        y = layer(torch.randn(4, 6, 3).to(dtype))
        y.sum().backward()
        assert (y.dtype, layer.weight.grad.dtype) == (dtype, dtype)
        assert {stat.dtype for stat in running(layer)} == {torch.float32}

    def test_double_and_back(self):
        layer = trained(torch.randn(4, 6)).double()
        assert {stat.dtype for stat in running(layer)} == {torch.float64}
        assert layer.train()(torch.randn(4, 6).double()).dtype == torch.float64
        assert {stat.dtype for stat in running(layer)} == {torch.float64}
        assert {stat.dtype for stat in running(layer.float())} == {torch.float32}

    @pytest.mark.parametrize(
        ("dtype", "kept"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str
    )
    def test_dtype_argument(self, dtype: torch.dtype, kept: torch.dtype):
        layer = BatchLayerNorm(6, dtype=dtype)
        assert layer.weight.dtype == dtype
        layer(torch.randn(4, 6).to(dtype))
        assert {stat.dtype for stat in running(layer)} == {kept}

    def test_meta_device(self):
        layer = BatchLayerNorm(6, device="meta")
        assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
        assert layer(torch.randn(4, 6, 3, device="meta")).shape == (4, 6, 3)
        assert layer.running_batch_mean.shape == (6, 3)
        layer.half().float().to_empty(device="cpu").reset_parameters()
        x = torch.randn(4, 6, 3)
        assert torch.equal(layer(x), BatchLayerNorm(6)(x))

    def test_repr_says_what_is_not_the_default(self):
        assert repr(BatchLayerNorm(6)) == (
            "BatchLayerNorm(6, feature_dim=1, eps=0.001, flags=TTFF, statistics=per_position)"
        )
        text = repr(
            BatchLayerNorm(
                6,
                feature_dim=-1,
                eps=1e-5,
                affine=False,
                flags="FFFF",
                feature_population="slot",
                population="ema",
                sync=True,
                batch_size=25,
                sample_dim=1,
            )
        )
        assert text == (
            "BatchLayerNorm(6, feature_dim=-1, eps=1e-05, sample_dim=1, affine=False, flags=FFFF, "
            "statistics=per_position, feature_population=slot, population=ema, sync=True, batch_size=25)"
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "keywords", "text"),
        [
            ((0,), {}, r"num_features must be 1 or more, got \(0,\); call for example BatchLayerNorm\(64\)"),
            (((),), {}, r"num_features must be 1 or more, got \(\)"),
            ((6,), {"eps": 0}, "eps must be above 0, got 0"),
            ((6,), {"eps": -1e-3}, "eps must be above 0, got -0.001"),
            ((6,), {"momentum": 0.0}, r"momentum is the weight of the new value, above 0 .* got 0\.0"),
            ((6,), {"momentum": 1.5}, r"momentum is the weight of the new value, .*at most 1, got 1\.5"),
            ((6,), {"batch_size": 0}, "batch_size must be at least 1 or None .* got 0"),
            ((6,), {"statistics": "global"}, "statistics must be one of 'per_position', 'per_channel', got 'global'"),
            ((6,), {"feature_population": "all"}, "feature_population must be one of 'pooled', 'slot', got 'all'"),
            ((6,), {"population": "mean"}, "population must be one of 'epoch', 'ema', 'precise', got 'mean'"),
            ((6,), {"flags": "TTTX"}, "four letters T .* got 'TTTX'"),
            (((5, 6),), {}, r"feature_dim must be -1, got 1; call BatchLayerNorm\(\(5, 6\), feature_dim=-1\)"),
            (
                (6,),
                {"statistics": "per_channel", "feature_population": "slot"},
                "needs fixed sizes: got it with statistics='per_channel'; use .*'per_position' or .*'pooled'",
            ),
        ],
    )
    def test_arguments(self, arguments: tuple, keywords: dict, text: str):
        with pytest.raises(ValueError, match=text):
            BatchLayerNorm(*arguments, **keywords)

    @pytest.mark.parametrize(
        ("keywords", "x", "error", "text"),
        [
            ({}, torch.randn(4, 5), ValueError, r"6 features along axis 1, got 5 .*\(4, 5\); build it for 5 features"),
            ({}, torch.randn(4, 5, 6), ValueError, r"got 5 in shape \(4, 5, 6\); feature_dim=2 fits this input"),
            ({}, torch.randn(6), ValueError, r"got an input of shape \(6,\); .*unsqueeze\(0\)"),
            ({}, torch.ones(4, 6, dtype=torch.int64), TypeError, r"floating-point input, got torch.int64"),
            ({"feature_dim": 2}, torch.randn(4, 6), ValueError, "got feature_dim=2 for an input"),
            ({"sample_dim": 1}, torch.randn(4, 6), ValueError, r"sample_dim=1, feature_dim=1 .*pass \(T, N, C\)"),
            ({"sample_dim": 2}, torch.randn(4, 6), ValueError, r"sample_dim must be an axis of the input .*\(4, 6\)"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_inputs(self, keywords: dict, x: Tensor, error: type[Exception], text: str, training: bool):
        with pytest.raises(error, match=text):
            BatchLayerNorm(6, **keywords).train(training)(x)

    @pytest.mark.parametrize("shape", [(8, 6, 5), (5, 6), (8, 5)], ids=str)
    def test_several_feature_axes_that_do_not_fit(self, shape: tuple[int, ...]):
        with pytest.raises(
            ValueError, match=r"must end in the feature axes \(5, 6\) .* got .*; pass shape \(N, .*5, 6"
        ):
            BatchLayerNorm((5, 6), feature_dim=-1)(torch.randn(shape))

    @pytest.mark.parametrize(
        ("norm", "text"),
        [
            (nn.BatchNorm1d(6), "holds a BatchNorm there .*running_mean.*"),
            (nn.LayerNorm(6), "holds a LayerNorm or the like there .*weight.*"),
        ],
        ids=["BatchNorm", "LayerNorm"],
    )
    def test_another_norms_checkpoint(self, norm: nn.Module, text: str):
        state = nn.Sequential(norm).state_dict()
        text = (
            rf"(?s)0 is a BatchLayerNorm, but the checkpoint {text}load the checkpoint first and swap then: "
            r"model.load_state_dict\(...\); swap_norms_\(model\)"
        )
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=text):
                nn.Sequential(BatchLayerNorm(6)).load_state_dict(state, strict=strict)

    @pytest.mark.parametrize(
        ("theirs", "ours", "text"),
        [
            ({"statistics": "per_channel"}, {}, "statistics='per_channel' there, 'per_position' here; build it with"),
            ({"feature_dim": -1}, {}, "feature_dim=-1 there, 1 here; build it with feature_dim=-1"),
            ({"feature_population": "slot"}, {}, "feature_population='slot' there, 'pooled' here"),
            ({}, {"sample_dim": 1}, "sample_dim=0 there, 1 here"),
            ({}, {"affine": False}, "affine=True there, False here"),
            ({}, {"bias": False}, "bias=True there, False here"),
        ],
    )
    def test_a_checkpoint_of_another_structure(self, theirs: dict, ours: dict, text: str):
        state = nn.Sequential(BatchLayerNorm(6, **theirs)).state_dict()
        with pytest.raises(RuntimeError, match=f"0: the checkpoint's BatchLayerNorm must have the structure .*{text}"):
            nn.Sequential(BatchLayerNorm(6, **ours)).load_state_dict(state)

    def test_a_checkpoint_with_other_features(self):
        state = trained(torch.randn(4, 7, 3)).state_dict()
        layer = BatchLayerNorm(6)
        text = r"(?s)num_features=7 there, 6 here.*running_batch_mean must be empty or hold 6 features, got .*\(7, 3\)"
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(state)
        assert not layer.has_population

    @pytest.mark.parametrize(
        "damage",
        [
            lambda extra: None,
            lambda extra: "settings",
            lambda extra: {},
            lambda extra: {"config": extra["config"]},
            lambda extra: {"config": {"num_features": 6}, "epoch": 0},
            lambda extra: torch.zeros(3),
        ],
        ids=["None", "string", "empty", "no epoch", "few settings", "tensor"],
    )
    def test_damaged_extra_state(self, damage):
        state = BatchLayerNorm(6).state_dict()
        state["_extra_state"] = damage(state["_extra_state"])
        with pytest.raises(
            RuntimeError, match=r"_extra_state must be the dict that BatchLayerNorm writes, got .*damaged"
        ):
            BatchLayerNorm(6).load_state_dict(state)

    def test_damaged_flags(self):
        state = BatchLayerNorm(6).state_dict()
        state["_extra_state"]["config"]["flags"] = "TTXX"
        with pytest.raises(RuntimeError, match=r"flags are damaged: .*four letters T .* got 'TTXX'"):
            BatchLayerNorm(6).load_state_dict(state)


class TestCompilers:
    @pytest.mark.parametrize(
        ("statistics", "population", "flags"),
        [
            ("per_position", "epoch", "TTFF"),
            ("per_position", "ema", "TTTT"),
            ("per_channel", "epoch", "FFFF"),
            ("per_channel", "ema", "TFFT"),
        ],
    )
    def test_compiled_layer_trains_and_infers_as_the_eager_one(self, statistics: str, flags: str, population: str):
        torch._dynamo.reset()
        eager = BatchLayerNorm(6, statistics=statistics, flags=flags, population=population)
        layer = copy.deepcopy(eager)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for epoch in range(2):
            for module in (eager, layer):
                module.start_epoch(epoch)
                module.train()
            for samples in (4, 7, 5):
                x = torch.randn(samples, 6, 3)
                outputs = [module(x) for module in (eager, compiled)]
                assert_close(outputs[1], outputs[0])
                for y in outputs:
                    y.square().sum().backward()
            eager.eval(), layer.eval()
            for ours, theirs in zip(running(layer), running(eager), strict=True):
                assert_close(ours, theirs)
            assert layer.num_samples == 16
            assert layer.nominal_batch_size == 7
            for samples in (2, 3):
                x = torch.randn(samples, 6, 3)
                assert_close(compiled(x), eager(x))
        assert_close(layer.weight.grad, eager.weight.grad)

    def test_export_for_inference_with_any_batch_size(self, layout: Layout):
        layer = BatchLayerNorm(7, feature_dim=layout.feature_dim, flags="TFFT")
        layer(layout.input())
        layer.eval()
        dynamic = {0: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(layer, (layout.input(),), dynamic_shapes=(dynamic,)).module()
        for samples in (2, 5, 50):
            x = layout.input(N=samples)
            assert_close(exported(x), layer(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_in_a_network(self, dtype: torch.dtype):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), BatchLayerNorm(6), nn.Conv2d(6, 2, 3))
        model.to(memory_format=torch.channels_last)
        seen: list[Tensor] = []
        model[1].register_forward_hook(lambda module, args, output: seen.extend([*args, output]))
        x = torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)
        for mode in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = model.train(mode)(x)
            assert y.dtype == dtype
            for value in seen:
                assert value.dtype == dtype
                assert value.is_contiguous(memory_format=torch.channels_last)
            seen.clear()
        assert model[1].running_batch_mean.dtype == model[1].weight.dtype == torch.float32
