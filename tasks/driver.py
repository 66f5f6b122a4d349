"""NVIDIA's kernel modules and libraries, where the host lacks them."""

from __future__ import annotations

from pyinfra.api import deploy

from tasks import probe as at
from tasks.operations import apt_get
from tasks.operations import driver as operations
from tasks.rules.plan import Plan


@deploy("NVIDIA driver")
def install(plan: Plan) -> None:
    """The driver that was chosen, compiled for the running kernel, and kept as it is.

    A driver that somebody else installed and that suffices is left alone altogether.
    """
    wanted, settings = plan.installation, plan.settings
    driver = wanted.driver
    if driver is not None:
        operations.marked(name="Remember that the driver is ours")
        if wanted.uninstallers:
            operations.runfiles_removed(
                name="Remove .run installations", uninstallers=wanted.uninstallers
            )
        if driver.packages.pins:
            apt_get.installed(
                name=f"Pin {driver.packages.what}",
                packages=driver.packages,
                pins=True,
                environment=settings.apt_environment,
            )
        apt_get.installed(
            name=f"Install {driver.packages.what}",
            packages=driver.packages,
            environment=settings.apt_environment,
        )
        if driver.dkms:
            operations.compiled(name="Check the kernel modules", kernel=driver.kernel)
    if driver is not None or at.DRIVER_MARK in plan.probe.files:
        operations.kept(name="Keep the driver as it is")


@deploy("NVIDIA driver")
def ready(plan: Plan) -> None:
    """The kernel runs the driver, or the deploy ends here and says that a reboot is needed."""
    if plan.stack is None or plan.probe.wsl:
        return
    probe = plan.probe
    runs = probe.driver_loaded is not None and (
        probe.driver_on_disk is None or probe.driver_loaded.version == probe.driver_on_disk.version
    )
    if plan.installation.driver is not None or not runs:
        operations.loaded(name="Load the driver")
