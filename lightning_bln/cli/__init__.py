"""``lightning-bln``, the command line: which subcommand runs, and how it ends.

Exit codes: 0; 2 after bad input, with one line on standard error; 1 after any other error, with its traceback; 130
after Ctrl-C. Nothing heavy is imported before a subcommand needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_bln.cli.errors import UsageError, bad_input, did_you_mean

COMMANDS = {
    "fit": "train a model; --bln true swaps its norms to BatchLayerNorm",
    "validate": "evaluate a model on its validation data",
    "test": "evaluate a model on its test data",
    "predict": "predict with a model",
    "score": "score all 16 settings of a trained model's flags in one pass",
    "tune": "search the settings, layer by layer too, in an Optuna study",
    "apply": "write a checkpoint with the chosen flags",
    "report": "write an HTML page about a study",
    "space": "print the search space for `optuna ask --search-space`",
}

_HELP = """\
usage: lightning-bln COMMAND [OPTIONS]

Batch Layer Normalization: train a model with it, and choose its inference flags.

commands:
{commands}

options:
  -h, --help  show this help; lightning-bln COMMAND --help shows a command's
  --version   show the version

Models and data are LightningModules and LightningDataModules, by class path or in
a YAML file. From a model to chosen flags:

  lightning-bln fit --model my_module.LitModel --data my_module.Data --bln true
  lightning-bln tune --config RUN/config.yaml --ckpt_path RUN/checkpoints/best.ckpt
  lightning-bln apply --ckpt_path RUN/checkpoints/best.ckpt --out chosen.ckpt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name. Default those of this process.

    Returns:
        The exit code.

    Example:
        >>> main(["space", "--indent", "2"])  # doctest: +SKIP
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    try:
        _run(command, [_underscores(argument) for argument in arguments[1:]])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # Whoever read this, `head` say, has seen enough; Python must not try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:
        # Lightning turns Ctrl-C into exit(1) when it has shut down.
        if isinstance(end.__context__, KeyboardInterrupt):
            return _interrupted()
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception as error:
        line = bad_input(error)
        if line is None:
            raise
        name = f"lightning-bln {command}" if command in COMMANDS else "lightning-bln"
        sys.stderr.write(f"{name}: error: {line}\n")
        return 2
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command in ("", "-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        sys.stdout.write(_HELP.format(commands="\n".join(f"  {n:{width}}  {text}" for n, text in COMMANDS.items())))
    elif command == "--version":
        import lightning_bln

        sys.stdout.write(f"lightning-bln {lightning_bln.__version__}\n")
    elif command not in COMMANDS:
        what = "option" if command.startswith("-") else "command"
        raise UsageError(
            f"the first argument must be a command ({', '.join(COMMANDS)}), got the {what} {command!r}"
            f"{did_you_mean(command, COMMANDS)}"
        )
    elif command in ("apply", "report", "space"):
        from lightning_bln.cli import files

        files.run(command, arguments)
    else:
        _make_current_folder_importable()
        from lightning_bln.cli import lit

        lit.run(command, arguments)


def _underscores(argument: str) -> str:
    """``--ckpt-path`` is ``--ckpt_path``; values, and what follows "=", are left alone."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _make_current_folder_importable() -> None:
    """As under ``python -m``: ``--model my_module.LitModel`` names a file here."""
    folder = os.getcwd()
    if not getattr(sys.flags, "safe_path", False) and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)


def _interrupted() -> int:
    sys.stderr.write("\nlightning-bln: interrupted\n")
    return 130
