"""`tune_flags` over all 16 settings: one process and several, killed, interrupted, failing, on every storage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from torch import nn
from torch.utils.data import DataLoader

from lightning_bln import StatFlags, set_flags_
from lightning_bln.tuning.mutex import Mutex
from lightning_bln.tuning.scoring import score_flags
from lightning_bln.tuning.space import params_setting
from lightning_bln.tuning.storage import open_storage
from lightning_bln.tuning.study import TuneResult, load_scores, tune_flags
from tests.tuning.tune_worker import SAMPLES, TRIED, make_data, make_model

ROOT = Path(__file__).parents[2]
CODES = [flags.code for flags in StatFlags.all()]
SPACE = {name: CategoricalDistribution((True, False)) for name in StatFlags.names()}
LOSS = nn.functional.cross_entropy


def tune(storage: Any, model: nn.Module | None = None, **arguments: Any) -> TuneResult:
    settings: dict[str, Any] = {"heartbeat": 0.5, "grace": 8.0, "progress": False}
    return tune_flags(model or make_model(), make_data(), LOSS, storage=storage, **(settings | arguments))


def code_of(trial: optuna.trial.FrozenTrial) -> str:
    setting = params_setting(trial.params)
    assert isinstance(setting, StatFlags)
    return setting.code


def complete(study: optuna.Study) -> list[str]:
    return [code_of(trial) for trial in study.get_trials(states=(TrialState.COMPLETE,))]


def load(storage: Any, name: str = "lightning-bln") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(storage))


def run_workers(storage: str, folder: Path, workers: list[dict[str, Any]]) -> tuple[list[int], list[int], str]:
    """Processes that begin a study together: their ids, their exit codes and what they said."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("tune_worker.py"))
    command = [sys.executable, "-W", "error", script, storage, str(folder), json.dumps(workers)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    output = process.stdout + process.stderr + "".join(path.read_text() for path in sorted(folder.glob("output-*")))
    assert process.returncode == 0, output
    ended = json.loads(process.stdout)
    return ended["pids"], ended["codes"], output


# ------------------------------------------------------------------- one process


def test_one_process_scores_all_16_in_one_pass():
    model = make_model()
    storage = InMemoryStorage()
    result = tune(storage, model)
    assert sorted(complete(result.study)) == sorted(CODES)
    assert [trial.number for trial in result.study.trials] == list(range(16))
    batches = len(make_data())
    assert Counter(model.calls) == Counter(dict.fromkeys(CODES, batches)) + Counter(["TTFF", "FFFF"])
    separate = score_flags(make_model(), make_data(), LOSS, progress=False)
    assert [score.to_dict() for score in result.table] == [score.to_dict() for score in separate]
    assert result.best == separate.best.setting
    assert set_flags_(model, result.best)["norm"] == result.best


def test_what_the_study_holds():
    result = tune(InMemoryStorage())
    about = result.study.user_attrs["lightning_bln"]
    assert {name: about[name] for name in ("version", "kind", "layers", "monitor", "mode", "confidence")} == {
        "version": 1,
        "kind": "uniform",
        "layers": ["norm"],
        "monitor": "loss",
        "mode": "min",
        "confidence": 0.95,
    }
    assert len(about["model"]) == 64
    for trial, code in zip(result.study.trials, CODES, strict=True):
        assert code_of(trial) == trial.user_attrs["setting"] == code
        assert trial.distributions == SPACE
        assert trial.value == trial.user_attrs["loss"]
        assert trial.user_attrs["attempt"] == 1
        assert trial.user_attrs["samples"] == sum(n for n, _ in trial.user_attrs["units"]) == SAMPLES
        assert trial.user_attrs["seconds"] > 0
        assert trial.user_attrs["worker"].split("/")[1] == str(os.getpid())
    assert str(result) == str(result.table)
    assert result.summary() == f"Study 'lightning-bln': {result.table.summary()}"


def test_the_model_is_not_changed():
    model = make_model().train()
    set_flags_(model, "FTFT")
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    tune(InMemoryStorage(), model)
    assert model.norm.flags.code == "FTFT"
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_finished_study_is_read_again(tmp_path: Path):
    first = tune(f"sqlite:///{tmp_path / 'flags.db'}")
    model = make_model()
    again = tune(f"sqlite:///{tmp_path / 'flags.db'}", model)
    assert model.calls == ["FFFF", "TTFF"] or model.calls == ["TTFF", "FFFF"]
    assert len(again.study.trials) == 16
    assert again.table.to_json() == first.table.to_json()
    assert load_scores(load(f"sqlite:///{tmp_path / 'flags.db'}")).to_json() == first.table.to_json()


def test_a_finished_study_is_rid_of_what_a_killed_worker_left():
    storage = InMemoryStorage()
    tune(storage)
    dead = subprocess.run([sys.executable, "-c", _NAME], capture_output=True, text=True, check=True).stdout.strip()
    Mutex(storage, "lightning-bln", dead)._acquire()
    tune(storage)
    assert optuna.get_all_study_names(storage) == ["lightning-bln"]


_NAME = "from lightning_bln.tuning.workers import worker_name; print(worker_name())"


def test_another_monitor_and_the_largest_value():
    from torchmetrics.classification import MulticlassAccuracy

    accuracy = {"accuracy": MulticlassAccuracy(2)}
    result = tune(InMemoryStorage(), metrics=accuracy, monitor="accuracy", mode="max")
    assert result.study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert result.study.best_value == result.table.best.metrics["accuracy"]
    assert result.study.best_value >= max(trial.value for trial in result.study.trials)


def lit_model() -> Any:
    import lightning.pytorch as pl

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            inputs, targets = batch
            outputs = self.net(inputs)
            self.log("val_loss", LOSS(outputs, targets))
            self.log("val_acc", (outputs.argmax(1) == targets).float().mean())

        def val_dataloader(self) -> Any:
            return DataLoader(make_data(), batch_size=None)

    return Lit()


def test_a_lightning_module_with_what_it_logs(tmp_path: Path):
    storage = InMemoryStorage()
    model = lit_model()
    result = tune_flags(model, storage=storage, progress=False)
    plain = tune(InMemoryStorage())
    assert result.study.user_attrs["lightning_bln"]["monitor"] == "val_loss"
    assert sorted(complete(result.study)) == sorted(CODES)
    assert {score.code: score.loss for score in result.table} == pytest.approx(
        {score.code: score.loss for score in plain.table}, rel=1e-5
    )
    assert result.table.best.metrics.keys() == {"val_loss", "val_acc"}
    again = tune_flags(model, storage=storage, monitor="val_loss", progress=False)
    assert again.table.to_json() == result.table.to_json()
    with pytest.raises(ValueError, match=r"whose monitored value is 'val_loss' where this call has 'val_acc'"):
        tune_flags(model, storage=storage, monitor="val_acc", progress=False)
    best = tune_flags(model, storage=storage, monitor="val_acc", mode="max", study_name="accuracy", progress=False)
    assert (
        best.study.best_value
        == best.table.best.metrics["val_acc"]
        == max(score.metrics["val_acc"] for score in result.table)
    )
    with pytest.raises(ValueError, match=r"one that validation_step logs, got monitor='acc'"):
        tune_flags(model, storage=storage, monitor="acc", study_name="other", progress=False)
    assert optuna.get_all_study_names(storage) == ["lightning-bln", "accuracy"]


# ------------------------------------------------------------- failures and interruptions


def test_a_setting_that_fails_is_tried_again(tmp_path: Path):
    model = make_model()
    model.fails = ("FTFT", tmp_path / "failed")
    result = tune(InMemoryStorage(), model)
    assert sorted(complete(result.study)) == sorted(CODES)
    failed = result.study.get_trials(states=(TrialState.FAIL,))
    assert [(code_of(trial), trial.user_attrs["error"]) for trial in failed] == [
        ("FTFT", "RuntimeError: no FTFT today")
    ]
    assert result.study.trials[-1].user_attrs["attempt"] == 2
    # The others were not scored again with it.
    assert model.calls.count("FTFF") == len(make_data())


def test_a_setting_that_always_fails_is_given_up(caplog: pytest.LogCaptureFixture):
    model = make_model()
    model.fails = ("FTFT", Path("/dev/null/never"))
    # A folder that cannot be: touch() raises, which is the setting's error.
    result = tune(InMemoryStorage(), model, max_retries=1)
    assert len(complete(result.study)) == 15
    assert list(result.given_up) == ["FTFT"]
    assert "Not a directory" in result.given_up["FTFT"]
    assert len(result.study.get_trials(states=(TrialState.FAIL,))) == 2
    assert "FTFT was given up" in caplog.text
    assert "FTFT was given up" in str(result)
    # Asked for more, it is tried once more.
    again = tune(result.study._storage, max_retries=2)
    assert sorted(complete(again.study)) == sorted(CODES)


def test_a_value_that_is_not_a_number_is_not_tried_again():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) + (float("nan") if self.net.norm.flags.code == "TFTF" else 0.0)

    result = tune(InMemoryStorage(), Broken())
    assert dict(result.given_up) == {"TFTF": "the value is NaN"}
    assert len(result.study.trials) == 16


def test_ctrl_c_gives_the_settings_back(tmp_path: Path):
    storage = f"sqlite:///{tmp_path / 'flags.db'}"
    model = make_model()
    model.interrupted_at = TRIED + 6 * len(make_data()) + 25
    with pytest.raises(KeyboardInterrupt):
        tune(storage, model, workers=3)
    study = load(storage)
    states = Counter(trial.state for trial in study.trials)
    # A third is done, a third of the rest was under way; nothing is left RUNNING.
    assert states == {TrialState.COMPLETE: 6, TrialState.FAIL: 4, TrialState.WAITING: 10}
    assert {trial.user_attrs["error"] for trial in study.get_trials(states=(TrialState.FAIL,))} == {
        "interrupted by KeyboardInterrupt"
    }
    done = complete(study)
    model = make_model()
    result = tune(storage, model)
    assert sorted(complete(result.study)) == sorted(CODES)
    assert Counter(model.calls[TRIED:]) == {code: len(make_data()) for code in CODES if code not in done}


def test_an_error_of_the_data_gives_the_settings_back():
    class Flaky:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from make_data()
            if self.passes == 2:  # the first is the trial run
                raise OSError("the disk went away")

    storage, data = InMemoryStorage(), Flaky()
    with pytest.raises(OSError, match="the disk went away"):
        tune_flags(make_model(), data, LOSS, storage=storage, progress=False)
    study = load(storage)
    assert Counter(trial.state for trial in study.trials) == {TrialState.FAIL: 16, TrialState.WAITING: 16}
    assert study.trials[0].user_attrs["error"] == "interrupted by OSError: the disk went away"
    result = tune_flags(make_model(), data, LOSS, storage=storage, progress=False)
    assert sorted(complete(result.study)) == sorted(CODES)


# -------------------------------------------------------------------- optuna ask and tell


def test_ask_and_tell_interleaved():
    storage = InMemoryStorage()
    study = optuna.create_study(study_name="lightning-bln", storage=storage)
    told, held = study.ask(SPACE), study.ask(SPACE)
    while code_of(storage.get_trial(held._trial_id)) == code_of(storage.get_trial(told._trial_id)):
        study.tell(held, state=TrialState.FAIL)
        held = study.ask(SPACE)
    study.tell(told, 0.125)
    result = tune(storage)
    held_code = code_of(storage.get_trial(held._trial_id))
    assert dict(result.elsewhere) == {held_code: held.number}
    assert held_code in result.summary()
    assert f"optuna tell --trial-number {held.number} --state fail" in result.summary()
    assert len(complete(study)) == 15
    assert result.study.best_trial.number == told.number
    study.tell(held, 0.25)
    again = tune(storage)
    assert not again.elsewhere
    assert sorted(complete(study)) == sorted(CODES)
    values = {score.code: score.loss for score in again.table}
    assert values[code_of(study.trials[told.number])] == 0.125
    assert values[held_code] == 0.25


def test_ask_takes_from_the_queue_of_an_interrupted_study():
    storage = InMemoryStorage()
    model = make_model()
    model.interrupted_at = 20
    with pytest.raises(KeyboardInterrupt):
        tune(storage, model)
    study = load(storage)
    asked = [study.ask(SPACE) for _ in range(3)]
    assert [code_of(storage.get_trial(trial._trial_id)) for trial in asked] == CODES[:3]
    for trial in asked:
        study.tell(trial, 1.0)
    model = make_model()
    result = tune(storage, model)
    assert sorted(complete(result.study)) == sorted(CODES)
    assert not set(CODES[:3]) & set(model.calls) - {"TTFF"}


def test_settings_queued_by_the_user_are_scored():
    storage = InMemoryStorage()
    study = optuna.create_study(study_name="lightning-bln", storage=storage)
    study.enqueue_trial(StatFlags.parse("FFTT").to_dict())
    study.enqueue_trial(StatFlags.parse("FFTT").to_dict())
    result = tune(storage)
    assert Counter(complete(result.study)) == dict.fromkeys(CODES, 1)
    assert code_of(result.study.trials[0]) == "FFTT"
    assert result.study.trials[0].distributions == SPACE
    assert result.study.trials[1].user_attrs["error"] == "another trial has this setting"


# ---------------------------------------------------------------------- several processes


def check_study(study: optuna.Study) -> None:
    assert Counter(complete(study)) == dict.fromkeys(CODES, 1)
    assert Counter(trial.state for trial in study.trials).keys() <= {TrialState.COMPLETE, TrialState.FAIL}
    assert optuna.get_all_study_names(study._storage) == ["lightning-bln"]


def check_three_workers(storage: str, folder: Path) -> None:
    """One of three is killed after it began scoring, and one setting raises the first time."""
    options = {"fails": "FTFT", "pause": 0.002, "waits": True}
    pids, codes, output = run_workers(storage, folder, [options, options, {"dies_at": 25}])
    assert codes == [0, 0, -signal.SIGKILL], output
    study = load(storage)
    check_study(study)
    by_error = Counter(trial.user_attrs["error"] for trial in study.get_trials(states=(TrialState.FAIL,)))
    silent = [error for error in by_error if f"/{pids[2]} fell silent" in error]
    assert len(silent) == 1, by_error
    assert by_error.pop(silent[0]) >= 4
    assert by_error == {"RuntimeError: no FTFT today": 1}
    scorers = [trial.user_attrs["worker"].split("/")[1] for trial in study.get_trials(states=(TrialState.COMPLETE,))]
    assert set(scorers) == {str(pid) for pid in pids[:2]}
    alone = {score.code: score.loss for score in score_flags(make_model(), make_data(), LOSS, progress=False)}
    assert {score.code: score.loss for score in load_scores(study)} == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sqlite:///{}/flags.db", "{}/flags.journal"])
def test_three_processes_share_a_file(name: str, tmp_path: Path):
    check_three_workers(name.format(tmp_path), tmp_path)


@pytest.mark.slow
def test_three_processes_share_a_postgresql_server(postgres: Callable[[], str], tmp_path: Path):
    check_three_workers(postgres(), tmp_path)


@pytest.mark.slow
def test_two_processes_share_a_grpc_proxy(tmp_path: Path):
    storage = f"sqlite:///{tmp_path / 'flags.db'}"
    port = free_port()
    code = (
        "import sys; from optuna.storages import run_grpc_proxy_server\n"
        "from lightning_bln.tuning.storage import open_storage\n"
        "from optuna.storages import get_storage\n"
        "run_grpc_proxy_server(get_storage(open_storage(sys.argv[1])), host='127.0.0.1', port=int(sys.argv[2]))\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, storage, str(port)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        options = {"fails": "FTFT", "pause": 0.002, "workers": 2}
        _, codes, output = run_workers(f"grpc://127.0.0.1:{port}", tmp_path, [options, options])
        assert codes == [0, 0], output
        assert "fell silent" not in output, output
    finally:
        server.terminate()
        server.wait(timeout=30)
    study = load(storage)
    check_study(study)
    assert len(study.trials) == 17


def free_port() -> int:
    import socket

    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped(tmp_path: Path):
    storage = f"sqlite:///{tmp_path / 'flags.db'}"
    batches = len(make_data())
    in_the_second_share = TRIED + 6 * batches + 5
    _, codes, output = run_workers(storage, tmp_path, [{"dies_at": in_the_second_share}])
    assert codes == [-signal.SIGKILL], output
    done = complete(load(storage))
    assert len(done) == 6
    model = make_model()
    started = time.monotonic()
    result = tune(storage, model, grace=60.0)
    assert time.monotonic() - started < 10, "a dead process of this machine needs no grace"
    check_study(result.study)
    assert Counter(model.calls[TRIED:]) == {code: batches for code in CODES if code not in done}


def test_threads_share_a_study():
    storage = InMemoryStorage()
    results: list[TuneResult] = []

    def work(model: nn.Module) -> None:
        results.append(tune(storage, model, workers=4))

    threads = [threading.Thread(target=work, args=[make_model()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    check_study(results[0].study)
    assert len({trial.user_attrs["worker"] for trial in results[0].study.trials}) > 1


# ------------------------------------------------------------------------------ bad input


def no_trace(storage: Any) -> bool:
    return optuna.get_all_study_names(storage) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Linear(3, 2)}, r"model with BatchLayerNorm layers, got a Linear without any"),
        ({"monitor": "accuracy"}, r"monitor must be 'loss' or one of the metrics \(none\), got 'accuracy'"),
        ({"mode": "best"}, r"mode must be 'min' or 'max', got 'best'"),
        ({"workers": 0}, r"workers must be at least 1, got 0"),
        ({"n_trials": 3}, r"got n_trials, which is for a search by layer; call tune_flags\(..., per_layer=True\)"),
        ({"heartbeat": 60.0}, r"shorter than grace.*got heartbeat=60.0 and grace=8.0"),
        ({"limit_batches": 0}, r"limit_batches must be at least 1"),
    ],
)
def test_bad_input_leaves_no_trace(arguments: dict[str, Any], message: str):
    storage = InMemoryStorage()
    with pytest.raises(ValueError, match=message):
        tune(storage, **arguments)
    assert no_trace(storage)


def test_a_loss_that_does_not_fit_leaves_no_trace():
    storage = InMemoryStorage()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        tune_flags(make_model(), make_data(), lambda output, target: output @ target, storage=storage, progress=False)
    assert no_trace(storage)


def test_data_that_can_be_had_once_only_are_refused():
    with pytest.raises(ValueError, match="gone through several times, got a list_iterator, which gives them once"):
        tune_flags(make_model(), iter(make_data()), LOSS, storage=InMemoryStorage())


def test_a_study_of_something_else_is_left_alone():
    storage = InMemoryStorage()
    tune(storage)
    before = storage.get_all_trials(0)
    other = make_model()
    nn.init.zeros_(other.last.bias)
    with pytest.raises(
        ValueError, match=r"'lightning-bln', whose model \(sha256 of its tensors\) is .* another study_name"
    ):
        tune(storage, other)
    with pytest.raises(
        ValueError, match=r"mode='max' must maximize one value, got 'lightning-bln', which has minimize"
    ):
        tune(storage, mode="max")
    with pytest.raises(
        ValueError, match=r"whose kind is 'uniform' where this call has 'per_layer'; .*'lightning-bln-per-layer'"
    ):
        tune(storage, per_layer=True)
    with pytest.raises(ValueError, match=r"whose limit_batches is None where this call has 2"):
        tune(storage, limit_batches=2)
    assert storage.get_all_trials(0) == before


def test_other_batches_are_noticed():
    storage = InMemoryStorage()
    model = make_model()
    model.interrupted_at = TRIED + 6 * len(make_data()) + 1
    with pytest.raises(KeyboardInterrupt):
        tune(storage, model, workers=3)
    with pytest.raises(ValueError, match=r"scored on the same batches, got 60 samples in 30 parts .* 60 in 10"):
        tune_flags(make_model(), make_data(batch=2), LOSS, storage=storage, progress=False)
    assert len(complete(load(storage))) == 6
    assert not load(storage).get_trials(states=(TrialState.RUNNING,))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lr": CategoricalDistribution((0.1, 0.2))}, "got trial 0 with lr"),
        ({name: CategoricalDistribution((False, True)) for name in SPACE}, r"got trial 0 with batch_moving_mean"),
    ],
)
def test_a_study_with_another_space_is_refused(space: dict[str, Any], message: str):
    storage = InMemoryStorage()
    study = optuna.create_study(study_name="lightning-bln", storage=storage)
    study.tell(study.ask(space), 1.0)
    with pytest.raises(ValueError, match=message):
        tune(storage)
    assert len(study.trials) == 1
    assert not study.user_attrs
