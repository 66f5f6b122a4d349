"""What is special about a distribution inside Windows Subsystem for Linux."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.probe import Probe
from tasks.rules import tables
from tasks.rules.findings import Finding, error, note


def findings(probe: Probe, gpu_wanted: bool) -> Iterator[Finding]:
    """What Windows and its driver have to do with it."""
    if not probe.wsl:
        return
    about = tables.wsl()
    if _is_first_version(probe):
        yield error(
            "wsl1",
            "this is WSL 1, which has no systemd and no GPU",
            "llama-server is a systemd service",
            "In Windows: `wsl --set-version <distribution> 2`.",
            about.source,
        )
        return
    yield note(
        "wsl-keepalive",
        "WSL stops a distribution seconds after its last window, running services or not",
        "the server would be gone with the last terminal",
        f"Write into {about.keepalive.path}: `{' '.join(about.keepalive.text.split())}` (each on a "
        f"line of its own), then `wsl --shutdown`; or set up {about.keepalive.fallback}.",
        about.keepalive.source,
    )
    if not gpu_wanted:
        return
    if probe.wsl_gpu and not probe.wsl_libcuda:
        yield note(
            "wsl-no-driver",
            "Windows shares its GPUs with WSL, but has no NVIDIA driver that brings CUDA",
            "llama.cpp is compiled for the CPU",
            "Install NVIDIA's driver in Windows (nothing in WSL), then `wsl --shutdown`.",
            about.source,
        )
    yield from _linux_driver(probe)


def _is_first_version(probe: Probe) -> bool:
    return "WSL2" not in (probe.kernel or "").upper() and not probe.wsl_gpu


def _linux_driver(probe: Probe) -> Iterator[Finding]:
    inside = sorted(
        name
        for name in probe.packages
        if tables.forbidden(name, wsl=True) and not tables.forbidden(name, wsl=False)
    )
    if inside:
        yield error(
            "wsl-linux-driver",
            f"packages of a Linux driver are installed: {', '.join(inside[:6])}",
            "their libraries hide the ones of Windows's driver in "
            f"{tables.wsl().library_folder}, and CUDA finds no GPU",
            f"On the host: `apt-get purge {' '.join(inside)}`.",
            "microsoft/WSL#6582, microsoft/WSL#11589",
        )
