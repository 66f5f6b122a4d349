"""Which driver, CUDA toolkit, compiler and architectures fit a host's GPUs.

Every rule is a Constraint. What is chosen automatically is the first candidate that none objects
to; what the user asked for is put before the same constraints, and they say what breaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tasks.rules.choice import Decision, errors_of, validate
from tasks.rules.findings import Finding
from tasks.rules.nvidia.driver import (
    DRIVER_CONSTRAINTS,
    DriverChoice,
    DriverNeeds,
    choose_driver,
    driver_candidates,
    present_driver,
)
from tasks.rules.nvidia.host import (
    Driver,
    Host,
    Wish,
    cuda_architectures,
    force_cublas,
    host_of,
    identify,
    present_driver_of,
    watched_packages,
    wish_of,
)
from tasks.rules.nvidia.toolkit import (
    TOOLKIT_CONSTRAINTS,
    HostCompiler,
    ToolkitChoice,
    asked_for_toolkits,
    choose_toolkit,
    fitting_toolkits,
    host_compiler,
    installed_toolkits,
    preferred_toolkits,
)

__all__ = [
    "DRIVER_CONSTRAINTS",
    "TOOLKIT_CONSTRAINTS",
    "Driver",
    "DriverChoice",
    "DriverNeeds",
    "Host",
    "HostCompiler",
    "Stack",
    "ToolkitChoice",
    "Wish",
    "asked_for_toolkits",
    "choose_driver",
    "choose_toolkit",
    "cuda_architectures",
    "driver_candidates",
    "fitting_toolkits",
    "force_cublas",
    "host_compiler",
    "host_of",
    "identify",
    "installed_toolkits",
    "plan_stack",
    "preferred_toolkits",
    "present_driver",
    "present_driver_of",
    "watched_packages",
    "wish_of",
]


@dataclass(frozen=True, slots=True)
class Stack:
    """Driver, toolkit, compiler and architectures for a host."""

    driver: Decision[DriverChoice]
    toolkit: Decision[ToolkitChoice]
    compiler: HostCompiler | None
    architectures: tuple[str, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that there is to say."""
        return tuple(dict.fromkeys((*self.driver.findings, *self.toolkit.findings)))


def plan_stack(host: Host, wish: Wish | None = None) -> Stack:
    """Decide driver and toolkit together, so that each runs with the other.

    What fits everything but a driver is looked for first; then a driver that one of those runs
    on; then the toolkit for that driver.
    """
    wish = wish or Wish()
    driverless = replace(host, driver=None)
    if wish.cuda_version is None:
        able = (*installed_toolkits(host), *preferred_toolkits())
    else:
        able = tuple(asked_for_toolkits(wish.cuda_version))
    fitting = tuple(
        {
            each.toolkit.version: each.toolkit
            for each in able
            if wish.cuda_version is not None
            or not errors_of(validate(each, driverless, TOOLKIT_CONSTRAINTS))
        }.values()
    )
    driver = choose_driver(host, wish, fitting)
    chosen = driver.choice
    # A driver that cannot be used is one fault; no toolkit is blamed for it too.
    used = (
        Driver(chosen.version, chosen.modules, chosen.source == "windows")
        if chosen is not None and not driver.errors
        else None
    )
    toolkit = choose_toolkit(replace(host, driver=used), wish.cuda_version)
    return Stack(
        driver,
        toolkit,
        host_compiler(toolkit.choice.toolkit, host) if toolkit.choice else None,
        cuda_architectures(host.cards),
    )
