"""The report's contents: numbers against their definition, every kind of study, what goes wrong."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
import report_studies
import torch
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from report_studies import EFFECTS, LAYERS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import BatchLayerNorm, StatFlags, update_statistics
from lightning_bln.cli import main
from lightning_bln.tuning import tune_flags
from lightning_bln.tuning.intervals import paired_difference
from lightning_bln.tuning.report import write_report
from lightning_bln.tuning.report_data import StudyData, digits, flag_effects, top_share
from lightning_bln.tuning.report_figures import MAX_DOTS, figures
from lightning_bln.tuning.report_layout import short_names, value_axis
from lightning_bln.tuning.space import CHOICES, parameter_names, setting_params
from lightning_bln.tuning.study import load_scores
from lightning_bln.tuning.table import CellScore


class Page(HTMLParser):
    """The page's tables as lists of texts, its plots' names, and what it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.plots: list[str] = []
        self.loads: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self._rows: list[list[str]] | None = None
        self._skip = False
        self.feed(self.source)
        figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', self.source)
        assert figures
        assert "<" not in figures[1], "a tag in the figures could end their element"
        self.figures = json.loads(figures[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._skip = tag in ("script", "style")
        self.loads += [str(found[name]) for name in ("src", "href") if name in found]
        if "plot" in str(found.get("class", "")).split():
            self.plots.append(str(found["id"]))
        if tag == "table":
            self._rows = self.tables[found.get("id") or f"table {len(self.tables)}"] = []
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        if tag == "table":
            self._rows = None

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.strip()

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    return report_studies.uniform(tmp_path_factory.mktemp("uniform"))


@pytest.fixture(scope="module")
def per_layer(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    return report_studies.per_layer(tmp_path_factory.mktemp("per_layer"))


@pytest.fixture(scope="module")
def uniform_page(uniform: optuna.Study, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(uniform, tmp_path_factory.mktemp("page") / "report.html"))


@pytest.fixture(scope="module")
def per_layer_page(per_layer: optuna.Study, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(per_layer, tmp_path_factory.mktemp("page") / "report.html"))


# --------------------------------------------------------------- a uniform study


def test_the_page_says_what_was_searched(uniform_page: Page):
    words = uniform_page.words
    assert "Inference flags: flags-of-resnet20" in words
    assert "16 of 16 settings scored" in words
    assert "16 complete, 1 failed" in words
    assert "loss, lower is better" in words
    assert "5,000 samples, compared in 40 groups" in words
    command = "lightning-bln apply --ckpt_path MODEL.ckpt --out CHOSEN.ckpt --study_name flags-of-resnet20 --storage"
    assert f"{command} STORAGE_URL" in words
    assert 'set_flags_(model, "TTFF")' in words
    assert "Tied with it: TTTF. On these data they cannot be told apart" in words


def test_the_table_is_that_of_load_scores(uniform: optuna.Study, uniform_page: Page):
    table = load_scores(uniform)
    header, *rows = uniform_page.tables["scores"]
    assert header == [
        "rank",
        "setting",
        "loss",
        "accuracy",
        "loss − best's",
        "95 % interval",
        "against the best",
        "trial",
    ]
    assert len(rows) == 16
    for row, score in zip(rows, table.rows(), strict=True):
        assert row[:4] == [str(score["rank"]), score["setting"], f"{score['loss']:.4f}", f"{score['accuracy']:.4f}"]
        if score["rank"] == 1:
            assert row[4:7] == ["", "", "best"]
        else:
            limits = f"{score['low']:+.4f} to {score['high']:+.4f}"
            assert row[4:6] == [text.replace("-", "−") for text in (f"{score['difference']:+.4f}", limits)]
            assert row[6] == ("tied" if score["tied"] else "different")
        trial = uniform.trials[int(row[7])]
        assert trial.user_attrs["setting"] == row[1]


def test_main_effects_are_the_planted_ones(uniform: optuna.Study):
    effects = StudyData(uniform).main_effects()
    assert [effect.flag for effect in effects] == list(StatFlags.names())
    for effect in effects:
        assert effect.pairs == 8
        assert effect.low < EFFECTS[effect.flag] < effect.high
        assert effect.high - effect.low < 0.005
    assert effects[2].low < 0 < effects[2].high


def test_a_main_effect_is_the_mean_of_the_pairs_and_its_interval_that_of_their_units(uniform: optuna.Study):
    scores = {score.setting: score for score in load_scores(uniform)}
    effect = StudyData(uniform).main_effects()[1]
    on = [flags for flags in scores if flags.batch_moving_var]
    off = [flags for flags in scores if not flags.batch_moving_var]
    assert math.isclose(
        effect.difference, sum(scores[f].loss for f in on) / 8 - sum(scores[f].loss for f in off) / 8, rel_tol=1e-9
    )
    first, second = (
        [(n, sum(scores[f].units[u][1] for f in side) / 8) for u, n in enumerate(report_studies.SIZES)]
        for side in (on, off)
    )
    expected = paired_difference(first, second, comparisons=4)
    assert (effect.difference, effect.low, effect.high) == pytest.approx(expected, rel=1e-9)


def test_effects_at_the_best_compare_it_with_its_neighbours(uniform: optuna.Study):
    scores = {score.code: score.loss for score in load_scores(uniform)}
    found = {effect.flag: effect for effect in StudyData(uniform).effects_at_best()}
    assert found["batch_moving_mean"].difference == pytest.approx(scores["TTFF"] - scores["FTFF"])
    assert found["feature_moving_var"].difference == pytest.approx(scores["TTFT"] - scores["TTFF"])
    assert {effect.pairs for effect in found.values()} == {1}


def test_effects_use_the_pairs_that_were_scored_both_ways():
    scores = {
        flags: CellScore(flags, 1.0 + 0.5 * flags.batch_moving_mean + 0.1 * flags.feature_moving_var)
        for flags in StatFlags.all()
        if flags.code not in ("TTTT", "FFFF")
    }
    scores[StatFlags.parse("TFTF")] = CellScore(StatFlags.parse("TFTF"), math.inf)
    effects = flag_effects(scores, StatFlags.all())
    assert [effect.pairs for effect in effects] == [5, 5, 5, 5]
    assert [effect.difference for effect in effects] == pytest.approx([0.5, 0.0, 0.0, 0.1])
    assert all(math.isnan(effect.low) and math.isnan(effect.high) for effect in effects)
    assert flag_effects({}, StatFlags.all()) == []


def test_the_effects_table_has_them(uniform: optuna.Study, uniform_page: Page):
    (table,) = (rows for rows in uniform_page.tables.values() if rows[0][0] == "flag" and "pairs" in rows[0])
    assert table[0] == ["flag", "averaged", "95 % interval", "pairs", "at the best", "95 % interval"]
    for row, effect in zip(table[1:], StudyData(uniform).main_effects(), strict=True):
        assert row[0] == effect.flag
        assert float(row[1].replace("−", "-")) == pytest.approx(effect.difference, abs=5e-5)
        assert row[3] == "8"


def test_the_dots_are_the_losses_with_their_intervals(uniform: optuna.Study, uniform_page: Page):
    table = load_scores(uniform)
    data = uniform_page.figures["plot-settings"]["data"]
    assert [trace["name"] for trace in data] == ["best", "tied with the best", "different"]
    dots = {
        (x, round(x - minus, 9), round(x + plus, 9))
        for trace in data
        for x, minus, plus in zip(trace["x"], trace["error_x"]["arrayminus"], trace["error_x"]["array"], strict=True)
    }
    expected = {(table.best.loss, round(table.best.loss, 9), round(table.best.loss, 9))}
    for score in table.scores[1:]:
        _, low, high = table.compared(score)
        expected.add((score.loss, round(table.best.loss + low, 9), round(table.best.loss + high, 9)))
    assert dots == expected
    labels = uniform_page.figures["plot-settings"]["layout"]["yaxis"]["ticktext"]
    assert labels == [score.code for score in table]


def test_the_heat_map_has_batch_flags_down_and_feature_flags_across(uniform: optuna.Study, uniform_page: Page):
    losses = {score.code: score.loss for score in load_scores(uniform)}
    (trace,) = uniform_page.figures["plot-heatmap"]["data"]
    assert trace["customdata"][1] == ["TFTT", "TFTF", "TFFT", "TFFF"]
    for codes, values in zip(trace["customdata"], trace["z"], strict=True):
        assert values == [losses[code] for code in codes]


def test_progress_marks_failed_trials_and_the_best_so_far(uniform: optuna.Study, uniform_page: Page):
    line, complete, failed = uniform_page.figures["plot-convergence"]["data"]
    assert (line["name"], complete["name"], failed["name"]) == ("best so far", "complete", "failed")
    assert failed["x"] == [1]
    assert complete["y"] == [trial.value for trial in uniform.trials[1:]]
    best = [min(complete["y"][: i + 1]) for i in range(16)]
    assert line["y"] == [*best, best[-1]]
    assert line["x"] == [*range(2, 18), 17]


def test_importance_sums_to_one_and_finds_the_large_effect(uniform: optuna.Study):
    found, why = StudyData(uniform).importances()
    assert why == ""
    assert sum(found.values()) == pytest.approx(1)
    assert next(iter(found)) == "batch_moving_var"
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_failed_trials_are_listed_with_their_error(uniform_page: Page):
    assert uniform_page.tables["unfinished"][1:] == [
        ["0", "failed", "TFTF", "", "RuntimeError: worker <host-2> was killed"]
    ]


# -------------------------------------------------------------- a study by layer


def test_a_study_by_layer_lists_the_layers_of_the_best(per_layer: optuna.Study, per_layer_page: Page):
    assert "a setting of the four flags for each of 4 layers. 31 settings scored" in per_layer_page.words
    assert "31 complete, 8 pruned, 1 failed, 1 running" in per_layer_page.words
    best = load_scores(per_layer).best.setting
    table = per_layer_page.tables["table 0"]
    assert table[0] == ["layer", "batch mean", "batch var", "feature mean", "feature var"]
    assert table[1:] == [[layer, *map(str, flags)] for layer, flags in best.items()]
    assert "'backbone.layer1.0.bn1': 'TTFF'," in per_layer_page.words


def test_layer_effects_are_differences_of_means_over_the_complete_trials(per_layer: optuna.Study):
    effects = StudyData(per_layer).layer_effects()
    assert len(effects) == 16
    complete = [trial for trial in per_layer.trials if trial.state is TrialState.COMPLETE]
    for effect in effects:
        on = [t.user_attrs["loss"] for t in complete if t.params[f"{effect.layer}.{effect.flag}"]]
        off = [t.user_attrs["loss"] for t in complete if not t.params[f"{effect.layer}.{effect.flag}"]]
        assert (effect.on, effect.off) == (len(on), len(off))
        assert effect.difference == pytest.approx(sum(on) / len(on) - sum(off) / len(off))


def test_the_layers_heat_map_marks_the_best(per_layer_page: Page, per_layer: optuna.Study):
    (trace,) = per_layer_page.figures["plot-heatmap"]["data"]
    best = load_scores(per_layer).best.setting
    assert trace["text"] == [list(best[layer].code) for layer in LAYERS]
    assert trace["zmin"] == -trace["zmax"]
    assert max(abs(value) for row in trace["z"] for value in row) == trace["zmax"]


def test_other_settings_are_told_by_the_layers_that_differ(per_layer: optuna.Study, per_layer_page: Page):
    rows = per_layer_page.tables["scores"][1:]
    assert rows[0][1] == "the best setting"
    data = StudyData(per_layer)
    best = data.table.best.setting
    for row, score in zip(rows, data.table, strict=True):
        differ = {layer: flags for layer, flags in score.setting.items() if flags != best[layer]}
        for layer, flags in differ.items():
            assert f"{layer}:{flags.code}(best: {best[layer].code})" in row[1]
        assert row[1].count("(best:") == len(differ)


def test_pruned_and_failed_trials_say_how_far_they_came(per_layer_page: Page):
    rows = {row[0]: row for row in per_layer_page.tables["unfinished"][1:]}
    assert sorted(map(int, rows)) == [4, 7, 9, 14, 19, 24, 29, 34, 39]
    assert rows["7"][1] == "failed, attempt 2"
    assert rows["7"][4] == "ValueError: <b>loss</b> is NaN"
    assert re.fullmatch(r"640 samples, step 4, value 0\.\d+", rows["4"][3])
    assert rows["4"][1::3] == ["pruned", "stopped by the pruner"]
    names = [trace["name"] for trace in per_layer_page.figures["plot-convergence"]["data"]]
    assert names == ["best so far", "complete", "pruned", "failed"]


def test_layers_that_were_tried_one_way_only_have_no_colour(tmp_path: Path):
    study = report_studies.create(tmp_path, "narrow", kind="per_layer", layers=["a", "b"], model=None)
    for number, code in enumerate(("TTFF", "TTFT")):
        setting = {"a": StatFlags.parse("TTFF"), "b": StatFlags.parse(code)}
        params = setting_params(setting, ["a", "b"])
        study.add_trial(report_studies.flag_trial(number, params, "", 0.5 + 0.1 * number, 0.5))
    page = Page(write_report(study, tmp_path / "report.html"))
    (trace,) = page.figures["plot-heatmap"]["data"]
    assert [[value is not None for value in row] for row in trace["z"]] == [[False] * 4, [False, False, False, True]]
    letters = [note["text"] for note in page.figures["plot-heatmap"]["layout"]["annotations"]]
    assert "".join(letters) == "TTFF" + "TTF"
    assert "It needs at least 4 complete trials, and this study has 2." in page.words


def test_only_the_best_settings_are_drawn_of_many(tmp_path: Path):
    page = Page(write_report(report_studies.per_layer(tmp_path, trials=56), tmp_path / "report.html"))
    assert sum(len(trace["x"]) for trace in page.figures["plot-settings"]["data"]) == MAX_DOTS
    assert f"The best {MAX_DOTS} of 44 settings." in page.words
    assert len(page.tables["scores"]) == 45


# ------------------------------------------------------------------ other studies


def test_a_training_study_has_its_parameters(tmp_path: Path):
    study = report_studies.training(tmp_path)
    page = Page(write_report(study, tmp_path / "report.html"))
    assert "Training settings: trainings" in page.words
    assert "val_acc, higher is better" in page.words
    header, *rows = page.tables["scores"]
    assert header == ["rank", "val_acc", "learning_rate", "bln.population", "bln.momentum", "flags", "trial"]
    assert len(rows) == 19
    assert int(rows[0][-1]) == study.best_trial.number
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    assert page.tables["unfinished"][0][2] == "parameters"
    assert page.plots == ["plot-convergence", "plot-importance"]
    assert next(iter(StudyData(study).importances()[0])) == "learning_rate"
    assert "optuna best-trial --study-name trainings --storage STORAGE_URL" in page.words


def test_a_training_with_a_checkpoint_says_how_to_load_it(tmp_path: Path):
    study = report_studies.create(tmp_path, "t", kind="training", layers=[], model=None, monitor="val_loss")
    attributes = {"setting": "TFFF", "checkpoint": "runs/trial 0.ckpt"}
    study.add_trial(report_studies.trial_of(0, TrialState.COMPLETE, value=1.0, user_attrs=attributes))
    page = Page(write_report(study, tmp_path / "report.html"))
    assert ["flags at inference", "TFFF"] in page.tables["table 0"]
    assert "load_swapped_checkpoint(LitModel, 'runs/trial 0.ckpt')" in page.words


def test_parameters_and_values_are_enough(tmp_path: Path):
    study = report_studies.told(tmp_path)
    page = Page(write_report(study, tmp_path / "report.html"))
    header, *rows = page.tables["scores"]
    assert header == ["rank", "setting", "loss", "trial"]
    assert [row[1:3] for row in rows] == [
        [flags.code, f"{0.5 + 0.01 * i:.4f}"] for i, flags in enumerate(list(StatFlags.all())[:5])
    ]
    assert "5 of 16 settings scored" in page.words
    assert "No intervals: the trials hold no losses by batch" in page.words
    assert "interval of the difference" not in page.words
    (trace,) = page.figures["plot-heatmap"]["data"]
    assert sum(value is not None for row in trace["z"] for value in row) == 5
    assert [text for row in trace["text"] for text in row].count("not scored") == 11


def test_layers_are_found_in_the_names_of_parameters(tmp_path: Path):
    study = report_studies.create(tmp_path, "told-by-layer")
    layers = ["", "net.bn"]
    distributions = dict.fromkeys(parameter_names(layers), CategoricalDistribution(CHOICES))
    for number, code in enumerate(("TTFF", "FFFF")):
        params = setting_params({"": StatFlags.parse(code), "net.bn": StatFlags()}, layers)
        study.enqueue_trial(params)
        study.tell(study.ask(distributions), 1.0 + number)
    data = StudyData(study)
    assert (data.kind, data.layers) == ("per_layer", layers)
    assert "(model)" in Page(write_report(study, tmp_path / "report.html")).words


def test_a_study_of_anything_else_is_a_table_of_parameters(tmp_path: Path):
    study = report_studies.create(tmp_path, "other", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + 0 * trial.suggest_int("batch_moving_mean", 0, 1), 6)
    page = Page(write_report(study, tmp_path / "report.html"))
    assert page.tables["scores"][0] == ["rank", "value", "x", "batch_moving_mean", "trial"]
    assert page.tables["scores"][1][1] == f"{study.best_value:.4f}"


def test_a_metric_that_decides_is_beside_the_loss(tmp_path: Path):
    study = report_studies.create(
        tmp_path, "by-accuracy", direction="maximize", kind="uniform", layers=["a"], monitor="accuracy", mode="max"
    )
    for number, flags in enumerate(list(StatFlags.all())[:4]):
        trial = report_studies.flag_trial(number, flags.to_dict(), flags.code, 0.5 - 0.01 * number, 0.6 - 0.1 * number)
        trial.value = trial.user_attrs["metrics"]["accuracy"]
        study.add_trial(trial)
    page = Page(write_report(study, tmp_path / "report.html"))
    # The best by accuracy has the largest loss here.
    assert [row[1] for row in page.tables["scores"][1:]] == ["TTTT", "TTTF", "TTFT", "TTFF"]
    assert all(row[4].startswith("−") for row in page.tables["scores"][2:])
    layout = page.figures["plot-settings"]["layout"]
    assert layout["xaxis"]["title"]["text"] == "loss (lower is better)"
    assert page.figures["plot-convergence"]["layout"]["yaxis"]["title"]["text"] == "accuracy (higher is better)"


def test_a_monitored_loss_is_shown_once(tmp_path: Path):
    study = report_studies.create(tmp_path, "lit", kind="uniform", layers=["a"], monitor="val_loss")
    for number, flags in enumerate(list(StatFlags.all())[:2]):
        trial = report_studies.flag_trial(number, flags.to_dict(), flags.code, 0.5 + number, 0.6)
        trial.user_attrs = trial.user_attrs | {"metrics": {"val_loss": trial.user_attrs["loss"], "val_acc": 0.5}}
        study.add_trial(trial)
    page = Page(write_report(study, tmp_path / "report.html"))
    assert page.tables["scores"][0][:5] == ["rank", "setting", "val_loss", "val_acc", "val_loss − best's"]


def test_repeated_foreign_and_unpaired_trials_are_counted(tmp_path: Path):
    study = report_studies.create(tmp_path, "mixed", kind="uniform", layers=["a"], model=None)
    flags = StatFlags.parse("TTFF")
    told = {
        "params": flags.to_dict(),
        "distributions": dict.fromkeys(flags.to_dict(), CategoricalDistribution(CHOICES)),
    }
    study.add_trial(report_studies.trial_of(0, TrialState.COMPLETE, value=0.1, **told))
    study.add_trial(report_studies.flag_trial(1, flags.to_dict(), flags.code, 0.5, 0.5))
    study.add_trial(report_studies.trial_of(2, TrialState.COMPLETE, value=0.1))
    other = report_studies.flag_trial(3, StatFlags.parse("FFFF").to_dict(), "FFFF", 0.7, 0.5)
    other.user_attrs = other.user_attrs | {"units": report_studies.units_of(0.7, 3, [100, 28])}
    study.add_trial(other)
    page = Page(write_report(study, tmp_path / "report.html"))
    assert [row[1] for row in page.tables["scores"][1:]] == ["TTFF", "FFFF"]
    assert page.tables["scores"][1][-1] == "1", "the trial with units stands for the setting"
    assert "1 more complete trials repeat a setting" in page.words
    assert "1 complete trials have other parameters" in page.words
    assert "1 settings were scored on other batches than the best one" in page.words


@pytest.mark.parametrize(
    ("values", "same", "why"),
    [
        ([0.5], False, "It needs at least 4 complete trials, and this study has 1."),
        ([0.5] * 5, False, "All complete trials have the same value"),
        ([0.5, 0.6, 0.7, 0.8], True, "All complete trials have the same parameters."),
    ],
)
def test_no_importance_says_why(tmp_path: Path, values: list[float], same: bool, why: str):
    study = report_studies.create(tmp_path, "few")
    distributions = dict.fromkeys(parameter_names(), CategoricalDistribution(CHOICES))
    for value, flags in zip(values, StatFlags.all(), strict=False):
        study.enqueue_trial((StatFlags() if same else flags).to_dict())
        study.tell(study.ask(distributions), value)
    page = Page(write_report(study, tmp_path / "report.html"))
    assert f"None is given. {why}" in page.words
    assert "plot-importance" not in page.plots


def test_what_tune_flags_wrote_and_the_command_that_applies_it(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4), nn.Linear(4, 4), BatchLayerNorm(4), nn.Linear(4, 2))
    data = DataLoader(TensorDataset(torch.randn(96, 3), torch.randint(2, (96,))), batch_size=8)
    update_statistics(model, data)
    url = report_studies.storage(tmp_path)
    result = tune_flags(
        model,
        data,
        nn.CrossEntropyLoss(),
        storage=url,
        study_name="by layer",
        per_layer=True,
        n_trials=6,
        progress=False,
    )
    page = Page(write_report(result.study, tmp_path / "report.html"))
    assert len(page.tables["scores"]) == len(result.table) + 1
    assert set(page.plots) >= {"plot-settings", "plot-effects", "plot-heatmap", "plot-convergence"}
    data_of_page = StudyData(result.study)
    assert [score.code for score in data_of_page.table] == [score.code for score in result.table]
    # The search began with the 16 settings of all layers together.
    assert [effect.pairs for effect in data_of_page.main_effects()] == [8] * 4

    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    shown = re.search(r"<code>(lightning-bln apply .*)</code>", page.source)
    assert shown
    places = {"MODEL.ckpt": tmp_path / "model.ckpt", "CHOSEN.ckpt": tmp_path / "chosen.ckpt", "STORAGE_URL": url}
    words = [str(places.get(word, word)) for word in shlex.split(html.unescape(shown[1]))]
    assert main(words[1:]) == 0
    state = torch.load(tmp_path / "chosen.ckpt", weights_only=True)["state_dict"]
    chosen = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4), nn.Linear(4, 4), BatchLayerNorm(4), nn.Linear(4, 2))
    chosen.load_state_dict(state)
    assert {"1": chosen[1].flags, "3": chosen[3].flags} == result.best


# ------------------------------------------------------------------------ the file


def test_one_file_that_loads_nothing(uniform_page: Page):
    assert uniform_page.loads == ["data:,"]
    assert uniform_page.source.count("plotly.js v") == 1
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', uniform_page.source)
    assert policy
    rules = html.unescape(policy[1])
    assert rules.startswith("default-src 'none'")
    assert "unsafe-eval" not in rules
    assert re.search(r"script-src( 'sha256-[^']+'){2};", rules)


def test_everything_from_the_study_is_escaped(tmp_path: Path):
    name = "</title><script>alert(1)</script> & 'x'"
    study = report_studies.per_layer(tmp_path, name=name, trials=10)
    page = Page(write_report(study, tmp_path / "report.html"))
    assert "alert(1)" in page.text
    assert "<script>alert" not in page.source
    assert "<b>loss</b>" not in page.source
    shell = re.search(r"<code>(lightning-bln apply .*)</code>", page.source)
    assert shell
    assert shlex.split(html.unescape(shell[1]))[7] == name


def test_a_title_of_ones_own(uniform: optuna.Study, tmp_path: Path):
    page = Page(write_report(uniform, tmp_path / "report.html", title="<Flags> & more"))
    assert "<title>&lt;Flags&gt; &amp; more</title>" in page.source
    assert "<h1>&lt;Flags&gt; &amp; more</h1>" in page.source


def test_two_reports_differ_in_their_date_only(per_layer: optuna.Study, tmp_path: Path):
    pages = [write_report(per_layer, tmp_path / f"{i}.html").read_text(encoding="utf-8") for i in range(2)]
    dateless = [re.sub(r"Written \d{4}-\d\d-\d\d \d\d:\d\d UTC", "Written", page) for page in pages]
    assert "Written" in dateless[0]
    assert dateless[0] == dateless[1]


def test_the_path_is_returned_and_an_older_report_replaced(uniform: optuna.Study, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(uniform, str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_write_that_fails_leaves_the_older_report(uniform: optuna.Study, tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(uniform, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_missing_folder_is_an_error(uniform: optuna.Study, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"folder of the report must exist, got .*; make it first: mkdir -p"):
        write_report(uniform, tmp_path / "none" / "report.html")
    with pytest.raises(IsADirectoryError, match=r"A report is one file, got the folder .*; write for example"):
        write_report(uniform, tmp_path)


def test_a_study_without_a_complete_trial_is_an_error(tmp_path: Path):
    study = report_studies.create(tmp_path, "empty study")
    with pytest.raises(ValueError, match=r"at least one complete trial .*got 'empty study' with no trial at all"):
        write_report(study, tmp_path / "report.html")
    study.add_trial(report_studies.trial_of(0, TrialState.FAIL))
    study.enqueue_trial({})
    with pytest.raises(ValueError, match=r"with 1 fail, 1 waiting; .*tune --study_name 'empty study' \.\.\.$"):
        write_report(study, tmp_path / "report.html")
    study.add_trial(report_studies.trial_of(2, TrialState.COMPLETE, value=math.inf))
    with pytest.raises(ValueError, match=r"of a finite value"):
        write_report(study, tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html"))


def test_several_objectives_are_an_error(tmp_path: Path):
    study = optuna.create_study(directions=["minimize", "maximize"], study_name="two")
    with pytest.raises(ValueError, match=r"a study with one objective, got 'two' with 2; .*plot_pareto_front"):
        write_report(study, tmp_path / "report.html")


def test_importing_the_report_needs_no_plotly():
    code = (
        "import sys, lightning_bln.tuning.report, lightning_bln.tuning.report_figures;"
        "print([name for name in ('plotly', 'lightning', 'matplotlib') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


# ------------------------------------------------------------------------ helpers


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 4), ([0.0, math.nan], 4), ([1.5, 20.0], 4), ([0.5, 0.00032], 5), ([1.0, 1e-17], 4), ([1e-12], 8)],
)
def test_digits_show_two_that_count(values: list[float], expected: int):
    assert digits(values) == expected


def test_axes_are_logarithmic_where_losses_are_far_apart():
    assert value_axis([0.4, 2.0, math.nan]) == ({"type": "linear"}, "")
    assert value_axis([0.0, 100.0])[0] == {"type": "linear"}
    axis, note = value_axis([0.4, 24.0])
    assert axis["type"] == "log"
    assert axis["ticktext"] == ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50", "100", "200", "500"]
    assert note == ", logarithmic"


def test_names_are_shortened_only_as_long_as_they_differ():
    assert short_names(["bn1", "bn2"]) == ["bn1", "bn2"]
    names = [f"backbone.stages.{i}.blocks.0.norm" for i in range(10)]
    short = short_names(names, 16)
    assert len(set(short)) == 10
    assert max(map(len, short)) < len(names[0])


@pytest.mark.parametrize(("trials", "share"), [(4, 0.5), (16, 5 / 16), (50, 0.1), (1000, 0.1)])
def test_the_best_are_at_least_five_trials_or_half(trials: int, share: float):
    assert top_share(trials) == pytest.approx(share)


def test_figures_hold_plain_text(tmp_path: Path):
    study = report_studies.create(tmp_path, "markup", kind="per_layer", layers=["<b>a</b>", "b&c"], model=None)
    for number, code in enumerate(("TTFF", "FFTT")):
        setting = {"<b>a</b>": StatFlags.parse(code), "b&c": StatFlags()}
        study.add_trial(
            report_studies.flag_trial(number, setting_params(setting, list(setting)), "", 0.5 + number, 0.5)
        )
    found = figures(StudyData(study))
    assert found["plot-heatmap"]["layout"]["yaxis"]["ticktext"] == ["&lt;b&gt;a&lt;/b&gt;", "b&amp;c"]
