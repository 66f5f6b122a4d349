"""Groups of processes that can be found and ended as a whole, whatever became of who started them.

Every lab has a cgroup, and in it one for each host and one for the servers of the outside. A
process can't leave it, and its descendants are born into it: nothing has to be looked up by name,
and a number that the kernel has given to another process since can't be hit. Hosts need a cgroup
of their own anyway: two systemds in one would take each other's units for theirs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .machine import cgroup_root
from .tools import LabError


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one cgroup and of all below it."""

    name: str
    """Path relative to the root of the cgroup hierarchy."""

    @property
    def path(self) -> Path:
        """Folder in the unified hierarchy."""
        root = cgroup_root()
        if root is None:
            raise LabError("the unified cgroup hierarchy (cgroup2) is not mounted")
        return root / self.name

    def start(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """Start a program in the group, in a session of its own; return its process number."""
        self.path.mkdir(parents=True, exist_ok=True)
        # A shell enters the group before there is a child, so that none is ever outside of it, and
        # ends at once, so that what runs on is nobody's child and leaves no zombie behind.
        script = 'echo $$ >"$0" && log=$1 && shift && { setsid "$@" >>"$log" 2>&1 & } && echo $!'
        started = subprocess.run(
            ["/bin/sh", "-c", script, self.path / "cgroup.procs", log, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            check=False,
        )
        if started.returncode:
            raise LabError(f"{command[0]} can't be started: {started.stderr.strip()}")
        return int(started.stdout)

    def processes(self) -> Iterator[int]:
        """Yield the numbers of the processes in the group, also of those deeper in it."""
        # Groups come and go meanwhile: os.walk passes over a folder that is gone, rglob raises.
        for folder, _, _ in os.walk(self.path):
            with suppress(OSError):
                listed = Path(folder, "cgroup.procs").read_text()
                yield from (int(line) for line in listed.split() if line != "0")

    @property
    def is_empty(self) -> bool:
        """Whether no process is left in the group."""
        return next(self.processes(), None) is None

    def wait_empty(self, seconds: float) -> bool:
        """Wait until no process is left; return whether that came to pass."""
        deadline = time.monotonic() + seconds
        while not self.is_empty:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        """End every process in the group at once, as a power cut does, and remove the group."""
        if not self.path.is_dir():
            return
        for _ in range(10):
            try:
                (self.path / "cgroup.kill").write_text("1")
            except OSError:  # a kernel before 5.14
                self._kill_one_by_one()
            if self.wait_empty(3):
                break
        else:
            raise LabError(f"processes in {self.path} can't be ended: {list(self.processes())}")
        self._remove()

    def _kill_one_by_one(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _remove(self) -> None:
        # nspawn mirrors the group in the older hierarchy where there is one.
        for path in {self.path, Path("/sys/fs/cgroup/systemd") / self.name}:
            for folder, _, _ in os.walk(path, topdown=False):
                _remove_folder(Path(folder))


def _remove_folder(folder: Path) -> None:
    for _ in range(100):
        with suppress(OSError):  # busy for a moment after its last process has ended
            folder.rmdir()
            return
        time.sleep(0.02)
    raise LabError(f"{folder} can't be removed")
