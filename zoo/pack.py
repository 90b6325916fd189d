"""Make a weights file of the zoo from a checkpoint of its training.

python -m zoo.pack CHECKPOINT --name resnet20_bln.cifar10 --recipe zoo/recipes/resnet20_bln.cifar10.yaml \
    --data-name "CIFAR-10 (JPEG)" --data.root FOLDER

The recipe's data module says on which data loss and accuracy are measured; its arguments can be replaced, as in
``lightning-bln fit``. The flags are searched on the validation data, see `search_flags`. The model's parameters are
stored in float16 if that does not change the validation accuracy; the test data are then used once.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save
from torch import Tensor, nn

from lightning_bln import StatFlags, set_flags_
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning import score_flags
from lightning_bln.tuning.table import ScoreTable
from zoo._few_bits import pack_rows
from zoo._registry import create_model
from zoo._weights import (
    FOLDER,
    GOLDEN,
    INPUT,
    SUFFIX,
    SUMS,
    as_float32,
    check_metadata,
    checksums,
    full_name,
    get_weights,
    load_tensors_,
)
from zoo.lit import LitClassifier

GOLDEN_SAMPLES = 4
# What inference depends on besides tensors and flags.
_FIXED = ("eps", "gain", "batch_size")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Without the program's name. Default those of this process.
    """
    parser = ArgumentParser(prog="python -m zoo.pack", description="Make a weights file from a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="of a training by the recipe")
    parser.add_argument("--name", type=str, required=True, help="MODEL.TAG, such as resnet20_bln.cifar10")
    parser.add_argument("--recipe", action="config", required=True, help="the YAML file of the training")
    parser.add_argument("--data-name", type=str, required=True, help='what cards call the data: "CIFAR-10 (JPEG)"')
    parser.add_argument("--flags", type=str | None, help='such as FFFF, or "own": as the layers have them')
    parser.add_argument("--embedding-bits", type=int | None, help="of each number of an embedding. Default: 16 or 32")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder of weights. Default: zoo/weights")
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parser.add_argument("--seed_everything", type=int, help=argparse.SUPPRESS)
    # As dicts, of which nothing is instantiated.
    parser.add_argument("--model", type=dict, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", type=dict, help=argparse.SUPPRESS)
    parser.add_argument("--bln", type=bool | dict, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    metadata = pack(
        given.checkpoint,
        name=given.name,
        recipe=Path(os.fspath(given.recipe[-1])),
        settings=given.model["init_args"],
        seed=given.seed_everything,
        data=parser.instantiate(given).data,
        data_name=given.data_name,
        flags=given.flags,
        embedding_bits=given.embedding_bits,
        folder=given.out,
    )
    sys.stdout.write(json.dumps(metadata, indent=2) + "\n")


def pack(
    checkpoint: Path,
    *,
    name: str,
    recipe: Path,
    settings: Mapping[str, Any],
    seed: int,
    data: Any,
    data_name: str,
    flags: str | None = None,
    embedding_bits: int | None = None,
    folder: Path = FOLDER,
) -> dict[str, Any]:
    """Measure a trained model, and write its weights file, its golden file and their sha256.

    Args:
        checkpoint: Of a `LitClassifier`.
        name: ``arch.tag``.
        recipe: The YAML file of the training.
        settings: Those of the recipe for `LitClassifier`, "model" among them.
        seed: Of the training.
        data: A LightningDataModule with mean and std (None, or tensors), ``classes`` and ``input_metadata()``; with a
            tokenizer for texts.
        data_name: What cards call the data.
        flags: Of all BatchLayerNorm layers; "own" for those that the checkpoint has. Default None: `search_flags`.
        embedding_bits: In how many bits embeddings' numbers are stored, for files that would be too large, whether
            that changes the validation accuracy or not. Default None: as other parameters.
        folder: Default ``zoo/weights``.

    Returns:
        The metadata.

    Raises:
        ValueError: If checkpoint, recipe and name are of different models, settings, seeds or first weights, or layers
            have other settings than those that `zoo.create_model` makes.
    """
    arch, _, tag = name.partition(".")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    hparams = saved["hyper_parameters"]
    if not tag or not arch == settings["model"] == hparams["model"]:
        raise ValueError(
            f"Name, recipe and checkpoint must be of one model, got the name {name!r}, {settings['model']!r} in the "
            f"recipe and {hparams['model']!r} in the checkpoint; call for example --name "
            f"{hparams['model']}.{tag or 'cifar10'}."
        )
    # What the recipe leaves out has its default. What a checkpoint of an older version does not tell is believed.
    defaults = {name: each.default for name, each in inspect.signature(LitClassifier).parameters.items()}
    wanted = {**defaults, **settings, "seed_everything": seed}
    trained = {**defaults, **hparams, "weights": saved.get("zoo_start", wanted["weights"])}
    trained["seed_everything"] = saved.get("zoo_seed", seed)
    for each in (wanted, trained):
        each["weights"] = each["weights"] and full_name(arch, each["weights"])
    if wanted["num_classes"] is None:
        wanted["num_classes"] = trained["num_classes"]  # of the data
    changed = {key: trained[key] for key, value in wanted.items() if trained[key] != value}
    if changed:
        raise ValueError(
            f"A checkpoint must be of a training by the recipe, got one with {changed}, where the recipe has "
            f"{ {key: wanted[key] for key in changed} }; train by the recipe, or write a recipe of these settings."
        )
    commit = _commit()
    arguments = {"num_classes": hparams["num_classes"], **(hparams["model_kwargs"] or {})}
    model = create_model(arch, **arguments)
    load_checkpoint_(model, saved["state_dict"])
    exact = stored_tensors(model, torch.float32, embedding_bits)
    rounded = stored_tensors(model, torch.float16, embedding_bits)
    search: dict[str, Any] | None = None
    data.setup("validate")
    if flags is None and bln_layers(model):
        search = search_flags(model, data.val_dataloader())
        flags = search["chosen"]
    chosen = _chosen_flags(model, None if flags == "own" else flags)

    # The rounded weights replace the others only if they are as accurate; the test data are for the ones that are kept.
    evaluate = partial(_evaluate, arch, arguments, flags=chosen, data=data)
    metrics, tensors = evaluate("validate", exact), exact
    rounded_metrics = evaluate("validate", rounded)
    if rounded_metrics["val_accuracy"] == metrics["val_accuracy"]:
        metrics, tensors = rounded_metrics, rounded
    metrics |= evaluate("test", tensors)

    *inputs, labels = next(iter(data.test_dataloader()))
    samples = [value[:GOLDEN_SAMPLES].contiguous() for value in inputs]
    golden = dict(zip(("input", "lengths"), samples, strict=False))
    golden["output"] = _outputs(arch, arguments, tensors, chosen, samples)
    taken = dict(data.input_metadata())
    others: dict[str, bytes] = {}
    if taken["kind"] == "text":
        taken["vocabulary"], content = _vocabulary(data, name, folder)
        others[taken["vocabulary"]] = content
    metadata = {
        "arch": arch,
        "tag": tag,
        "arguments": arguments,
        "data": data_name,
        "recipe": _in_repository(recipe),
        "seed": seed,
        "epochs": saved["epoch"] + 1,
        "flags": chosen,
        "metrics": metrics,
        "classes": list(data.classes),
        "test_batch_size": len(labels),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": ("float16" if tensors is rounded else "float32")
        + (f", embeddings in {embedding_bits} bits" if embedding_bits else ""),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit,
        "torch": str(torch.__version__),
        "input": taken,
    }
    # What the weights owe to others.
    metadata |= {"start": wanted["weights"]} if wanted["weights"] else {}
    if settings.get("teachers"):
        metadata["teachers"] = [get_weights(teacher).name for teacher in settings["teachers"]]
        metadata |= {"mirror_teachers": True} if settings.get("mirror_teachers") else {}
    if search is not None:
        metadata["flag_search"] = search
    tensors |= {key: value for key, value in zip(INPUT, (data.mean, data.std), strict=True) if value is not None}
    write_weights(folder, name, tensors, golden, metadata, others)
    return metadata


def load_checkpoint_(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the part of a LitClassifier's state_dict that is its model's, flags too.

    Args:
        model: Fresh from `zoo.create_model`; changed in place.
        state: With keys ``model.*``.

    Raises:
        ValueError: If a BatchLayerNorm layer was trained with another eps, gain or fixed batch size than the fresh
            one has: `zoo.create_model` would make another model than was trained.
        RuntimeError: If tensors are missing, too many or of other shapes.
    """
    fresh = {name: layer.config() for name, layer in bln_layers(model).items()}
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    for name, layer in bln_layers(model).items():
        config = layer.config()
        different = [
            f"{key}={config[key]!r}, not {fresh[name][key]!r}" for key in _FIXED if config[key] != fresh[name][key]
        ]
        if different:
            raise ValueError(
                f"A layer must be trained with the settings that zoo.create_model gives it, got {name} with "
                f"{', '.join(different)}; train it without settings of its own for these."
            )


def search_flags(model: nn.Module, batches: Any) -> dict[str, Any]:
    """The flags for a model by their loss on validation data, batch statistics being the population's.

    With batch statistics of the mini-batch an output would depend on which other samples are in the batch: it would
    be of no use for one sample, and wrong where a batch is all of one class, as in data sorted by class.

    Args:
        model: Trained, with BatchLayerNorm layers.
        batches: (inputs..., labels).

    Returns:
        "chosen": of the four settings with batch statistics of the population the default one, unless the best one
        differs from it by more than chance, see `ScoreTable.compared`; "tied": those of the four that cannot be told
        apart from their best, best first; "losses" of all 16.
    """
    table = score_flags(model, batches, LitClassifier.loss, progress=False)
    scores = [score for score in table if score.code.startswith("TT")]
    candidates = ScoreTable(scores, monitor=table.monitor, mode=table.mode, confidence=table.confidence)
    # One batch alone gives no interval: then nothing is known to be worse.
    tied = [score.code for score in candidates if not candidates.compared(score)[1] > 0]
    default = StatFlags().code
    return {
        "chosen": default if default in tied else candidates.best.code,
        "tied": tied,
        "losses": {score.code: score.loss for score in table},
    }


def stored_tensors(model: nn.Module, dtype: torch.dtype, embedding_bits: int | None = None) -> dict[str, Tensor]:
    """What a weights file holds of a model: parameters in ``dtype``, buffers as they are, nothing else.

    Buffers are the statistics of norms, whose range float16 does not have. Embeddings are packed if they are to have
    so many bits, see `zoo._few_bits.pack_rows`.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {
        name: value.detach()
        .to(dtype if name in parameters else value.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    if embedding_bits is None:
        return stored
    tables = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise ValueError(
            f"Bits of embeddings are for models that have some, got {embedding_bits!r} for a {type(model).__name__} "
            f"without; leave out --embedding-bits."
        )
    return pack_rows(stored, tables, embedding_bits)


def write_weights(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    golden: dict[str, Tensor],
    metadata: dict[str, Any],
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write a weights file and its golden file, and list them in ``sha256.json``.

    Every file is written beside its place and then moved there, the list last: weights that are not listed do not
    exist for the zoo, and ones that are half replaced are an error.

    Args:
        folder: Created if need be.
        name: ``arch.tag``.
        tensors: The model's, in the dtype of the file, and ``input.mean`` and ``input.std``.
        golden: "input", "lengths" where the model takes them, and "output".
        metadata: As `Weights` has it.
        others: More files, such as a vocabulary: name -> content. Default None.

    Raises:
        ValueError: If the metadata is not that of weights of this name.
    """
    check_metadata(metadata, name)
    contents = {
        name + SUFFIX: save(tensors, {"zoo": json.dumps(metadata)}),
        name + GOLDEN: save(golden),
        **(others or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    sums = checksums(folder) | {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    contents[SUMS] = (json.dumps(sums, indent=2, sort_keys=True) + "\n").encode()
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=folder) as beside:
        for file, content in contents.items():
            (Path(beside) / file).write_bytes(content)
        for file in contents:
            os.replace(Path(beside) / file, folder / file)


def _chosen_flags(model: nn.Module, flags: str | None) -> str | dict[str, str] | None:
    """The flags of the model's layers, after they were set: one code if all have the same, None without layers."""
    if flags is not None:
        set_flags_(model, flags)
    codes = {name: layer.flags.code for name, layer in bln_layers(model).items()}
    if len(set(codes.values())) > 1:
        return codes
    return next(iter(codes.values()), None)


def _evaluate(
    arch: str,
    arguments: dict[str, Any],
    stage: str,
    tensors: dict[str, Tensor],
    *,
    flags: str | dict[str, str] | None,
    data: Any,
) -> dict[str, float]:
    """Loss and accuracy in validation or test, of the model as `zoo.create_model` makes it."""
    arguments = dict(arguments)
    module = LitClassifier(arch, num_classes=arguments.pop("num_classes"), model_kwargs=arguments)
    _load(module.model, tensors, flags)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return dict(getattr(trainer, stage)(module, datamodule=data, verbose=False)[0])


def _outputs(
    arch: str,
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    flags: str | dict[str, str] | None,
    inputs: Sequence[Tensor],
) -> Tensor:
    model = create_model(arch, **arguments)
    _load(model, tensors, flags)
    with torch.inference_mode():
        return model.eval()(*inputs)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], flags: str | dict[str, str] | None) -> None:
    load_tensors_(model, as_float32(tensors))
    if flags is not None:
        set_flags_(model, flags)


def _vocabulary(data: Any, name: str, folder: Path) -> tuple[str, bytes]:
    """Name and content of the vocabulary file of text data.

    Weights with one tag share it, unless their vocabularies differ: their training texts may.
    """
    content = data.tokenizer.to_bytes()
    shared = f"{name.partition('.')[2]}.vocabulary.txt"
    same = checksums(folder).get(shared) in (None, hashlib.sha256(content).hexdigest())
    return shared if same else f"{name}.vocabulary.txt", content


def _in_repository(path: Path) -> str:
    root = Path(__file__).parents[1]
    path = path.resolve()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
