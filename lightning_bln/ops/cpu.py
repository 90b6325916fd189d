"""The CPU kernel: compiles `cpu.cpp` on first use, keeps the result, and loads it into PyTorch.

`load` registers the kernel for the two ops of `library`. Where there is no compiler, or the build fails, it warns once
and the plain PyTorch reference goes on serving the CPU.

Environment variables (documented in README.md):
    CXX: The C++20 compiler, with arguments if need be. Default: the first of g++, c++ and clang++ on the PATH.
    LIGHTNING_BLN_CACHE: Folder for compiled kernels. Default: ``lightning-bln`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.cpp")

# What each run of the compiler adds to the flags; they run side by side, since one for all takes twice as long.
PARTS = (
    ("-DLIGHTNING_BLN_PART=0",),
    ("-DLIGHTNING_BLN_PART=1",),
    ("-DLIGHTNING_BLN_PART=2", "-O1"),
    ("-DLIGHTNING_BLN_PART=3",),
)

_lock = threading.Lock()


class BuildError(RuntimeError):
    """The kernel could not be compiled or loaded; says why, and what to do."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice or (
            "Install a C++20 compiler (Debian, Ubuntu: apt install g++) or name one in the environment variable CXX"
        )


def compiler() -> list[str]:
    """The command of the C++ compiler.

    Raises:
        BuildError: If there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"the compiler {named[0]!r} that CXX names is not there")
        return named
    for name in ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return [path]
    raise BuildError("there is no C++ compiler (g++, c++ or clang++) on the PATH")


def compile_flags() -> list[str]:
    """Arguments for compiling against the installed PyTorch, for this very processor."""
    include = Path(torch.__file__).parent / "include"
    # x86 calls it -march; elsewhere -mcpu stands for architecture and tuning both.
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return [
        "-O2",
        native,
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",  # a square root is one instruction
        "-w",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of PyTorch 2.10
        f"-I{include}",
    ]


def link_flags() -> list[str]:
    """Arguments for linking against the installed PyTorch."""
    return ["-shared", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get("LIGHTNING_BLN_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning-bln"


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def library_name(command: list[str]) -> str:
    """The file name for this source, compiler, flags, processor and PyTorch."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    parts = (
        SOURCE.read_text(),
        *command,
        version,
        *compile_flags(),
        *link_flags(),
        torch.__version__,
        platform.platform(),
        _processor(),
    )
    return f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"


def _private(folder: Path) -> bool:
    """Whether nobody else can write into the folder: what lies there is going to be run."""
    info = folder.stat()
    return not hasattr(os, "getuid") or (
        info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Only one process at a time: the others wait, and find the kernel built. A killed process lets go of it."""
    if sys.platform == "win32":
        yield  # each builds its own and puts it in place in one step
        return
    import fcntl

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(folder: Path) -> Path:
    """Compile the kernel into ``folder``, unless it lies there.

    Args:
        folder: Made if need be. Nobody else may write there.

    Returns:
        The library's path.

    Raises:
        BuildError: If there is no compiler, or it fails.
        OSError: If the folder cannot be written.
    """
    command = compiler()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _private(folder):
        raise BuildError(f"others can write into the cache folder {folder}", advice=f"Call: chmod go-w {folder}")
    target = folder / library_name(command)
    if _whole(target):
        return target
    with _one_process(folder):
        if _whole(target):
            return target
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = [str(Path(scratch) / f"{i}.o") for i in range(len(PARTS))]
            _run(
                [
                    [*command, *compile_flags(), *part, "-c", str(SOURCE), "-o", name]
                    for part, name in zip(PARTS, objects, strict=True)
                ]
            )
            library = Path(scratch) / "cpu.so"
            _run([[*command, *objects, "-o", str(library), *link_flags()]])
            digest = Path(scratch) / "digest"
            digest.write_text(_sha256(library))
            # Each in one step, and the digest last: without it the library does not count.
            library.replace(target)
            digest.replace(target.with_suffix(".sha256"))
    return target


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _whole(library: Path) -> bool:
    """Whether the library is there as it was built: a part of one, after a full disk, would end the process."""
    digest = library.with_suffix(".sha256")
    return library.is_file() and digest.is_file() and digest.read_text() == _sha256(library)


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side.

    Raises:
        BuildError: If one fails; the others are ended too.
    """
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        for command, process in zip(commands, running, strict=True):
            output, _ = process.communicate(timeout=600)
            if process.returncode != 0:
                said = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["nothing"]
                raise BuildError(f"{command[0]} failed ({process.returncode}): {said[0].strip()}")
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler took more than {error.timeout:.0f} s") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def load() -> bool:
    """Register the kernel, compiling it if this is its first use on this machine. Later calls do nothing.

    Returns:
        Whether the kernel serves the CPU. If not, a warning has said why.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> bool:
    try:
        folder = cache_folder()
        try:
            library = build(folder)
        except OSError:
            # No home, or one that cannot be written: for this process only. The file may go once it is loaded.
            with tempfile.TemporaryDirectory(prefix="lightning-bln-") as scratch:
                torch.ops.load_library(str(build(Path(scratch))))
            return True
        torch.ops.load_library(str(library))
    except (BuildError, OSError) as error:
        advice = error.advice if isinstance(error, BuildError) else "Check the compiler, CXX and LIGHTNING_BLN_CACHE"
        warnings.warn(
            f"Batch layer normalization runs on the CPU in plain PyTorch, several times slower, because its kernel "
            f"could not be compiled: {error}. {advice}.",
            stacklevel=2,
        )
        return False
    return True
