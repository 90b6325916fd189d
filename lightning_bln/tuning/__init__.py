"""Choosing the four inference flags of a trained model: scores of many settings in one pass, and Optuna studies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bln.tuning.apply import apply_flags
    from lightning_bln.tuning.report import write_report
    from lightning_bln.tuning.scoring import score_flags
    from lightning_bln.tuning.storage import open_storage
    from lightning_bln.tuning.study import TuneResult, load_scores, tune_flags
    from lightning_bln.tuning.table import CellScore, ScoreTable
    from lightning_bln.tuning.training import tune_training
    from lightning_bln.tuning.training_space import suggest_swap

# Name -> module; each is imported when it is first asked for: scoring needs no optuna, and a study no plotly.
_WHERE = {
    "CellScore": "table",
    "ScoreTable": "table",
    "TuneResult": "study",
    "apply_flags": "apply",
    "load_scores": "study",
    "open_storage": "storage",
    "score_flags": "scoring",
    "suggest_swap": "training_space",
    "tune_flags": "study",
    "tune_training": "training",
    "write_report": "report",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
