"""The disk that a host starts with: a Debian made once by mmdebstrap and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from .tools import cache_directory, locked, run, say

Distribution = Literal["debian-12", "debian-13"]
Variant = Literal["standard", "bare"]
"""Bare: no Python, no curl, no certificates; what a minimal installation with SSH has."""

DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
ADMIN_USER = "admin"
ADMIN_PASSWORD = "tall camel 42"

_CODENAMES: dict[Distribution, str] = {"debian-12": "bookworm", "debian-13": "trixie"}
_PACKAGES: dict[Variant, tuple[str, ...]] = {
    "bare": (
        "systemd",
        "systemd-sysv",
        "dbus",
        "openssh-server",
        "iproute2",
        "sudo",
        "udev",
        "kmod",
    ),
    "standard": ("python3", "ca-certificates", "curl"),
}
_SETUP = f"""
useradd --create-home --shell /bin/bash --groups sudo {ADMIN_USER}
echo '{ADMIN_USER}:{ADMIN_PASSWORD}' | chpasswd
# A host makes its own, so that no two are the same.
rm -f /etc/ssh/ssh_host_*_key* /etc/hostname
: >/etc/machine-id
# There are no names to look up in the lab; a proxy does that.
rm -f /etc/resolv.conf
: >/etc/resolv.conf
systemctl enable systemd-networkd.service
# They would hold apt's lock at a moment that nobody chose.
systemctl mask apt-daily.timer apt-daily-upgrade.timer
# Installs several times faster; a throwaway disk need not survive this machine's power failure.
echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/lab
echo 'Acquire::Languages "none";' >/etc/apt/apt.conf.d/80lab-languages
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that a base root is made from; another recipe, another root."""

    codename: str
    packages: tuple[str, ...]
    sources: tuple[str, ...]
    apt_options: tuple[str, ...]
    setup: str

    @property
    def key(self) -> str:
        """Fingerprint of the recipe."""
        text = json.dumps([asdict(self), platform.machine()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def recipe(distribution: Distribution, variant: Variant) -> Recipe:
    """Return how to make the root of a distribution, with this machine's own mirror."""
    packages = _PACKAGES["bare"] + (() if variant == "bare" else _PACKAGES[variant])
    codename = _CODENAMES[distribution]
    return Recipe(codename, packages, debian_sources(codename), _apt_options(), _SETUP)


def base_root(distribution: Distribution, variant: Variant = "standard") -> Path:
    """Return the base root of a distribution, made first if it isn't there."""
    made_from = recipe(distribution, variant)
    roots = cache_directory("roots")
    root = roots / f"{distribution}-{variant}-{made_from.key}"
    if root.is_dir():
        return root
    with locked(roots / f".{root.name}.lock"):
        if not root.is_dir():
            say(f"making the base root of {distribution} ({variant}), once: about half a minute")
            unfinished = roots / f".{root.name}.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)  # of one that was interrupted
            _make(made_from, unfinished)
            unfinished.rename(root)
    return root


def _make(made_from: Recipe, root: Path) -> None:
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--quiet"]
    command += [f"--include={','.join(made_from.packages)}"]
    command += [f"--aptopt={option}" for option in (*made_from.apt_options, *_apt_proxy())]
    run([*command, made_from.codename, root, *made_from.sources])
    run(["chroot", root, "/bin/sh", "-e"], stdin=made_from.setup)
    # The way to the mirror is this machine's; what it accepts from the mirror holds for the host.
    (root / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)
    if made_from.apt_options:
        options = "".join(f"{option};\n" for option in made_from.apt_options)
        (root / "etc/apt/apt.conf.d/80lab").write_text(options)


def debian_sources(codename: str, targets: str | None = None) -> tuple[str, ...]:
    """Return apt's lines for a Debian release, by the mirrors that this machine itself uses.

    Empty on a machine that has no Debian in its own sources: mmdebstrap then knows where to go.
    """
    if targets is None:
        targets = _ask_apt("apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages")
    lines: dict[str, None] = {}
    for target in targets.splitlines():
        uri, suite, component, origin = target.split("\t")
        match = re.fullmatch(rf"(?:{'|'.join(_CODENAMES.values())})(-updates|-security)?", suite)
        # Without lists (apt-get update never ran) apt does not know the origin yet.
        if match and component == "main" and origin in ("Debian", "$(ORIGIN)"):
            lines[f"deb {uri} {codename}{match[1] or ''} main"] = None
    return tuple(lines)


def mirrors(root: Path) -> set[str]:
    """Return the names of the hosts that a root gets its packages from."""
    sources = (root / "etc/apt/sources.list").read_text()
    return {str(urlsplit(uri).hostname) for uri in re.findall(r"https?://\S+", sources)}


_FORMAT = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(ORIGIN)"


def _apt_options() -> tuple[str, ...]:
    """Return what this machine's apt accepts from its mirror (an old snapshot, for instance)."""
    return _apt_settings(r"Acquire::(?:Check-Valid-Until|Check-Date)")


def apt_proxies() -> dict[str, str]:
    """Return the proxies that this machine's apt uses, by scheme."""
    found = re.findall(r'^Acquire::(https?)::Proxy "(http[^"]+)";$', _apt_dump(), re.MULTILINE)
    return dict(found)


def _apt_proxy() -> tuple[str, ...]:
    return _apt_settings(r"Acquire::https?::(?:Proxy|CaInfo)\S*")


def _apt_settings(pattern: str) -> tuple[str, ...]:
    return tuple(re.findall(rf'^{pattern} "[^"]+"(?=;$)', _apt_dump(), re.MULTILINE))


def _apt_dump() -> str:
    return _ask_apt("apt-config", "dump")


def _ask_apt(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # not a Debian: apt has nothing to say
        return ""
