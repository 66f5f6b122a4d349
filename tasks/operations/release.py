"""Releases of llama.cpp side by side: compiled, installed whole, switched atomically."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator
from pathlib import Path

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.operations import shell
from tasks.operations.job import Job, finished
from tasks.preflight import probe_host
from tasks.rules import server
from tasks.rules.build import BuildPlan, replan
from tasks.settings import Settings
from tasks.upstream import split_credentials

WORK = f"{at.CACHE}/llama.cpp"
STAGE = f"{WORK}/stage"
STUBS = f"{WORK}/stubs"
"""Where the build lays a stub of libcuda if there is no driver to link with."""
_SCRIPT = (Path(__file__).parents[2] / "files" / "build-llama.sh").read_text()


@operation()
def installed(build: BuildPlan, settings: Settings) -> Generator[PyinfraCommand, None, None]:
    """Compile llama.cpp and install it under /opt/llama.cpp/releases.

    A release appears there only when it is complete and its llama-server answers `--version`.
    """
    if build.build_id is None and state.is_executing:
        # The compiler is here by now, and its version belongs to what a release depends on.
        build = replan(build, settings, probe_host(settings))
    if build.release is not None:
        host.noop(f"release {build.release.name} is installed")
        return
    yield from finished._inner(job=_job(build, settings))
    yield shell.command(_install(build.release_name or "unknown"))
    if state.is_executing:
        # Only now is it known what this version takes; what runs has not been touched yet.
        made = replan(build, settings, probe_host(settings)).release
        unknown = list(server.unknown_to(made, settings)) if made else []
        if unknown:
            yield shell.failure(*(f"Error: {found}" for found in unknown))


@operation()
def current(build: BuildPlan, settings: Settings) -> Generator[PyinfraCommand, None, None]:
    """Make `current` point at the release of a build, and `previous` at the one before."""
    if build.release is None and state.is_executing:
        build = replan(build, settings, probe_host(settings))
    yield shell.command(switch(shlex.quote(build.release_name or "unknown")))


def switch(release: str) -> str:
    """Shell that points `current` at a release, given as a shell word.

    A rename: there is always one or the other.
    """
    target = f"releases/{release}"
    return f"""
cd {at.PREFIX} && [ -e {target}/release.json ] || exit 1
old=$(readlink current)
[ "$old" != {target} ] || exit 0
ln -sfn {target} .current.new && mv -T .current.new current || exit 1
[ -z "$old" ] || {{ ln -sfn "$old" .previous.new && mv -T .previous.new previous; }}
"""


def _job(build: BuildPlan, settings: Settings) -> Job:
    source = build.source
    address, secrets = split_credentials(source.repo)
    told = {
        "name": build.release_name,
        "commit": source.commit,
        "version": source.label,
        "repo": address,
        "compiler": build.inputs["compiler"],
        "toolkit": build.inputs.get("toolkit"),
        "backend": build.backend,
        "architectures": list(build.architectures),
        "inputs": dict(build.inputs),
    }
    return Job(
        name="build",
        key=build.release_name or "unknown",
        script=_SCRIPT,
        variables={
            "COMMIT": source.commit,
            "NUMBER": str(source.build_number or 0),
            "LABEL": source.label,
            "TARGETS": " ".join(build.targets),
            "JOBS": str(build.jobs),
            "WORK": WORK,
            "STAGE": STAGE,
            "STUBS": STUBS,
            "OPTIONS": "\n".join(f"{name}={value}" for name, value in build.options.items()),
            "NEEDED": " ".join(sorted(build.needed_options)),
            "CUDA": build.toolkit_root or "",
            "LIBRARIES": "|".join(build.allowed_libraries),
            "RELEASE": json.dumps(told, sort_keys=True),
            "CCACHE_SIZE": settings.llama_cpp_ccache_size,
        },
        # An address can hold a password, as a proxy's can.
        environment={**settings.proxy_environment, **secrets, "REPO": address},
        user=at.WORKER_USER,
        writable=(WORK,),
        timeout_seconds=settings.llama_cpp_build_timeout_seconds,
    )


def _install(release: str) -> str:
    """Shell that copies a staged release into place: complete under a hidden name, then renamed."""
    return f"""
set -e
install -d -m 755 {at.PREFIX} {at.RELEASES}
cd {at.RELEASES}
rm -rf .incoming
mkdir .incoming
# Read by the user whose folder it is: a link in there leads to nothing that only root may see.
runuser -u {at.WORKER_USER} -- tar -C {STAGE} -cf - . |
  tar -C .incoming -xf - --no-same-owner --no-same-permissions
chmod -R u=rwX,go=rX .incoming
[ -f .incoming/release.json ] || {{ echo "the release was not copied whole" >&2; exit 1; }}
# The stubs are the build user's: no program of root's may look for libraries there.
runuser -u {at.WORKER_USER} -- env LD_LIBRARY_PATH={STUBS} \\
  {at.RELEASES}/.incoming/bin/llama-server --version >/dev/null || {{
  echo "the new llama-server does not run from {at.RELEASES}: is that mounted noexec?" >&2
  exit 1
}}
sync -f .incoming
rm -rf {shlex.quote(release)}
mv -T .incoming {shlex.quote(release)}
rm -rf {STAGE}
"""
