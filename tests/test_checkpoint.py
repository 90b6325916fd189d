"""`load_swapped_checkpoint`: full, weights-only, damaged and foreign checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lit import LitNet, loader, trainer
from torch import nn

from lightning_bln import BLNSwap, load_swapped_checkpoint, set_flags_
from lightning_bln.surgery import bln_layers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.LightningModule, Path, Path]:
    """A trained model with one layer's flags changed, and its checkpoint, full and weights-only."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run = trainer(BLNSwap(statistics="per_channel", flags="FFTT"), max_epochs=1)
    run.fit(LitNet("configure_model"), loader(), loader(24, seed=1))
    set_flags_(run.lightning_module, {"net.5": "TFTF"})
    full, weights = folder / "full.ckpt", folder / "weights.ckpt"
    run.save_checkpoint(full)
    run.save_checkpoint(weights, weights_only=True)
    return run.lightning_module, full, weights


@pytest.mark.parametrize("kind", ["full", "weights"])
def test_the_rebuilt_model_is_the_trained_one(kind: str, trained: tuple[pl.LightningModule, Path, Path]) -> None:
    model, full, weights = trained
    rebuilt = load_swapped_checkpoint(LitNet, full if kind == "full" else weights)
    assert {name: layer.flags.code for name, layer in bln_layers(rebuilt).items()} == {
        "net.1": "FFTT",
        "net.5": "TFTF",
        "last": "FFTT",
    }
    assert [layer.statistics for layer in bln_layers(rebuilt).values()] == ["per_channel"] * 3
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), model.eval()(x))


def test_arguments_reach_the_class(trained: tuple[pl.LightningModule, Path, Path]) -> None:
    assert load_swapped_checkpoint(LitNet, trained[1], learning_rate=0.5, map_location="cpu").learning_rate == 0.5


def test_a_model_that_has_its_own_bln_layers_is_loaded_as_it_is(tmp_path: Path) -> None:
    from lightning_bln import BatchLayerNorm

    class Own(LitNet):
        def __init__(self) -> None:
            super().__init__(first=BatchLayerNorm(4))

    run = trainer(BLNSwap(), max_epochs=1)
    run.fit(Own(), loader(), loader(24, seed=1))
    run.save_checkpoint(tmp_path / "own.ckpt")
    rebuilt = load_swapped_checkpoint(Own, tmp_path / "own.ckpt")
    assert torch.equal(rebuilt.net[1].running_batch_mean, run.lightning_module.net[1].running_batch_mean)


def test_lightnings_own_loading_fails_and_names_the_keys(trained: tuple[pl.LightningModule, Path, Path]) -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"net\.1\._extra_state"'):
        LitNet.load_from_checkpoint(trained[1])


def test_a_batchnorm_checkpoint_into_a_swapped_model_names_the_order_that_works(tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(LitNet(), loader(), loader(24, seed=1))
    run.save_checkpoint(tmp_path / "bn.ckpt")
    with pytest.raises(RuntimeError, match=r"net\.1 is a BatchLayerNorm.*holds a BatchNorm.*swap_norms_\(model\)"):
        trainer(BLNSwap()).test(LitNet(), loader(), ckpt_path=tmp_path / "bn.ckpt")
    with pytest.raises(ValueError, match=r"must be of a model swapped.*load_from_checkpoint"):
        load_swapped_checkpoint(LitNet, tmp_path / "bn.ckpt")


class Smaller(LitNet):
    """Has no norm where the checkpoint holds one."""

    def __init__(self, **_: Any) -> None:
        super().__init__(first=nn.Identity())


class Wider(LitNet):
    """Has a norm of another size where the checkpoint holds one."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.net[0] = nn.Conv2d(1, 4, 3)
        self.net[5] = nn.LayerNorm(7)


class TestBadInput:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_swapped_checkpoint(LitNet, tmp_path / "none.ckpt")

    @pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
    def test_a_damaged_file(self, damage: str, trained: tuple[pl.LightningModule, Path, Path], tmp_path: Path) -> None:
        content = trained[1].read_bytes()
        path = tmp_path / "damaged.ckpt"
        middle = len(content) // 2
        damaged = {
            "truncated": content[:middle],
            "text": b"every checkpoint is a zip file, and this is none",
            "empty": b"",
            "flipped": bytes(255 - byte for byte in content[:4096]) + content[4096:],
        }
        path.write_bytes(damaged[damage])
        with pytest.raises(
            ValueError, match=r"complete Lightning checkpoint.*damaged\.ckpt.*pass the path of a \.ckpt"
        ):
            load_swapped_checkpoint(LitNet, path)

    def test_a_file_that_would_run_code(self, tmp_path: Path) -> None:
        path = tmp_path / "code.ckpt"
        torch.save({"state_dict": {}, "evil": Path}, path)
        with pytest.raises(ValueError, match="plain types"):
            load_swapped_checkpoint(LitNet, path)

    def test_arguments_that_are_fixed(self, trained: tuple[pl.LightningModule, Path, Path]) -> None:
        with pytest.raises(TypeError, match=r"always loads strictly.*\['strict'\]"):
            load_swapped_checkpoint(LitNet, trained[1], strict=False)

    def test_no_state_dict(self, tmp_path: Path) -> None:
        path = tmp_path / "other.ckpt"
        torch.save({"weights": torch.ones(2)}, path)
        with pytest.raises(ValueError, match=r"must hold a state_dict.*\['weights'\]"):
            load_swapped_checkpoint(LitNet, path)

    def test_another_model(self, trained: tuple[pl.LightningModule, Path, Path]) -> None:
        with pytest.raises(ValueError, match=r"BatchLayerNorm at 'net\.1'.*Identity"):
            load_swapped_checkpoint(Smaller, trained[1])
        with pytest.raises(ValueError, match=r"size mismatch for net\.5"):
            load_swapped_checkpoint(Wider, trained[1])

    def test_damaged_settings_of_a_layer(self, trained: tuple[pl.LightningModule, Path, Path], tmp_path: Path) -> None:
        checkpoint = torch.load(trained[1], weights_only=True)
        checkpoint["state_dict"]["net.1._extra_state"]["config"]["flags"] = "TTQQ"
        torch.save(checkpoint, tmp_path / "flags.ckpt")
        with pytest.raises(ValueError, match="'TTQQ'"):
            load_swapped_checkpoint(LitNet, tmp_path / "flags.ckpt")
        checkpoint["state_dict"]["net.1._extra_state"] = [1, 2]
        torch.save(checkpoint, tmp_path / "state.ckpt")
        with pytest.raises(ValueError, match=r"'net\.1' with _extra_state \[1, 2\]"):
            load_swapped_checkpoint(LitNet, tmp_path / "state.ckpt")
