"""What a host's NVIDIA cards need, and all that there is to say about that."""

from __future__ import annotations

from collections.abc import Iterator

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules import nvidia, tables, wsl
from tasks.rules.findings import Finding, error
from tasks.rules.nvidia import DriverChoice, Host, Stack, kernel, leftovers
from tasks.rules.space import GIB, Need
from tasks.settings import Settings

DRIVER_BYTES = {"compute": 2 * GIB, "desktop": 3 * GIB}
"""What a driver takes, with the modules that DKMS builds."""

INSTALLER_BYTES = 8 * GIB
"""A local installer, and the repository that it unpacks."""


def plan(settings: Settings, probe: Probe) -> Stack | None:
    """Driver, toolkit, compiler and architectures; None where no NVIDIA card is used."""
    where = _host(settings, probe)
    return nvidia.plan_stack(where, nvidia.wish_of(settings)) if where else None


def _host(settings: Settings, probe: Probe) -> Host | None:
    if settings.llama_cpp_backend == "cpu":
        return None
    where = nvidia.host_of(probe)
    return where if where is not None and where.cards else None


def findings(settings: Settings, probe: Probe, stack: Stack | None) -> Iterator[Finding]:
    """What is in the way, what will be done about it, and what is worth knowing."""
    gpu_wanted = settings.llama_cpp_backend != "cpu"
    yield from wsl.findings(probe, gpu_wanted)
    if not gpu_wanted:
        return
    yield from nvidia.identify(probe.gpus)[1]
    if stack is None:
        yield from _without_card(settings, probe)
        return
    yield from stack.findings
    driver = None if stack.driver.errors else stack.driver.choice
    yield from kernel.findings(probe, driver)
    yield from leftovers.findings(settings, probe, driver, driver_package_names(probe, driver))


def needs(settings: Settings, stack: Stack | None) -> Iterator[Need]:
    """Disk space that driver and toolkit take."""
    if stack is None:
        return
    if stack.driver.choice is not None and not stack.driver.choice.installed:
        yield Need(at.SYSTEM, DRIVER_BYTES[settings.driver_flavour], "the driver")
    if stack.toolkit.choice is not None and stack.toolkit.choice.root is None:
        sets = {each.set: each for each in tables.toolkit_package_sets()}
        packages = sets[settings.cuda_packages]
        yield Need(at.SYSTEM, packages.installed_bytes or 9 * GIB, "the CUDA toolkit")
        local = settings.cuda_install_method == "local"
        download = INSTALLER_BYTES if local else packages.download_bytes or 4 * GIB
        yield Need(at.CACHE, download, "its packages")


def driver_package_names(probe: Probe, driver: DriverChoice | None) -> tuple[str, ...]:
    """What apt is asked for to install a driver."""
    where = nvidia.host_of(probe)
    packages = driver.packages(where.distribution) if driver and where else None
    if driver is None or packages is None:
        return ()
    return (*packages.pins(driver.branch), *packages.names(driver.branch))


def _without_card(settings: Settings, probe: Probe) -> Iterator[Finding]:
    if settings.llama_cpp_backend != "cuda":
        return
    fix = (
        "Install NVIDIA's driver in Windows, then `wsl --shutdown`; "
        if probe.wsl
        else "Check that the card is plugged in, powered and shown by `lspci -nn | grep 10de`, "
        "and handed through if this is a virtual machine; "
    )
    yield error(
        "no-gpu",
        "llama_cpp_backend is cuda, but there is no NVIDIA card that could be used",
        "the server would serve from the CPU",
        f"{fix}or set `llama_cpp_backend` to auto or cpu.",
    )
