"""Studies for the report's tests, on a real SQLite file, with the attributes that `tune_flags` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from lightning_bln.flags import StatFlags
from lightning_bln.tuning.space import CHOICES, parameter_names, setting_code, setting_params

LAYERS = ["backbone.bn1", "backbone.layer1.0.bn1", "backbone.layer1.0.bn2", "head.norm"]
SIZES = [128] * 39 + [8]
EFFECTS = {
    "batch_moving_mean": -0.05,
    "batch_moving_var": -0.12,
    "feature_moving_mean": 0.0,
    "feature_moving_var": 0.03,
}
"""Planted: what each flag adds to the loss where it is True, at every layer in a study by layer shared among them."""

START = datetime(2026, 1, 1, 12)


def create(folder: Path, name: str, *, direction: str = "minimize", **info: Any) -> optuna.Study:
    study = optuna.create_study(storage=storage(folder), study_name=name, direction=direction)
    if info:
        study.set_user_attr(
            "lightning_bln", {"version": 1, "monitor": "loss", "mode": "min", "confidence": 0.95, **info}
        )
    return study


def storage(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def units_of(loss: float, seed: int, sizes: Sequence[int] = SIZES) -> list[list[float]]:
    """Batches with a common part, that is the same for all settings, and a small part of the setting's own."""
    common = np.random.default_rng(0).normal(0, 0.2, len(sizes))
    own = np.random.default_rng(seed).normal(0, 0.004, len(sizes))
    return [[n, float(n * (loss + a + b))] for n, a, b in zip(sizes, common, own, strict=True)]


def trial_of(number: int, state: TrialState, **kwargs: Any) -> optuna.trial.FrozenTrial:
    trial = create_trial(state=state, **kwargs)
    trial.datetime_start = START + timedelta(seconds=10 * number)
    if state.is_finished():
        trial.datetime_complete = trial.datetime_start + timedelta(seconds=9)
    return trial


def flag_trial(number: int, params: dict[str, bool], setting: str, loss: float, accuracy: float) -> Any:
    units = units_of(loss, number)
    mean = math.fsum(total for _, total in units) / sum(n for n, _ in units)
    attributes = {
        "setting": setting,
        "loss": mean,
        "metrics": {"accuracy": accuracy},
        "samples": sum(SIZES),
        "units": units,
        "worker": "host-1",
        "beat": 3,
        "attempt": 1,
        "seconds": 9.0,
    }
    distributions = dict.fromkeys(params, CategoricalDistribution(CHOICES))
    return trial_of(
        number, TrialState.COMPLETE, params=params, distributions=distributions, value=mean, user_attrs=attributes
    )


def uniform(folder: Path, name: str = "flags-of-resnet20") -> optuna.Study:
    """All 16 settings with the planted effects, and one failed first attempt."""
    study = create(folder, name, kind="uniform", layers=LAYERS, model="0123456789abcdef" * 4)
    failed = StatFlags.parse("TFTF").to_dict()
    study.add_trial(
        trial_of(
            0,
            TrialState.FAIL,
            params=failed,
            distributions=dict.fromkeys(failed, CategoricalDistribution(CHOICES)),
            user_attrs={"error": "RuntimeError: worker <host-2> was killed", "attempt": 1},
        )
    )
    for number, flags in enumerate(StatFlags.all(), start=1):
        loss = 0.6 + sum(EFFECTS[flag] for flag, on in flags.to_dict().items() if on)
        study.add_trial(flag_trial(number, flags.to_dict(), flags.code, loss, 1.1 - loss))
    return study


def per_layer(folder: Path, name: str = "flags-by-layer", trials: int = 40) -> optuna.Study:
    """The uniform best first, then random settings; every fifth trial is pruned, one failed, one is running."""
    study = create(folder, name, kind="per_layer", layers=LAYERS, model="0123456789abcdef" * 4)
    generator = np.random.default_rng(1)
    distributions = dict.fromkeys(parameter_names(LAYERS), CategoricalDistribution(CHOICES))
    for number in range(trials):
        values = generator.random((len(LAYERS), 4)) < 0.5
        setting = {layer: StatFlags(*map(bool, row)) for layer, row in zip(LAYERS, values, strict=True)}
        if number < 2:
            setting = dict.fromkeys(LAYERS, StatFlags.parse(["TTFF", "FTFF"][number]))
        params = setting_params(setting, LAYERS)
        loss = 0.6 + sum(EFFECTS[name.rsplit(".", 1)[1]] / len(LAYERS) for name, on in params.items() if on)
        common: dict[str, Any] = {"params": params, "distributions": distributions}
        if number == 7:
            attributes = {"error": "ValueError: <b>loss</b> is NaN", "attempt": 2}
            study.add_trial(trial_of(number, TrialState.FAIL, user_attrs=attributes, **common))
        elif number % 5 == 4:
            attributes = {"setting": setting_code(setting), "samples": 640, "attempt": 1}
            steps = {4: loss + 0.05}
            pruned = {"value": loss + 0.05, "intermediate_values": steps, "user_attrs": attributes}
            study.add_trial(trial_of(number, TrialState.PRUNED, **pruned, **common))
        else:
            study.add_trial(flag_trial(number, params, setting_code(setting), loss, 1.1 - loss))
    study.add_trial(trial_of(trials, TrialState.RUNNING, params=params, distributions=distributions))
    return study


def training(folder: Path, name: str = "trainings") -> optuna.Study:
    """A user's hyper-parameters, maximised, with a conditional one, and a trial that the pruner ended."""
    study = create(
        folder, name, direction="maximize", kind="training", layers=[], model=None, monitor="val_acc", mode="max"
    )
    generator = np.random.default_rng(2)
    for number in range(20):
        rate = float(10 ** generator.uniform(-3, 0))
        population = ["epoch", "ema"][number % 2]
        params = {"learning_rate": rate, "bln.population": population}
        distributions: dict[str, Any] = {
            "learning_rate": FloatDistribution(1e-3, 1, log=True),
            "bln.population": CategoricalDistribution(("epoch", "ema")),
        }
        if population == "ema":
            params["bln.momentum"] = 0.1
            distributions["bln.momentum"] = FloatDistribution(0.01, 0.5, log=True)
        value = 0.9 - 0.1 * abs(math.log10(rate) + 1.2)
        state = TrialState.PRUNED if number == 6 else TrialState.COMPLETE
        steps = {epoch: value - 0.3 / (epoch + 1) for epoch in range(2 if number == 6 else 5)}
        common: dict[str, Any] = {"params": params, "distributions": distributions, "intermediate_values": steps}
        attributes = {} if state is TrialState.PRUNED else {"setting": "TTFF"}
        study.add_trial(trial_of(number, state, value=value, user_attrs=attributes, **common))
    return study


def told(folder: Path, name: str = "told") -> optuna.Study:
    """As the `optuna` command leaves it: parameters and values, nothing else."""
    study = create(folder, name)
    for flags in list(StatFlags.all())[:5]:
        study.enqueue_trial(flags.to_dict())
    distributions = dict.fromkeys(parameter_names(), CategoricalDistribution(CHOICES))
    for number in range(5):
        study.tell(study.ask(distributions), 0.5 + 0.01 * number)
    return study
