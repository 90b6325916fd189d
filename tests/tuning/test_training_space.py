"""Which parameters `suggest_swap` gives a trial, and what it makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FixedTrial
from training_study import FLAGS, build

from lightning_bln import BLNSwap, StatFlags
from lightning_bln.tuning.training import tune_training
from lightning_bln.tuning.training_space import suggest_swap


class TestSuggestSwap:
    def test_every_setting_is_a_parameter_with_one_distribution(self) -> None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        seen: dict[str, Any] = {}
        for _ in range(20):
            trial = study.ask()
            swap = suggest_swap(trial)
            assert swap.flags == StatFlags(*(trial.params[name] for name in FLAGS))
            for name in ("eps", "population", "statistics"):
                assert swap.swap_arguments[name] == trial.params[f"bln.{name}"]
            # A parameter without effect would only confuse the sampler.
            assert ("bln.momentum" in trial.params) == (swap.swap_arguments["population"] == "ema")
            assert swap.swap_arguments["momentum"] == trial.params.get("bln.momentum", 0.1)
            seen |= trial.distributions
        flags = CategoricalDistribution((True, False))
        assert seen == {
            **dict.fromkeys(FLAGS, flags),
            "bln.eps": FloatDistribution(1e-5, 1e-1, log=True),
            "bln.momentum": FloatDistribution(0.01, 0.5, log=True),
            "bln.population": CategoricalDistribution(("epoch", "ema", "precise")),
            "bln.statistics": CategoricalDistribution(("per_position", "per_channel")),
        }

    def test_single_values_are_no_parameters(self) -> None:
        trial = optuna.create_study().ask()
        single = {"flags": "FTFT", "eps": 2e-3, "population": "ema", "momentum": (0.2, 0.2)}
        swap = suggest_swap(trial, **single, statistics=["per_channel"], norms=["layer"])
        assert trial.params == {}
        assert swap.flags == StatFlags.parse("FTFT")
        arguments = swap.swap_arguments
        assert [arguments[name] for name in ("eps", "population", "momentum", "statistics", "norms")] == [
            *(2e-3, "ema", 0.2, "per_channel", ("layer",)),
        ]

    def test_none_leaves_a_setting_to_the_callback(self) -> None:
        swap = suggest_swap(
            FixedTrial({}), flags=None, eps=None, population="ema", momentum=None, statistics="per_channel"
        )
        plain = BLNSwap(population="ema", statistics="per_channel")
        assert (swap.flags, swap.swap_arguments) == (None, plain.swap_arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"eps": (0.0, 0.1)},
                r"eps must be a number or a range \(low, high\) with 0 < low <= high, got \(0.0, 0.1\)",
            ),
            ({"eps": (0.1, 0.01)}, r"eps must be a number or a range .* got \(0.1, 0.01\)"),
            ({"eps": -1.0}, "eps must be above 0, got -1.0"),
            ({"momentum": (0.1, 1.5)}, "momentum is the weight of the new value, .* got 1.5"),
            ({"population": ("epoch", "emma")}, "population must be one of 'epoch', 'ema', 'precise', got 'emma'"),
            ({"population": ()}, r"population needs at least one choice, got \(\)"),
            ({"statistics": "per_pixel"}, "statistics must be one of"),
            ({"flags": "TTXF"}, "four letters T .* got 'TTXF'"),
            ({"affine": "keep"}, "affine must be 'preserve' or 'paper'"),
        ],
    )
    def test_what_no_trial_could_use_is_an_error_at_once(
        self, arguments: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        first = {"bln.population": "epoch", "bln.statistics": "per_channel", "bln.eps": 0.01} | dict.fromkeys(
            FLAGS, True
        )
        with pytest.raises(ValueError, match=message):
            suggest_swap(FixedTrial(first), **arguments)
        if "flags" not in arguments:
            with pytest.raises(ValueError, match=message):
                tune_training(build, n_trials=1, storage=f"sqlite:///{tmp_path / 'study.db'}", swap=arguments)
