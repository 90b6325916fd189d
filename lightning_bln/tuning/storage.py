"""`open_storage`: an Optuna storage from a URL, a path or nothing, set up so that several processes can share it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import time
import warnings
import weakref
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Union
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

log = logging.getLogger(__name__)

# Union, not "|": the alias is evaluated when the module is imported, on Python 3.10 too.
StorageLike = Union[BaseStorage, str, "PathLike[str]", None]

DEFAULT_STORAGE = "sqlite:///lightning-bln.db"
"""In the current folder; `optuna` and optuna-dashboard take the same URL."""

BUSY_SECONDS = 60
"""How long a process waits for SQLite's lock; its own default of 5 s is short where several processes write."""

CONNECT_SECONDS = 10
"""How long a server may take to answer the first time."""

FORMS = (
    "'sqlite:///flags.db', 'postgresql://user@host/name', 'mysql://user@host/name', 'grpc://host:13000', or a path "
    "that ends in .log or .journal"
)

# Dialect -> (module, driver name) in the order in which they are taken, and what to install when there is none.
_DRIVERS = {
    "postgresql": ((("psycopg2", "psycopg2"), ("psycopg", "psycopg")), 'pip install "psycopg[binary]"'),
    "mysql": ((("MySQLdb", "mysqldb"), ("pymysql", "pymysql")), "pip install pymysql"),
    "mariadb": ((("MySQLdb", "mysqldb"), ("pymysql", "pymysql")), "pip install pymysql"),
}
_OPENINGS = 8


def open_storage(storage: StorageLike = None) -> BaseStorage:
    """Open the storage of a study.

    ================================  ==================================================================
    None                              ``sqlite:///lightning-bln.db`` in the current folder
    ``sqlite:///flags.db``            a file; processes of one machine may share it
    ``postgresql://user@host/name``   a server; needs psycopg or psycopg2. ``mysql://`` alike: mysqlclient or pymysql
    ``flags.journal``, ``flags.log``  Optuna's journal file, which also works on NFS
    ``grpc://host:13000``             Optuna's gRPC proxy (`optuna.storages.run_grpc_proxy_server`), for many workers
    a storage object                  as it is
    ================================  ==================================================================

    Args:
        storage: One of the above.

    Returns:
        The storage, opened; `optuna.load_study` takes it too.

    Raises:
        ValueError: If it is none of these, its driver is not installed, or it cannot be opened. Passwords are masked.

    Example:
        >>> open_storage("flags.csv")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: storage must be ..., got 'flags.csv'; for an SQLite file write 'sqlite:///flags.csv'.
    """
    if isinstance(storage, BaseStorage):
        return storage
    if storage is None:
        storage = DEFAULT_STORAGE
    if not isinstance(storage, (str, PathLike)):
        raise ValueError(
            f"storage must be a URL, a path or an optuna storage object, got {type(storage).__name__}; "
            f"call for example open_storage('{DEFAULT_STORAGE}')."
        )
    text = os.fspath(storage)
    if text.startswith("grpc://"):
        return _open_grpc(text)
    if "://" in text:
        return _open_database(text)
    if Path(text).suffix in (".log", ".journal") or _is_journal(Path(text)):
        return _open_journal(text)
    raise ValueError(
        f"storage must be {FORMS}, got {text!r}; for an SQLite file write 'sqlite:///{text or 'flags.db'}'."
    )


# ------------------------------------------------------------------------- databases


def _open_database(text: str) -> BaseStorage:
    import sqlalchemy.exc
    from sqlalchemy.engine import make_url

    try:
        url = make_url(text)
        dialect = url.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):
        # "from None": the messages of some versions hold the whole URL, with its password.
        raise ValueError(
            f"storage must be {FORMS}, got a URL that cannot be read ({text.split('://')[0]}://...); in a password "
            f"write special characters as %XX."
        ) from None
    if dialect == "sqlite":
        arguments = _sqlite_arguments(url)
    elif dialect in _DRIVERS:
        url = _with_driver(url, dialect)
        # Between two writes lies a pass over the data; a server may have closed the connection by then.
        arguments = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
        if "connect_timeout" in url.query:
            del arguments["connect_args"]
    else:
        raise ValueError(f"storage must be {FORMS}, got a URL of {dialect!r}.")
    shown = url.render_as_string(hide_password=True)
    try:
        return _create(url.render_as_string(hide_password=False), arguments)
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"storage must be a database that can be opened, got {shown}: {reason[0].rstrip('.')}. Check that it "
            f"exists and may be written to; an SQLite file needs an existing folder."
        ) from error


def _sqlite_arguments(url: URL) -> dict[str, object]:
    if url.database in (None, "", ":memory:"):
        raise ValueError(
            "storage must outlive this process, got an SQLite database in memory; pass "
            "optuna.storages.InMemoryStorage() for a study that is not to be kept."
        )
    return {} if "timeout" in url.query else {"connect_args": {"timeout": BUSY_SECONDS}}


def _with_driver(url: URL, dialect: str) -> URL:
    """The URL with a driver that is installed; one that the URL names must be."""
    known, install = _DRIVERS[dialect]
    if "+" in url.drivername:
        named = url.drivername.split("+")[1]
        module = next((module for module, driver in known if driver == named), named)
        if importlib.util.find_spec(module) is not None:
            return url
        raise ValueError(
            f"storage {url.drivername}://... needs the Python package {module!r}, which is not installed; call "
            f"{install}, and write {dialect}://... for whichever driver there is."
        )
    for module, driver in known:
        if importlib.util.find_spec(module) is not None:
            return url.set(drivername=f"{dialect}+{driver}")
    raise ValueError(
        f"storage {dialect}://... needs a Python driver, and none of {', '.join(m for m, _ in known)} is installed; "
        f"call {install}."
    )


def _create(url: str, arguments: dict[str, object]) -> RDBStorage:
    """Open the database; processes that start together also make its tables together, and all but one may fail."""
    import sqlalchemy.exc

    for attempt in range(1, _OPENINGS + 1):
        try:
            storage = RDBStorage(url, engine_kwargs=dict(arguments))
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError, AssertionError) as error:
            if attempt == _OPENINGS or not _made_by_another(error):
                raise
            log.debug("the database is being set up by another process, opening it again: %s", error)
            time.sleep(random.uniform(0.05, 0.25) * attempt)
        else:
            # Nothing else closes the connections; a driver may warn of those that are left open.
            weakref.finalize(storage, storage.engine.dispose)
            return storage
    raise AssertionError("unreachable")


def _made_by_another(error: Exception) -> bool:
    import sqlalchemy.exc

    if isinstance(error, (RuntimeError, AssertionError)):
        return True  # Optuna's check found tables, but not yet the row with their version
    if isinstance(error, (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError)):
        return True  # the same table, type or row twice
    return any(word in str(error).lower() for word in ("already exists", "locked", "no such table"))


# ------------------------------------------------------------------------- the others


def _open_journal(path: str) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    # The lock is a symbolic link to the file; made of a relative path it points nowhere, and a killed process's lock
    # is then never released.
    absolute = str(Path(path).absolute())
    try:
        lock = JournalFileOpenLock(absolute) if os.name == "nt" else None
        return JournalStorage(JournalFileBackend(absolute, lock_obj=lock))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"storage must be a journal file of Optuna, or a path where one can be written, got {path!r}: {error}."
        ) from error


def _is_journal(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline(65536)
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _open_grpc(text: str) -> BaseStorage:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.path.strip("/"):
        raise ValueError(
            f"storage of a gRPC proxy must be 'grpc://host:port', got {text!r}; write 'grpc://localhost:13000'."
        )
    if any(importlib.util.find_spec(module) is None for module in ("grpc", "google.protobuf")):
        raise ValueError(
            "storage grpc://... needs the Python package grpcio, which is not installed; call "
            "pip install grpcio protobuf."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # the user asked for it by the URL
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        proxy.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError as error:
        raise ValueError(
            f"storage must be a gRPC proxy that answers, got {text!r}: none in {CONNECT_SECONDS} s; start it with "
            f"optuna.storages.run_grpc_proxy_server(storage, host=..., port={port})."
        ) from error
    return proxy
