"""From a checkpoint to weights: what is rounded, how files are written, and the command on real data."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

import zoo
from lightning_bln import set_flags_
from lightning_bln.tuning import score_flags
from lightning_bln.tuning.table import CellScore, ScoreTable
from tests.zoo.example_weights import metadata, write_example
from zoo import _weights, pack
from zoo._weights import as_float32, checksums
from zoo.data import Digits, IMDb
from zoo.lit import LitClassifier

NAME = "cnn_bln.digits"
RECIPE = """
seed_everything: 3
trainer:
  max_epochs: 1
model:
  class_path: zoo.lit.LitClassifier
  init_args: {arguments}
data:
  class_path: zoo.data.{data}
  init_args:
    batch_size: 4
bln: true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights in place of the zoo's."""
    monkeypatch.setattr(_weights, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def train(folder: Path, data: pl.LightningDataModule, module: LitClassifier, epochs: int = 1) -> Path:
    """A checkpoint of a short training, saved as recipes do."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return folder / "last.ckpt"


def recipe(folder: Path, model: str, data: str, **arguments: Any) -> Path:
    path = folder / f"{model}.yaml"
    path.write_text(RECIPE.format(arguments=json.dumps({"model": model, **arguments}), data=data))
    return path


def edit(path: Path, change: Any) -> None:
    """Change a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, list[str]]:
    """A checkpoint, and what the command is told besides."""
    pl.seed_everything(3)
    settings: dict[str, Any] = {"lr": 1e-2, "optimizer": "adam", "model_kwargs": {"width": 4}}
    checkpoint = train(tmp_path, Digits(), LitClassifier("cnn_bln", **settings), epochs=2)
    return checkpoint, [
        str(checkpoint),
        "--recipe",
        str(recipe(tmp_path, "cnn_bln", "Digits", **settings)),
        "--data-name",
        "digits",
        "--data.eval_batch_size",
        "100",
        "--out",
        str(tmp_path / "weights"),
    ]


# ------------------------------------------------------------------- functions


def test_parameters_are_rounded_and_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2)).to(memory_format=torch.channels_last)
    model[1].running_var.fill_(1e6)
    model[2].weight = model[2].bias = nn.Parameter(torch.full((2,), 0.1))  # one tensor, two names
    tensors = pack.stored_tensors(model, torch.float16)
    assert {name: value.dtype for name, value in tensors.items()} == {
        "0.weight": torch.float16,
        "0.bias": torch.float16,
        "1.weight": torch.float16,
        "1.bias": torch.float16,
        "1.running_mean": torch.float32,
        "1.running_var": torch.float32,
        "1.num_batches_tracked": torch.int64,
        "2.weight": torch.float16,
        "2.bias": torch.float16,
    }
    assert tensors["0.weight"].is_contiguous()
    assert torch.equal(tensors["0.weight"], model[0].weight.half())
    assert tensors["1.running_var"].tolist() == [1e6, 1e6]
    assert len({value.data_ptr() for value in tensors.values()}) == len(tensors)
    kept = pack.stored_tensors(model, torch.float32)["0.weight"]
    assert torch.equal(kept, model[0].weight)
    assert kept.data_ptr() != model[0].weight.data_ptr()


def test_embeddings_in_few_bits() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(5, 16), "dense": nn.Linear(16, 2)})
    stored = pack.stored_tensors(model, torch.float16, embedding_bits=4)
    assert stored.keys() == {"words.weight.codes", "words.weight.scale", "dense.weight", "dense.bias"}
    rows = model["words"].weight.detach()
    step = 2 * rows.abs().amax(1, keepdim=True) / 15
    assert ((as_float32(stored)["words.weight"] - rows).abs() <= step * 0.5001).all()
    with pytest.raises(ValueError, match="for a Linear without; leave out --embedding-bits"):
        pack.stored_tensors(nn.Linear(8, 2), torch.float16, embedding_bits=4)


def test_files_are_written_and_listed(folder: Path) -> None:
    write_example(folder)
    write_example(folder, "paper_cnn_bn.noise")
    files = sorted(path.name for path in folder.iterdir())
    assert files == [
        "paper_cnn_bln.noise.golden.safetensors",
        "paper_cnn_bln.noise.safetensors",
        "paper_cnn_bn.noise.golden.safetensors",
        "paper_cnn_bn.noise.safetensors",
        "sha256.json",
    ]
    assert list(checksums(folder)) == files[:-1]
    before = (folder / "sha256.json").read_bytes()
    write_example(folder)  # other random numbers
    assert list(checksums(folder)) == files[:-1]
    assert (folder / "sha256.json").read_bytes() != before
    zoo.create_model("paper_cnn_bln.noise")
    zoo.create_model("paper_cnn_bn.noise")


def test_the_same_model_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for target in (folder, tmp_path / "again"):
        torch.manual_seed(1)
        write_example(target)
    assert checksums(folder) == checksums(tmp_path / "again")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interruption_leaves_no_half_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    write_example(folder, "paper_cnn_bn.noise")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, done = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_example(folder)
    # Weights that are not listed yet do not exist, and what there was is as it was.
    assert zoo.list_models(pretrained=True) == ["paper_cnn_bn.noise"]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(list(folder.iterdir())) == len(before) + at


def test_metadata_are_checked_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'arch' and 'tag' of cnn_bn.digits"):
        pack.write_weights(folder, NAME, {}, {}, metadata("cnn_bn.digits"))
    assert not folder.exists()


# ----------------------------------------------------------------- the command


def test_images(folder: Path, digits: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, arguments = digits
    pack.main([*arguments, "--name", NAME])
    weights = zoo.get_weights("cnn_bln")
    expected = metadata(
        NAME,
        arguments={"num_classes": 10, "width": 4},
        data="digits",
        recipe=(checkpoint.parent / "cnn_bln.yaml").as_posix(),
        seed=3,
        epochs=2,
        flags="TTFF",
        classes=list("0123456789"),
        test_batch_size=100,
        input={"kind": "image", "size": [1, 8, 8]},
    )
    given = weights.metadata
    measured = ("flags", "flag_search", "metrics", "parameters", "date", "commit", "torch", "dtype")
    assert {k: v for k, v in given.items() if k not in measured} == {
        k: v for k, v in expected.items() if k not in measured
    }
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert given["commit"] == head
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", given["date"])
    assert given["torch"] == torch.__version__
    assert '"test_accuracy"' in capsys.readouterr().out

    # The metrics are those of the model that create_model makes of the file, on standardised images.
    model = zoo.create_model("cnn_bln", weights="digits").eval()
    assert given["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    data = Digits(eval_batch_size=100)
    data.setup("test")
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        with torch.no_grad():
            outputs = [(model(x), labels) for x, labels in loader]
        right = sum(int((y.argmax(1) == labels).sum()) for y, labels in outputs)
        loss = sum(float(nn.functional.cross_entropy(y, labels, reduction="sum")) for y, labels in outputs)
        assert given["metrics"][f"{part}_accuracy"] == pytest.approx(right / 300, abs=1e-6)
        assert given["metrics"][f"{part}_loss"] == pytest.approx(loss / 300, rel=1e-5)
    assert given["metrics"]["test_accuracy"] > 0.3

    (x,), output = weights.golden()
    assert torch.equal(x, next(iter(data.test_dataloader()))[0][:4])
    with torch.no_grad():
        torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-5)
    assert torch.equal(weights.transforms().mean.flatten(), data.mean)
    assert torch.equal(weights.transforms().std.flatten(), data.std)


def test_flags_are_the_default_unless_others_are_better_on_validation_data(
    folder: Path, digits: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, arguments = digits
    pack.main([*arguments, "--name", NAME])
    search = zoo.get_weights(NAME).metadata["flag_search"]
    assert len(search["losses"]) == 16
    four = {code: loss for code, loss in search["losses"].items() if code[:2] == "TT"}
    assert search["tied"][0] == min(four, key=four.__getitem__)
    assert search["chosen"] == ("TTFF" if "TTFF" in search["tied"] else search["tied"][0])
    assert search["losses"][search["chosen"]] == pytest.approx(
        zoo.get_weights(NAME).metadata["metrics"]["val_loss"], rel=1e-3
    )

    class Apart(ScoreTable):
        def compared(self, score: CellScore) -> tuple[float, float, float]:
            return (0.0, 0.0, 0.0) if score is self.best else (1.0, 0.5, 1.5)

    def best_is_another(*args: Any, **kwargs: Any) -> ScoreTable:
        table = score_flags(*args, **kwargs)
        worse = [dataclasses.replace(score, loss=score.loss + (score.code == "TTFF")) for score in table]
        return ScoreTable(worse, monitor=table.monitor, mode=table.mode)

    monkeypatch.setattr(pack, "ScoreTable", Apart)
    monkeypatch.setattr(pack, "score_flags", best_is_another)
    pack.main([*arguments, "--name", NAME])
    search = zoo.get_weights(NAME).metadata["flag_search"]
    assert [search["chosen"]] == search["tied"] == [zoo.get_weights(NAME).metadata["flags"]] != ["TTFF"]
    assert search["chosen"].startswith("TT")


def test_flags_are_those_of_the_command_or_of_the_layers(folder: Path, digits: tuple[Path, list[str]]) -> None:
    checkpoint, arguments = digits
    pack.main([*arguments, "--name", NAME, "--flags", "own"])
    pack.main([*arguments, "--name", "cnn_bln.ffff", "--flags", "F,F,F,F"])
    ours, theirs = zoo.get_weights(NAME), zoo.get_weights("cnn_bln.ffff")
    assert (ours.metadata["flags"], theirs.metadata["flags"]) == ("TTFF", "FFFF")
    assert ours.metadata["metrics"]["test_loss"] != theirs.metadata["metrics"]["test_loss"]

    def set_one(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["model.layers.4._extra_state"]["config"]["flags"] = "TFTF"

    edit(checkpoint, set_one)
    pack.main([*arguments, "--name", "cnn_bln.layers", "--flags", "own"])
    flags = {"layers.1": "TTFF", "layers.4": "TFTF", "layers.7": "TTFF"}
    assert zoo.get_weights("cnn_bln.layers").metadata["flags"] == flags
    model = zoo.create_model("cnn_bln.layers")
    assert set_flags_(model, {"layers.1": "TTFF"})["layers.4"].code == "TFTF"


def test_parameters_stay_in_float32_where_rounding_changes_the_accuracy(
    folder: Path, digits: tuple[Path, list[str]]
) -> None:
    checkpoint, arguments = digits

    def shrink(checkpoint: dict[str, Any]) -> None:
        # Below float16's smallest number: rounded, all scores would be 0.
        checkpoint["state_dict"]["model.fc.weight"] *= 1e-9
        checkpoint["state_dict"]["model.fc.bias"] *= 1e-9

    edit(checkpoint, shrink)
    pack.main([*arguments, "--name", NAME])
    weights = zoo.get_weights(NAME)
    assert weights.metadata["dtype"] == "float32"
    assert weights.metadata["metrics"]["test_accuracy"] > 0.3
    tensors = load_file(weights.path)
    assert torch.equal(tensors["fc.weight"], torch.load(checkpoint, weights_only=True)["state_dict"]["model.fc.weight"])


def test_what_a_training_began_with(folder: Path, digits: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, arguments = digits
    pack.main([*arguments, "--name", NAME])
    settings: dict[str, Any] = {"lr": 1e-2, "optimizer": "adam", "weights": NAME, "model_kwargs": {"width": 4}}
    pl.seed_everything(3)
    arguments[0] = str(train(tmp_path / "twin", Digits(), LitClassifier("cnn_bn", **settings), epochs=1))
    arguments[2] = str(recipe(tmp_path, "cnn_bn", "Digits", **settings))
    pack.main([*arguments, "--name", "cnn_bn.digits"])
    assert zoo.get_weights("cnn_bn.digits").metadata["start"] == NAME
    assert "start" not in zoo.get_weights(NAME).metadata
    settings["weights"] = None
    arguments[2] = str(recipe(tmp_path, "cnn_bn", "Digits", **settings))
    with pytest.raises(
        ValueError, match=f"got one with {{'weights': '{NAME}'}}, where the recipe has {{'weights': None"
    ):
        pack.main([*arguments, "--name", "cnn_bn.other"])


def test_a_checkpoint_that_does_not_belong(folder: Path, digits: tuple[Path, list[str]], tmp_path: Path) -> None:
    checkpoint, arguments = digits
    with pytest.raises(
        ValueError, match=r"the name 'cnn_bn.digits', 'cnn_bln' in the recipe and 'cnn_bln' in the check"
    ):
        pack.main([*arguments, "--name", "cnn_bn.digits"])
    with pytest.raises(ValueError, match=r"call for example --name cnn_bln.cifar10"):
        pack.main([*arguments, "--name", "cnn_bln"])
    arguments[2] = str(recipe(tmp_path, "cnn_ln", "Digits"))
    with pytest.raises(ValueError, match="'cnn_ln' in the recipe"):
        pack.main([*arguments, "--name", "cnn_ln.digits"])
    arguments[2] = str(tmp_path / "cnn_bln.yaml")
    for change, message in (
        ({"zoo_seed": 4}, "'seed_everything': 4"),
        ({"zoo_start": "digits"}, "'weights': 'cnn_bln.digits'"),
        ({"hyper_parameters": {"lr": 0.5}}, "'lr': 0.5"),
        ({"hyper_parameters": {"temperature": 9.0}}, "'temperature': 9.0"),  # of which the recipe says nothing
    ):
        saved = torch.load(checkpoint, weights_only=True)
        before = {key: saved[key] for key in change}
        news = {key: {**saved[key], **value} if isinstance(value, dict) else value for key, value in change.items()}
        edit(checkpoint, lambda saved, news=news: saved.update(news))
        with pytest.raises(ValueError, match=f"got one with {{{message}}}, where the recipe has"):
            pack.main([*arguments, "--name", NAME])
        edit(checkpoint, lambda saved, before=before: saved.update(before))

    def change_eps(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["model.layers.1._extra_state"]["config"]["eps"] = 0.5

    edit(checkpoint, change_eps)
    with pytest.raises(
        ValueError, match=r"settings that zoo.create_model gives it, got layers.1 with eps=0.5, not 1e-05"
    ):
        pack.main([*arguments, "--name", NAME])
    assert not folder.exists()


def test_texts(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, word in (("neg", "bad"), ("pos", "good")):
            place = tmp_path / "aclImdb" / part / label
            place.mkdir(parents=True)
            for number in range(8):
                (place / f"{number}_1.txt").write_text(f"a {word} film" + " really" * number, encoding="utf-8")
    sizes = {"vocabulary_size": 20, "embedding_size": 8, "hidden_size": 4, "batch_size": 4}
    data = IMDb(str(tmp_path / "aclImdb"), batch_size=4, validation=4)
    pl.seed_everything(3)
    settings: dict[str, Any] = {"num_classes": 2, "model_kwargs": sizes}
    checkpoint = train(tmp_path, data, LitClassifier("gru_bln", **settings))
    path = recipe(tmp_path, "gru_bln", "IMDb", **settings)
    arguments = [str(checkpoint), "--recipe", str(path), "--data-name", "films"]
    arguments += ["--data.root", str(tmp_path / "aclImdb"), "--data.max_tokens", "6", "--data.validation", "4"]
    arguments += ["--out", str(folder)]
    pack.main([*arguments, "--name", "gru_bln.films"])
    assert "films.vocabulary.txt" in checksums(folder)
    weights = zoo.get_weights("gru_bln")
    assert weights.metadata["input"] == {
        "kind": "text",
        "max_tokens": 6,
        "pad_to": None,
        "vocabulary": "films.vocabulary.txt",
    }
    assert weights.metadata["arguments"] == {"num_classes": 2, **sizes}
    (tokens, lengths), output = weights.golden()
    transform = weights.transforms()
    vocabulary = (folder / "films.vocabulary.txt").read_text(encoding="utf-8").split("\n")
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    texts = [" ".join(vocabulary[number - 2] for number in row) for row in rows]
    assert texts[0].endswith(("film", "really"))
    again, counted = transform(texts)
    assert torch.equal(again, tokens[:, : again.shape[1]])
    assert torch.equal(counted, lengths)
    with torch.no_grad():
        y = zoo.create_model("gru_bln", weights="films").eval()(tokens, lengths)
    torch.testing.assert_close(y, output, atol=1e-5, rtol=1e-5)

    # Of other training texts, so with another vocabulary: the first one stays.
    for path in (tmp_path / "aclImdb" / "train" / "neg").iterdir():
        path.write_text("worst", encoding="utf-8")
    pack.main([*arguments, "--name", "gru_bln.films"])
    assert zoo.get_weights("gru_bln").metadata["input"]["vocabulary"] == "gru_bln.films.vocabulary.txt"
    assert "worst" in (folder / "gru_bln.films.vocabulary.txt").read_text()
    assert "worst" not in (folder / "films.vocabulary.txt").read_text()

    pack.main([*arguments, "--name", "gru_bln.small", "--embedding-bits", "3"])
    small = zoo.get_weights("gru_bln.small")
    assert small.metadata["dtype"].endswith(", embeddings in 3 bits")
    with torch.no_grad():
        y = zoo.create_model("gru_bln", weights="small").eval()(*small.golden()[0])
    torch.testing.assert_close(y, small.golden()[1], atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "sha256.json").read_text()).keys() == {
        path.name for path in folder.iterdir() if path.name != "sha256.json"
    }
