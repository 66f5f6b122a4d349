"""What other installations left behind: packages, apt's files and keys, `.run` installers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules import tables
from tasks.rules.findings import Finding, error, note, warning
from tasks.rules.nvidia.driver import SOURCE_NAMES, DriverChoice
from tasks.rules.nvidia.host import is_complete
from tasks.settings import Settings

OURS = "llamastead"
"""In the name of every file that this software gives to apt."""

REMOVE = "Set `driver_remove_conflicts` to have it removed"


def findings(
    settings: Settings, probe: Probe, driver: DriverChoice | None, wanted: tuple[str, ...]
) -> Iterator[Finding]:
    """What is in the way of a driver that is to be installed; wanted are its packages."""
    yield from _toolkits(probe)
    if probe.wsl:
        return
    installs = driver is not None and not driver.installed
    if installs and driver is not None:
        yield from _pins(probe, driver, wanted)
        yield from _runfiles(settings, probe)
        yield from _other_packages(settings, probe, driver, wanted)
    yield from _signed_twice(probe)
    yield from _retired_keys(probe)
    yield from _unattended(probe, driver)


def driver_packages(probe: Probe) -> tuple[str, ...]:
    """Installed packages that belong to a driver."""
    belongs = tables.housekeeping().is_driver_package
    return tuple(sorted(name for name in probe.packages if belongs(name)))


def _of_nvidia(text: str) -> bool:
    return re.search("nvidia", text, re.IGNORECASE) is not None


def _pins(probe: Probe, driver: DriverChoice, wanted: tuple[str, ...]) -> Iterator[Finding]:
    for pin in probe.apt_pins:
        if OURS in pin.path or not _forbids(pin, driver, wanted):
            continue
        yield error(
            "apt-pin",
            f"{pin.path} keeps apt from {SOURCE_NAMES[driver.archive or 'nvidia']} (`Package: "
            f"{pin.package}`, `Pin: {pin.pin}`, priority {pin.priority})",
            f"{driver} cannot be installed",
            "Take it out of that file, or set `driver_source` to the other one.",
            "NVIDIA/ansible-role-nvidia-driver#11",
        )


def _forbids(pin: at.AptPin, driver: DriverChoice, wanted: tuple[str, ...]) -> bool:
    """Whether a pin with a negative priority meets one of the packages from this source."""
    if pin.priority >= 0:
        return False
    from_nvidia = _of_nvidia(pin.pin)
    everywhere = pin.pin.strip() in ("release *", "version *")
    meant = everywhere or from_nvidia == (driver.archive == "nvidia")
    return meant and any(fnmatchcase(name, glob) for glob in pin.package.split() for name in wanted)


def _runfiles(settings: Settings, probe: Probe) -> Iterator[Finding]:
    if probe.runfiles:
        finding = warning if settings.driver_remove_conflicts else error
        yield finding(
            "runfile",
            f"a `.run` installation is on the host ({', '.join(probe.runfiles)})",
            "its files and those of the packages overwrite each other",
            f"{REMOVE}, or do so yourself: `{probe.runfiles[0]}`.",
            "CUDA installation guide, handling of conflicting installation methods",
        )


def _other_packages(
    settings: Settings, probe: Probe, driver: DriverChoice, wanted: tuple[str, ...]
) -> Iterator[Finding]:
    there = driver_packages(probe)
    for conflict in tables.conflicts():
        enemies = [name for name in conflict.others if name in there and name not in wanted]
        if conflict.package in wanted and enemies:
            finding = warning if settings.driver_remove_conflicts else error
            yield finding(
                "driver-conflict",
                f"{', '.join(enemies)} cannot stand beside {conflict.package}: {conflict.reason}",
                f"{driver} cannot be installed",
                f"{REMOVE}, or do so yourself: `apt-get purge {' '.join(enemies)}`.",
                conflict.source,
            )
    others = [name for name in there if name not in wanted and _of_another(name, driver)]
    if others:
        yield warning(
            "driver-leftovers",
            f"packages of another driver are installed: {_some(others)}",
            f"apt replaces what {driver.short} collides with, and leaves the rest",
            f"{REMOVE}.",
        )


def _of_another(name: str, driver: DriverChoice) -> bool:
    """Whether the name of a driver package has another branch in it."""
    match = re.search(r"(?<!\d)([3-9]\d\d)(?!\d)", name)
    return match is not None and int(match[1]) != driver.branch


def _some(names: list[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _signed_twice(probe: Probe) -> Iterator[Finding]:
    keys: dict[tuple[str, str], dict[str | None, str]] = {}
    for source in probe.apt_sources:
        parts = urlsplit(source.uri)
        place = (f"{parts.netloc}{parts.path.rstrip('/')}", source.suite)
        keys.setdefault(place, {}).setdefault(source.signed_by, source.path)
    for (address, _), by_key in keys.items():
        if len(by_key) > 1:
            yield warning(
                "apt-signed-by",
                f"{' and '.join(by_key.values())} name {address} with different keys",
                "apt refuses to work at all (`Conflicting values set for option Signed-By`)",
                "Leave only one of them.",
                "NVIDIA container toolkit, troubleshooting: conflicting values for Signed-By",
            )


def _retired_keys(probe: Probe) -> Iterator[Finding]:
    if probe.retired_keys:
        key = tables.key("cuda-retired")
        yield note(
            "apt-retired-key",
            f"NVIDIA's key of before {key.retired} is still in {', '.join(probe.retired_keys)}",
            "it signs nothing any more; it is removed",
            source=key.source,
        )


def _unattended(probe: Probe, driver: DriverChoice | None) -> Iterator[Finding]:
    if not probe.unattended_upgrades or driver is None:
        return
    kept = any(_of_nvidia(pattern) for pattern in probe.unattended_blacklist)
    there = driver_packages(probe)
    loose = [name for name in there if name not in probe.held]
    if kept or (there and not loose):
        return
    yield note(
        "unattended-driver",
        "unattended-upgrades may upgrade the driver under running programs",
        "they would fail with `Driver/library version mismatch` until the next boot",
        "The driver is held and kept away from it.",
        "tseliot/ubuntu-packaging-nvidia-driver#3",
    )


def _toolkits(probe: Probe) -> Iterator[Finding]:
    for present in probe.toolkits:
        if not is_complete(present, probe):
            yield note(
                "toolkit-incomplete",
                f"CUDA {present.nvcc_version} in {present.root} has no headers of cuBLAS",
                "llama.cpp cannot be compiled with it; it is left as it is and not used",
            )
        if present.root == "/usr":
            yield note(
                "nvcc-shadow",
                f"plain `nvcc` is the distribution's CUDA {present.nvcc_version}",
                "it hides newer ones in PATH; here nvcc is called by its absolute path",
                source="abetlen/llama-cpp-python#1003",
            )
