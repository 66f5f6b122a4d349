"""What stands between a card and a driver that runs: kernels, modules, firmware, nouveau."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules import tables
from tasks.rules.findings import Finding, error, note, warning
from tasks.rules.nvidia.driver import DriverChoice, enrolment
from tasks.rules.nvidia.host import NVIDIA

MIB = 1024**2
SMALL_WINDOW_BYTES = 64 * MIB
"""The window to a card's memory is 256 MiB at least; the largest of the others has 32 MiB."""
CLASSIC_WINDOW_BYTES = 256 * MIB
"""What the window has without Resizable BAR."""

DISTRIBUTIONS_KEYS = re.compile(r"Canonical|Debian Secure Boot|Ubuntu")
"""Signers of modules whose keys the distributions' own shim brings along."""


def reboot_reason(probe: Probe) -> str | None:
    """Why the kernel does not run the driver that is installed, but will after a reboot."""
    loaded, on_disk, library = probe.driver_loaded, probe.driver_on_disk, probe.driver_library
    if probe.wsl:
        return None
    if loaded is not None and library is not None and loaded.version != library:
        return f"the kernel runs driver {loaded.version}, but its libraries are {library}"
    if loaded is not None and on_disk is not None:
        if loaded.version != on_disk.version:
            return f"the kernel runs driver {loaded.version}, but {on_disk.version} is installed"
        if loaded.modules and on_disk.modules and loaded.modules != on_disk.modules:
            return (
                f"the kernel runs the {loaded.modules} modules, but the {on_disk.modules} ones "
                "are installed"
            )
    if on_disk is not None and loaded is None and holds_a_card(probe, "nouveau"):
        return "nouveau holds the card"
    return None


def holds_a_card(probe: Probe, driver: str) -> bool:
    """Whether a kernel driver is bound to one of NVIDIA's cards."""
    return any(gpu.vendor == NVIDIA and gpu.driver == driver for gpu in probe.gpus)


def findings(probe: Probe, driver: DriverChoice | None) -> Iterator[Finding]:
    """What can be seen on the host; driver is what will be used."""
    if probe.wsl:
        return
    yield from _mismatch(probe)
    yield from _kernels(probe, driver)
    yield from _dkms(probe, driver)
    yield from _signatures(probe)
    yield from _nouveau(probe)
    yield from _handed_away(probe)
    yield from _windows(probe)
    yield from _last_start(probe)


def _mismatch(probe: Probe) -> Iterator[Finding]:
    reason = reboot_reason(probe)
    if reason is not None and probe.driver_loaded is not None:
        yield warning(
            "driver-mismatch",
            reason,
            "every CUDA program fails until the next boot (`Driver/library version mismatch`)",
            "Reboot.",
            _fault("version-mismatch").source,
        )


def _kernels(probe: Probe, driver: DriverChoice | None) -> Iterator[Finding]:
    if not probe.kernels or probe.kernel is None:
        return  # a container, which has its kernel from elsewhere
    running = next((each for each in probe.kernels if each.release == probe.kernel), None)
    will_build = driver is not None and not driver.installed and not driver.prebuilt
    if running is None:
        if probe.driver_loaded is None:
            yield error(
                "kernel-gone",
                f"the running kernel {probe.kernel} is no longer installed",
                "no module can be built for it or loaded into it",
                "Reboot, and run this again.",
            )
        return
    if will_build and not running.headers:
        yield note(
            "headers-missing",
            f"the headers of the running kernel {probe.kernel} are missing",
            "they are installed before the driver, together with the package that keeps them "
            "coming with new kernels",
            source="GoogleCloudPlatform/compute-gpu-installation#25",
        )
    newest = max(probe.kernels, key=lambda each: kernel_order(each.release))
    if newest is not running and running.nvidia and not newest.nvidia:
        yield _next_kernel(newest)


def _next_kernel(newest: at.Kernel) -> Finding:
    headers = "" if newest.headers else f"apt-get install linux-headers-{newest.release} && "
    return warning(
        "kernel-without-driver",
        f"kernel {newest.release}, which the next boot starts, has no NVIDIA module"
        + ("" if newest.headers else " and no headers to build one with"),
        "after the next reboot there is no GPU",
        f"On the host: `{headers}dkms autoinstall -k {newest.release}`; or install the "
        "linux-modules-nvidia package for it.",
        "GoogleCloudPlatform/compute-gpu-installation#34",
    )


def kernel_order(release: str) -> tuple[int, ...]:
    """What sorts kernels from old to new: all the numbers of their names."""
    return tuple(int(number) for number in re.findall(r"\d+", release))


def _dkms(probe: Probe, driver: DriverChoice | None) -> Iterator[Finding]:
    is_driver = tables.housekeeping().is_driver_package
    # Packages that dpkg could not set up are set up again, and DKMS builds once more.
    once_more = any(is_driver(name) for name in probe.dpkg_broken)
    for module in probe.dkms:
        for kernel in module.failed:
            now = kernel == probe.kernel
            same = driver is not None and module.version.startswith(f"{driver.branch}.")
            fatal = now and same and probe.driver_loaded is None and not once_more
            finding = error if fatal else warning
            yield finding(
                "dkms-failed",
                f"DKMS could not build {module.name} {module.version} for kernel {kernel}",
                "there is no driver under this kernel"
                if now
                else "under that kernel there will be no driver",
                f"{module.log} says why. Usually the kernel is newer than the driver: set "
                "`driver_version` to a newer branch, or boot an older kernel.",
                "NVIDIA/open-gpu-kernel-modules#1143",
            )


def _signatures(probe: Probe) -> Iterator[Finding]:
    distribution = tables.distribution(probe.os_id, probe.os_version)
    on_disk = probe.driver_on_disk
    if not probe.secure_boot or on_disk is None or probe.driver_loaded or distribution is None:
        return
    if on_disk.signer and DISTRIBUTIONS_KEYS.search(on_disk.signer):
        return
    boot = tables.secure_boot(distribution)
    state = probe.mok_keys.get(boot.key)
    if state == "enrolled" and on_disk.signer:
        return
    by = f"signed by {on_disk.signer!r}" if on_disk.signer else "not signed"
    fix = enrolment(boot, pending=state == "pending")
    built = next((each for each in probe.dkms if each.version == str(on_disk.version)), None)
    if not on_disk.signer and built is not None:
        name = f"{built.name}/{built.version}"
        fix += f" Then have it signed: `dkms build --force {name} && dkms install --force {name}`."
    yield error(
        "secure-boot-module",
        f"Secure Boot is on, and the NVIDIA module is {by}, which the firmware does not trust",
        "the kernel refuses it (`Key was rejected by service`)",
        fix,
        boot.source,
    )


def _nouveau(probe: Probe) -> Iterator[Finding]:
    if not holds_a_card(probe, "nouveau"):
        return
    yield note(
        "nouveau",
        "nouveau drives the card",
        "NVIDIA's driver gets it only after a reboot",
        "" if probe.nouveau_blacklisted else "nouveau is blacklisted with the driver.",
    )


def _handed_away(probe: Probe) -> Iterator[Finding]:
    if holds_a_card(probe, "vfio-pci"):
        yield warning(
            "gpu-passthrough",
            "an NVIDIA card is handed to a virtual machine (vfio-pci)",
            "this host cannot use it",
            "Set `llama_cpp_backend` to cpu, or take the card's ids out of vfio-pci's options.",
        )


def _windows(probe: Probe) -> Iterator[Finding]:
    for gpu in probe.gpus:
        if gpu.vendor != NVIDIA or gpu.bar1_bytes is None:
            continue
        card = tables.gpu(gpu.device)
        name = card.name if card else "the NVIDIA card"
        if gpu.bar1_bytes < SMALL_WINDOW_BYTES:
            yield warning(
                "gpu-window",
                f"the firmware gave {name} at {gpu.address} no window to its memory",
                "nvidia-smi says `No devices were found`",
                "In the firmware setup, switch on Above 4G Decoding and Resizable BAR (and switch "
                "off CSM); install the newest firmware. In a virtual machine, give it a 64-bit "
                "PCI window.",
                "NVIDIA/open-gpu-kernel-modules#862",
            )
        elif gpu.bar1_bytes <= CLASSIC_WINDOW_BYTES and card and (card.memory_gib or 0) >= 1:
            yield note(
                "gpu-window",
                f"{name} at {gpu.address} shows {gpu.bar1_bytes // MIB} MiB of its memory",
                "it works; models load faster with Resizable BAR",
                "If the driver reports `No devices were found`: switch on Above 4G Decoding and "
                "Resizable BAR in the firmware setup.",
                "NVIDIA/open-gpu-kernel-modules#862",
            )


def _last_start(probe: Probe) -> Iterator[Finding]:
    """A server's gate kept it from starting: what its words mean."""
    said = [
        line
        for service in probe.services.values()
        if service.active != "active"
        for line in service.gate
    ]
    for symptom in tables.driver_faults():
        if symptom.pattern is None:
            continue
        line = next((line for line in said if re.search(symptom.pattern, line)), None)
        if line is not None:
            yield warning(
                f"gpu-{symptom.id}",
                f"at its last start the server saw no GPU ({line})",
                symptom.cause,
                f"{symptom.fix[:1].upper()}{symptom.fix[1:]}.",
                symptom.source,
            )


def _fault(name: str) -> tables.Symptom:
    return next(each for each in tables.driver_faults() if each.id == name)
