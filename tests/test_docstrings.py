"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import lightning_bln

MODULES = ["lightning_bln", *(found.name for found in pkgutil.walk_packages(lightning_bln.__path__, "lightning_bln."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str):
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, **vars(module)}
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(module, name, globs=names):
        runner.run(example, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", lightning_bln.__all__)
def test_public_names_have_an_example(name: str):
    assert ">>> " in inspect.getdoc(getattr(lightning_bln, name))


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(".__main__")])
def test_modules_say_what_they_are(name: str):
    assert importlib.import_module(name).__doc__
