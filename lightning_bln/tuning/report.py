"""`write_report`: one self-contained HTML page about a study, that opens offline."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shlex
from datetime import datetime, timezone
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bln.flags import StatFlags
from lightning_bln.tuning.report_data import StudyData, top_share
from lightning_bln.tuning.report_figures import MAX_BARS, MAX_DOTS, figures
from lightning_bln.tuning.report_tables import effects_grid, settings_grid, shown, training_grid, unfinished_grid

if TYPE_CHECKING:
    import optuna

HERE = Path(__file__).parent
PACKAGES = ("lightning-bln", "torch", "lightning", "optuna", "plotly")


def write_report(study: optuna.Study, path: str | PathLike[str], *, title: str | None = None) -> Path:
    """Write a page about a study: its settings and intervals, the flags' effects, the search itself.

    One HTML file with its plots (plotly.js, 5 MB) inside; it makes no network request. Everything that comes from the
    study is escaped, and the page's security policy lets no other script run than its own. Two reports of one study
    differ in their date only.

    Args:
        study: A study of `tune_flags`, or any other one with a single objective: parameters and values are enough,
            intervals then are left out.
        path: The file to write; its folder must exist. It appears when it is complete, replacing an older one.
        title: The page's heading. Default: says that it is about the flags, or the training, and the study's name.

    Returns:
        The path.

    Raises:
        ValueError: If the study has no complete trial, or several objectives. No file is left behind.
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If ``path`` is a folder.

    Example:
        >>> write_report(tune_flags(model, data, loss).study, "report.html")  # doctest: +SKIP
        PosixPath('report.html')
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"A report is one file, got the folder {path}; write for example {path / 'report.html'}."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder of the report must exist, got {path} without {path.parent}; make it first: "
            f"mkdir -p {shlex.quote(str(path.parent))}"
        )
    page = _page(StudyData(study), title).encode()
    # Beside the target, so that the move is atomic: a reader sees the old page or the new one.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(page)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _page(data: StudyData, title: str | None) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    scripts = [_script(get_plotlyjs()), _script((HERE / "report_page.js").read_text(encoding="utf-8"))]
    importances, no_importance = data.importances()
    few = len(data.complete) < 50
    what = "Training settings" if data.kind == "training" else "Inference flags"
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plots = figures(data)
    return environment.get_template("report_page.html").render(
        data=data,
        title=title if title is not None else f"{what}: {data.name}",
        flags=_FLAGS,
        best=_best(data),
        tied=[_tied_name(data, score.code) for score in data.tied],
        percent=f"{data.confidence * 100:g} %",
        samples=_samples(data),
        counts=_counts(data),
        grid=training_grid(data) if data.table is None else settings_grid(data),
        effects=effects_grid(data),
        unfinished=unfinished_grid(data),
        no_importance=no_importance,
        top_percent=f"{top_share(len(data.complete)) * 100:.0f} %",
        few=few,
        long_names=data.kind == "per_layer" and any(len(layer) > 22 for layer in data.layers),
        max_bars=MAX_BARS if len(importances) > MAX_BARS else None,
        max_dots=MAX_DOTS if data.table is not None and len(data.table) > MAX_DOTS else None,
        # "<" inside JSON would end the element early.
        figures=Markup(json.dumps(plots, sort_keys=True).replace("<", "\\u003c")),
        plots=plots,
        style=Markup((HERE / "report_page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_sha256(script) for script in scripts],
        versions=[("Python", platform.python_version()), *((name, _version(name)) for name in PACKAGES)],
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


_ATTRIBUTES = {"setting": "flags at inference", "checkpoint": "weights"}
_FLAGS = {
    "batch_moving_mean": "mean over the samples",
    "batch_moving_var": "variance over the samples",
    "feature_moving_mean": "mean over the features",
    "feature_moving_var": "variance over the features",
}


def _best(data: StudyData) -> dict[str, Any]:
    trial = data.best_trial
    name = shlex.quote(data.name)
    best: dict[str, Any] = {
        "number": trial.number,
        "value": "" if trial.value is None else f"{trial.value:.6g}",
        "params": {name: shown(value) for name, value in trial.params.items()},
        "settings": [],
        "code": "",
        "shell": f"optuna best-trial --study-name {name} --storage STORAGE_URL",
        "python": "",
    }
    if data.table is None:
        for name in ("setting", "checkpoint"):
            if trial.user_attrs.get(name):
                best["params"][_ATTRIBUTES[name]] = str(trial.user_attrs[name])
        if trial.user_attrs.get("checkpoint"):
            best["python"] = f"load_swapped_checkpoint(LitModel, {str(trial.user_attrs['checkpoint'])!r})"
        return best
    setting = data.table.best.setting
    best["value"] = f"{data.table.best.value(data.monitor):.6g}"
    best["shell"] = (
        f"lightning-bln apply --ckpt_path MODEL.ckpt --out CHOSEN.ckpt --study_name {name} --storage STORAGE_URL"
    )
    if isinstance(setting, StatFlags):
        best["code"] = setting.code
        best["settings"] = [("all layers", setting)]
        best["python"] = f'set_flags_(model, "{setting.code}")'
    else:
        best["settings"] = [(layer or "(model)", flags) for layer, flags in setting.items()]
        by_layer = "".join(f"    {layer!r}: {flags.code!r},\n" for layer, flags in setting.items())
        best["python"] = "set_flags_(model, {\n" + by_layer + "})"
    return best


def _tied_name(data: StudyData, code: str) -> str:
    return code if data.kind == "uniform" else f"trial {data.numbers[code]}"


def _samples(data: StudyData) -> str:
    if data.table is None or not data.table.best.samples:
        return ""
    found = sorted({score.samples for score in data.table if score.samples})
    text = f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
    units = len(data.table.best.units)
    return f"{text} samples" + (f", compared in {units} groups" if units else "")


def _counts(data: StudyData) -> str:
    names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    return ", ".join(f"{data.counts[s]} {n}" for s, n in names.items() if data.counts[s] or s in ("COMPLETE", "FAIL"))


def _script(text: str) -> str:
    # As a browser reads it: only then does the hash in the page's policy fit.
    return re.sub(r"</(script)", r"<\\/\1", text.replace("\r\n", "\n"), flags=re.IGNORECASE)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
