"""llama-server as a sandboxed systemd service."""

from __future__ import annotations

from io import StringIO

from pyinfra.api import deploy
from pyinfra.operations import files

from tasks import probe as at
from tasks.operations import release, service
from tasks.operations.user import system_user
from tasks.rules.plan import Plan


@deploy("llama-server")
def serve(plan: Plan) -> None:
    """The wanted release, serving the wanted model, healthy, and started at boot."""
    assert plan.build is not None
    assert plan.server is not None
    if plan.server.converged and plan.is_current:
        return
    system_user(name=f"Make the system user {at.SERVER_USER}", user=at.SERVER_USER)
    service.remembered(name="Remember what serves now")
    if plan.server.needs_api_key:
        service.api_key(name="Make the API key")
    files.directory(name="Make the folder for helpers", path=at.LIBRARY, mode="755")
    for file in plan.server.files:
        files.put(
            name=f"Write {file.path}",
            src=StringIO(file.content),
            dest=file.path,
            user="root",
            group="root",
            mode=f"{file.mode:o}",
            create_remote_dir=True,
        )
    if not plan.is_current:
        release.current(name="Switch to the release", build=plan.build, settings=plan.settings)
    service.serving(
        name="Start llama-server and wait until it is healthy", digest=plan.server.digest
    )
