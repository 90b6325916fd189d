"""The subcommands that need no model: ``space``, ``apply`` and ``report``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from lightning_bln.cli.errors import UsageError, did_you_mean
from lightning_bln.cli.options import DEFAULT_STUDY, STORAGE_HELP, STORAGE_VARIABLE


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def run(command: str, arguments: list[str]) -> None:
    """Run one of them."""
    parser = _Parser(prog=f"lightning-bln {command}", allow_abbrev=False)
    {"space": _add_space, "apply": _add_apply, "report": _add_report}[command](parser)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = re.findall(r"--\w+", parser.format_help())
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0].split('=')[0], known)}")
    {"space": _space, "apply": _apply, "report": _report}[command](options)


def _add_space(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the search space as `optuna ask --search-space` reads it: the four flags of all layers together, or of "
        "each layer. The order of names and values is the one that studies of `lightning-bln tune` have."
    )
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--ckpt_path", metavar="FILE", help="a search by layer, over the layers of this checkpoint")
    layers.add_argument("--layers", metavar="A,B", help="a search by layer, over these layers")
    parser.add_argument("--indent", type=int, metavar="N", help="spread over lines, indented by so many spaces")


def _space(options: argparse.Namespace) -> None:
    from lightning_bln.tuning.space import search_space_json

    layers = None
    if options.layers is not None:
        layers = [name.strip() for name in options.layers.split(",") if name.strip()]
        if not layers or len(set(layers)) < len(layers):
            raise UsageError(
                f"--layers must be names of layers, each once, got {options.layers!r}; write --layers a,b."
            )
    elif options.ckpt_path is not None:
        from lightning_bln.tuning.apply import checkpoint_flags, read_checkpoint

        layers = list(checkpoint_flags(read_checkpoint(options.ckpt_path, mmap=True), options.ckpt_path))
    sys.stdout.write(search_space_json(layers, indent=options.indent) + "\n")


def _add_apply(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a checkpoint whose BatchLayerNorm layers have the chosen flags, those of --flags or the best ones of a "
        "study. Everything else in it stays as it was, bit for bit; training resumes from it as from the original."
    )
    parser.add_argument("--ckpt_path", metavar="FILE", required=True, help="checkpoint of a model trained with --bln")
    parser.add_argument("--out", metavar="FILE", required=True, help="the checkpoint to write")
    parser.add_argument(
        "--flags", metavar="TTFF", help='flags of all layers, or of each layer as "net.1=TTFF,net.5=FFFF"'
    )
    _add_study(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def _apply(options: argparse.Namespace) -> None:
    from lightning_bln.tuning.apply import apply_flags, checkpoint_flags, read_checkpoint
    from lightning_bln.tuning.space import setting_code

    _check_new(options.out, options.overwrite)
    if options.flags is not None:
        if options.study_name is not None or options.storage is not None:
            raise UsageError("the flags must come from one place, got --flags and a study; leave one of them out.")
        setting, whence = options.flags, ""
    else:
        from lightning_bln.tuning.lookup import find_study
        from lightning_bln.tuning.study import load_scores

        layers = list(checkpoint_flags(read_checkpoint(options.ckpt_path, mmap=True), options.ckpt_path))
        study = find_study(_storage(options), options.study_name or DEFAULT_STUDY)
        setting = load_scores(study).best.setting
        whence = f", the best of {study.study_name!r}"
        _check_layers(study.user_attrs.get("lightning_bln", {}).get("layers"), layers, options.ckpt_path)
    chosen = apply_flags(options.ckpt_path, setting, options.out, overwrite=options.overwrite)
    code = setting_code(next(iter(chosen.values())) if len(set(chosen.values())) == 1 else chosen)
    sys.stdout.write(f"{options.out}: {len(chosen)} {'layer' if len(chosen) == 1 else 'layers'} with {code}{whence}\n")


def _check_layers(studied: list[str] | None, layers: list[str], path: str) -> None:
    if studied is not None and list(studied) != layers:
        raise UsageError(
            f"the study must be of this checkpoint's model, got one over {', '.join(studied)} for {path} with "
            f"{', '.join(layers)}; give the --storage and --study_name of its own study, or --flags."
        )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write one HTML page about a study, which opens without a network: the settings and their intervals, the "
        "effect of each flag and layer, the search itself."
    )
    _add_study(parser)
    parser.add_argument("--out", metavar="FILE", default="report.html", help="default: %(default)s")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def _report(options: argparse.Namespace) -> None:
    from lightning_bln.tuning.lookup import find_study

    _check_new(options.out, options.overwrite)
    study = find_study(_storage(options), options.study_name or DEFAULT_STUDY)

    from lightning_bln.tuning.report import write_report

    sys.stdout.write(f"{write_report(study, options.out, title=options.title)}\n")


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", metavar="URL", help=STORAGE_HELP)
    parser.add_argument("--study_name", metavar="NAME", help=f"default: {DEFAULT_STUDY}")


def _storage(options: argparse.Namespace) -> str | None:
    return options.storage or os.environ.get(STORAGE_VARIABLE) or None


def _check_new(out: str, overwrite: bool) -> None:
    if Path(out).exists() and not overwrite:
        raise UsageError(f"--out must be a new file, got {out!r}, which exists; name another or add --overwrite.")
