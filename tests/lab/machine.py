"""What the lab needs of the machine it runs on, and how it gets what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .tools import LabError, run, say

_PACKAGES = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "git": "git",
    "apt-ftparchive": "apt-utils",
    "gpg": "gpg",
    "nsenter": "util-linux",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
"""A command or file that the lab uses, and the Debian package that brings it."""

_CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12}


def _missing() -> dict[str, str]:
    return {
        thing: package
        for thing, package in _PACKAGES.items()
        if not (Path(thing).exists() if thing.startswith("/") else shutil.which(thing))
    }


def _lacks_capabilities() -> list[str]:
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]


def obstacle() -> str | None:
    """Return why a lab can't run on this machine, in one line; None if it can."""
    if sys.platform != "linux":
        return "the lab needs Linux (systemd-nspawn)"
    if os.geteuid() != 0:
        return "the lab makes network bridges and boots containers: run it as root (sudo)"
    if lacks := _lacks_capabilities():
        return f"the lab needs {' and '.join(lacks)}, which this container's root does not have"
    if cgroup_root() is None:
        return "the lab needs the unified cgroup hierarchy (cgroup2), which is not mounted"
    if (missing := _missing()) and not shutil.which("apt-get"):
        return f"the lab needs {', '.join(missing)} (Debian: {' '.join(_unique(missing))})"
    return None


def _unique(missing: dict[str, str]) -> list[str]:
    return sorted(set(missing.values()))


def install_missing() -> None:
    """Install the Debian packages that the lab needs and this machine lacks."""
    if reason := obstacle():
        raise LabError(reason)
    if not (missing := _missing()):
        return
    packages = _unique(missing)
    say(f"installing {', '.join(packages)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300", "update"], env=env)
    install = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300", "install"]
    run([*install, "--no-install-recommends", *packages], env=env)
    if missing := _missing():
        raise LabError(f"still missing after installing {', '.join(packages)}: {list(missing)}")


def cgroup_root() -> Path | None:
    """Return where the unified cgroup hierarchy is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None
