"""A folder of weights as the zoo's own, of a small model that has seen one batch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo
from lightning_bln import set_flags_
from zoo._weights import checksums, load_tensors_
from zoo.pack import stored_tensors, write_weights

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.15])
IMAGE = {"kind": "image", "size": [3, 32, 32]}


def metadata(name: str, **changes: Any) -> dict[str, Any]:
    """All keys that the metadata of weights has."""
    arch, _, tag = name.partition(".")
    return {
        "arch": arch,
        "tag": tag,
        "arguments": {"num_classes": 10},
        "data": "noise",
        "recipe": f"zoo/recipes/{name}.yaml",
        "seed": 1,
        "epochs": 2,
        "flags": None,
        "metrics": {"test_accuracy": 0.5, "test_loss": 0.7, "val_accuracy": 0.5, "val_loss": 0.7},
        "classes": ["cat", "dog"],
        "test_batch_size": 500,
        "parameters": 62_006,
        "dtype": "float16",
        "date": "2026-11-24",
        "commit": "0" * 40,
        "torch": "2.10.0",
        "input": IMAGE,
    } | changes


def write_example(folder: Path, name: str = "paper_cnn_bln.noise", **changes: Any) -> nn.Module:
    """Write weights of a new image model and return it, in eval mode, with the rounded parameters that were stored.

    Args:
        folder: Of weights.
        name: ``arch.tag``.
        changes: To the metadata.
    """
    values = metadata(name, **changes)
    model = zoo.create_model(values["arch"], **values["arguments"])
    for _ in range(2):
        model(torch.randn(8, 3, 32, 32))
    tensors = stored_tensors(model, torch.float16)
    load_tensors_(model, tensors)
    if values["flags"] is not None:
        set_flags_(model, values["flags"])
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        golden = {"input": x, "output": model.eval()(x)}
    write_weights(folder, name, tensors | {"input.mean": MEAN, "input.std": STD}, golden, values)
    return model


def write_listed(path: Path, content: bytes) -> None:
    """Write a file, and its sha256 into the list beside it, as whoever publishes a wrong file would."""
    path.write_bytes(content)
    sums = checksums(path.parent) | {path.name: hashlib.sha256(content).hexdigest()}
    path.with_name("sha256.json").write_text(json.dumps(sums))
