"""One deploy at a time on one host."""

from __future__ import annotations

import getpass
import os
import shlex
import socket
import uuid
from collections.abc import Generator
from datetime import datetime, timezone

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks.operations import shell
from tasks.probe import LOCK

WAIT_SECONDS = 3
"""A lock whose holder was killed is free after a second."""


@operation()
def held() -> Generator[PyinfraCommand, None, None]:
    """Hold the host's lock until this run ends, however it ends. Changes nothing.

    The lock is an flock of a process on the host that says something each second. When this run
    dies, or its connection, the next word finds nobody listening, the process ends and the kernel
    frees the lock: it can never be left behind.
    """
    if not state.is_executing:
        return
    token = uuid.uuid4().hex
    since = datetime.now(timezone.utc).strftime("%H:%M:%S UTC")
    who = f"{getpass.getuser()}@{socket.gethostname()}, process {os.getpid()}, since {since}"
    shell.start(host, _hold(token, who))
    got_it, output = shell.run(host, _wait(token))
    if not got_it:
        holder = output.stdout.strip() or "nobody knows whose"
        yield shell.failure(
            f"Error: another deploy is at work on this host ({holder}). Wait for it and run this "
            "again."
        )


def _hold(token: str, who: str) -> str:
    return f"""
exec 9>>{LOCK} || exit 1
flock -w {WAIT_SECONDS} 9 || exit 1
printf '%s\\n%s\\n' {shlex.quote(who)} {token} >{LOCK}
while echo held; do sleep 1 9>&-; done
"""


def _wait(token: str) -> str:
    return f"""
n=0
while [ $n -lt {(WAIT_SECONDS + 2) * 10} ]; do
  [ "$(sed -n 2p {LOCK} 2>/dev/null)" = {token} ] && exit 0
  n=$((n + 1)); sleep 0.1
done
sed -n 1p {LOCK}
exit 1
"""
