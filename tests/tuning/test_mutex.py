"""The mutex: held by one at a time on every storage, taken from the dead, lost with notice."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage, get_storage

from lightning_bln.tuning.mutex import Mutex, MutexLostError
from lightning_bln.tuning.storage import open_storage
from lightning_bln.tuning.workers import worker_name

STORAGES = ["memory", "sqlite:///{}/flags.db", "{}/flags.journal", "postgresql"]


@pytest.fixture(params=STORAGES)
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], BaseStorage]:
    """Opens the same storage as often as it is called, as different processes do."""
    if request.param == "memory":
        one = InMemoryStorage()
        return lambda: one
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres")()
        return lambda: get_storage(open_storage(url))
    return lambda: get_storage(open_storage(request.param.format(tmp_path)))


def test_one_at_a_time(storages: Callable[[], BaseStorage]):
    inside, most, count = 0, 0, 0
    errors: list[BaseException] = []

    def work(mutex: Mutex) -> None:
        nonlocal inside, most, count
        try:
            for _ in range(5):
                with mutex.hold():
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.002)
                    mutex.check()
                    inside -= 1
                    count += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[Mutex(storages(), "study", worker_name())]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (most, count) == (1, 20)
    assert optuna.get_all_study_names(storages()) == []


def test_studies_do_not_wait_for_each_other():
    storage = InMemoryStorage()
    with Mutex(storage, "a", worker_name()).hold(), Mutex(storage, "b", worker_name()).hold():
        assert optuna.get_all_study_names(storage) == ["a (lock)", "b (lock)"]


def test_it_is_given_back_after_an_error():
    storage = InMemoryStorage()
    with pytest.raises(RuntimeError, match="inside"), Mutex(storage, "a", worker_name()).hold():
        raise RuntimeError("inside")
    with Mutex(storage, "a", worker_name()).hold():
        pass


def test_ctrl_c_while_it_is_held_takes_effect_after_it(storages: Callable[[], BaseStorage]):
    mutex, finished = Mutex(storages(), "study", worker_name()), []

    def work() -> None:
        with mutex.hold():
            signal.raise_signal(signal.SIGINT)
            mutex.check()
            finished.append(True)

    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert finished
    assert "study (lock)" not in [study.study_name for study in mutex.storage.get_all_studies()]


def test_a_holder_that_ended_is_not_waited_for(caplog: pytest.LogCaptureFixture):
    storage = InMemoryStorage()
    name = subprocess.run(
        [sys.executable, "-c", "from lightning_bln.tuning.workers import worker_name; print(worker_name())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    dead = Mutex(storage, "a", name)
    dead._acquire()
    dead.note(claiming=[3, 4])
    broken: list[dict[str, Any]] = []
    started = time.monotonic()
    with Mutex(storage, "a", worker_name(), on_broken=broken.append).hold():
        assert time.monotonic() - started < 5
    assert broken[0]["claiming"] == [3, 4]
    assert f"is taken from worker {name}, which ended" in caplog.text
    with pytest.raises(MutexLostError, match="broken by another process"):
        dead.check()


def test_a_silent_holder_elsewhere_is_waited_for_as_long_as_said():
    storage = InMemoryStorage()
    silent = Mutex(storage, "a", "there/1/2/elsewhere/run")
    silent._acquire()
    started = time.monotonic()
    with Mutex(storage, "a", worker_name(), patience=0.4).hold():
        assert 0.4 <= time.monotonic() - started < 5


def test_a_study_without_a_holder_is_removed_in_time(monkeypatch: pytest.MonkeyPatch):
    storage = InMemoryStorage()
    optuna.create_study(storage=storage, study_name="a (lock)")  # killed between two calls
    monkeypatch.setattr("lightning_bln.tuning.mutex.UNSIGNED_PATIENCE", 0.2)
    with Mutex(storage, "a", worker_name()).hold():
        pass
    assert optuna.get_all_study_names(storage) == []


def test_what_a_killed_holder_left_can_be_tidied():
    storage = InMemoryStorage()
    mutex = Mutex(storage, "a", worker_name(), patience=0.1)
    mutex.tidy()
    Mutex(storage, "a", "there/1/2/elsewhere/run")._acquire()
    mutex.tidy()
    assert optuna.get_all_study_names(storage) == []


def test_a_holder_that_changes_is_not_taken_for_dead():
    storage = InMemoryStorage()
    name = "there/1/2/elsewhere/run"
    stop = time.monotonic() + 1.0
    got: list[float] = []

    def others() -> None:
        while time.monotonic() < stop:
            with Mutex(storage, "a", name).hold():
                time.sleep(0.05)

    def wait() -> None:
        with Mutex(storage, "a", worker_name(), patience=0.3).hold():
            got.append(time.monotonic())

    threads = [threading.Thread(target=others), *(threading.Thread(target=wait) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2


def test_one_who_lost_it_leaves_the_next_holders_alone(caplog: pytest.LogCaptureFixture):
    storage = InMemoryStorage()
    slow, quick = Mutex(storage, "a", "there/1/2/elsewhere/run"), Mutex(storage, "a", worker_name(), patience=0.1)
    with quick_after(quick, slow) as held:
        with pytest.raises(MutexLostError):
            slow.check()
        slow._release()
        assert "took this one for dead" in caplog.text
        held.check()


class quick_after:  # noqa: N801
    """``quick`` holds what ``slow`` still believes to hold."""

    def __init__(self, quick: Mutex, slow: Mutex) -> None:
        self.quick, self.slow = quick, slow

    def __enter__(self) -> Mutex:
        self.slow._acquire()
        self.quick._acquire()
        return self.quick

    def __exit__(self, *_: object) -> None:
        self.quick._release()


def test_ctrl_c_while_it_is_taken_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    storage = InMemoryStorage()
    mutex = Mutex(storage, "a", worker_name())

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mutex, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt), mutex.hold():
            pass
    assert optuna.get_all_study_names(storage) == []


def test_optuna_tells_of_studies_and_not_of_the_mutex(tmp_path: Path):
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener = Listener()
    logging.getLogger("optuna").addHandler(listener)
    try:
        for name in (f"sqlite:///{tmp_path}/flags.db", f"{tmp_path}/flags.journal"):
            storage = open_storage(name)
            with Mutex(storage, "mine", worker_name()).hold():
                optuna.create_study(storage=storage, study_name="mine")
    finally:
        logging.getLogger("optuna").removeHandler(listener)
    assert told == ["A new study created in RDB with name: mine", "A new study created in Journal with name: mine"]
