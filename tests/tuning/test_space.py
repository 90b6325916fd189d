"""Settings as codes, as parameters and as the JSON that the optuna command reads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from optuna.distributions import CategoricalDistribution, json_to_distribution

from lightning_bln import StatFlags
from lightning_bln.tuning.space import (
    by_layer,
    params_setting,
    parse_setting,
    search_space_json,
    setting_code,
    setting_params,
)

LAYERS = ["net.1", "net.5"]
BY_LAYER = {"net.1": StatFlags.parse("TTFF"), "net.5": StatFlags.parse("FTFT")}


@pytest.mark.parametrize("setting", [StatFlags.parse("FTTF"), BY_LAYER])
def test_codes_and_params_come_back(setting) -> None:
    layers = None if isinstance(setting, StatFlags) else LAYERS
    assert parse_setting(setting_code(setting)) == setting
    assert params_setting(setting_params(setting, layers), layers) == setting


def test_written_forms() -> None:
    assert parse_setting("net.5=FTFT, net.1=TTFF", LAYERS) == BY_LAYER
    assert list(parse_setting({"net.5": "FTFT", "net.1": "TTFF"}, LAYERS)) == LAYERS
    assert parse_setting({"batch_moving_mean": False}) == StatFlags(False)
    assert setting_code(BY_LAYER) == "net.1=TTFF,net.5=FTFT"
    assert by_layer(StatFlags(), LAYERS) == dict.fromkeys(LAYERS, StatFlags())


def test_parameters_of_other_studies_are_no_setting() -> None:
    assert params_setting({"lr": 0.1}) is None
    assert params_setting(dict.fromkeys(StatFlags.names(), "yes")) is None
    assert params_setting(setting_params(StatFlags()), LAYERS) is None
    whole = setting_params(StatFlags(), LAYERS)
    assert params_setting(whole, LAYERS) == dict.fromkeys(LAYERS, StatFlags())
    del whole["net.5.feature_moving_var"]
    assert params_setting(whole, LAYERS) is None


@pytest.mark.parametrize("layers", [None, LAYERS, [""]])
def test_the_json_is_optunas(layers) -> None:
    space = json.loads(search_space_json(layers))
    assert len(space) == 4 * len(layers or [1])
    for distribution in space.values():
        # The order of the choices is part of a study's schema.
        assert json_to_distribution(json.dumps(distribution)).choices == CategoricalDistribution((True, False)).choices
    if layers is not None:
        assert all("." in name for name in space)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"net.1": "TTFF"},
            r"must name every BatchLayerNorm of the model once .*got net.1; missing: net.5; or give one",
        ),
        ("net.1=TTFF,net.9=TTFF", "missing: net.5; unknown: net.9"),
        ("net.1=TTXF,net.5=TTFF", "four letters T .population. or F"),
    ],
)
def test_bad_settings(value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_setting(value, LAYERS)


def test_a_study_over_all_layers_together_has_one_code() -> None:
    with pytest.raises(ValueError, match=r"needs one code, got 'net\.1=TTFF,net\.5=FTFT'"):
        setting_params(BY_LAYER)


def test_it_needs_the_standard_library_only() -> None:
    code = "import sys; import lightning_bln.tuning.space; print('torch' in sys.modules, 'optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
