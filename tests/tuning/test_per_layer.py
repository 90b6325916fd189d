"""Flags of each layer: the uniform settings first, proposals pruned by paired comparison, shared, resumed."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bln import BatchLayerNorm, StatFlags, set_flags_, update_statistics
from lightning_bln.tuning.per_layer import STEPS, default_pruner, default_sampler
from lightning_bln.tuning.scoring import score_flags
from lightning_bln.tuning.space import params_setting, setting_code
from lightning_bln.tuning.storage import open_storage
from lightning_bln.tuning.study import TuneResult, load_scores, tune_flags

LAYERS = ["first", "second"]
PLANTED = {"first": StatFlags.parse("TFFT"), "second": StatFlags.parse("FFTT")}


class Planted(nn.Module):
    """Two layers whose flags make the loss: 1 for each flag that is not as planted, and noise that the batch brings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BatchLayerNorm(2)
        self.second = BatchLayerNorm(2)
        self.calls: list[str] = []
        self.interrupted_at = -1

    def forward(self, x: Tensor) -> Tensor:
        if len(self.second(self.first(x))) != len(x):
            raise RuntimeError("Calls are counted setting by setting, not of several in one call.")
        flags = {name: getattr(self, name).flags for name in LAYERS}
        self.calls.append(setting_code(flags))
        if len(self.calls) == self.interrupted_at:
            raise KeyboardInterrupt
        wrong = sum(a != b for name in LAYERS for a, b in zip(flags[name], PLANTED[name], strict=True))
        return torch.full((len(x),), float(wrong))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return output + target


def make_data(batches: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches, 4, 2, generator=generator)
    return list(zip(inputs, torch.rand(batches, 4, generator=generator), strict=True))


def make_model() -> Planted:
    torch.manual_seed(0)
    model = Planted()
    update_statistics(model, [inputs for inputs, _ in make_data()])
    model.calls.clear()
    return model.eval()


def tune(storage: Any, model: nn.Module | None = None, **arguments: Any) -> TuneResult:
    settings: dict[str, Any] = {"heartbeat": 0.5, "grace": 8.0, "progress": False, "n_trials": 30}
    settings |= {"sampler": seeded(0)}
    return tune_flags(
        model or make_model(), make_data(), loss, storage=storage, per_layer=True, **(settings | arguments)
    )


def seeded(seed: int) -> TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(multivariate=True, constant_liar=True, seed=seed)


@pytest.fixture(scope="module")
def searched() -> tuple[Planted, TuneResult]:
    """One search, and the model that counted what was scored."""
    model = make_model()
    return model, tune(InMemoryStorage(), model, n_trials=80)


def code_of(trial: FrozenTrial) -> str:
    setting = params_setting(trial.params, LAYERS)
    assert setting is not None
    return setting_code(setting)


def uniform(code: str) -> str:
    return f"first={code},second={code}"


UNIFORM = [uniform(flags.code) for flags in StatFlags.all()]


def test_it_gets_from_the_best_uniform_setting_to_the_planted_one(searched: tuple[Planted, TuneResult]):
    _, result = searched
    study = result.study
    assert [code_of(trial) for trial in study.trials[:16]] == UNIFORM
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials[:16])
    assert len(study.trials) == 96
    best_uniform = min(trial.value for trial in study.trials[:16] if trial.value is not None)
    assert result.table.best.loss < best_uniform
    assert result.best == PLANTED
    assert set_flags_(make_model(), result.best) == PLANTED
    about = study.user_attrs["lightning_bln"]
    assert (about["kind"], about["layers"]) == ("per_layer", LAYERS)
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        assert trial.user_attrs["setting"] == code_of(trial)
        assert trial.value == trial.user_attrs["loss"]


def test_scores_are_those_of_separate_passes(searched: tuple[Planted, TuneResult]):
    _, result = searched
    settings = [score.setting for score in result.table]
    separate = score_flags(make_model(), make_data(), loss, cells=settings, progress=False)
    assert {score.code: score.loss for score in separate} == {score.code: score.loss for score in result.table}


def test_bad_proposals_are_pruned_before_the_end(searched: tuple[Planted, TuneResult]):
    model, result = searched
    pruned = result.study.get_trials(states=(TrialState.PRUNED,))
    assert len(pruned) >= 5
    settings = [params_setting(trial.params, LAYERS) for trial in pruned if "copied_from" not in trial.user_attrs]
    separate = score_flags(make_model(), make_data(), loss, cells=settings, progress=False)
    assert separate.best.loss > result.table.best.loss, "the best one is not pruned"
    calls = Counter(model.calls)
    for trial in pruned:
        assert 7 <= len(trial.intermediate_values) < 20, "p < 0.01 needs 7 batches that are all worse"
        assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]
        if "copied_from" not in trial.user_attrs:
            assert calls[code_of(trial)] == len(trial.intermediate_values)
    assert sorted(score.code for score in result.table) == sorted(
        {code_of(trial) for trial in result.study.get_trials(states=(TrialState.COMPLETE,))}
    )


def test_what_is_known_is_copied_and_not_scored_again(searched: tuple[Planted, TuneResult]):
    model, result = searched
    copies = [trial for trial in result.study.trials if "copied_from" in trial.user_attrs]
    assert copies
    for trial in copies:
        source = result.study.trials[trial.user_attrs["copied_from"]]
        assert code_of(trial) == code_of(source)
        assert (trial.state, trial.value) == (source.state, source.value)
        assert trial.intermediate_values == source.intermediate_values
        assert trial.user_attrs["units"] == source.user_attrs["units"]
    calls = Counter(model.calls)
    del calls[uniform("TTFF")], calls[uniform("FFFF")]  # tried out before
    assert max(calls.values()) == len(make_data())


class Listed(BaseSampler):
    """Proposes what it is given, in order."""

    def __init__(self, codes: list[dict[str, str]]) -> None:
        self.codes = list(codes)
        self.current: dict[str, Any] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        flags = {name: StatFlags.parse(code) for name, code in self.codes.pop(0).items()}
        self.current = {f"{layer}.{name}": value for layer in LAYERS for name, value in flags[layer].to_dict().items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self.current[name]


def test_the_sampler_and_a_duplicate_in_one_pass():
    twice = {"first": "TFFT", "second": "FFTT"}
    sampler = Listed([twice, {"first": "TTTT", "second": "TTTT"}, twice])
    result = tune(InMemoryStorage(), sampler=sampler, n_trials=3)
    new = result.study.trials[16:]
    assert [trial.user_attrs.get("copied_from") for trial in new] == [None, 0, 16]
    assert {trial.state for trial in new} == {TrialState.COMPLETE}
    assert result.best == PLANTED


def test_another_pruner_decides():
    class Never(BasePruner):
        asked = 0

        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            assert trial.intermediate_values
            Never.asked += 1
            return False

    result = tune(InMemoryStorage(), pruner=Never(), sampler=RandomSampler(seed=1), n_trials=8)
    assert Counter(trial.state for trial in result.study.trials) == {TrialState.COMPLETE: 24}
    scored = sum("copied_from" not in trial.user_attrs for trial in result.study.trials[16:])
    assert Never.asked == scored * len(make_data())


@pytest.mark.parametrize("batches", [1, 20, STEPS, STEPS + 1, 3 * STEPS + 5])
def test_losses_are_reported_by_block(batches: int):
    data = make_data(batches)
    result = tune_flags(
        make_model(), data, loss, storage=InMemoryStorage(), per_layer=True, n_trials=2, pruner=NopPruner(),
        sampler=RandomSampler(seed=3), progress=False,
    )  # fmt: skip
    block = -(-batches // STEPS)
    steps = list(range(-(-batches // block)))
    for trial in result.study.trials:
        assert trial.user_attrs["batches"] == batches
        assert list(trial.intermediate_values) == steps
        for step in steps:
            targets = torch.cat([target for _, target in data[step * block : (step + 1) * block]])
            wrong = round(trial.values[0] - torch.cat([target for _, target in data]).mean().item())
            assert trial.intermediate_values[step] == pytest.approx(wrong + targets.mean().item(), rel=1e-5)


def test_nothing_is_pruned_by_the_loss_if_something_else_is_monitored(caplog: pytest.LogCaptureFixture):
    from torchmetrics import MeanMetric

    class Negative(MeanMetric):
        def update(self, output: Tensor, target: Tensor) -> None:
            super().update(-output)

    caplog.set_level(logging.INFO)
    metrics = {"right": Negative()}
    found = {"monitor": "right", "mode": "max", "pruner": default_pruner(), "sampler": RandomSampler(seed=0)}
    result = tune(InMemoryStorage(), metrics=metrics, n_trials=8, **found)
    assert Counter(trial.state for trial in result.study.trials) == {TrialState.COMPLETE: 24}
    assert "nothing is pruned" in caplog.text
    assert result.study.best_value == result.table.best.metrics["right"]


def test_a_lightning_module_is_pruned_by_the_loss_that_it_logs():
    import lightning.pytorch as pl

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            inputs, targets = batch
            self.log("val_loss", loss(self.net(inputs), targets).mean(), batch_size=len(inputs))

    found = {"n_trials": 8, "sampler": seeded(0), "progress": False, "per_layer": True}
    result = tune_flags(Lit(), DataLoader(make_data(), batch_size=None), storage=InMemoryStorage(), **found)
    states = Counter(trial.state for trial in result.study.trials)
    assert states[TrialState.PRUNED] >= 1
    assert sum(states.values()) == 24
    names = ["net.first", "net.second"]
    assert result.study.user_attrs["lightning_bln"]["layers"] == names
    assert set(result.best) == set(names)


def test_interrupted_and_started_again(tmp_path: Path):
    storage = f"sqlite:///{tmp_path / 'flags.db'}"
    model = make_model()
    model.interrupted_at = 2 + 16 * len(make_data()) + 30
    with pytest.raises(KeyboardInterrupt):
        tune(storage, model, n_trials=12)
    study = optuna.load_study(study_name="lightning-bln", storage=open_storage(storage))
    given_back = study.get_trials(states=(TrialState.FAIL,))
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert len(given_back) == 8
    known = {code_of(trial) for trial in study.get_trials(states=(TrialState.COMPLETE,))}
    assert {code_of(trial) for trial in waiting} == {code_of(trial) for trial in given_back} - known
    model = make_model()
    result = tune(storage, model, n_trials=12)
    assert not set(model.calls) & set(UNIFORM) - {uniform("TTFF"), uniform("FFFF")}
    finished = result.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert len(finished) == 16 + 12
    assert Counter(trial.state for trial in result.study.trials).keys() == {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    }
    assert {code_of(trial) for trial in waiting} <= {code_of(trial) for trial in finished}


def test_an_error_of_the_sampler_leaves_nothing_running():
    class Broken(RandomSampler):
        def sample_independent(self, *args: Any) -> Any:
            raise ArithmeticError("no idea")

    storage = InMemoryStorage()
    with pytest.raises(ArithmeticError, match="no idea"):
        tune(storage, sampler=Broken())
    study = optuna.load_study(study_name="lightning-bln", storage=storage)
    assert Counter(trial.state for trial in study.trials) == {TrialState.COMPLETE: 16, TrialState.FAIL: 8}
    result = tune(storage, n_trials=8)
    assert len(result.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) == 24


def test_workers_count_their_proposals_together():
    storage = InMemoryStorage()
    models = [make_model() for _ in range(3)]
    samplers = [seeded(number) for number in range(3)]
    results: list[TuneResult] = []

    def work(number: int) -> None:
        results.append(tune(storage, models[number], sampler=samplers[number], n_trials=12, proposals=4, workers=3))

    threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    study = results[0].study
    assert Counter(code_of(trial) for trial in study.trials[:16]) == dict.fromkeys(UNIFORM, 1)
    assert len(study.trials) == 16 + 12
    assert Counter(trial.state for trial in study.trials).keys() <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert load_scores(study).best.loss <= min(trial.value for trial in study.trials[:16] if trial.value is not None)


def test_with_one_layer_the_uniform_settings_are_all():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchLayerNorm(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)[:, 0]

    result = tune_flags(One(), make_data(), loss, storage=InMemoryStorage(), per_layer=True, progress=False)
    assert len(result.study.trials) == 16


def test_the_defaults_warn_of_nothing():
    assert isinstance(default_sampler(), TPESampler)
    assert type(default_pruner()).__name__ == "WilcoxonPruner"
