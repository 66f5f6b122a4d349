"""Which driver, from where, with which kernel modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from packaging.version import Version

from tasks.rules import tables
from tasks.rules.choice import Constraint, Decision, against_each, choose, errors_of, validate
from tasks.rules.findings import Finding, error, warning
from tasks.rules.nvidia.host import Driver, Host, Wish
from tasks.rules.tables import (
    Distribution,
    DriverBranch,
    DriverPackages,
    DriverSource,
    Flavour,
    Modules,
    SecureBoot,
    Toolkit,
)

MODULES: tuple[Modules, ...] = ("open", "proprietary")
"""The better ones first."""

WINDOWS_BRANCH_SPAN = 9
"""Windows numbers the releases of a branch on: 581 to 589 belong to branch 580."""


@dataclass(frozen=True, slots=True)
class DriverChoice:
    """A driver that could be used."""

    branch: int
    version: Version
    """The installed one, or what is to be expected of an installation today."""
    modules: Modules | None
    source: Literal["present", "windows", "nvidia", "distro"]
    prebuilt: bool = False
    """Signed modules for the distribution's kernel, instead of DKMS."""
    flavour: Flavour = "compute"

    def __str__(self) -> str:
        if self.source in ("present", "windows"):
            return f"driver {self.version}"
        return f"driver {self.branch} from {SOURCE_NAMES[self.source]}"

    @property
    def short(self) -> str:
        """Without where it is from."""
        return f"driver {self.version if self.installed else self.branch}"

    @property
    def installed(self) -> bool:
        """Whether it is there already."""
        return self.source in ("present", "windows")

    @property
    def archive(self) -> DriverSource | None:
        """Where it would be installed from."""
        if self.source == "present" or self.source == "windows":  # noqa: PLR1714, for mypy
            return None
        return self.source

    @property
    def record(self) -> DriverBranch | None:
        """What the table knows of the branch."""
        return tables.driver_branch(self.branch)

    def packages(self, distribution: Distribution) -> DriverPackages | None:
        """What installs it; None if it is there already, or if there is no such set."""
        if self.archive is None or self.modules is None:
            return None
        return tables.driver_packages(
            self.archive,
            distribution,
            self.branch,
            self.modules,
            self.flavour,
            prebuilt=self.prebuilt,
        )


SOURCE_NAMES = {"nvidia": "NVIDIA's repository", "distro": "the distribution's archive"}


@dataclass(frozen=True, slots=True)
class DriverNeeds:
    """What a driver has to satisfy."""

    host: Host
    toolkits: tuple[Toolkit, ...] = ()
    """Toolkits that fit everything else; one of them has to run on it."""


def _knows_the_card(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    span = WINDOWS_BRANCH_SPAN if choice.source == "windows" else 0
    for chip in needs.host.chips:
        card = next(card for card in needs.host.cards if card.chip == chip)
        if chip.driver_first is not None and choice.branch < chip.driver_first:
            yield error(
                "driver-gpu",
                f"{choice.short} does not know {card.name}, "
                f"which needs {chip.driver_first} or newer",
                "the card stays unused",
                f"Set `driver_version` to {chip.driver_first} or newer, or leave it unset.",
                chip.source,
            )
        if chip.driver_last is not None and choice.branch > chip.driver_last + span:
            yield error(
                "driver-gpu",
                f"{choice.short} no longer knows {card.name}, "
                f"whose last branch is {chip.driver_last}",
                "the card stays unused",
                f"Set `driver_version` to {chip.driver_last}, or leave it unset.",
                chip.source,
            )


def _lists_the_card(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    for card in dict.fromkeys(needs.host.cards):
        if card.listed is not None and choice.version < card.listed:
            yield warning(
                "driver-listed",
                f"{card.name} is in NVIDIA's list from {card.listed} on; this is {choice.version}",
                "the driver may not know the card",
                source="NVIDIA/open-gpu-kernel-modules README",
            )


def _drives_with_these_modules(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    if choice.modules is None or choice.source == "windows":
        return
    for chip in needs.host.chips:
        if chip.takes(choice.modules):
            continue
        card = next(card for card in needs.host.cards if card.chip == chip)
        yield error(
            "driver-modules",
            f"{card.name} works with the {chip.modules} kernel modules only, not with the "
            f"{choice.modules} ones",
            "nvidia-smi says `No devices were found`",
            f"Set `driver_modules` to {chip.modules}, or leave it unset."
            if all(other.takes(_other(choice.modules)) for other in needs.host.chips)
            else "Take one of the cards out: no driver serves both.",
            "NVIDIA/open-gpu-kernel-modules#872",
        )


def _other(modules: Modules) -> Modules:
    return "proprietary" if modules == "open" else "open"


def _branch_has_these_modules(choice: DriverChoice, _needs: DriverNeeds) -> Iterator[Finding]:
    record = choice.record
    if choice.installed or record is None or choice.modules in record.modules:
        return
    yield error(
        "driver-branch-modules",
        f"{record} has no {choice.modules} kernel modules any more",
        "there is nothing to install",
        "Set `driver_version` to 610 or older.",
        record.source,
    )


def _is_offered(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    if choice.archive is None:
        return
    distribution = needs.host.distribution
    offer = tables.offer(choice.archive, distribution)
    where = f"{SOURCE_NAMES[choice.archive]} for {distribution.title}"
    if offer is None:
        yield error(
            "driver-offer",
            f"{where} has no drivers",
            "there is nothing to install",
            "Leave `driver_source` unset.",
        )
    elif choice.branch in offer.missing:
        yield error(
            "driver-offer",
            f"{where} has no driver {choice.branch}",
            "there is nothing to install",
            f"It has {', '.join(str(branch) for branch in offer.branches)}.",
            offer.source,
        )
    elif choice.branch not in offer.branches:
        yield warning(
            "driver-offer",
            f"whether {where} has driver {choice.branch} is not known",
            "apt will tell before anything is changed",
            f"Known are {', '.join(str(branch) for branch in offer.branches)}.",
            offer.source,
        )
    if offer is not None and choice.modules in offer.without_modules:
        yield error(
            "driver-offer",
            f"{where} has no {choice.modules} kernel modules that go with its driver",
            "there is nothing to install",
            f"Leave `driver_modules` and `driver_source` unset, or set `driver_modules` to "
            f"{_other(choice.modules)} where all cards work with that.",
            offer.source,
        )


def _has_packages(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    distribution = needs.host.distribution
    if choice.archive is not None and choice.packages(distribution) is None:
        yield error(
            "driver-packages",
            f"{SOURCE_NAMES[choice.archive]} for {distribution.title} has no {choice.modules} "
            f"{choice.flavour} packages of {choice.short}",
            "there is nothing to install",
            "Leave `driver_source`, `driver_version` and `driver_modules` unset.",
        )


def _is_maintained(choice: DriverChoice, _needs: DriverNeeds) -> Iterator[Finding]:
    record = choice.record
    if choice.source == "windows" or record is None or record.state != "end-of-life":
        return
    yield warning(
        "driver-end-of-life",
        f"{record} gets no security fixes since {record.end_of_life}",
        source=record.source,
    )


def _loads_under_secure_boot(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    host = needs.host
    if choice.installed or choice.prebuilt or not host.secure_boot or host.key_enrolled:
        return
    boot = tables.secure_boot(host.distribution)
    yield error(
        "secure-boot",
        "Secure Boot is on, and the firmware does not trust the key that DKMS signs modules with",
        "the kernel would refuse the driver's modules",
        enrolment(boot, pending=host.key_pending),
        boot.source,
    )


def enrolment(boot: SecureBoot, *, pending: bool) -> str:
    """What a person has to do until the firmware trusts the key; pending: half of it is done."""
    console = "the console (MokManager, with the password that mokutil asked for)"
    if pending:
        return f"Reboot and confirm the key at {console}."
    return (
        f"On the host: `apt-get install {' '.join(boot.packages)}`, "
        f"`test -e {boot.key} || {boot.create}`, `mokutil --import {boot.key}`; then reboot and "
        f"confirm the key at {console}. Or switch Secure Boot off in the firmware setup."
    )


def _runs_a_toolkit(choice: DriverChoice, needs: DriverNeeds) -> Iterator[Finding]:
    windows = choice.source == "windows"
    if not needs.toolkits or any(
        each.supports_driver(choice.version, windows=windows) for each in needs.toolkits
    ):
        return
    oldest = min(
        needs.toolkits, key=lambda each: each.windows_driver_min if windows else each.driver_min
    )
    least = oldest.windows_driver_min if windows else oldest.driver_min
    yield error(
        "driver-cuda",
        f"{choice.short} is too old for {oldest}, which needs {least} or newer",
        "no toolkit that fits this host runs on it",
        "Install a newer driver in Windows." if windows else "Leave `driver_version` unset.",
        oldest.source,
    )


DRIVER_CONSTRAINTS: tuple[Constraint[DriverChoice, DriverNeeds], ...] = (
    Constraint("driver-gpu", _knows_the_card),
    Constraint("driver-modules", _drives_with_these_modules),
    Constraint("driver-branch-modules", _branch_has_these_modules),
    Constraint("driver-cuda", _runs_a_toolkit),
    Constraint("driver-offer", _is_offered),
    Constraint("driver-packages", _has_packages),
    Constraint("secure-boot", _loads_under_secure_boot),
    Constraint("driver-listed", _lists_the_card),
    Constraint("driver-end-of-life", _is_maintained),
)


def present_driver(driver: Driver) -> DriverChoice:
    """The driver on the host, as a candidate."""
    return DriverChoice(
        driver.version.major,
        driver.version,
        driver.modules,
        "windows" if driver.windows else "present",
    )


def driver_candidates(host: Host, wish: Wish) -> Iterator[DriverChoice]:
    """Drivers that could be installed, in the order in which they are tried."""
    sources: tuple[DriverSource, ...]
    if wish.driver_source == "auto":
        sources = host.distribution.driver_sources
    else:
        sources = () if wish.driver_source == "none" else (wish.driver_source,)
    for source in sources:
        for branch in _branches(host.distribution, wish, source):
            version = wish.driver_version or branch.version
            if wish.driver_version == Version(str(branch.number)):
                version = branch.version
            for modules in _modules_to_try(host, wish):
                choice = DriverChoice(branch.number, version, modules, source, flavour=wish.flavour)
                prebuilt = replace(choice, prebuilt=True)
                if prebuilt.packages(host.distribution) is not None:
                    yield prebuilt
                yield choice


def _branches(
    distribution: Distribution, wish: Wish, source: DriverSource
) -> Iterator[DriverBranch]:
    if wish.driver_branch is not None:
        branch = tables.driver_branch(wish.driver_branch)
        if branch is not None:
            yield branch
        return
    numbers = [each.number for each in tables.driver_branches() if each.automatic]
    offer = tables.offer(source, distribution)
    if wish.driver_source == source and offer is not None:
        # Who asks for a source takes what it has: Debian's archive has one branch, an old one.
        numbers += sorted(offer.branches, reverse=True)
    for number in dict.fromkeys((*distribution.driver_branches, *numbers)):
        branch = tables.driver_branch(number)
        if branch is not None:
            yield branch


def _modules_to_try(host: Host, wish: Wish) -> tuple[Modules, ...]:
    """The kinds that all cards work with, the open ones first; where none does, both."""
    if wish.driver_modules is not None:
        return (wish.driver_modules,)
    fitting = tuple(kind for kind in MODULES if all(chip.takes(kind) for chip in host.chips))
    return fitting or MODULES


def choose_driver(
    host: Host, wish: Wish, toolkits: tuple[Toolkit, ...] = ()
) -> Decision[DriverChoice]:
    """The driver that is there if it suffices, else the one asked for, else the best."""
    needs = DriverNeeds(host, toolkits)
    keep = host.driver if _may_keep(host, wish) else None
    if keep is not None:
        present = present_driver(keep)
        findings = validate(present, needs, DRIVER_CONSTRAINTS)
        immovable = keep.windows or wish.driver_source == "none"
        if immovable or not errors_of(findings):
            return Decision(present, f"{present}: it is there and stays", findings)
    if wish.driver_source == "none" or host.distribution.wsl:
        return Decision(None, "no driver", (_driver_missing(host),))
    if wish.driver_branch is not None and tables.driver_branch(wish.driver_branch) is None:
        known = ", ".join(str(each.number) for each in tables.driver_branches())
        unknown = error(
            "driver-version",
            f"there is no driver branch {wish.driver_branch}",
            fix=f"`driver_version` is one of {known}.",
        )
        return Decision(None, "no such branch", (unknown,))
    candidates = list(driver_candidates(host, wish))
    decision = choose(candidates, needs, DRIVER_CONSTRAINTS, partial(_no_driver, wish))
    if decision.choice is None and wish.driver_branch is not None:
        judged = decision.rejected
        fewest = min(judged, key=lambda pair: len(errors_of(pair[1])))
        return Decision(fewest[0], f"{fewest[0]}: asked for", fewest[1])
    return decision


def _may_keep(host: Host, wish: Wish) -> bool:
    """Whether the driver on the host is what was asked for."""
    if host.driver is None:
        return False
    right_modules = wish.driver_modules in (None, host.driver.modules) or not host.driver.modules
    return host.driver.windows or (right_modules and wish.means(host.driver.version))


def _driver_missing(host: Host) -> Finding:
    if host.distribution.wsl:
        return error(
            "driver-none",
            "Windows shows this WSL distribution no NVIDIA driver",
            "the server would find no GPU",
            "Install NVIDIA's driver in Windows (nothing in WSL), then `wsl --shutdown`.",
            tables.wsl().source,
        )
    return error(
        "driver-none",
        "there is no NVIDIA driver on the host, and `driver_source` is none",
        "the server would find no GPU",
        "Install one, or set `driver_source` to auto.",
    )


def _no_driver(wish: Wish, judged: Sequence[tuple[DriverChoice, tuple[Finding, ...]]]) -> Finding:
    for _, findings in judged:
        only, *others = errors_of(findings)
        if only.code == "secure-boot" and not others:
            return only
    cards_at_odds = [
        found for _, findings in judged[:1] for found in findings if found.code == "driver-modules"
    ]
    fix = "Use another distribution or another card, or set `llama_cpp_backend` to cpu."
    if wish.driver_source != "auto":
        fix = "Leave `driver_source` unset."
    return error(
        "driver-none",
        f"no driver fits: {against_each(judged)}",
        "the server would find no GPU",
        cards_at_odds[0].fix if cards_at_odds else fix,
    )
