"""The subcommands that run a model: LightningCLI with `BLNSwap` one option away, and with ``score`` and ``tune``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_bln.callback import BLNSwap
from lightning_bln.cli.errors import UsageError, did_you_mean, parser_message
from lightning_bln.cli.flag_trainer import FlagTrainer
from lightning_bln.tuning.apply import checkpoint_flags, read_checkpoint

TRAINING = ("fit", "validate", "test", "predict")
CHOOSING = ("score", "tune")

# Arguments of the Trainer's methods that the command line builds itself.
_OBJECTS = ("model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule")

_USAGE = "--model MODULE.CLASS [--data MODULE.CLASS] [--config FILE] [OPTIONS]"

_SWITCHES = ("--bln", "--per_layer")

# Options that name a class -> the right form.
_CLASSES = {
    "model": "write --model my_module.LitModel, a LightningModule in a file of this folder or an installed package; ",
    "data": "write --data my_module.Data, a LightningDataModule in a file of this folder or an installed package; ",
    "optimizer": "write --optimizer SGD, say; ",
    "lr_scheduler": "write --lr_scheduler StepLR, say; ",
}

_BLN_HELP = (
    "Swap the model's normalization layers to BatchLayerNorm: true, or arguments of BLNSwap, each as an option of its "
    "own (--bln.flags FFFF --bln.statistics per_channel) or in YAML (bln: {statistics: per_channel})."
)


@dataclass
class SwapArguments:
    """Arguments of BLNSwap, the callback that swaps a model's normalization layers to BatchLayerNorm.

    Args:
        flags: Inference flags, such as TTFF; null keeps TTFF, or what a checkpoint brings.
        statistics: Batch statistics for each position (the paper) or for each channel (any input size).
        feature_population: Feature statistics pooled over samples, or for each sample slot.
        population: An average over the epoch (the paper), an exponential one, or recomputed before each validation.
        momentum: Weight of the new value in "ema".
        batch_size: Fixes B of the formula; null for the size of the batch.
        sync: Batch statistics over all processes; auto for as trainer.sync_batchnorm says.
        affine: Keep the scale of the layer that is replaced, or weight 1 and bias 0 as in the paper.
        eps: Added to each variance; null keeps that of the layer that is replaced.
        norms: Which kinds of layers are swapped.
        include: Only layers whose names match a pattern such as "net.*".
        exclude: Not the layers whose names match.
        precise_batches: Batches that population "precise" keeps and runs again.
    """

    flags: str | None = None
    statistics: Literal["per_position", "per_channel"] = "per_position"
    feature_population: Literal["pooled", "slot"] = "pooled"
    population: Literal["epoch", "ema", "precise"] = "epoch"
    momentum: float = 0.1
    batch_size: int | None = None
    sync: bool | Literal["auto"] = "auto"
    affine: Literal["preserve", "paper"] = "preserve"
    eps: float | None = None
    norms: list[str] = field(default_factory=lambda: ["batch", "layer"])
    include: str | list[str] | None = None
    exclude: str | list[str] | None = None
    precise_batches: int = 16


class Parser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage, which is longer than a screen."""
        if not self.exit_on_error:  # a parser inside the parser, whose error becomes a part of another
            super().error(message, ex)
        raise UsageError(parser_message(message)) from ex


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of ``fit`` beside its results, for ``--config`` of every subcommand."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As in Lightning, but an older file in the way is bad input."""
        if self.already_saved or stage != "fit":
            return
        try:
            super().setup(trainer, pl_module, stage)
        except RuntimeError as error:
            if "to NOT exist" not in str(error):
                raise
            raise UsageError(
                f"The run's configuration must not replace another, got {trainer.log_dir}/{self.config_filename}, "
                f"which exists; move it, or write to another folder with --trainer.default_root_dir."
            ) from error


class BLNCLI(LightningCLI):
    """LightningCLI with one subcommand: any LightningModule and LightningDataModule, and ``--bln``.

    Args:
        command: "fit", "validate", "test", "predict", "score" or "tune".
        arguments: What follows it on the command line.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self.other_options = _options_of_others(command)
        _check_for_options_of_others(command, arguments, self.other_options)
        super().__init__(
            save_config_callback=SaveConfig if command == "fit" else None,
            trainer_class=FlagTrainer if command in CHOOSING else pl.Trainer,
            parser_class=Parser,
            parser_kwargs={"prog": "lightning-bln", command: {"usage": f"lightning-bln {command} {_USAGE}"}},
            args=[command, *arguments],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that runs; parsers for the others would cost seconds."""
        return {self.command: set(_OBJECTS)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--bln``, and what other subcommands read from the same configuration."""
        self.command_parser = parser
        parser.add_argument("--bln", type=bool | SwapArguments, default=False, help=_BLN_HELP)
        for name in self.other_options:
            parser.add_argument(f"--{name}", type=Any, help=argparse.SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and look at the checkpoint before anything is built."""
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            raise UsageError(self._with_the_right_form(str(error))) from error
        path = self.config[self.command].get("ckpt_path")
        if path and _is_local_file(path):
            self._check_checkpoint(path)

    def _check_checkpoint(self, path: str) -> None:
        if not Path(path).exists():
            raise UsageError(
                f"--ckpt_path must be a checkpoint, got {path!r}, and there is no such file; check the path."
            )
        if not Path(path).is_file():  # a folder: Lightning's sharded checkpoints
            return
        checkpoint = read_checkpoint(path, mmap=True)
        if self.command in CHOOSING:
            checkpoint_flags(checkpoint, path)
        self._take_arguments(checkpoint)

    def _take_arguments(self, checkpoint: dict[str, Any]) -> None:
        """The model's arguments that the checkpoint holds, as ``load_from_checkpoint`` of its class takes them."""
        arguments = checkpoint.get("hyper_parameters")
        if not isinstance(arguments, dict) or checkpoint.get("hparams_name", "kwargs") != "kwargs":
            return
        class_path = self.config[self.command]["model"]["class_path"]
        module, _, name = class_path.rpartition(".")
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        known = {key: value for key, value in arguments.items() if takes_any or key in parameters}
        known = {key: value for key, value in known.items() if key not in ("_class_path", "_instantiator")}
        if known:
            model = {"class_path": class_path, "dict_kwargs": dict(known)}
            try:
                self.config = self.parser.parse_object({self.command: {"model": model}}, self.config)
            except UsageError as error:
                kind = str(error).partition(", got")[0]
                raise UsageError(
                    f"--ckpt_path must be a checkpoint of {class_path}, got one with the arguments {known}: {kind}; "
                    f"name the class that was trained."
                ) from error

    def _parse_ckpt_path(self) -> None:
        # Done above. Lightning's way fails on checkpoints that a script wrote, and lets a checkpoint of LightningCLI
        # replace the class that was asked for by the one that the file names.
        pass

    def _with_the_right_form(self, message: str) -> str:
        message = message.removesuffix(".").replace(f"--{self.command}.", "--")
        required = re.fullmatch(r"the following arguments are required: (.*)", message)
        if required:
            names = [f"--{name.strip().removeprefix(self.command + '.')}" for name in required[1].split(",")]
            forms = {"--model": "--model my_module.LitModel", "--ckpt_path": "--ckpt_path RUN/checkpoints/best.ckpt"}
            written = " ".join(forms.get(name, name) for name in names)
            return f"the following arguments are required: {', '.join(names)}; write {written}, or --config run.yaml"
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            known = re.findall(r"--[\w.]+", self.command_parser.format_help())
            message += did_you_mean(unknown[1].partition("=")[0], known)
        option = re.match(r"--(\w+)(\.\w+)?: (?:([\w.]+): )?", message)
        name = option[1] if option else ""
        see = f"see lightning-bln {self.command}"
        if name == "bln":
            message = message.replace(f"{SwapArguments.__module__}.{SwapArguments.__name__}: ", "")
            return f"{message}; write --bln true, or its arguments as in --bln.flags FFFF; {see} --bln.help"
        if option and option[3] and (option[2] or "Option '" in message):
            return f"{message}; {see} --{name}.help {option[3]}"  # the class is known, and it says what it takes
        return f"{message}; {_CLASSES.get(name, '')}{see} --help"

    def before_instantiate_classes(self) -> None:
        """What other subcommands read is not for this one's saved configuration."""
        for name in self.other_options:
            self.config[self.command].pop(name, None)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """With `BLNSwap` before all other callbacks, or for choosing flags with no callbacks at all."""
        given = self._get(self.config_init, "trainer")["callbacks"]
        callbacks = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
        swap = self._get(self.config_init, "bln")
        if self.command in CHOOSING:
            # The checkpoint says what is swapped; nothing is trained, logged or saved.
            own = self.config_init[self.command]
            kwargs |= {"callbacks": [], "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
            kwargs["enable_progress_bar"] = own["progress"] and own["json"] != "-" and sys.stdout.isatty()
        elif swap:
            if any(isinstance(callback, BLNSwap) for callback in callbacks):
                raise UsageError(
                    "BLNSwap must be given once, got --bln and one among trainer.callbacks; leave one out."
                )
            arguments = asdict(swap) if isinstance(swap, SwapArguments) else {}
            kwargs["callbacks"] = [BLNSwap(**arguments), *callbacks]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise UsageError(f"the Trainer must be given settings that fit, got --trainer.* with: {error}") from error


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a subcommand: parse, build the model, the data and the Trainer, and call its method."""
    # "--bln" alone means "--bln true".
    spelled = [
        f"{one}=true" if one in _SWITCHES and after.startswith("-") else one
        for one, after in itertools.pairwise([*arguments, "--"])
    ]
    try:
        BLNCLI(command, spelled)
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("Error(s) in loading state_dict"):
            raise
        if "running_batch_mean" in text and "BatchLayerNorm" not in text:
            got = "one with BatchLayerNorm for a model without; add --bln true, with the arguments of its training"
        elif "is a BatchLayerNorm, but the checkpoint holds" in text:
            got = "one without BatchLayerNorm for a model with it; leave --bln out"
        else:
            listed = textwrap.shorten(text.partition(":")[2], 300, placeholder=" ...")
            got = f"another one ({listed}); give the arguments of its training, as --config of its run"
        raise UsageError(f"--ckpt_path must be a checkpoint of the same model, got {got}.") from error


def _options(command: str) -> list[str]:
    """The options that a subcommand adds to those of all: arguments of the Trainer's method."""
    trainer = FlagTrainer if command in CHOOSING else pl.Trainer
    parameters = inspect.signature(getattr(trainer, command)).parameters
    return [name for name in parameters if name != "self" and name not in _OBJECTS]


def _options_of_others(command: str) -> list[str]:
    own = _options(command)
    others = [name for other in (*TRAINING, *CHOOSING) for name in _options(other)]
    return [name for name in dict.fromkeys(others) if name not in own]


def _check_for_options_of_others(command: str, arguments: Sequence[str], others: Sequence[str]) -> None:
    # In a configuration they are for the other subcommand; written here they would silently do nothing.
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and name in others:
            where = [other for other in (*TRAINING, *CHOOSING) if name in _options(other)]
            raise UsageError(f"--{name} is an option of {' and '.join(where)}, got it with {command}; leave it out.")


def _is_local_file(path: str) -> bool:
    return path not in ("best", "last", "hpc") and "://" not in path and not path.startswith("registry")
