"""`apply_flags`: the flags change in the copy, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_bln import BLNSwap, StatFlags, load_swapped_checkpoint, set_flags_, swap_norms_
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.apply import apply_flags, checkpoint_flags, read_checkpoint
from tests.lit import LitNet, loader, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a swapped model after one epoch with momentum, and with more epochs to come."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    run = trainer(BLNSwap(), ModelCheckpoint(folder, "best", save_last=False), max_epochs=1)
    run.fit(LitNet(), loader(), loader(seed=1))
    return folder / "best.ckpt"


def same(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ; tensors bit for bit, containers in type and order."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        equal = equal and one.contiguous().flatten().view(torch.uint8).equal(
            other.contiguous().flatten().view(torch.uint8)
        )
        return [] if equal else [path]
    if isinstance(one, dict):
        if list(one) != list(other) or vars_of(one) != vars_of(other):
            return [path]
        return [place for key in one for place in same(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [path]
        return [place for i, pair in enumerate(zip(one, other, strict=True)) for place in same(*pair, f"{path}/{i}")]
    return [] if one == other else [path]


def vars_of(value: Any) -> dict[str, Any]:
    # An OrderedDict of module.state_dict() has the versions of its modules as an attribute.
    return getattr(value, "__dict__", {})


def test_only_the_flags_change(trained: Path, tmp_path: Path):
    before = trained.read_bytes()
    chosen = apply_flags(trained, "FTFT", tmp_path / "chosen.ckpt")
    assert chosen == {"net.1": StatFlags.parse("FTFT"), "net.5": StatFlags.parse("FTFT")}
    assert trained.read_bytes() == before
    old, new = read_checkpoint(trained), read_checkpoint(tmp_path / "chosen.ckpt")
    assert same(old, new) == [f"/state_dict/net.{i}._extra_state/config/flags" for i in (1, 5)]
    assert old["optimizer_states"][0]["state"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["chosen.ckpt"]


def test_the_copy_loads_and_computes_with_the_flags(trained: Path, tmp_path: Path):
    apply_flags(trained, {"net.1": "FFFF", "net.5": "TTTT"}, tmp_path / "chosen.ckpt")
    model = load_swapped_checkpoint(LitNet, tmp_path / "chosen.ckpt").eval()
    assert {name: layer.flags.code for name, layer in bln_layers(model).items()} == {"net.1": "FFFF", "net.5": "TTTT"}
    by_hand = load_swapped_checkpoint(LitNet, trained).eval()
    set_flags_(by_hand, {"net.1": "FFFF", "net.5": "TTTT"})
    x = next(iter(loader(seed=2)))[0]
    torch.testing.assert_close(model(x), by_hand(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
def test_training_resumes_from_the_copy_as_from_the_original(trained: Path, tmp_path: Path):
    apply_flags(trained, "FFFF", tmp_path / "chosen.ckpt")
    weights = []
    for path in (trained, tmp_path / "chosen.ckpt"):
        model = LitNet()
        run = trainer(BLNSwap(), ModelCheckpoint(tmp_path / "later"), max_epochs=2)
        run.fit(model, loader(), loader(seed=1), ckpt_path=path)
        assert run.current_epoch == 2
        weights.append(model.state_dict())
    assert {layer.flags.code for layer in bln_layers(model).values()} == {"FFFF"}
    assert [path for path in same(dict(weights[0]), dict(weights[1])) if not path.endswith("/flags")] == []


@pytest.mark.parametrize("setting", ["1=FFFF,2=TFTF", {"1": "FFFF", "2": (True, False, True, False)}])
def test_a_shared_layer_has_its_flags_under_all_its_names(tmp_path: Path, setting: Any):
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.BatchNorm1d(3), nn.Linear(3, 3), norm)
    swap_norms_(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.ckpt")
    assert list(checkpoint_flags(read_checkpoint(tmp_path / "a.ckpt"))) == list(bln_layers(model)) == ["1", "2"]
    apply_flags(tmp_path / "a.ckpt", setting, tmp_path / "b.ckpt")
    states = read_checkpoint(tmp_path / "b.ckpt")["state_dict"]
    assert {name: states[f"{name}._extra_state"]["config"]["flags"] for name in "124"} == {
        "1": "FFFF",
        "2": "TFTF",
        "4": "FFFF",
    }
    model.load_state_dict(states)
    assert [layer.flags.code for layer in bln_layers(model).values()] == ["FFFF", "TFTF"]


def test_averaged_weights_and_another_models_state(tmp_path: Path):
    model, teacher = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    swap_norms_(model)
    swap_norms_(teacher)
    state = model.state_dict()
    torch.save(
        {"state_dict": state, "current_model_state": model.state_dict(), "teacher": teacher.state_dict()},
        tmp_path / "a.ckpt",
    )
    apply_flags(tmp_path / "a.ckpt", "FFFF", tmp_path / "b.ckpt")
    written = read_checkpoint(tmp_path / "b.ckpt")
    found = {
        name: [s["config"]["flags"] for k, s in part.items() if k.endswith("_extra_state")]
        for name, part in written.items()
    }
    assert found == {"state_dict": ["FFFF"], "current_model_state": ["FFFF"], "teacher": ["TTFF"]}


def test_a_model_that_is_one_layer(tmp_path: Path):
    from lightning_bln import BatchLayerNorm

    torch.save({"state_dict": BatchLayerNorm(3).state_dict()}, tmp_path / "a.ckpt")
    assert apply_flags(tmp_path / "a.ckpt", "FFFF", tmp_path / "b.ckpt") == {"": StatFlags.parse("FFFF")}


def test_the_checkpoint_itself_can_be_replaced(trained: Path, tmp_path: Path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(trained.read_bytes())
    with pytest.raises(
        FileExistsError, match=r"must be a new file, got '.*a.ckpt', which exists; name another or pass"
    ):
        apply_flags(path, "FFFF", path)
    apply_flags(path, "FFFF", path, overwrite=True)
    assert {flags.code for flags in checkpoint_flags(read_checkpoint(path)).values()} == {"FFFF"}


def test_a_failed_write_leaves_the_older_file(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "chosen.ckpt").write_text("older")

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        apply_flags(trained, "FFFF", tmp_path / "chosen.ckpt", overwrite=True)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("chosen.ckpt", "older")]


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("planted"), "code ran")


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": Planted()}, "bad.ckpt")
    with pytest.raises(ValueError, match=r"must be a complete file of plain types, got bad.ckpt, which cannot be read"):
        apply_flags("bad.ckpt", "FFFF", "out.ckpt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.ckpt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "must be a complete file of plain types"),
        (b"", "must be a complete file of plain types"),
        ([1, 2], "must hold a state_dict, got .*a.ckpt with list"),
        ({"epoch": 3}, r"must hold a state_dict, got .*a.ckpt with dict\['epoch'\]"),
        ({"state_dict": {"w": 1}}, "Flags belong to BatchLayerNorm layers, got .*a.ckpt, whose 1 entries hold none"),
        ({"state_dict": {"norm._extra_state": {"config": {}, "epoch": 0}}}, "Flags belong to BatchLayerNorm layers"),
    ],
)
def test_files_that_are_no_swapped_checkpoints(tmp_path: Path, content: Any, message: str):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        apply_flags(path, "FFFF", tmp_path / "b.ckpt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_part_of_a_file(trained: Path, tmp_path: Path):
    (tmp_path / "a.ckpt").write_bytes(trained.read_bytes()[:3000])
    for mmap in (False, True):
        with pytest.raises(ValueError, match="must be a complete file of plain types"):
            read_checkpoint(tmp_path / "a.ckpt", mmap=mmap)


def test_settings_that_do_not_fit(trained: Path, tmp_path: Path):
    out = tmp_path / "out.ckpt"
    with pytest.raises(ValueError, match=r"missing: net.5; unknown: net.6"):
        apply_flags(trained, "net.1=TTFF,net.6=TTFF", out)
    with pytest.raises(ValueError, match="four letters"):
        apply_flags(trained, "TTX", out)
    with pytest.raises(FileNotFoundError, match=r"must be a file, got 'none.ckpt', which is none"):
        apply_flags("none.ckpt", "TTFF", out)
    with pytest.raises(FileNotFoundError, match=r"The folder of .* must exist"):
        apply_flags(trained, "TTFF", tmp_path / "no" / "out.ckpt")
    with pytest.raises(ValueError, match=r"must be a file, got the folder .*; write for example .*chosen.ckpt"):
        apply_flags(trained, "TTFF", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_lightning():
    code = "import sys; import lightning_bln.tuning.apply; print({'lightning', 'optuna'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
