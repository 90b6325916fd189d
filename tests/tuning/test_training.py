"""Training studies as a whole: what they say, what fails, what is interrupted, several processes."""

from __future__ import annotations

import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from lit import LitNet
from optuna.trial import TrialState
from torch import Tensor
from training_study import QUICK, build, loaders, states

from lightning_bln.tuning.storage import open_storage
from lightning_bln.tuning.training import _Worker, tune_training
from lightning_bln.tuning.workers import worker_name


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


class TestFailures:
    def test_a_failed_trial_is_kept_with_its_error_and_replaced(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def failing(trial: optuna.Trial) -> Any:
            if trial.number == 1:
                raise ZeroDivisionError("planted\nsecond line")
            return build(trial)

        with caplog.at_level(logging.WARNING, logger="lightning.pytorch.lightning_bln"):
            study = tune_training(failing, n_trials=2, storage=url)
        assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
        assert study.trials[1].user_attrs["error"] == "ZeroDivisionError: planted"
        assert "Trial 1 failed" in caplog.text
        assert "Traceback" in caplog.text, "the log shows where"

    def test_a_failing_training_leaves_nothing_in_the_signal_handlers(self, url: str) -> None:
        class Failing(LitNet):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                raise ZeroDivisionError("in training")

        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(RuntimeError, match="ZeroDivisionError: in training"):
            tune_training(lambda trial: (Failing(), loaders(), QUICK), n_trials=1, storage=url)
        assert signal.getsignal(signal.SIGINT) is before

    def test_trials_that_all_fail_the_same_way_end_the_study_and_a_corrected_program_goes_on(self, url: str) -> None:
        match = (
            r"all the same way.*3 failures.*monitor must be a value that validation_step logs \(val_loss.*got 'val_los'"
        )
        with pytest.raises(RuntimeError, match=match):
            tune_training(build, n_trials=20, storage=url, monitor="val_los")
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        assert states(study) == ["FAIL"] * 3
        assert all("got 'val_los'" in trial.user_attrs["error"] for trial in study.trials)

        def broken(trial: optuna.Trial) -> Any:
            raise KeyError(f"number {trial.number}")

        with pytest.raises(RuntimeError, match="KeyError: 'number 0'; KeyError: 'number 1'; KeyError: 'number 2'"):
            tune_training(broken, n_trials=5, storage=url, study_name="other")
        study = tune_training(build, n_trials=1, storage=url, study_name="other")
        assert states(study) == ["FAIL"] * 3 + ["COMPLETE"]

    def test_failures_after_successes_do_not_go_on_for_ever(self, url: str) -> None:
        def failing(trial: optuna.Trial) -> Any:
            if trial.number:
                raise OSError(f"disk full at {trial.number}")
            return build(trial)

        with pytest.raises(RuntimeError, match=r"again and again, got 4 failures.*disk full at 4"):
            tune_training(failing, n_trials=4, storage=url)
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        assert states(study) == ["COMPLETE"] + ["FAIL"] * 4

    @pytest.mark.parametrize("where", ["training", "build"])
    def test_ctrl_c_leaves_no_running_trial_and_the_study_goes_on_later(self, where: str, url: str) -> None:
        class Interrupted(LitNet):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if where == "training":
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)  # the interrupt comes before this ends
                return super().training_step(batch, batch_idx)

        def interrupted(trial: optuna.Trial) -> Any:
            if trial.number == 1 and where == "build":
                raise KeyboardInterrupt
            return (Interrupted if trial.number == 1 else LitNet)(), loaders(), QUICK

        outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
        try:
            with pytest.raises(KeyboardInterrupt):
                tune_training(interrupted, n_trials=3, storage=url)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Lightning leaves it ignored"
        finally:
            signal.signal(signal.SIGINT, outside)
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        assert states(study) == ["COMPLETE", "FAIL"]
        assert study.trials[1].user_attrs["error"] == "Interrupted: KeyboardInterrupt"
        assert states(tune_training(interrupted, n_trials=3, storage=url)) == [
            "COMPLETE",
            "FAIL",
            "COMPLETE",
            "COMPLETE",
        ]

    def test_sigterm_as_lightning_raises_it(self, url: str) -> None:
        class Terminated(LitNet):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                os.kill(os.getpid(), signal.SIGTERM)
                return super().training_step(batch, batch_idx)

        with pytest.raises(SystemExit):
            tune_training(lambda trial: (Terminated(), loaders(), QUICK), n_trials=1, storage=url)
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        assert states(study) == ["FAIL"]
        assert study.trials[0].user_attrs["error"].startswith("Interrupted: ")


class TestSharing:
    def test_an_earlier_calls_trials_count(self, url: str) -> None:
        trained = []

        def counted(trial: optuna.Trial) -> Any:
            trained.append(trial.number)
            return build(trial)

        tune_training(counted, n_trials=2, storage=url)
        study = tune_training(counted, n_trials=3, storage=url)
        assert trained == [0, 1, 2]
        assert states(tune_training(counted, n_trials=2, storage=url)) == states(study) == ["COMPLETE"] * 3
        assert trained == [0, 1, 2]

    @pytest.mark.parametrize("arguments", [{"mode": "max"}, {"monitor": "val_acc"}, {"flags": "TTFF"}])
    def test_a_study_is_one_kind_of_search(self, arguments: dict[str, Any], url: str) -> None:
        tune_training(build, n_trials=1, storage=url)
        with pytest.raises(
            ValueError, match=r"'lightning-bln-training' must be a search of the same kind.*another name"
        ):
            tune_training(build, n_trials=2, storage=url, **arguments)
        optuna.create_study(study_name="foreign", storage=url).add_trial(optuna.trial.create_trial(value=1.0))
        with pytest.raises(ValueError, match="got one with the settings none"):
            tune_training(build, n_trials=2, storage=url, study_name="foreign")

    @pytest.mark.parametrize(
        ("worker", "why"),
        [("dead", "its process has ended"), ("elsewhere/1/1/machine/run", "no sign of life for 0.5 s")],
    )
    def test_a_killed_trial_is_closed_and_replaced(self, worker: str, why: str, url: str) -> None:
        tune_training(build, n_trials=1, storage=url)
        zombie = optuna.load_study(study_name="lightning-bln-training", storage=url).ask()
        name = worker_name().split("/")
        name[1] = "4194305"  # above the largest pid of Linux
        zombie.set_user_attr("worker", "/".join(name) if worker == "dead" else worker)
        study = tune_training(build, n_trials=2, storage=url, heartbeat=0.1, grace=0.5)
        assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
        assert study.trials[1].user_attrs["error"] == f"Given up: {why}."

    def test_a_long_training_shows_signs_of_life(self, url: str) -> None:
        def long(trial: optuna.Trial) -> Any:
            deadline = time.monotonic() + 20
            study = optuna.load_study(study_name="lightning-bln-training", storage=url)
            while study.trials[0].user_attrs["beat"] < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            return LitNet(), loaders(), QUICK

        (trial,) = tune_training(long, n_trials=1, storage=url, heartbeat=0.1, grace=0.5).trials
        assert trial.user_attrs["beat"] >= 3

    def test_a_trial_that_was_asked_for_by_other_means_is_left_alone(self, url: str) -> None:
        tune_training(build, n_trials=1, storage=url)
        optuna.load_study(study_name="lightning-bln-training", storage=url).ask()
        study = tune_training(build, n_trials=2, storage=url, heartbeat=0.1, grace=0.5)
        assert states(study) == ["COMPLETE", "RUNNING", "COMPLETE"]

    def test_a_result_that_comes_too_late_is_told_of(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        def slow(trial: optuna.Trial) -> Any:
            if trial.number == 0:
                optuna.load_study(study_name="lightning-bln-training", storage=url).tell(0, state=TrialState.FAIL)
            return LitNet(), loaders(), QUICK

        with caplog.at_level(logging.WARNING, logger="lightning.pytorch.lightning_bln"):
            study = tune_training(slow, n_trials=1, storage=url)
        assert states(study) == ["FAIL", "COMPLETE"]
        assert "Trial 0 was closed as FAIL by another process" in caplog.text

    def test_enqueued_trials_come_first(self, url: str) -> None:
        tune_training(build, n_trials=1, storage=url)
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        study.enqueue_trial({"learning_rate": 0.125, "bln.eps": 0.0625})
        study = tune_training(build, n_trials=2, storage=url)
        assert (study.trials[1].params["learning_rate"], study.trials[1].params["bln.eps"]) == (0.125, 0.0625)

    def test_workers_that_finish_at_the_same_moment_start_no_trial_too_many(self, url: str) -> None:
        class Instant:
            """Takes no time, so that all workers come back for the last trials together."""

            monitor = "val_loss"

            def __call__(self, trial: optuna.Trial) -> float:
                trial.set_user_attr("setting", "TTFF")
                return trial.suggest_float("x", 0, 1)

        def work(_: int) -> None:
            storage = open_storage(url)
            study = optuna.load_study(study_name="shared", storage=storage)
            _Worker(study, storage, Instant(), n_trials=10, heartbeat=0.1, grace=20.0).work()  # type: ignore[arg-type]

        study = optuna.create_study(study_name="shared", storage=open_storage(url))
        study.set_user_attr("lightning_bln", {"layers": ["net.1"]})
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert states(study) == ["COMPLETE"] * 10

    @pytest.mark.slow
    def test_three_processes_one_of_them_killed_train_exactly_n_trials(self, url: str, tmp_path: Path) -> None:
        context = get_context("spawn")
        workers = [context.Process(target=_work, args=(url, str(tmp_path), number)) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0, -signal.SIGKILL]
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        by_state = {state: [t for t in study.trials if t.state.name == state] for state in states(study)}
        assert len(by_state.pop("COMPLETE")) + len(by_state.pop("PRUNED", [])) == 6
        (killed,) = by_state.pop("FAIL")
        assert killed.user_attrs["error"] == "Given up: its process has ended."
        assert by_state == {}
        assert len({trial.user_attrs["worker"] for trial in study.trials}) == 3
        assert optuna.get_all_study_names(url) == ["lightning-bln-training"]


def _work(url: str, folder: str, number: int) -> None:
    """One of three processes; the last one is killed in the middle of its first training."""
    torch.set_num_threads(1)

    class Killed(LitNet):
        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGKILL)

    def wait_for_all(trial: optuna.Trial) -> Any:
        (Path(folder) / f"started-{number}").touch()
        while len(list(Path(folder).glob("started-*"))) < 3:
            time.sleep(0.05)
        return (Killed if number == 2 else LitNet)(), loaders(), QUICK

    tune_training(wait_for_all, n_trials=6, storage=url, heartbeat=0.2, grace=20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": 0}, "n_trials must be at least 1, got 0"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"grace": 5.0}, "heartbeat must be above 0 and below grace, got 10.0 and 5.0"),
        ({"flags": "TTXF"}, "four letters T .* got 'TTXF'"),
        ({"swap": {"flags": "TTFF"}}, r"flags are an argument of their own: tune_training\(..., flags='TTFF'\)"),
        ({"storage": "study.csv"}, "storage must be"),
    ],
)
def test_bad_arguments_are_errors_before_anything_is_trained(
    arguments: dict[str, Any], message: str, url: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tune_training(build, **{"n_trials": 1, "storage": url} | arguments)
    assert list(tmp_path.iterdir()) == []
