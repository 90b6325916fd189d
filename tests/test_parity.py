"""The layer gives the authors' figures: outputs, gradients, population statistics, inference under all 16 flags."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES, assert_close
from torch import Tensor

from lightning_bln import BatchLayerNorm, StatFlags, set_flags_, start_epoch
from lightning_bln.layer import RUNNING

COPIED = Path(__file__).parent / "golden"
# All of them, where the reference data stands beside the repository.
REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "golden"
FILES = {path.stem: path for folder in (REFERENCE, COPIED) for path in sorted(folder.glob("*.npz"))}

# From the files' channels-last arrays to the layer's input and back.
VARIANTS = {
    "channels-last": (-1, lambda t: t, lambda t: t),
    "channels-first": (1, lambda t: t.movedim(-1, 1).contiguous(), lambda t: t.movedim(1, -1)),
    "channels-last-memory": (1, lambda t: t.movedim(-1, 1), lambda t: t.movedim(1, -1)),
}
CASES = [
    (name, variant)
    for name in sorted(FILES)
    for variant in VARIANTS
    if not (name.startswith("dense") and variant != "channels-last")
    if variant != "channels-last-memory" or name.startswith("image")
]


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(FILES[name]) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@functools.cache
def ours(name: str, variant: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the layer makes of a file's inputs, under the file's keys and in its shapes."""
    data = {key: value.to(dtype) if value.is_floating_point() else value for key, value in golden(name).items()}
    feature_dim, to_layer, back = VARIANTS[variant]
    B, C = data["x_eval"].shape[0], data["gamma"].numel()
    layer = BatchLayerNorm(C, feature_dim=feature_dim, feature_population="slot", batch_size=B, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(data["gamma"])
        layer.bias.copy_(data["beta"])
    found: dict[str, list[Tensor]] = {}
    for epoch in range(data["x"].shape[0]):
        start_epoch(layer, epoch)
        layer.train()
        batches: dict[str, list[Tensor]] = {}
        for x, dy in zip(data["x"][epoch], data["dy"][epoch], strict=True):
            x = to_layer(x).detach().requires_grad_()
            if variant == "channels-last-memory":
                assert x.is_contiguous(memory_format=torch.channels_last)
            y = layer(x)
            assert y.stride() == x.stride()
            gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], to_layer(dy))
            for key, value in zip(("y", "dx", "dgamma", "dbeta"), (y, *gradients), strict=True):
                batches.setdefault(key, []).append(back(value.detach()) if value.ndim > 1 else value)
        layer.eval()
        batches["y_eval"] = []
        for flags in data["flags"].tolist():
            set_flags_(layer, flags)
            batches["y_eval"].append(back(layer(to_layer(data["x_eval"])).detach()))
        for key, values in batches.items():
            found.setdefault(key, []).append(torch.stack(values))
        batch_mean, batch_var, feature_mean, feature_var = (getattr(layer, running).clone() for running in RUNNING)
        for key, value in (("mean", batch_mean), ("var", batch_var)):
            found.setdefault(f"moving_batch_{key}", []).append(back(value.unsqueeze(0)))
        for key, value in (("mean", feature_mean), ("var", feature_var)):
            found.setdefault(f"moving_feature_{key}", []).append(value.unsqueeze(-1))
    return {key: torch.stack(values) for key, values in found.items()}


@pytest.mark.parametrize(("name", "variant"), CASES)
class TestParity:
    @pytest.mark.parametrize("key", ["y", "dx", "dgamma", "dbeta"])
    def test_training_outputs_and_gradients(self, name: str, variant: str, key: str):
        assert golden(name)[key].isfinite().all()
        actual, expected = ours(name, variant)[key], golden(name)[key]
        # The files were computed in float32 too, and at B = 2 their dx is up to 4e-5 off the exact value. Where they
        # are off, we may differ from them by as much more.
        error = (expected.double() - ours(name, variant, torch.float64)[key]).abs()
        assert error.max() < 1e-4
        allowed = TOLERANCES[torch.float32]["atol"] + TOLERANCES[torch.float32]["rtol"] * expected.abs() + error
        assert ((actual - expected).abs() <= allowed).all()

    @pytest.mark.parametrize("statistic", ["batch_mean", "batch_var", "feature_mean", "feature_var"])
    def test_population_statistics_after_each_epoch(self, name: str, variant: str, statistic: str):
        actual, expected = ours(name, variant)[f"moving_{statistic}"], golden(name)[f"moving_{statistic}"]
        assert actual.isfinite().all()
        assert actual.shape == expected.shape
        # The reference divides by B - 1: its variances, and nothing else, are not finite at B = 1.
        assert bool(expected.isfinite().all()) == (statistic.endswith("mean") or "_b1_" not in name)
        if expected.isfinite().all():
            assert_close(actual, expected)

    def test_inference_under_all_flags(self, name: str, variant: str):
        actual, expected = ours(name, variant)["y_eval"], golden(name)["y_eval"]
        assert actual.shape == expected.shape
        assert actual.isfinite().all()
        finite = expected.isfinite()
        assert_close(actual[finite], expected[finite])


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_setting_is_compared_but_those_where_the_reference_is_nan(name: str):
    """At B = 1 the reference's batch variance is NaN, and so are the 8 settings that use it."""
    codes = [StatFlags.parse(row).code for row in golden(name)["flags"].tolist()]
    assert sorted(codes) == sorted(flags.code for flags in StatFlags.all())
    finite = {code for row, code in enumerate(codes) if golden(name)["y_eval"][:, row].isfinite().all()}
    assert set(codes) - finite == {code for code in codes if "_b1_" in name and code[1] == "T"}


def test_a_dense_file_with_one_sample_and_an_image_file_are_always_there():
    assert {path.stem for path in COPIED.glob("*.npz")} == {"dense_b1_c9", "image_b4_h5_w3_c6"}


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs the reference data beside the repository")
@pytest.mark.parametrize("copy", sorted(COPIED.glob("*.npz")), ids=lambda path: path.stem)
def test_the_copied_files_are_the_reference(copy: Path):
    assert copy.read_bytes() == (REFERENCE / copy.name).read_bytes()
