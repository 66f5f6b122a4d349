"""llama-server as sandboxed systemd services."""

from __future__ import annotations

from io import StringIO

from pyinfra.api import deploy
from pyinfra.operations import files

from tasks import probe as at
from tasks.operations import release, service
from tasks.operations.user import system_user
from tasks.rules.plan import Plan
from tasks.rules.server import FilePlan


@deploy("llama-server")
def serve(plan: Plan) -> None:
    """The wanted release, serving the wanted models, healthy, and started at boot."""
    assert plan.build is not None
    changed = [each for each in plan.servers if not (each.converged and plan.is_current)]
    if plan.serves:
        return
    system_user(name=f"Make the system user {at.SERVER_USER}", user=at.SERVER_USER)
    service.remembered(name="Remember what serves now", units=tuple(each.name for each in changed))
    if any(each.needs_api_key for each in changed):
        service.api_key(name="Make the API key")
    files.directory(name="Make the folder for helpers", path=at.LIBRARY, mode="755")
    for file in dict.fromkeys(file for each in changed for file in each.helpers):
        _put(file)
    for unit in plan.leftovers:
        service.stopped(name=f"Stop {unit}", unit=unit)
    if not plan.is_current:
        release.current(name="Switch to the release", build=plan.build, settings=plan.settings)
    for each in changed:
        for file in (each.unit, *each.own):
            _put(file)
        service.serving(
            name=f"Start {each.name} and wait until it is healthy",
            unit=each.name,
            digest=each.digest,
        )
    for unit in plan.leftovers:
        service.removed(name=f"Remove {unit}", unit=unit)


def _put(file: FilePlan) -> None:
    files.put(
        name=f"Write {file.path}",
        src=StringIO(file.content),
        dest=file.path,
        user="root",
        group="root",
        mode=f"{file.mode:o}",
        create_remote_dir=True,
    )
