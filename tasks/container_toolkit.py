"""GPUs in containers: NVIDIA's container toolkit, where there is an engine to use it."""

from __future__ import annotations

from pyinfra.api import deploy

from tasks.operations import apt_get, containers, rehearsal
from tasks.rules import tables
from tasks.rules.plan import Plan


@deploy("NVIDIA container toolkit")
def install(plan: Plan) -> None:
    """The four packages at one version, held; Docker and Podman told of the GPUs."""
    wanted = plan.installation
    container = wanted.container
    if container is not None and container.packages is not None:
        apt_get.installed(
            name=f"Install {container.packages.what}",
            packages=container.packages,
            environment=plan.settings.apt_environment,
        )
        containers.held(
            name="Hold the container toolkit", packages=tables.container_toolkit().packages
        )
    if container is not None and container.docker:
        containers.docker_configured(name="Tell Docker of NVIDIA's runtime")
    if container is not None and container.podman:
        containers.gpus_described(name="Describe the GPUs", refreshed=container.refreshed)
    if container is not None and not container.is_done:
        containers.shown(name="Run nvidia-smi in a container")
    if wanted.every_set:
        rehearsal.cleared(name="Remove what is installed by now from the cache")
