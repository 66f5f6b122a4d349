"""Whether this software can work on a host at all."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.probe import Probe
from tasks.rules import tables
from tasks.rules.findings import Finding, error, note

SUPPORTED_ARCH = ("x86_64", "aarch64")

WSL_SYSTEMD = tables.wsl().systemd.source


def findings(probe: Probe) -> Iterator[Finding]:
    """What makes the host unfit, whatever is wanted of it."""
    if probe.uid != 0:
        yield error(
            "not-root",
            "not root on the host",
            "nothing can be installed",
            "Connect as root, or as a user who may use sudo with `--sudo` (data: `_sudo=True`).",
        )
    if tables.distribution(probe.os_id, probe.os_version) is None:
        yield error(
            "unsupported-os",
            f"the host runs {probe.os_name or 'an unknown system'}",
            fix=f"Supported are {', '.join(each.title for each in tables.distributions())}.",
        )
    if probe.arch not in SUPPORTED_ARCH:
        yield error(
            "unsupported-architecture",
            f"the host's processor is {probe.arch or 'unknown'}",
            fix=f"Supported are {' and '.join(SUPPORTED_ARCH)}.",
        )
    if not probe.systemd_running:
        yield _no_systemd(probe)
    yield from _folders(probe)
    if probe.dpkg_broken:
        yield note(
            "dpkg-interrupted",
            f"an earlier installation was interrupted at {', '.join(probe.dpkg_broken[:5])}",
            "apt would refuse to install anything; it is repaired first (`dpkg --configure -a`, "
            "`apt-get -f install`)",
        )
    if probe.locked_by is not None:
        yield error(
            "deploy-running",
            f"another deploy is at work on this host ({probe.locked_by})",
            "two at a time would undo each other",
            "Wait for it and run this again.",
        )


def _folders(probe: Probe) -> Iterator[Finding]:
    """Root must not work where somebody else can put links, nor among somebody else's files."""
    for path, folder in probe.folders.items():
        if folder.owner != "root" or folder.mode & 0o022:
            yield error(
                "folder-not-ours",
                f"{path} is there and belongs to {folder.owner} (mode {folder.mode:o})",
                "what is served from there could be changed by others than root",
                f"If it is yours, move it away: `mv {path} {path}.old`; if it is this software's: "
                f"`chown root:root {path} && chmod 755 {path}`.",
            )
    if probe.checkout is not None:
        yield error(
            "folder-not-ours",
            f"{probe.checkout} is a git checkout",
            "releases would be put among its files",
            f"Move it away: `mv {probe.checkout} {probe.checkout}.old`. To build from it, set "
            "llama_cpp_repo to its path.",
        )


def _no_systemd(probe: Probe) -> Finding:
    if probe.wsl:
        return error(
            "no-systemd",
            "systemd is not running in this WSL distribution",
            "llama-server is a systemd service",
            "Put `[boot]` and `systemd=true` into /etc/wsl.conf, then in Windows: "
            "`wsl --shutdown`.",
            WSL_SYSTEMD,
        )
    return error(
        "no-systemd",
        "systemd is not running on this host",
        "llama-server is a systemd service",
        "Use a machine (or a virtual machine) that booted with systemd, not a container.",
    )
