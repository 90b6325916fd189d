"""Which process works on a trial and whether it still lives: worker names, the heartbeat and who has fallen silent."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage

log = logging.getLogger(__name__)


def worker_name() -> str:
    """A name for this run of the search: ``host/pid/start/machine/run``.

    ``start`` tells a process from a later one with the same pid, ``machine`` says where the pid means something (one
    boot and one pid namespace on Linux, otherwise the network card), ``run`` tells two runs in one process apart.
    """
    pid = os.getpid()
    return f"{socket.gethostname().replace('/', '-')}/{pid}/{_start(pid) or 0}/{_machine()}/{secrets.token_hex(4)}"


def is_gone(worker: str) -> bool:
    """Whether that worker's process is known to have ended; False where this process cannot tell."""
    parts = worker.split("/")
    if len(parts) != 5 or not parts[1].isdigit() or parts[3] != _machine() or os.name != "posix":
        return False
    pid = int(parts[1])
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process with that pid: the start says whether it is the one
    start = _start(pid)
    return start is not None and parts[2] != "0" and start != parts[2]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        where = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        where = f"{socket.gethostname()} {uuid.getnode()}"  # a host's name alone may not be unique
    return hashlib.sha256(where.encode()).hexdigest()[:12]


def _start(pid: int) -> str | None:
    """When the process started, in clock ticks since the boot; "dead" for one not yet waited for; None if unknown."""
    try:
        # The name in parentheses may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]


class Watch:
    """Tells that something has not changed for a while, by this process's own clock: clocks of machines differ.

    Args:
        patience: Seconds without change.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._seen: dict[object, tuple[object, float]] = {}

    def unchanged(self, key: object, state: object) -> bool:
        """Whether ``key`` has had this state for `patience` seconds, as far as this object was asked."""
        now = time.monotonic()
        known = self._seen.get(key)
        if known is None or known[0] != state:
            self._seen[key] = state, now
            return False
        return now - known[1] >= self.patience


class Heartbeat:
    """A thread that counts up the attribute ``beat`` of trials while this process works on them.

    Args:
        storage: Of the study.
        interval: Seconds between two beats.
    """

    def __init__(self, storage: BaseStorage, interval: float) -> None:
        self.storage = storage
        self.interval = interval
        self._trials: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightning-bln heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def add(self, trial_ids: Iterable[int]) -> None:
        """Beat for these trials too."""
        with self._lock:
            self._trials |= set(trial_ids)

    def remove(self, trial_ids: Iterable[int]) -> None:
        """Beat for these no longer."""
        with self._lock:
            self._trials -= set(trial_ids)

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(self.interval):
            beat += 1
            with self._lock:
                trials = sorted(self._trials)
            for trial_id in trials:
                try:
                    self.storage.set_trial_user_attr(trial_id, "beat", beat)
                except (UpdateFinishedTrialError, KeyError):
                    self.remove([trial_id])  # finished, by this worker or over its head
                except Exception as error:
                    # Any storage's own error, a lost connection for one: the pass goes on, the next beat may get there.
                    log.warning("the heartbeat of a trial could not be written: %s", error)
        self.storage.remove_session()
