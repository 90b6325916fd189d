"""The trained weights in ``zoo/weights``: which there are, whether they are whole, how they get into a model."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from lightning_bln.surgery import bln_layers
from zoo._few_bits import unpack_rows
from zoo.text import PADDING, Tokenizer

FOLDER = Path(__file__).parent / "weights"
SUMS = "sha256.json"
SUFFIX, GOLDEN = ".safetensors", ".golden.safetensors"
INPUT = ("input.mean", "input.std")
"""Tensors of a weights file that are not the model's."""

_RESTORE = (
    "restore it with `pip install --force-reinstall --no-deps lightning-bln`, or in a checkout with "
    "`git checkout -- zoo/weights`"
)
_METADATA: dict[str, tuple[type, ...]] = {
    "arch": (str,),
    "tag": (str,),
    "arguments": (dict,),
    "data": (str,),
    "recipe": (str,),
    "seed": (int,),
    "epochs": (int,),
    "flags": (str, dict, type(None)),
    "metrics": (dict,),
    "classes": (list,),
    "test_batch_size": (int,),
    "parameters": (int,),
    "dtype": (str,),
    "date": (str,),
    "commit": (str,),
    "torch": (str,),
    "input": (dict,),
}
_INPUT_KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "image": {"size": (list,)},
    "sequence": {"size": (list,)},
    "text": {"vocabulary": (str,), "max_tokens": (int,), "pad_to": (int, type(None))},
}


@dataclass(frozen=True)
class Weights:
    """A trained model's weights, and what is known about them; `get_weights` returns it.

    Args:
        name: ``arch.tag``, such as "resnet20_bln.cifar10".
        arch: A name for `zoo.create_model`.
        tag: What they were trained on.
        path: The safetensors file.
        metadata: "arguments" of the model, "data", "recipe", "seed", "epochs", "flags" of its BatchLayerNorm layers,
            "metrics" (accuracies from 0 to 1), "classes" in the order of the outputs, "test_batch_size", "parameters",
            "dtype" of the file, "date", "commit" and "torch" of its making, "input"; where there were any, "start",
            the weights that its training began with, "teachers", and "mirror_teachers", True.

    Example:
        >>> weights = zoo.get_weights("resnet20_bln.cifar10")  # doctest: +SKIP
        >>> weights.metadata["metrics"]["test_accuracy"]  # doctest: +SKIP
    """

    name: str
    arch: str
    tag: str
    path: Path
    metadata: dict[str, Any] = field(repr=False, hash=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's parameters and buffers, in float32 where the file has float16 or fewer bits.

        Settings of BatchLayerNorm layers, which their state_dict has too, come from the model and from the metadata's
        flags: ``zoo.create_model(arch, weights=tag)`` sets both.

        Raises:
            ValueError: If the file is not the one that was published.
        """
        return {name: value for name, value in self._tensors().items() if name not in INPUT}

    def golden(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """A few test samples, as the model's arguments, and its outputs in eval mode on a CPU.

        Raises:
            ValueError: If the file is not the one that was published.

        Example:
            >>> inputs, output = weights.golden()  # doctest: +SKIP
            >>> torch.testing.assert_close(model.eval()(*inputs), output, atol=1e-5, rtol=1e-5)  # doctest: +SKIP
        """
        tensors = load(checked(self.path.with_name(self.name + GOLDEN)))
        return tuple(tensors[name] for name in ("input", "lengths") if name in tensors), tensors["output"]

    def transforms(self) -> Callable[..., Any]:
        """What makes the model's inputs of images, texts or sequences, as in its training.

        Returns:
            A `Standardize`; for texts a `zoo.text.Tokenizer`, or, where all have one length, a function from texts to
            tokens (N, length), padded in front.

        Raises:
            ValueError: If a file is not the one that was published.
        """
        given = self.metadata["input"]
        if given["kind"] == "text":
            vocabulary = checked(self.path.parent / given["vocabulary"])
            tokenizer = Tokenizer.from_bytes(vocabulary, given["max_tokens"])
            return partial(_of_one_length, tokenizer, given["pad_to"]) if given["pad_to"] else tokenizer
        tensors = self._tensors()
        mean, std = (tensors.get(name) for name in INPUT)
        return Standardize(given["size"], mean, std, image=given["kind"] == "image")

    def _tensors(self) -> dict[str, Tensor]:
        return as_float32(load(checked(self.path)))


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A weights file's tensors as a model takes them."""
    return {
        name: value.float() if value.dtype == torch.float16 else value for name, value in unpack_rows(tensors).items()
    }


def _of_one_length(tokenizer: Tokenizer, length: int, texts: Sequence[str]) -> Tensor:
    rows = [tokenizer.encode(text)[-length:] for text in texts]
    return torch.tensor([[PADDING] * (length - len(row)) + row for row in rows])


class Standardize(nn.Module):
    """Inputs as float32, less their mean, divided by their deviation.

    Shapes: (..., *size) to the same; a PIL image to ``size``.

    Args:
        size: Of an input: (C, H, W) of an image, (steps, features) of a sequence.
        mean: (C,) or ``size`` for images, in units where pixels are 0 to 1; for sequences anything that broadcasts.
            None for 0.
        std: Likewise. None for 1.
        image: Inputs are PIL images, uint8 tensors, which are divided by 255, or float tensors from 0 to 1; otherwise
            they are tensors of numbers.

    Example:
        >>> transform = Standardize((1, 2, 2), torch.tensor([0.5]), torch.tensor([0.25]), image=True)
        >>> transform(torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8))
        tensor([[[-2.,  2.],
                 [ 2., -2.]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: Sequence[int], mean: Tensor | None, std: Tensor | None, *, image: bool) -> None:
        super().__init__()
        self.size, self.image = tuple(size), image
        for name, value in (("mean", torch.zeros(()) if mean is None else mean), ("std", std)):
            value = torch.ones(()) if value is None else value
            self.register_buffer(name, value.reshape(-1, 1, 1) if image and value.ndim == 1 else value)

    def forward(self, x: Any) -> Tensor:
        """Standardise one input or many.

        Raises:
            ValueError: If the input has another size, or an image tensor is of integers other than uint8.
        """
        if self.image and hasattr(x, "tobytes") and hasattr(x, "convert"):
            width, height = x.size
            pixels = bytearray(x.convert("L" if self.size[0] == 1 else "RGB").tobytes())
            x = torch.frombuffer(pixels, dtype=torch.uint8).reshape(height, width, -1).permute(2, 0, 1)
        if tuple(x.shape[-len(self.size) :]) != self.size:
            raise ValueError(
                f"The inputs of this model have size {self.size}, got shape {tuple(x.shape)}; resize them first, as by "
                f"torch.nn.functional.interpolate(x, {self.size[1:]}) or image.resize(...)."
                if self.image
                else f"The inputs of this model have shape (..., {', '.join(map(str, self.size))}), got "
                f"{tuple(x.shape)}; cut or pad them first."
            )
        if self.image and x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(
                f"Image tensors must be uint8, or float from 0 to 1, got {x.dtype}; call x.to(torch.uint8) if values "
                f"are 0 to 255."
            )
        x = x.float() / 255 if self.image and x.dtype == torch.uint8 else x.float()
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The size for repr()."""
        return f"size={self.size}, image={self.image}"


def weights_names() -> list[str]:
    """``arch.tag`` of all weights in the folder, sorted."""
    files = checksums(FOLDER)
    return sorted(file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX) and not file.endswith(GOLDEN))


def get_weights(name: str) -> Weights:
    """Trained weights by name, offline; their file's sha256 is checked first.

    Args:
        name: ``arch.tag``, as `zoo.list_models` with ``pretrained=True`` lists them, or ``arch`` where it has one tag.

    Returns:
        The weights.

    Raises:
        ValueError: If there are none of that name, or several; if the file is missing, damaged or not of the zoo.

    Example:
        >>> zoo.get_weights("resnet20_bln").transforms()  # doctest: +SKIP
    """
    names = weights_names()
    path = FOLDER / f"{name}{SUFFIX}"
    # A file that is there but not listed is an error of its own; other folders are none of ours.
    if name not in names and not (path.parent == FOLDER and path.exists()):
        tagged = [known for known in names if known.partition(".")[0] == name]
        if len(tagged) > 1:
            raise ValueError(
                f"The name must say which of its weights, got {name!r}, which has {', '.join(map(repr, tagged))}; call "
                f"for example zoo.get_weights({tagged[0]!r})."
            )
        if not tagged:
            listed = f"there are {', '.join(names)}" if names else "there are none"
            raise ValueError(f"The zoo has no weights named {name!r}; {did_you_mean(name, names)}{listed}.")
        path = FOLDER / f"{tagged[0]}{SUFFIX}"
    return read_weights(path)


def read_weights(path: Path) -> Weights:
    """The weights of a file, which ``sha256.json`` beside it must list.

    Raises:
        ValueError: If it is missing, damaged, not listed or without the metadata that weights have.
    """
    data = checked(path)
    name = path.name.removesuffix(SUFFIX)
    try:
        load(data)
        # Of the bytes that were checked: their length, little-endian, then a JSON header.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header.get("__metadata__", {}).get("zoo", ""))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A weights file must be in the safetensors format, with a metadata key 'zoo' that holds JSON, got "
            f"{str(path)!r}: {error}; python -m zoo.pack writes such files."
        ) from error
    check_metadata(metadata, name)
    return Weights(name, metadata["arch"], metadata["tag"], path, metadata)


def full_name(arch: str, name: str) -> str:
    """``arch.tag`` of what may be a tag only."""
    return name if "." in name else f"{arch}.{name}"


def check_metadata(metadata: Any, name: str) -> None:
    """Raise ValueError unless this is the metadata of weights of that name."""
    problems = _problems(metadata, _METADATA)
    if not problems:
        if f"{metadata['arch']}.{metadata['tag']}" != name:
            problems.append(f"'arch' and 'tag' of {metadata['arch']}.{metadata['tag']}")
        if "." in metadata["tag"]:
            problems.append(f"'tag' {metadata['tag']!r} with a dot, which ends the model's name")
        problems += _problems(metadata["arguments"], {"num_classes": (int,)}, "arguments.")
        kind = metadata["input"].get("kind")
        if kind not in _INPUT_KINDS:
            problems.append(f"'input.kind' {kind!r}, not one of {', '.join(map(repr, _INPUT_KINDS))}")
        else:
            problems += _problems(metadata["input"], _INPUT_KINDS[kind], "input.")
        vocabulary = metadata["input"].get("vocabulary", "")
        if isinstance(vocabulary, str) and Path(vocabulary).name != vocabulary:
            problems.append(f"'input.vocabulary' {vocabulary!r}, not the name of a file beside the weights")
    if problems:
        raise ValueError(
            f"The metadata of the weights {name!r} must be as python -m zoo.pack writes it, got {'; '.join(problems)}; "
            f"pack the checkpoint again."
        )


def _problems(given: Any, expected: Mapping[str, tuple[type, ...]], where: str = "") -> list[str]:
    if not isinstance(given, dict):
        return [f"a {type(given).__name__} instead of a dict"]
    problems = []
    for key, types in expected.items():
        if key not in given:
            problems.append(f"no {where + key!r}")
        # True and False are ints in Python.
        elif not isinstance(given[key], types) or isinstance(given[key], bool):
            problems.append(f"{where + key!r} of type {type(given[key]).__name__}")
    return problems


def checksums(folder: Path) -> dict[str, str]:
    """File name -> sha256 in hex, of every file that belongs in the folder.

    Raises:
        ValueError: If the list is damaged.
    """
    path = folder / SUMS
    if not path.exists():
        return {}
    try:
        return cast("dict[str, str]", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must hold JSON, got {error}; {_RESTORE}.") from error


def checked(path: Path) -> bytes:
    """A file's content, if it is the one that ``sha256.json`` beside it lists.

    Raises:
        ValueError: If it is not listed, missing or another one.
    """
    sums = checksums(path.parent)
    if path.name not in sums:
        raise ValueError(
            f"Every file of weights must be listed in {str(path.parent / SUMS)!r}, and {path.name!r} is not; "
            f"python -m zoo.pack writes a file and lists it."
        )
    if not path.is_file():
        raise ValueError(f"The file {str(path)!r} belongs to the zoo's weights and is not there; {_RESTORE}.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sums[path.name]:
        raise ValueError(
            f"The file {str(path)!r} is damaged or cut short: its sha256 must be {sums[path.name]}, got {found}, of "
            f"{len(data):,} bytes; {_RESTORE}."
        )
    return data


def load_tensors_(model: nn.Module, tensors: Mapping[str, Tensor], *, fresh_classifier: bool = False) -> None:
    """Load parameters and buffers; settings of BatchLayerNorm layers stay the model's own.

    Args:
        model: Changed in place, but not where names do not agree.
        tensors: All of the model's, by their names in its state_dict.
        fresh_classifier: Leave out those of its last layer, ``model.classifier``. Default False.

    Raises:
        ValueError: If tensors are missing, too many or of other shapes.
    """
    state = model.state_dict()
    own = {name for name, value in state.items() if isinstance(value, Tensor)}
    if fresh_classifier:
        prefix = f"{model.classifier}."
        own = {name for name in own if not name.startswith(prefix)}
        tensors = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    missing, unexpected = sorted(own - set(tensors)), sorted(set(tensors) - own)
    if missing or unexpected:
        raise ValueError(
            f"Weights must be those of the model, a {type(model).__name__}, got them without {_some(missing)} and with "
            f"{_some(unexpected)} besides; make the model with the arguments that it was trained with, which is what "
            f"zoo.create_model does if only num_classes is given."
        )
    state.update(tensors)
    layers = bln_layers(model).values()
    fixed = [layer.batch_size for layer in layers]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Weights must have the shapes of the model, got others: {error}\nMake the model with the arguments that "
            f"it was trained with, which is what zoo.create_model does if only num_classes is given."
        ) from error
    for layer, batch_size in zip(layers, fixed, strict=True):
        # What was accumulated belongs to the training that is over: the next one begins with its first batch.
        layer.start_epoch()
        if batch_size is not None:
            with torch.no_grad():
                layer.nominal_batch_size.fill_(batch_size)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown or "nothing"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A part of a sentence with the known names that come nearest, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""
