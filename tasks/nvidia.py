"""NVIDIA's repositories: rehearsed before anything is changed, then trusted."""

from __future__ import annotations

from pyinfra.api import deploy

from tasks.operations import apt_get, rehearsal, repositories
from tasks.rules.plan import Plan


@deploy("NVIDIA's packages")
def prepare(plan: Plan) -> None:
    """Everything that driver, CUDA and container toolkit need is at hand, checked and trusted."""
    wanted, settings = plan.installation, plan.settings
    if wanted.every_set:
        rehearsal.passed(
            name="Rehearse the installation, and fetch what it needs",
            installation=wanted,
            settings=settings,
            codename=plan.probe.os_codename or "",
        )
    if wanted.retired_keyrings:
        repositories.without_retired_key(
            name="Remove NVIDIA's retired key", keyrings=wanted.retired_keyrings
        )
    if not wanted.every_set:
        return
    if wanted.superseded:
        repositories.superseded(name="Take back older sources", sources=wanted.superseded)
    repositories.trusted(name="Trust NVIDIA's repositories")
    apt_get.updated(name="Read the package lists", environment=settings.apt_environment)
