"""A mutual exclusion between processes that share nothing but an Optuna storage."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection

from lightning_bln.tuning.workers import Watch, is_gone

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds after which a holder that does nothing is taken for dead; it is held for milliseconds."""

UNSIGNED_PATIENCE = 5.0
"""The same for one that has not even written its name, the first thing that it does."""

_HOLDER = "lightning_bln_holder"


class MutexLostError(RuntimeError):
    """Another process took this one for dead and broke its mutex: what was read under it may have changed."""


class Mutex:
    """Held by one process at a time, on any storage: a helper study that exists while it is held.

    Optuna's storages give no other operation that only one of several processes can succeed in: a trial's state is
    set conditionally on PostgreSQL and MySQL, but on SQLite two processes may both take one waiting trial. A study's
    name is unique on all of them.

    A holder that was killed leaves its study behind. Others delete it when its process is known to be gone, or when it
    stayed the same for `PATIENCE` seconds.

    Args:
        storage: Of the study that it guards.
        study_name: The name of that study.
        worker: This process's name, from `workers.worker_name`.
        patience: Seconds as above. Default `PATIENCE`.
        on_broken: Called with what the dead holder had noted, before its study is deleted.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_name: str,
        worker: str,
        *,
        patience: float = PATIENCE,
        on_broken: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.storage = storage
        self.name = f"{study_name} (lock)"
        self.worker = worker
        self.on_broken = on_broken
        self._watch = Watch(patience)
        self._unsigned = Watch(min(patience, UNSIGNED_PATIENCE))
        self._held: tuple[int, str] | None = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for it, hold it inside, give it back; Ctrl-C inside takes effect after that.

        Raises:
            MutexLostError: From `check` and `note` inside, if it was broken meanwhile.
        """
        self._acquire()
        with _interrupted_afterwards():
            try:
                yield
            finally:
                self._release()

    def tidy(self) -> None:
        """Remove what a holder that was killed has left, which would stay if nobody needed it any more."""
        if self._holder()[0] is not None:
            with self.hold():
                pass

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            MutexLostError: If it is not.
        """
        if self._held is None or self._holder()[1].get("token") != self._held[1]:
            raise MutexLostError("the mutex was broken by another process")

    def note(self, **what: Any) -> None:
        """Leave word of what is being done, for whoever has to break it."""
        self.check()
        assert self._held is not None
        study_id, token = self._held
        self._write(study_id, token, **what)

    def _acquire(self) -> None:
        token = secrets.token_hex(8)
        while True:
            try:
                with _without_its_own_log_line(self.name):
                    study_id = self.storage.create_new_study([StudyDirection.MINIMIZE], self.name)
            except DuplicatedStudyError:
                self._break_if_dead()
                time.sleep(random.uniform(0.01, 0.05))
                continue
            try:
                self._write(study_id, token)
            except KeyError:
                continue  # deleted between the two calls by one who found it without a token for long
            except BaseException:
                self.storage.delete_study(study_id)  # Ctrl-C just now: nobody could tell whose it is
                raise
            self._held = study_id, token
            return

    def _release(self) -> None:
        held, self._held = self._held, None
        study_id, holder = self._holder()
        if held is None or study_id != held[0] or holder.get("token") != held[1]:
            log.warning("another process took this one for dead while it held the mutex of a study")
            return
        with contextlib.suppress(KeyError):
            self.storage.delete_study(study_id)

    def _break_if_dead(self) -> None:
        found = self._holder()
        study_id, holder = found
        if study_id is None:
            return
        worker = holder.get("worker", "")
        # One of this very run is left over from an interruption: it holds no other when it waits for this one.
        gone = worker == self.worker or is_gone(worker)
        watch = self._watch if worker else self._unsigned
        if not watch.unchanged(self.name, found) and not gone:
            return
        # Several may see it dead; after waiting for different times, all but the first see another holder.
        time.sleep(random.uniform(0, 0.2))
        if self.on_broken is not None:
            self.on_broken(holder)
        if self._holder() == found:
            log.warning(
                "the mutex of a study is taken from worker %s, which %s", worker, "ended" if gone else "fell silent"
            )
            with contextlib.suppress(KeyError):
                self.storage.delete_study(study_id)

    def _holder(self) -> tuple[int | None, dict[str, Any]]:
        try:
            study_id = self.storage.get_study_id_from_name(self.name)
            return study_id, self.storage.get_study_user_attrs(study_id).get(_HOLDER, {})
        except KeyError:
            return None, {}

    def _write(self, study_id: int, token: str, **what: Any) -> None:
        self.storage.set_study_user_attr(study_id, _HOLDER, {"worker": self.worker, "token": token, **what})


@contextlib.contextmanager
def _without_its_own_log_line(name: str) -> Iterator[None]:
    """Optuna tells of each new study; this one is none to the user. Lines about other studies pass."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith(f"name: {name}")

    loggers = [logging.getLogger(storage.__module__) for storage in (RDBStorage, JournalStorage, InMemoryStorage)]
    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end.

    In the middle of a query it would leave SQLite's file locked for as long as the exception is handled, so that giving
    trials and the mutex back waited for itself until the database's timeout.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[0])
