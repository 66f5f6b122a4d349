"""What apt says: what it would do, what it has, and what is wrong, read out of its output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tasks.rules import tables

PINNING = "nvidia-driver-pinning-"
"""Packages of NVIDIA's that hold the driver at a branch or a version."""

_INST = re.compile(
    r"Inst (?P<name>\S+)(?: \[(?P<old>[^\]]+)\])? \((?P<new>\S+) (?P<origin>[^)]*)\)"
)
_REMV = re.compile(r"Remv (?P<name>\S+)(?: \[(?P<old>[^\]]+)\])?")


@dataclass(frozen=True, slots=True)
class Change:
    """A package that would be installed, upgraded or downgraded."""

    name: str
    old: str | None
    """None if it is not there yet."""
    new: str
    origin: str
    """Where it is from, as apt puts it: `NVIDIA CUDA:stable [amd64]`."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What `apt-get --simulate install` would do."""

    installed: tuple[Change, ...] = ()
    removed: tuple[str, ...] = ()

    def version(self, package: str) -> str | None:
        """The version that would be installed."""
        return next((each.new for each in self.installed if each.name == package), None)


def simulation(lines: Iterable[str]) -> Simulation:
    """What apt would do, from the lines that it prints."""
    installed, removed = [], []
    for line in lines:
        if match := _INST.match(line):
            installed.append(Change(**match.groupdict()))
        elif match := _REMV.match(line):
            removed.append(match["name"])
    return Simulation(tuple(installed), tuple(removed))


def candidates(lines: Iterable[str]) -> dict[str, str]:
    """Versions that apt would install, by package, from what `apt-cache policy` prints."""
    found: dict[str, str] = {}
    package = ""
    for line in lines:
        if line[:1].strip() and line.endswith(":"):
            package = line[:-1]
        elif package and line.startswith("  Candidate: ") and not line.endswith("(none)"):
            found[package] = line.removeprefix("  Candidate: ")
    return found


def upstream(version: str) -> str:
    """A package's version without epoch and revision: 13.2.86 of 1:13.2.86-1."""
    without_epoch = version.rpartition(":")[2]
    return without_epoch.rpartition("-")[0] or without_epoch


@dataclass(frozen=True, slots=True)
class Symptom:
    """A line of apt's, and what it means for people."""

    pattern: re.Pattern[str]
    meaning: str


_SYMPTOMS = tuple(
    Symptom(re.compile(pattern), meaning)
    for pattern, meaning in (
        (
            r"(?:NO_PUBKEY |Missing key )(?P<key>[0-9A-F]+)",
            "it is signed with another key ({key}) than the one that is trusted",
        ),
        (r"EXPSIG|Expired on (?P<when>[0-9-]+)", "its signature has expired"),
        (r"EXPKEYSIG|KEYEXPIRED", "the key that signs it has expired"),
        (r"BADSIG|Bad signature|NODATA|Malformed|Message has been manipulated",
         "its signature is wrong: it was changed on the way"),
        (r"SHA1 is not considered secure|Policy rejected",
         "its key relies on SHA-1, which apt here refuses"),
        (r"Failed to fetch (?P<url>\S+)\s+(?:Hash Sum mismatch|File has unexpected size)",
         "{url} is not what was signed (hash sum mismatch)"),
        (r"Release file for (?P<url>\S+) is expired", "{url} is out of date"),
        (r"Failed to fetch (?P<url>\S+)\s+(?P<why>\S.*)", "{url}: {why}"),
        (r"repository '(?P<url>\S+) .*' does not have a Release file", "there is none at {url}"),
        (r"Could not get lock (?P<lock>\S+)\.", "another apt is at work here (it holds {lock})"),
        (r"Unable to locate package (?P<name>\S+)", "there is no package {name}"),
        (r"Version '(?P<version>\S+)' for '(?P<name>\S+)' was not found",
         "there is no {name} {version}"),
        (r"Package '?(?P<name>\S+?)'? has no installation candidate",
         "there is no package {name}"),
        (r" (?P<name>\S+) : (?:Pre)?Depends: (?P<what>.*)",
         "{name} needs {what}"),
        (r"^Consult (?P<log>\S+/make\.log) for more information",
         "the driver's modules could not be compiled, {log} says why"),
        (r"E: You don't have enough free space in (?P<where>\S+?)\.?$",
         "{where} has too little space"),
        (r"to '(?P<where>\S+?)(?:\.dpkg-new)?': failed to write \(No space left on device\)",
         "the disk is full where {where} goes"),
        (r"No space left on device", "a disk of the host is full (`df -h` there)"),
        (r"dpkg: error processing (?:archive|package) (?P<what>\S+)", "dpkg stopped at {what}"),
    )
)  # fmt: skip


def complaint(lines: Iterable[str]) -> str:
    """What is wrong, in one line for people, out of everything that apt printed."""
    text = list(lines)
    for symptom in _SYMPTOMS:
        for line in text:
            if match := symptom.pattern.search(line):
                found = {name: value or "" for name, value in match.groupdict().items()}
                return symptom.meaning.format(**found).strip()
    errors = [line for line in text if line.startswith("E: ")] or text[-1:]
    return errors[0].removeprefix("E: ").strip() if errors else "apt failed and said nothing"


@dataclass(frozen=True, slots=True)
class Limits:
    """What an installation may not do on the way."""

    wsl: bool = False
    remove_drivers: bool = False
    """Whether packages of Linux drivers may be removed; others never are."""
    held: frozenset[str] = frozenset()
    """Packages that the user wants left as they are."""

    def objections(self, planned: Simulation) -> Iterator[str]:
        """What speaks against it, each in one line."""
        for change in planned.installed:
            reason = tables.forbidden(change.name, wsl=self.wsl)
            if reason is not None and change.old is None:
                yield f"apt would install {change.name}: {reason}"
        kept = [name for name in planned.removed if not self._removable(name.partition(":")[0])]
        if kept:
            yield f"apt would remove {_listed(kept)}"
        changed = [each.name for each in planned.installed if each.old and each.name in self.held]
        if changed:
            yield f"apt would change {_listed(changed)}, which is held (`apt-mark showhold`)"

    def _removable(self, name: str) -> bool:
        if name.startswith(PINNING):
            return True  # one pin takes the place of another
        return self.remove_drivers and tables.housekeeping().is_driver_package(name)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
