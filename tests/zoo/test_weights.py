"""Weights files: what is read from them, and that a damaged one never is."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

import zoo
from lightning_bln import BatchLayerNorm
from tests.zoo.example_weights import IMAGE, MEAN, STD, metadata, write_example, write_listed
from zoo import _weights
from zoo._weights import Standardize, checksums, load_tensors_
from zoo.data.images import Images
from zoo.pack import stored_tensors, write_weights
from zoo.text import Tokenizer

ROOT = Path(__file__).parents[2]
SHIPPED = zoo.list_models(pretrained=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights in place of the zoo's."""
    monkeypatch.setattr(_weights, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


# ------------------------------------------------------------------- the zoo's


def test_there_are_weights() -> None:
    assert {"cnn_bln.digits", "gru_bln.digits", "gru_bln.imdb", "resnet20_bln.cifar10"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_give_their_golden_output(name: str) -> None:
    weights = zoo.get_weights(name)
    inputs, output = weights.golden()
    with torch.no_grad():
        y = zoo.create_model(name).eval()(*inputs)
    torch.testing.assert_close(y, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_what_their_metadata_say(name: str) -> None:
    weights = zoo.get_weights(name)
    assert weights.arch in zoo.list_models()
    assert weights.path.stat().st_size < 10_000_000
    assert (ROOT / weights.metadata["recipe"]).is_file()
    model = zoo.create_model(name)
    assert len(weights.metadata["classes"]) == max(2, weights.metadata["arguments"]["num_classes"])
    assert weights.metadata["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, BatchLayerNorm)]
    assert (weights.metadata["flags"] is None) == (not layers)
    weights.transforms()


def test_every_file_of_the_zoo_is_listed_with_its_sha256() -> None:
    files = {path.name: path for path in _weights.FOLDER.glob("*") if path.name != "sha256.json"}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == checksums(
        _weights.FOLDER
    )


# --------------------------------------------------------------------- reading


def test_what_weights_are(folder: Path) -> None:
    model = write_example(folder, flags="FTTF")
    weights = zoo.get_weights("paper_cnn_bln.noise")
    assert (weights.name, weights.arch, weights.tag) == ("paper_cnn_bln.noise", "paper_cnn_bln", "noise")
    assert weights.path == folder / "paper_cnn_bln.noise.safetensors"
    assert weights.metadata == metadata("paper_cnn_bln.noise", flags="FTTF")
    assert repr(weights).startswith("Weights(name='paper_cnn_bln.noise'")
    assert len({weights, zoo.get_weights("paper_cnn_bln")}) == 1

    state = weights.state_dict()
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    assert len(state) == 42  # 10 of convolutions and dense layers, 8 of each norm
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        # In a model the count begins anew: what it counted belongs to the training that is over.
        expected_count = 16 if name.endswith("num_samples") else value
        assert torch.equal(state[name], torch.as_tensor(expected_count)), name
    assert state["norm1.num_samples"].dtype == torch.int64
    assert state["norm1.running_batch_mean"].shape == (6, 16, 16)


def test_the_files_hold_rounded_parameters_and_whole_statistics(folder: Path) -> None:
    write_example(folder)
    write_example(folder, "paper_cnn_bn.noise")
    dtypes = {name: value.dtype for name, value in load_file(folder / "paper_cnn_bln.noise.safetensors").items()}
    assert dtypes["conv1.weight"] == dtypes["norm1.weight"] == torch.float16
    assert dtypes["norm1.running_batch_var"] == dtypes["input.mean"] == torch.float32
    dtypes = {name: value.dtype for name, value in load_file(folder / "paper_cnn_bn.noise.safetensors").items()}
    assert dtypes["norm1.running_var"] == torch.float32
    assert dtypes["norm1.num_batches_tracked"] == torch.int64


def test_golden_output_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the zoo opens no connection")

    write_example(folder, flags="FTTF")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = zoo.create_model("paper_cnn_bln", weights="noise")
    inputs, output = zoo.get_weights("paper_cnn_bln").golden()
    assert len(inputs) == 1
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs), output, atol=1e-5, rtol=1e-5)


def test_a_layer_that_never_saw_a_batch_keeps_its_empty_statistics(folder: Path) -> None:
    model = zoo.create_model("paper_cnn_bln")
    values = metadata("paper_cnn_bln.new", flags="TTFF")
    write_weights(folder, "paper_cnn_bln.new", stored_tensors(model, torch.float32), {}, values)
    assert zoo.create_model("paper_cnn_bln.new").norm1.running_batch_mean.shape == (0,)


# ---------------------------------------------------------------------- damage


def damage_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_a_byte, cut_short, empty])
def test_a_damaged_file_is_never_read(folder: Path, damage: Any) -> None:
    write_example(folder)
    path = folder / "paper_cnn_bln.noise.safetensors"
    weights = zoo.get_weights("paper_cnn_bln")
    listed = checksums(folder)[path.name]
    damage(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    message = (
        rf"{re.escape(str(path))}' is damaged or cut short: .* must be {listed}, got {found}, .*git checkout -- zoo"
    )
    for read in (
        lambda: zoo.get_weights("paper_cnn_bln"),
        lambda: zoo.create_model("paper_cnn_bln", weights="noise"),
        weights.state_dict,
        weights.transforms,
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_a_damaged_golden_file_is_never_read(folder: Path) -> None:
    write_example(folder)
    damage_a_byte(folder / "paper_cnn_bln.noise.golden.safetensors")
    weights = zoo.get_weights("paper_cnn_bln")
    with pytest.raises(ValueError, match=r"noise\.golden\.safetensors' is damaged or cut short"):
        weights.golden()


def test_a_file_that_is_not_there(folder: Path) -> None:
    write_example(folder)
    (folder / "paper_cnn_bln.noise.safetensors").unlink()
    with pytest.raises(ValueError, match=r"noise\.safetensors' belongs to the zoo's weights and is not there; restore"):
        zoo.get_weights("paper_cnn_bln")


def test_a_file_that_is_not_listed(folder: Path) -> None:
    write_example(folder)
    path = folder / "paper_cnn_bln.noise.safetensors"
    path.with_name("paper_cnn_bln.mine.safetensors").write_bytes(path.read_bytes())
    assert zoo.list_models(pretrained=True) == ["paper_cnn_bln.noise"]
    with pytest.raises(
        ValueError, match=r"must be listed in '.*sha256.json', and 'paper_cnn_bln.mine.safetensors' is no"
    ):
        zoo.get_weights("paper_cnn_bln.mine")


def test_a_damaged_list(folder: Path) -> None:
    write_example(folder)
    cut_short(folder / "sha256.json")
    cut_short(folder / "sha256.json")
    with pytest.raises(ValueError, match=r"sha256.json' must hold JSON, got .*; restore it with"):
        zoo.get_weights("paper_cnn_bln")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": ...}, "no 'seed'"),
        ({"seed": "1"}, "'seed' of type str"),
        ({"epochs": True}, "'epochs' of type bool"),
        ({"metrics": None}, "'metrics' of type NoneType"),
        ({"tag": "other"}, "'arch' and 'tag' of paper_cnn_bln.other"),
        ({"arguments": {}}, "no 'arguments.num_classes'"),
        ({"input": {}}, "'input.kind' None, not one of 'image', 'sequence', 'text'"),
        ({"input": {"kind": "text", "max_tokens": 4, "pad_to": None}}, "no 'input.vocabulary'"),
        ({"flags": 3, "data": 4}, "'data' of type int; 'flags' of type int"),
    ],
)
def test_metadata_that_lack_something(folder: Path, change: dict[str, Any], message: str) -> None:
    values = metadata("paper_cnn_bln.noise", **change)
    text = json.dumps({key: value for key, value in values.items() if value is not ...})
    write_example(folder)
    path = folder / "paper_cnn_bln.noise.safetensors"
    write_listed(path, save(load_file(path), {"zoo": text}))
    with pytest.raises(
        ValueError, match=f"'paper_cnn_bln.noise' must be as python -m zoo.pack writes it, got {message};"
    ):
        zoo.get_weights("paper_cnn_bln")


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors",
        save({"x": torch.zeros(1)}),
        save({"x": torch.zeros(1)}, {"zoo": "{"}),
    ],
    ids=["format", "no metadata", "no JSON"],
)
def test_a_listed_file_that_is_not_one_of_weights(folder: Path, content: bytes) -> None:
    write_example(folder)
    write_listed(folder / "paper_cnn_bln.noise.safetensors", content)
    with pytest.raises(
        ValueError, match="must be in the safetensors format, with a metadata key 'zoo' that holds JSON"
    ):
        zoo.get_weights("paper_cnn_bln")


def test_metadata_that_are_no_dict(folder: Path) -> None:
    write_example(folder)
    write_listed(folder / "paper_cnn_bln.noise.safetensors", save({"x": torch.zeros(1)}, {"zoo": "[]"}))
    with pytest.raises(ValueError, match="got a list instead of a dict"):
        zoo.get_weights("paper_cnn_bln")


# ----------------------------------------------------------------------- names


def test_names(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights named 'paper_cnn_bln'; there are none\."):
        zoo.get_weights("paper_cnn_bln")
    for name in ("paper_cnn_bln.noise", "paper_cnn_bln.other", "paper_cnn_bn.noise"):
        write_example(folder, name)
    assert zoo.get_weights("paper_cnn_bn").name == "paper_cnn_bn.noise"
    with pytest.raises(
        ValueError, match=r"got 'paper_cnn_bln', which has 'paper_cnn_bln.noise', 'paper_cnn_bln.other'; c"
    ):
        zoo.get_weights("paper_cnn_bln")
    everything = "there are paper_cnn_bln.noise, paper_cnn_bln.other, paper_cnn_bn.noise"
    with pytest.raises(
        ValueError, match=rf"named 'paper_cnn_bn.noize'; did you mean 'paper_cnn_bn.noise'.*\? {everything}"
    ):
        zoo.get_weights("paper_cnn_bn.noize")
    with pytest.raises(ValueError, match=rf"no weights named 'xyz'; {everything}"):
        zoo.get_weights("xyz")


# ------------------------------------------------------------------ transforms


@pytest.mark.parametrize("shape", [(3,), (3, 32, 32)])
def test_images_are_standardised_as_in_training(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.rand(shape), torch.rand(shape) + 0.1
    expected, _ = Images(pixels, torch.zeros(5, dtype=torch.int64), mean, std).__getitems__([(0, i) for i in range(5)])
    transform = Standardize((3, 32, 32), mean, std, image=True)
    assert torch.equal(transform(pixels), expected)
    assert torch.equal(transform(pixels[None])[0], expected)
    assert torch.equal(transform(pixels.float() / 255), expected)
    image = Image.fromarray(pixels[2].permute(1, 2, 0).numpy())
    assert torch.equal(transform(image), expected[2])
    assert torch.equal(transform(image.convert("RGBA")), expected[2])


def test_grey_images() -> None:
    pixels = torch.randint(0, 256, (8, 6), dtype=torch.uint8)
    transform = Standardize((1, 8, 6), None, None, image=True)
    assert torch.equal(transform(Image.fromarray(pixels.numpy())), pixels[None].float() / 255)


def test_images_that_do_not_fit() -> None:
    transform = Standardize((3, 32, 32), MEAN, STD, image=True)
    with pytest.raises(ValueError, match=r"size \(3, 32, 32\), got shape \(3, 28, 30\); resize them first.*\(32, 32\)"):
        transform(Image.new("RGB", (30, 28)))
    with pytest.raises(ValueError, match=r"size \(3, 32, 32\), got shape \(32, 32\)"):
        transform(torch.zeros(32, 32))
    with pytest.raises(ValueError, match=r"must be uint8, or float from 0 to 1, got torch.int64"):
        transform(torch.zeros(3, 32, 32, dtype=torch.int64))


def test_sequences() -> None:
    x = torch.rand(5, 8, 4)
    mean, std = torch.rand(4), torch.rand(4) + 0.1
    assert torch.equal(Standardize((8, 4), mean, std, image=False)(x), (x - mean) / std)
    assert torch.equal(Standardize((8, 4), None, None, image=False)(x), x)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 8, 4\), got \(5, 4, 8\); cut or pad"):
        Standardize((8, 4), mean, std, image=False)(x.mT)


def test_transforms_of_weights(folder: Path) -> None:
    write_example(folder)
    write_example(folder, "paper_cnn_bn.noise", input={"kind": "sequence", "size": [32, 3]})
    transform = zoo.get_weights("paper_cnn_bln").transforms()
    assert isinstance(transform, Standardize)
    assert (transform.size, transform.image) == (tuple(IMAGE["size"]), True)
    assert torch.equal(transform.mean.flatten(), MEAN)
    assert torch.equal(transform.std.flatten(), STD)
    transform = zoo.get_weights("paper_cnn_bn").transforms()
    assert isinstance(transform, Standardize)
    assert (transform.size, transform.image, transform.mean.shape) == ((32, 3), False, (3,))


def test_texts(folder: Path) -> None:
    write_example(folder, input={"kind": "text", "vocabulary": "films.vocabulary.txt", "max_tokens": 2, "pad_to": None})
    weights = zoo.get_weights("paper_cnn_bln")
    with pytest.raises(ValueError, match=r"'films.vocabulary.txt' is not; python -m zoo.pack"):
        weights.transforms()
    write_listed(folder / "films.vocabulary.txt", b"a\nfilm")
    tokenizer = weights.transforms()
    assert isinstance(tokenizer, Tokenizer)
    tokens, lengths = tokenizer(["Once a film", "film"])
    assert tokens.tolist() == [[2, 3], [3, 0]]
    assert lengths.tolist() == [2, 1]
    (folder / "films.vocabulary.txt").write_text("film\na")
    with pytest.raises(ValueError, match=r"films.vocabulary.txt' is damaged"):
        weights.transforms()


def test_texts_of_one_length(folder: Path) -> None:
    given = {"kind": "text", "vocabulary": "films.vocabulary.txt", "max_tokens": 9, "pad_to": 3}
    write_example(folder, input=given)
    write_listed(folder / "films.vocabulary.txt", b"a\nfilm")
    tokens = zoo.get_weights("paper_cnn_bln").transforms()(["Once a film a film", "film"])
    assert tokens.tolist() == [[3, 2, 3], [0, 0, 3]]


# --------------------------------------------------------------- into the model


def test_a_model_is_not_touched_by_weights_that_lack_tensors() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: value + 1 for name, value in before.items() if name != "1.bias"} | {"2.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"a Sequential, got them without 1.bias and with 2.weight besides"):
        load_tensors_(model, tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"without 0.bias, 0.weight, 1.bias, 1.num_batches_tracked and 3 more and with n"
    ):
        load_tensors_(model, {})
    with pytest.raises(
        ValueError, match=r"(?s)must have the shapes of the model, got others: .*size mismatch for 0.bias"
    ):
        load_tensors_(model, before | {"0.bias": torch.zeros(4)})


def test_float16_is_loaded_into_the_dtype_of_the_model() -> None:
    model = nn.Linear(2, 3).double()
    load_tensors_(model, {"weight": torch.full((3, 2), 0.1).half(), "bias": torch.zeros(3).half()})
    assert model.weight.dtype == torch.float64
    assert (model.weight == torch.tensor(0.1).half().double()).all()


# --------------------------------------------------------------- further training


def test_further_training_begins_statistics_afresh(folder: Path) -> None:
    write_example(folder)
    model = zoo.create_model("paper_cnn_bln", weights="noise")
    before = model.norm4.running_batch_mean.clone()
    x = torch.randn(5, 3, 32, 32)
    seen = []
    model.norm4.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    model(x)
    assert int(model.norm4.num_samples) == 5
    torch.testing.assert_close(model.norm4.running_batch_mean, seen[0].mean(0))
    assert not torch.allclose(model.norm4.running_batch_mean, before)


def test_a_batch_size_that_is_asked_for_is_the_one_of_the_layers(folder: Path) -> None:
    model = zoo.create_model("gru_bln", weights=None, vocabulary_size=9, batch_size=7)
    model(torch.randint(1, 9, (3, 4)))
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    other = zoo.create_model("gru_bln", vocabulary_size=9, batch_size=11)
    load_tensors_(other, tensors)
    assert [int(norm.nominal_batch_size) for norm in other.norms] == [11, 11]


@pytest.mark.parametrize("name", ["../weights/paper_cnn_bln.noise", "/etc/paper_cnn_bln.noise"])
def test_weights_are_those_of_the_zoo_s_folder(folder: Path, name: str) -> None:
    write_example(folder)
    with pytest.raises(ValueError, match="The zoo has no weights named"):
        zoo.get_weights(name)


def test_a_vocabulary_is_a_file_beside_the_weights() -> None:
    text = {"kind": "text", "vocabulary": "../secret.txt", "max_tokens": 3, "pad_to": None}
    with pytest.raises(ValueError, match=r"'input.vocabulary' '../secret.txt', not the name of a file beside"):
        _weights.check_metadata(metadata("gru_bln.x", input=text), "gru_bln.x")
