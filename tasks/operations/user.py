"""Users without rights, for work and service."""

from __future__ import annotations

from collections.abc import Generator

from pyinfra import host
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand
from pyinfra.facts.server import Command

from tasks.operations import shell


@operation()
def system_user(user: str) -> Generator[PyinfraCommand, None, None]:
    """A system user, and a group of its name, without a shell or a home.

    One that is there is left as it is: it may be a person's, whose shell and home are theirs.
    """
    there = f"id -u {user} >/dev/null 2>&1 && getent group {user} >/dev/null"
    if host.get_fact(Command, command=f"{there} && echo yes || echo no") == "yes":
        host.noop(f"user {user} exists")
        return
    yield shell.command(
        f"getent group {user} >/dev/null || groupadd --system {user} || exit 1\n"
        f"id -u {user} >/dev/null 2>&1 || useradd --system --gid {user} --no-create-home "
        f"--home-dir /nonexistent --shell /usr/sbin/nologin {user}"
    )
