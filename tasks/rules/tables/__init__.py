"""What is known about toolkits, GPUs, drivers and distributions: TOML files, loaded once.

A lookup that finds nothing returns None: what that means is for the rules to say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from packaging.version import Version
from pydantic import TypeAdapter

from tasks.rules.tables.records import (
    DEB_ARCHITECTURES,
    Backend,
    BuildCost,
    BuildOption,
    Card,
    Chip,
    Conflict,
    ContainerToolkit,
    Device,
    DeviceRange,
    Distribution,
    DriverBranch,
    DriverPackages,
    DriverSource,
    ExactVersion,
    Family,
    FlashAttentionPairs,
    Flavour,
    Forbidden,
    GoneOption,
    Housekeeping,
    Key,
    Library,
    LocalInstaller,
    Modules,
    Offer,
    Pin,
    Preference,
    Release,
    Repository,
    SecureBoot,
    Symptom,
    Toolkit,
    ToolkitFault,
    ToolkitPackages,
    Variable,
    Wsl,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEB_ARCHITECTURES",
    "Backend",
    "BuildCost",
    "BuildOption",
    "Card",
    "Chip",
    "Conflict",
    "ContainerToolkit",
    "Device",
    "DeviceRange",
    "Distribution",
    "DriverBranch",
    "DriverPackages",
    "DriverSource",
    "ExactVersion",
    "Family",
    "FlashAttentionPairs",
    "Flavour",
    "Forbidden",
    "GoneOption",
    "Housekeeping",
    "Key",
    "Library",
    "LocalInstaller",
    "Modules",
    "Offer",
    "Pin",
    "Preference",
    "Release",
    "Repository",
    "SecureBoot",
    "Symptom",
    "Toolkit",
    "ToolkitFault",
    "ToolkitPackages",
    "Variable",
    "Wsl",
    "allowed_libraries",
    "build_cost",
    "build_options",
    "cards",
    "chips",
    "conflicts",
    "container_toolkit",
    "devices",
    "distribution",
    "distributions",
    "driver_branch",
    "driver_branches",
    "driver_faults",
    "driver_package_sets",
    "driver_packages",
    "environment",
    "fa_quants",
    "families",
    "forbidden",
    "forbidden_packages",
    "gone_options",
    "gpu",
    "housekeeping",
    "key",
    "keys",
    "local_installer",
    "offer",
    "offers",
    "pin",
    "preferences",
    "repositories",
    "repository",
    "secure_boot",
    "toolkit",
    "toolkit_faults",
    "toolkit_package_sets",
    "toolkit_packages",
    "toolkits",
    "wsl",
]

FOLDER = Path(__file__).parent

T = TypeVar("T")


@cache
def _file(name: str) -> Mapping[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def _rows(kind: type[T], name: str, table: str) -> tuple[T, ...]:
    return TypeAdapter(tuple[kind, ...]).validate_python(_file(name)[table])  # type: ignore[valid-type]


def _row(kind: type[T], name: str, table: str) -> T:
    return TypeAdapter(kind).validate_python(_file(name)[table])


# Toolkits


@cache
def toolkits() -> tuple[Toolkit, ...]:
    """Every minor release, the oldest first."""
    return _rows(Toolkit, "toolkits", "toolkit")


def toolkit(version: Version | str) -> Toolkit | None:
    """The toolkit that a version (12.9, 12.9.2, 13.2.78) belongs to."""
    wanted = Version(str(version)).release[:2]
    return next((each for each in toolkits() if each.version.release == wanted), None)


@cache
def toolkit_faults() -> tuple[ToolkitFault, ...]:
    """What is wrong with some releases."""
    return _rows(ToolkitFault, "toolkits", "fault")


@cache
def preferences() -> tuple[Preference, ...]:
    """Releases in the order in which they are tried."""
    return _rows(Preference, "toolkits", "preference")


@cache
def toolkit_package_sets() -> tuple[ToolkitPackages, ...]:
    """Every set of toolkit packages."""
    return _rows(ToolkitPackages, "toolkits", "packages")


def toolkit_packages(of: Toolkit, which: str = "minimal") -> tuple[str, ...]:
    """The packages of a set (minimal, full, run) for one toolkit."""
    sets = {each.set: each for each in toolkit_package_sets()}
    return sets[which].names(of)  # type: ignore[index]


# GPUs


@cache
def families() -> Mapping[str, Family]:
    """Chip families by name."""
    return {each.name: each for each in _rows(Family, "gpus", "family")}


@cache
def chips() -> Mapping[str, Chip]:
    """Chips by name."""
    return {each.name: each for each in _rows(Chip, "gpus", "chip")}


@cache
def cards() -> Mapping[int, Card]:
    """Products by PCI device id (the vendor is 10de)."""
    memory = _file("gpus")["memory"]
    products = {}
    for chip, ids in _file("gpus")["pci"].items():
        if not isinstance(ids, Mapping):
            continue  # source and certainty of all of them
        for text, entry in ids.items():
            row = entry if isinstance(entry, Mapping) else {"name": entry}
            known = memory.get(text, {})
            device = int(text, 16)
            if device in products:
                raise ValueError(f"gpus.toml: {text} stands under two chips")
            products[device] = Card(
                device=device,
                name=row["name"],
                listed=row.get("listed"),
                memory_gib=known.get("gib"),
                bandwidth_gb_per_second=known.get("gb_per_second"),
                chip=chips()[chip],
                family=families()[chips()[chip].family],
            )
    return products


@cache
def _ranges() -> tuple[DeviceRange, ...]:
    return _rows(DeviceRange, "gpus", "range")


def gpu(device: int) -> Card | None:
    """The card with this PCI device id, guessed from its neighbours if it is not in the table.

    None for what is older than the oldest, newer than the newest, or no GPU at all.
    """
    known = cards().get(device)
    if known is not None:
        return known
    for each in _ranges():
        if int(each.first, 16) <= device <= int(each.last, 16):
            chip = chips()[each.chip]
            family = families()[chip.family]
            name = f"unknown {family.title} card"
            return Card(device=device, name=name, chip=chip, family=family, guessed=True)
    return None


# Distributions


@cache
def distributions() -> tuple[Distribution, ...]:
    """Every supported distribution."""
    return _rows(Distribution, "distributions", "distribution")


def distribution(
    os_id: str | None, version_id: str | None, *, wsl: bool = False
) -> Distribution | None:
    """The distribution that os-release names; inside WSL with the repository for that."""
    for each in distributions():
        if (each.os_id, each.version_id) == (os_id, version_id):
            if not wsl:
                return each
            return replace(each, wsl=True, repository=each.wsl_repository, driver_sources=())
    return None


@cache
def keys() -> Mapping[str, Key]:
    """Keys by name."""
    return {each.name: each for each in _rows(Key, "distributions", "key")}


def key(name: str) -> Key:
    """The key of this name."""
    return keys()[name]


@cache
def repositories() -> Mapping[str, Repository]:
    """NVIDIA's repositories by name."""
    return {each.name: each for each in _rows(Repository, "distributions", "repository")}


def repository(of: Distribution) -> Repository:
    """NVIDIA's repository for a distribution."""
    return repositories()[of.repository]


@cache
def pin() -> Pin:
    """The preferences that prefer NVIDIA's packages."""
    return _row(Pin, "distributions", "pin")


@cache
def local_installer() -> LocalInstaller:
    """How the installers that carry a whole repository are named."""
    return _row(LocalInstaller, "distributions", "local_installer")


# Drivers


@cache
def driver_branches() -> tuple[DriverBranch, ...]:
    """Every branch, the oldest first."""
    return _rows(DriverBranch, "drivers", "branch")


def driver_branch(number: int) -> DriverBranch | None:
    """The branch of this number."""
    return next((each for each in driver_branches() if each.number == number), None)


@cache
def offers() -> tuple[Offer, ...]:
    """Which branches there are, by source and distribution."""
    return _rows(Offer, "drivers", "offer")


def offer(source: DriverSource, of: Distribution) -> Offer | None:
    """Which branches a source has for a distribution; none inside WSL."""
    if of.wsl:
        return None
    for each in offers():
        if (each.source_name, each.distribution) == (source, of.name):
            return each
    return None


@cache
def driver_package_sets() -> tuple[DriverPackages, ...]:
    """Every set of driver packages."""
    return _rows(DriverPackages, "drivers", "packages")


def driver_packages(
    source: DriverSource,
    of: Distribution,
    branch: int,
    modules: Modules,
    flavour: Flavour = "compute",
    *,
    prebuilt: bool = False,
) -> DriverPackages | None:
    """The packages that bring this driver, or None where there is no such set."""
    if of.wsl:
        return None
    for each in driver_package_sets():
        if (
            (each.source_name, each.os, each.flavour) == (source, of.os_id, flavour)
            and (each.modules, each.prebuilt) == (modules, prebuilt)
            and each.first <= branch <= each.last
        ):
            return each
    return None


def secure_boot(of: Distribution) -> SecureBoot:
    """Where DKMS keeps its key on a distribution."""
    rows = _rows(SecureBoot, "drivers", "secure_boot")
    return next(each for each in rows if each.os == of.os_id)


@cache
def housekeeping() -> Housekeeping:
    """What is held, kept apart and looked for."""
    return _row(Housekeeping, "drivers", "housekeeping")


@cache
def conflicts() -> tuple[Conflict, ...]:
    """Packages that don't stand each other."""
    return _rows(Conflict, "drivers", "conflict")


@cache
def driver_faults() -> tuple[Symptom, ...]:
    """What goes wrong with drivers that work elsewhere."""
    return _rows(Symptom, "drivers", "fault")


# Packages that are never installed


@cache
def forbidden_packages() -> tuple[Forbidden, ...]:
    """Patterns of package names that no plan holds."""
    return _rows(Forbidden, "forbidden", "forbidden")


def forbidden(package: str, *, wsl: bool) -> str | None:
    """Why a package is never installed, or None if it may be."""
    for each in forbidden_packages():
        if (wsl or each.where == "everywhere") and each.matches(package):
            return each.reason
    return None


# Containers and WSL


@cache
def container_toolkit() -> ContainerToolkit:
    """NVIDIA's container toolkit."""
    return TypeAdapter(ContainerToolkit).validate_python(_file("container_toolkit"))


@cache
def wsl() -> Wsl:
    """Windows Subsystem for Linux."""
    return TypeAdapter(Wsl).validate_python(_file("wsl"))


# How llama.cpp is compiled and run


@cache
def build_options() -> tuple[BuildOption, ...]:
    """CMake options of all backends."""
    return _rows(BuildOption, "build", "option")


@cache
def fa_quants() -> FlashAttentionPairs:
    """Pairs of KV cache types that flash attention is compiled for."""
    return _row(FlashAttentionPairs, "build", "fa_quants")


@cache
def gone_options() -> tuple[GoneOption, ...]:
    """Options that llama.cpp does not know any more."""
    return _rows(GoneOption, "build", "gone")


def allowed_libraries(backend: Backend) -> tuple[str, ...]:
    """Names of libraries that a release may need from the host, as grep -E reads them."""
    rows = _rows(Library, "build", "library")
    return tuple(each.pattern for each in rows if each.backend in ("any", backend))


@cache
def build_cost(backend: Backend) -> BuildCost:
    """What a build takes."""
    return TypeAdapter(BuildCost).validate_python(_file("build")["cost"][backend])


def devices(*, wsl: bool) -> tuple[str, ...]:
    """Devices that a server on the GPU uses, as systemd's DeviceAllow names them."""
    rows = _rows(Device, "build", "device")
    return tuple(each.name for each in rows if (each.where == "wsl") is wsl)


def environment(backend: Backend) -> tuple[tuple[str, str], ...]:
    """Environment of the server."""
    rows = _rows(Variable, "build", "environment")
    return tuple((each.name, each.value) for each in rows if each.backend == backend)
