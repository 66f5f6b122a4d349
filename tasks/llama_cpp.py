"""llama.cpp, compiled on the host for the host."""

from __future__ import annotations

from pyinfra.api import deploy
from pyinfra.operations import files

from tasks import probe as at
from tasks.operations import release
from tasks.operations.user import system_user
from tasks.rules.plan import Plan


@deploy("llama.cpp")
def install(plan: Plan) -> None:
    """A complete release of the wanted commit under /opt/llama.cpp/releases."""
    assert plan.build is not None
    if not plan.needs_build:
        return
    worker(at.WORKER_USER)
    files.directory(name="Make the cache folder", path=at.CACHE, mode="755")
    files.directory(
        name="Make the build folder",
        path=release.WORK,
        user=at.WORKER_USER,
        group=at.WORKER_USER,
        mode="755",
    )
    release.installed(
        name=f"Compile llama.cpp {plan.build.source.label}",
        build=plan.build,
        settings=plan.settings,
    )


def worker(user: str) -> None:
    """The user who compiles and downloads."""
    system_user(name=f"Make the system user {user}", user=user)
