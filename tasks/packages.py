"""The distribution's packages that the plan needs and the host lacks."""

from __future__ import annotations

from pyinfra.api import deploy

from tasks import probe as at
from tasks.operations import apt_get
from tasks.rules.plan import RUNTIME_PACKAGES, Plan


@deploy("Packages")
def prepare(plan: Plan) -> None:
    """Nothing is half-installed, and the host can fetch: what all else is tried with."""
    if plan.probe.dpkg_broken or at.APT_PENDING in plan.probe.files:
        apt_get.repaired(
            name="Finish an interrupted installation", environment=plan.settings.apt_environment
        )
    _added(plan, tuple(name for name in plan.missing_packages if name in RUNTIME_PACKAGES))


@deploy("Packages")
def install(plan: Plan) -> None:
    """Install what else is missing, compilers mostly; nothing is upgraded on the way."""
    _added(plan, tuple(name for name in plan.missing_packages if name not in RUNTIME_PACKAGES))


def _added(plan: Plan, packages: tuple[str, ...]) -> None:
    if not packages:
        return
    environment = plan.settings.apt_environment
    apt_get.updated(name="Read the package lists", environment=environment)
    # As a job of ours: a command of pyinfra's would show a proxy's password in the process list.
    apt_get.added(name=f"Install {_some(packages)}", packages=packages, environment=environment)


def _some(packages: tuple[str, ...]) -> str:
    return " and ".join(packages) if len(packages) < 3 else f"{len(packages)} packages"
