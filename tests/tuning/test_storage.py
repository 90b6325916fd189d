"""`open_storage`: what it takes, what it says of what it does not, and that passwords stay out of messages."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage

from lightning_bln.tuning import storage as module
from lightning_bln.tuning.storage import DEFAULT_STORAGE, open_storage


def names(storage: object) -> list[str]:
    return optuna.get_all_study_names(open_storage(storage))  # type: ignore[arg-type]


def test_by_default_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    optuna.create_study(storage=open_storage(), study_name="a")
    assert (tmp_path / "lightning-bln.db").exists()
    # The command line opens the same URL.
    assert optuna.get_all_study_names(DEFAULT_STORAGE) == ["a"]


def test_an_object_is_taken_as_it_is():
    storage = InMemoryStorage()
    assert open_storage(storage) is storage


def test_sqlite_waits_for_a_lock(tmp_path: Path):
    path = tmp_path / "flags.db"
    storage = open_storage(f"sqlite:///{path}")
    blocker = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN EXCLUSIVE")
    with ThreadPoolExecutor(1) as pool:
        # sqlite3's own 5 s would do here, but not for long writes of others: the setting is what is looked at.
        waiting = pool.submit(optuna.create_study, storage=storage, study_name="a")
        time.sleep(0.3)
        assert not waiting.done()
        blocker.execute("COMMIT")
        assert waiting.result(timeout=10).study_name == "a"
    blocker.close()
    assert isinstance(storage, RDBStorage)
    assert storage.engine_kwargs["connect_args"] == {"timeout": 60}
    own = open_storage(f"sqlite:///{path}?timeout=3")
    assert isinstance(own, RDBStorage)
    assert "connect_args" not in own.engine_kwargs


@pytest.mark.parametrize("name", ["flags.log", "flags.journal"])
def test_a_journal_file(name: str, tmp_path: Path):
    storage = open_storage(tmp_path / name)
    assert isinstance(storage, JournalStorage)
    optuna.create_study(storage=storage, study_name="a")
    assert names(str(tmp_path / name)) == ["a"]


def test_a_journal_file_of_another_name(tmp_path: Path):
    optuna.create_study(storage=open_storage(tmp_path / "flags.log"), study_name="a")
    (tmp_path / "flags.log").rename(tmp_path / "flags")
    assert names(tmp_path / "flags") == ["a"]


def test_a_journal_is_locked_by_a_link_that_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = open_storage("folder/flags.log")
    assert isinstance(storage, JournalStorage)
    storage._backend._lock.acquire()
    assert (tmp_path / "folder" / "flags.log.lock").resolve() == tmp_path / "folder" / "flags.log"
    storage._backend._lock.release()


def test_a_journal_that_is_none(tmp_path: Path):
    (tmp_path / "train.log").write_text("epoch 1\nepoch 2\n")
    with pytest.raises(ValueError, match=r"storage must be a journal file of Optuna.*train.log"):
        open_storage(tmp_path / "train.log")


@pytest.mark.parametrize("value", ["flags", "flags.csv", "", "flags.db"])
def test_another_path(value: str):
    expected = rf"storage must be 'sqlite:///flags.db', .*, got '{value}'; for an SQLite file write 'sqlite:///"
    with pytest.raises(ValueError, match=expected):
        open_storage(value)


def test_another_type():
    with pytest.raises(
        ValueError, match=r"storage must be a URL, a path or an optuna storage object, got int; call for"
    ):
        open_storage(3)  # type: ignore[arg-type]


def test_another_database():
    with pytest.raises(ValueError, match=r"storage must be 'sqlite:///flags.db', .*, got a URL of 'mssql'"):
        open_storage("mssql://host/name")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory(url: str):
    with pytest.raises(ValueError, match=r"must outlive this process.*optuna.storages.InMemoryStorage\(\)"):
        open_storage(url)


def test_a_folder_that_does_not_exist(tmp_path: Path):
    with pytest.raises(ValueError, match=r"can be opened, got sqlite:////.*: unable to open database file. Check"):
        open_storage(f"sqlite:///{tmp_path}/none/flags.db")


def test_a_file_that_is_no_database(tmp_path: Path):
    (tmp_path / "flags.db").write_text("not a database, however long one looks at it" * 50)
    with pytest.raises(ValueError, match=r"got sqlite:////.*flags.db: file is not a database"):
        open_storage(f"sqlite:///{tmp_path / 'flags.db'}")


def test_a_server_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"can be opened, got postgresql\+psycopg\w*://me:\*\*\*@localhost:1/flags: "
    ) as error:
        open_storage("postgresql://me:secret@localhost:1/flags")
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match=r"can be opened, got mysql\+\w+://me:\*\*\*@127.0.0.1:1/flags: ") as error:
        open_storage("mysql://me:secret@127.0.0.1:1/flags")
    assert "secret" not in str(error.value)


def test_a_url_that_cannot_be_read_does_not_show_its_password():
    with pytest.raises(ValueError, match=r"cannot be read \(postgresql://...\); in a password write") as error:
        open_storage("postgresql://me:secret@host:port/flags")
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "installed", "driver"),
    [
        ("postgresql://h/d", {"psycopg2", "psycopg"}, "postgresql+psycopg2"),
        ("postgresql://h/d", {"psycopg"}, "postgresql+psycopg"),
        ("mysql://h/d", {"pymysql"}, "mysql+pymysql"),
        ("mysql://h/d", {"MySQLdb", "pymysql"}, "mysql+mysqldb"),
        ("mariadb://h/d", {"pymysql"}, "mariadb+pymysql"),
        ("postgresql+psycopg://h/d", {"psycopg2", "psycopg"}, "postgresql+psycopg"),
        (
            "postgresql://h/d",
            set(),
            r'needs a Python driver, and none of psycopg2, psycopg is .* pip install "psycopg\[bin',
        ),
        (
            "mysql://h/d",
            set(),
            r"needs a Python driver, and none of MySQLdb, pymysql is installed; call pip install pymysql",
        ),
        (
            "postgresql+psycopg2://h/d",
            {"psycopg"},
            r"needs the Python package 'psycopg2', which is not .* postgresql://",
        ),
    ],
)
def test_drivers(url: str, installed: set[str], driver: str, monkeypatch: pytest.MonkeyPatch):
    from sqlalchemy.engine import make_url

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    dialect = make_url(url).get_backend_name()
    if "+" in driver:
        assert module._with_driver(make_url(url), dialect).drivername == driver
    else:
        with pytest.raises(ValueError, match=driver):
            open_storage(url)


@pytest.mark.parametrize("url", ["grpc://localhost", "grpc://:13000", "grpc://localhost:port", "grpc://localhost:1/a"])
def test_a_proxy_needs_host_and_port(url: str):
    with pytest.raises(
        ValueError, match=r"must be 'grpc://host:port', got 'grpc://.*'; write 'grpc://localhost:13000'"
    ):
        open_storage(url)


def test_a_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"a gRPC proxy that answers, got 'grpc://localhost:1'.*run_grpc_proxy_server"):
        open_storage("grpc://localhost:1")


def test_a_proxy_without_grpc(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the Python package grpcio.*pip install grpcio protobuf"):
        open_storage("grpc://localhost:13000")


_OPEN_TOGETHER = """
import json, os, sys, time
from lightning_bln.tuning.storage import open_storage
import optuna, sqlalchemy, alembic
optuna.logging.set_verbosity(optuna.logging.ERROR)
for url in json.loads(sys.argv[1]):
    pids = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                optuna.create_study(storage=open_storage(url), study_name=str(number))
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\\n")
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4, url
"""


@pytest.mark.slow
def test_processes_that_open_an_empty_storage_together(postgres: Callable[[], str], tmp_path: Path):
    urls = [f"sqlite:///{tmp_path}/{number}.db" for number in range(4)] + [postgres() for _ in range(3)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _OPEN_TOGETHER, json.dumps(urls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    for url in urls:
        assert sorted(names(url)) == ["0", "1", "2", "3"]
