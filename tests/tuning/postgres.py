"""A real PostgreSQL server, started once for the tests that ask for it."""

from __future__ import annotations

import glob
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def _programs(folder: Path, other_user: bool) -> Path | None:
    """Where initdb and postgres are: on the PATH, where Debian puts them, or in the package pgserver."""
    found = shutil.which("initdb")
    if found is not None and shutil.which("postgres") is not None:
        return Path(found).resolve().parent
    debian = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: float(path.split("/")[4]))
    if debian:
        return Path(debian[-1]).parent
    # Not imported: its import warns of folders that it does not find.
    package = importlib.util.find_spec("pgserver")
    if package is None or package.origin is None:
        return None
    installed = Path(package.origin).parent
    if other_user:  # who may have no way into this environment's folder
        libraries = installed.with_name("pgserver.libs")
        shutil.copytree(libraries, folder / libraries.name)
        installed = shutil.copytree(installed, folder / "pgserver")
    return installed / "pginstall" / "bin"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Makes an empty database on a server of its own and returns its URL."""
    import psycopg

    # Short, since a socket's path is limited; not tmp_path, which only this user may enter.
    folder = Path(tempfile.mkdtemp(prefix="bln-pg-", dir="/tmp"))
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = names.get("postgres") or names["nobody"]
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    server = None
    try:
        programs = _programs(folder, other_user=bool(account))
        if programs is None:
            pytest.skip("needs PostgreSQL: initdb and postgres on the PATH, or pip install pgserver")
        if account:
            os.chown(folder, account["user"], account["group"])
        arguments: dict[str, Any] = {**account, "cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        initdb = [
            programs / "initdb",
            "-D",
            folder / "data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        made = subprocess.run([*initdb, "--locale", "C"], text=True, check=False, **arguments)
        assert made.returncode == 0, made.stdout
        log = folder / "log"
        with log.open("w") as output:
            options = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", str(folder)]
            command = [programs / "postgres", "-D", folder / "data", *options]
            server = subprocess.Popen(command, **(arguments | {"stdout": output, "stderr": output}))
        where = {"host": str(folder), "user": "postgres", "dbname": "postgres", "autocommit": True}
        for _ in range(200):
            try:
                connection = psycopg.connect(**where)
                break
            except psycopg.OperationalError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
        else:
            pytest.fail(f"PostgreSQL did not answer:\n{log.read_text()}")

        def database() -> str:
            name = f"flags_{secrets.token_hex(4)}"
            connection.execute(f"CREATE DATABASE {name}")
            return f"postgresql://postgres@/{name}?host={folder}"

        with connection:
            yield database
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)  # at once: nothing is to be kept
            server.wait(timeout=30)
        shutil.rmtree(folder)
