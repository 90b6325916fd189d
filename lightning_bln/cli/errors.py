"""Which errors are bad input, told in one line, and how the line reads."""

from __future__ import annotations

import difflib
import dis
import re
from collections.abc import Iterable

_BAD_INPUT = (ValueError, TypeError, OSError)
_LIGHTNING = {"lightning", "lightning_bln", "jsonargparse"}


class UsageError(Exception):
    """Bad input: ends in one line on standard error that names the mistake and the right form, and exit code 2."""


def bad_input(error: Exception) -> str | None:
    """The line for an error that is bad input; None for any other, which keeps its traceback.

    Bad input is a `UsageError`, and what this package's own checks raise: an error of another package or of the user's
    model is for the user to trace.
    """
    if isinstance(error, UsageError):
        return one_line(str(error))
    names = []
    raised = False
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_globals.get("__name__", ""))
        # By a raise statement, on purpose; what Python raises by itself, an index out of range say, is our mistake.
        raised = trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        trace = trace.tb_next
    if isinstance(error, _BAD_INPUT) and raised and names[-1].startswith("lightning_bln."):
        return one_line(str(error))
    # Lightning's name for settings that do not fit each other; inside the user's own code its traceback helps more.
    packages = {name.partition(".")[0] for name in names}
    if type(error).__name__ == "MisconfigurationException" and packages <= _LIGHTNING:
        return one_line(str(error))
    return None


def one_line(text: str) -> str:
    """The text without line breaks and colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A half sentence with the known word that comes nearest, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def parser_message(text: str) -> str:
    r"""What jsonargparse says in many lines, as one: which option, what is wrong, what was given.

    Example:
        >>> parser_message("Parser key \"model.width\":\n  Expected a <class 'int'>\n  Given value: x")
        "--model.width: expected int, got 'x'"
    """
    option, given = "", ""
    problems: list[str] = []
    kinds: list[str] = []
    for line in text.strip().splitlines():
        line = line.strip().removeprefix("- ")
        key = re.match(r'Parser key "([^"]+)":\s*(.*)', line)
        if key:
            option = f"{option}.{key[1]}" if option else f"--{key[1]}"
            line = key[2]
        line = re.sub(r"^Problem with given class_path '([^']+)':", r"\1:", line)
        if line.startswith("Given value:"):
            given = line.removeprefix("Given value:").strip()
        elif not line or re.match(r"Does not validate|Subtypes:|Errors:|Given value type:|Expected a path but ", line):
            continue
        elif kind := re.fullmatch(r"Expected an? <class '(?:\w+\.)*(\w+)'>(?:\. Got value: (.*))?", line):
            given = kind[2] or given
            if kind[1] != "NoneType":  # the default of most options, and not what anybody wanted to write
                kinds.append(f"expected {kind[1]}")
        else:
            problems.append(line.replace("typing.", ""))
    nested = re.fullmatch(r"NestedArg\(key='([^']+)', val='?(.*?)'?\)", given)
    if nested:
        given = nested[2]
        if option and not option.endswith(f".{nested[1]}") and not any(f"'{nested[1]}'" in line for line in problems):
            option = f"{option}.{nested[1]}"
    # A class is a problem by itself ("...: " of a line above), and what it could be instead is not.
    shown = "; ".join([*problems, *(kinds if not problems or problems[-1].endswith(":") else [])]).replace(":;", ":")
    if given and not re.search(rf"(?<!\w){re.escape(given)}(?!\w)", shown):
        shown = f"{shown}, got {given!r}"
    return one_line(f"{option}: {shown}" if option else shown)
