"""The zoo through torch.hub, from a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from tests.zoo.example_weights import write_example
from zoo import _weights

ROOT = Path(__file__).parents[2]


def load(*args: object, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), *args, source="local", **kwargs)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of one model."""
    monkeypatch.setattr(_weights, "FOLDER", tmp_path / "weights")
    write_example(tmp_path / "weights")
    return tmp_path / "weights"


def test_entry_points_are_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.hub lists repositories of GitHub only, and this one from its cache.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    cached = tmp_path / "hub" / "lightning-bln_lightning-bln_main"
    cached.parent.mkdir()
    cached.symlink_to(ROOT, target_is_directory=True)
    repository = {"github": "lightning-bln/lightning-bln:main", "trust_repo": True, "skip_validation": True}
    assert torch.hub.list(**repository, verbose=False) == sorted(["create_model", *zoo.list_models()])
    assert 'zoo.create_model("resnet20_bln", ...)' in torch.hub.help(**repository, model="resnet20_bln")


def test_new_models() -> None:
    model = load("resnet20_bn", num_classes=3)
    assert isinstance(model, zoo.resnet.CifarResNet)
    assert model.fc.weight.shape == (3, 64)
    assert isinstance(load("create_model", "paper_cnn_ln"), zoo.paper.PaperCNN)


def test_trained_models(folder: Path) -> None:
    (x,), output = zoo.get_weights("paper_cnn_bln").golden()
    for model in (
        load("paper_cnn_bln", pretrained=True),
        load("paper_cnn_bln", weights="noise"),
        load("create_model", "paper_cnn_bln.noise"),
        load("create_model", "paper_cnn_bln", weights="noise"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), output, atol=1e-5, rtol=1e-5)
    assert load("paper_cnn_bln", pretrained=True, num_classes=7).fc3.weight.shape == (7, 84)


def test_pretrained_needs_a_choice_where_there_are_several(folder: Path) -> None:
    write_example(folder, "paper_cnn_bln.other")
    with pytest.raises(
        ValueError, match=r"got 'paper_cnn_bln', which has 'paper_cnn_bln.noise', 'paper_cnn_bln.other'"
    ):
        load("paper_cnn_bln", pretrained=True)
    with pytest.raises(ValueError, match="no weights named 'paper_cnn_ln'; did you mean"):
        load("paper_cnn_ln", pretrained=True)
