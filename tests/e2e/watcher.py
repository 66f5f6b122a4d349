"""Reading what a host's processes show of a secret while a deploy is at work."""

from __future__ import annotations

import json
import shlex
import subprocess
from types import TracebackType

from tests.lab import LabHost

# The needle comes by a pipe, or it would find itself; the pipe's end is when to stop.
_LOOK = """
import glob, json, select, sys
needle = sys.stdin.readline().strip().encode()
seen, looks = {}, 0
while not select.select([sys.stdin], [], [], 0.02)[0]:
    looks += 1
    for kind in ("cmdline", "environ"):
        for path in glob.glob("/proc/[0-9]*/" + kind):
            try:
                with open(path, "rb") as file:
                    text = file.read()
            except OSError:
                continue
            if needle in text:
                seen[path] = text[max(0, text.index(needle) - 200):].decode(errors="replace")[:300]
print(json.dumps([looks, seen]))
"""
PLACES = "/etc /var /run /root /home /opt /data /tmp /usr/local"


class Watcher:
    """Looks at command line and environment of every process, some ten times a second.

    As root it sees all of them; as somebody else what anybody may see: all command lines, and the
    environment of that user's own processes.
    """

    def __init__(self, host: LabHost, needle: str, user: str = "root") -> None:
        self._command = [*host.ssh_command(user), shlex.join(["python3", "-c", _LOOK])]
        self._needle = needle
        self.seen: dict[str, str] = {}
        self.looks = 0

    def __enter__(self) -> Watcher:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._needle}\n")
        self._process.stdin.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        told, _ = self._process.communicate(timeout=60)
        self.looks, self.seen = json.loads(told)


def kept(host: LabHost, needle: str) -> str:
    """Journal lines and files of the host that hold it."""
    script = (
        f'read -r t; journalctl --no-pager | grep -F -e "$t"; grep -rIlF -e "$t" {PLACES} '
        "--exclude-dir=ccache 2>/dev/null"
    )
    return host.run(script, stdin=needle, check=False).stdout
