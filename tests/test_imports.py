"""What an import pulls in, the public names, and the one direction in which the modules import each other."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_bln

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_bln"
PUBLIC = {
    "BatchLayerNorm",
    "batch_layer_norm",
    "StatFlags",
    "swap_norms_",
    "BLNSwap",
    "set_flags_",
    "start_epoch",
    "update_statistics",
    "load_swapped_checkpoint",
}
TUNING = {
    "CellScore",
    "ScoreTable",
    "TuneResult",
    "apply_flags",
    "load_scores",
    "open_storage",
    "score_flags",
    "suggest_swap",
    "tune_flags",
    "tune_training",
    "write_report",
}
HEAVY = (
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "optuna",
    "torchvision",
    "torchmetrics",
    "timm",
    "triton",
    "plotly",
    "matplotlib",
    "rich",
    "zoo",
)
# A module imports only from levels below its own; within ops/, tuning/ and so on as it likes.
LEVELS = (
    {"flags"},
    {"ops"},
    {"layer", "norm_kinds", "swap_report"},
    {"variants"},
    {"surgery"},
    {"statistics", "checkpoint", "replay", "averaging", "optim"},
    {"callback"},
    {"tuning"},
    {"cli"},
    {"__main__"},
)
# Where a package may be imported at all, as paths in the package; a name without suffix is a folder.
ALLOWED = {
    "lightning": ("callback.py", "tuning", "cli"),
    "pytorch_lightning": (),
    "optuna": ("tuning",),
    "triton": ("ops/cuda.py",),
}


def sources() -> dict[str, ast.Module]:
    """Path inside the package -> its syntax tree."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(), str(path)) for path in paths}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a tree imports, inside functions too; relative imports are not used here."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_on_import(tree: ast.Module) -> set[str]:
    """Those outside functions and ``if TYPE_CHECKING``: what importing the module runs."""

    class Outermost(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST | None:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return None
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                return None
            return self.generic_visit(node)

    return imported(Outermost().visit(ast.parse(ast.unparse(tree))))


def part(path: str) -> str:
    """The first name after the package: ``ops/library.py`` is of ``ops``."""
    return path.removesuffix(".py").split("/")[0]


SOURCES = sources()


def python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def test_importing_the_package_is_light():
    # Not even PyTorch: the command line answers at once.
    code = f"import json, sys, lightning_bln; print(json.dumps([n for n in {('torch', *HEAVY)!r} if n in sys.modules]))"
    assert json.loads(python(code)) == []


def test_the_public_names_for_pytorch_need_pytorch_only():
    names = sorted(PUBLIC - {"BLNSwap"})
    code = f"""
import json, sys
import torch
before = set(sys.modules)
from lightning_bln import {", ".join(names)}
print(json.dumps({{
    "heavy": [name for name in {HEAVY!r} if name in sys.modules and name not in before],
    "cuda": torch.cuda.is_initialized(),
}}))
"""
    assert json.loads(python(code)) == {"heavy": [], "cuda": False}


def test_names_and_modules_are_there_when_asked_for():
    code = """
import pickle, sys, types
import lightning_bln
assert lightning_bln.layer.BatchLayerNorm is lightning_bln.BatchLayerNorm
assert isinstance(lightning_bln.tuning, types.ModuleType)
assert callable(lightning_bln.batch_layer_norm)
assert "BatchLayerNorm" in vars(lightning_bln)
assert "lightning" not in sys.modules
layer = pickle.loads(pickle.dumps(lightning_bln.BatchLayerNorm(3)))
assert type(layer) is lightning_bln.BatchLayerNorm
"""
    python(code)


def test_a_module_that_lacks_what_it_needs_says_so():
    code = """
import sys
sys.modules["lightning"] = None
import lightning_bln
try:
    lightning_bln.callback
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code).strip() == "lightning.pytorch"


def test_flags_need_the_standard_library_only():
    names = imported(SOURCES["flags.py"])
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_the_public_names():
    assert set(lightning_bln.__all__) == PUBLIC
    assert dir(lightning_bln) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(lightning_bln, name).__module__.startswith("lightning_bln")


def test_the_names_of_tuning():
    from lightning_bln import tuning

    assert set(tuning.__all__) == TUNING
    assert dir(tuning) == sorted(TUNING)
    for name in TUNING:
        assert getattr(tuning, name).__module__.startswith("lightning_bln.tuning")
    with pytest.raises(AttributeError, match=r"module 'lightning_bln.tuning' has no attribute 'tune'"):
        tuning.tune  # noqa: B018


def test_scoring_a_plain_module_imports_neither_lightning_nor_optuna():
    code = """
import sys
from lightning_bln.tuning import score_flags
print([name for name in ("lightning", "optuna", "plotly", "torchmetrics") if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'lightning_bln' has no attribute 'BatchNorm'"):
        lightning_bln.BatchNorm  # noqa: B018


@pytest.mark.parametrize("path", [path for path in SOURCES if path != "__init__.py"])
def test_imports_point_one_way(path: str):
    level_of = {name: level for level, names in enumerate(LEVELS) for name in names}
    own = part(path)
    assert own in level_of, f"{path} has no level yet: say in LEVELS what it may import"
    for name in imported(SOURCES[path]):
        if not name.startswith("lightning_bln."):
            continue
        other = name.split(".")[1]
        assert other == own or level_of[other] < level_of[own], f"{path} imports {name}"


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_is_imported_only_where_it_belongs(package: str):
    importers = {path for path, tree in SOURCES.items() if package in {name.split(".")[0] for name in imported(tree)}}
    allowed = ALLOWED[package]
    assert {path for path in importers if path not in allowed and part(path) not in allowed} == set()


def test_the_zoo_is_not_imported():
    for path, tree in SOURCES.items():
        # The command line may offer zoo models when asked for one.
        names = imported_on_import(tree) if part(path) == "cli" else imported(tree)
        assert "zoo" not in {name.split(".")[0] for name in names}, path


def test_the_package_itself_imports_lightning_only_when_asked():
    assert "lightning_bln.callback.BLNSwap" in imported(SOURCES["__init__.py"])
    assert not any(name.startswith("lightning_bln.callback") for name in imported_on_import(SOURCES["__init__.py"]))
