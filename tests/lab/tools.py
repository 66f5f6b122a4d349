"""What every part of the lab uses: its error, its progress lines, its folders, other programs."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_STARTED = time.monotonic()


class LabError(Exception):
    """What went wrong, in one line for the person at the keyboard."""


def say(text: str) -> None:
    """Tell on stderr what is being done, with the seconds since this process began."""
    print(f"lab [{time.monotonic() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def cache_directory(*parts: str) -> Path:
    """Return the folder under the user's cache that the lab keeps things in, made if need be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    lab = base.absolute() / "llamastead" / "lab"
    directory = lab.joinpath(*parts)
    try:
        lab.mkdir(parents=True, exist_ok=True)
        # There are programs in it that run with root's rights: nobody else is to come near them.
        lab.chmod(0o700)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{directory} can't be made: {error.strerror}") from None
    return directory


def compiler_cache() -> Path:
    """Return a ccache folder to bind into hosts, so that the second compile is a short one."""
    directory = cache_directory("ccache")
    # The build user's number differs from host to host, and each has to find what others wrote.
    directory.chmod(0o777)
    configuration = directory / "ccache.conf"
    if not configuration.exists():
        write_whole(configuration, "umask = 000\n")
    return directory


def run(
    command: Sequence[str | Path],
    *,
    stdin: str | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program of this machine and return what it printed; a failure is one line."""
    try:
        done = subprocess.run(
            command, input=stdin, env=env, cwd=cwd, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise LabError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = said[-1] if said else f"exit status {done.returncode}"
        raise LabError(f"`{' '.join(map(str, command))[:120]}` failed: {reason}")
    return done.stdout


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        # Asked for again and again: under pyinfra threads are greenlets, and one that waits in the
        # kernel would keep the one that holds the lock from ever going on.
        while not _lock(file):
            time.sleep(0.02)
        yield


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
