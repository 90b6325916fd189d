"""Names of workers, who has gone, the heartbeat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from lightning_bln.tuning.workers import Heartbeat, Watch, is_gone, worker_name


def test_a_name_tells_host_process_and_run():
    first, second = worker_name(), worker_name()
    assert first.split("/")[1] == str(os.getpid())
    assert first.split("/")[:4] == second.split("/")[:4]
    assert first != second


def test_a_living_process_is_not_gone():
    assert not is_gone(worker_name())


def test_a_process_that_ended_is_gone():
    child = subprocess.Popen(
        [sys.executable, "-c", "from lightning_bln.tuning.workers import worker_name; print(worker_name()); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert not is_gone(name)
    child.send_signal(signal.SIGKILL)
    # Before anyone has waited for it, too: it is a zombie then.
    deadline = time.monotonic() + 10
    while not is_gone(name) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(name)
    child.communicate()
    assert is_gone(name)


def test_another_process_with_the_same_pid_is_not_the_one():
    host, pid, start, machine, run = worker_name().split("/")
    if start == "0":
        pytest.skip("needs /proc to tell when a process started")
    assert is_gone("/".join([host, pid, str(int(start) - 1), machine, run]))


@pytest.mark.parametrize("name", ["", "someone", "host/1/2/elsewhere/run", "host/x/2/elsewhere/run"])
def test_of_other_machines_nothing_is_known(name: str):
    assert not is_gone(name)


def test_watch_tells_what_has_not_changed_for_long():
    watch = Watch(0.05)
    assert not watch.unchanged("a", 1)
    time.sleep(0.06)
    assert watch.unchanged("a", 1)
    assert not watch.unchanged("a", 2)
    assert not watch.unchanged("b", 1)


def test_the_heartbeat_beats_for_running_trials_only():
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage)
    kept, ended, dropped = (study.ask() for _ in range(3))
    with Heartbeat(storage, 0.01) as heartbeat:
        heartbeat.add(trial._trial_id for trial in (kept, ended, dropped))
        wait_for_beat(storage, kept._trial_id, 2)
        study.tell(ended, state=TrialState.FAIL)
        heartbeat.remove([dropped._trial_id])
        time.sleep(0.03)
        after = [storage.get_trial(trial._trial_id).user_attrs["beat"] for trial in (kept, ended, dropped)]
        wait_for_beat(storage, kept._trial_id, after[0] + 3)
        now = [storage.get_trial(trial._trial_id).user_attrs["beat"] for trial in (kept, ended, dropped)]
    assert now[0] > after[0]
    assert now[1:] == after[1:]
    stopped = storage.get_trial(kept._trial_id).user_attrs["beat"]
    time.sleep(0.05)
    assert storage.get_trial(kept._trial_id).user_attrs["beat"] == stopped


def test_the_heartbeat_survives_an_error_of_the_storage(caplog: pytest.LogCaptureFixture):
    class Unreliable(InMemoryStorage):
        broken = False

        def set_trial_user_attr(self, trial_id: int, key: str, value: object) -> None:
            if self.broken:
                raise ConnectionError("no route to host")
            super().set_trial_user_attr(trial_id, key, value)

    storage = Unreliable()
    trial = optuna.create_study(storage=storage).ask()
    with Heartbeat(storage, 0.01) as heartbeat:
        heartbeat.add([trial._trial_id])
        wait_for_beat(storage, trial._trial_id, 1)
        storage.broken = True
        time.sleep(0.05)
        storage.broken = False
        beat = storage.get_trial(trial._trial_id).user_attrs["beat"]
        wait_for_beat(storage, trial._trial_id, beat + 1)
    assert "could not be written: no route to host" in caplog.text


def wait_for_beat(storage: InMemoryStorage, trial_id: int, beat: int) -> None:
    deadline = time.monotonic() + 10
    while storage.get_trial(trial_id).user_attrs.get("beat", 0) < beat:
        assert time.monotonic() < deadline
        time.sleep(0.002)
