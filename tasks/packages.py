"""The Debian packages that the plan needs and the host lacks."""

from __future__ import annotations

from pyinfra.api import deploy

from tasks import probe as at
from tasks.operations import apt_get
from tasks.rules.plan import Plan


@deploy("Packages")
def install(plan: Plan) -> None:
    """Finish what was interrupted and install what is missing; nothing is upgraded on the way."""
    environment = plan.settings.apt_environment
    if plan.probe.dpkg_broken or at.APT_PENDING in plan.probe.files:
        apt_get.repaired(name="Finish an interrupted installation", environment=environment)
    if not plan.missing_packages:
        return
    apt_get.updated(name="Read the package lists", environment=environment)
    # As a job of ours: a command of pyinfra's would show a proxy's password in the process list.
    apt_get.added(name="Install packages", packages=plan.missing_packages, environment=environment)
