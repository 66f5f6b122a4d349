"""What nvidia.sh tells, as parts of the Probe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal

from packaging.version import Version

from tasks.facts.lines import Lines, number, version
from tasks.probe import AptPin, AptSource, DkmsModule, Gpu, Kernel, KernelModule
from tasks.rules import tables

NVIDIA = 0x10DE
VGA = 0x030000

DRIVER_VERSION = re.compile(r"(?<![\d.])(\d{3}\.\d+(?:\.\d+)?)(?![\d.])")

Mok = Literal["enrolled", "pending", "unknown"]


def wanted() -> dict[str, str]:
    """What nvidia.sh has to look for."""
    keys = {tables.secure_boot(each).key for each in tables.distributions()}
    # Packets of a keyring name a key by the last eight bytes of its fingerprint.
    retired = bytes.fromhex(tables.key("cuda-retired").fingerprint[-16:])
    return {
        "mok_keys": " ".join(sorted(keys)),
        "retired_key": "".join(f"\\{byte:03o}" for byte in retired),
        "uninstallers": " ".join(tables.housekeeping().runfile_uninstallers),
    }


def driver_loaded(lines: Lines) -> KernelModule | None:
    """From /proc/driver/nvidia/version, or at least /sys/module/nvidia/version."""
    told = lines.all("driver_loaded")
    found = [match[1] for text in told if (match := DRIVER_VERSION.search(text))]
    if not found:
        return None
    kind: Literal["open", "proprietary"] | None = None
    if told[0].startswith("NVRM"):
        kind = "open" if "Open Kernel Module" in told[0] else "proprietary"
    return KernelModule(tables.ExactVersion(found[0]), kind)


def driver_on_disk(lines: Lines) -> KernelModule | None:
    """From modinfo. The open modules have a licence of their own: `Dual MIT/GPL`."""
    found = version(lines.text("driver_on_disk.version"))
    if found is None:
        return None
    licence = lines.text("driver_on_disk.license")
    kind: Literal["open", "proprietary"] | None = None
    if licence is not None:
        kind = "proprietary" if licence == "NVIDIA" else "open"
    return KernelModule(found, kind, lines.text("driver_on_disk.signer"))


def driver_library(lines: Lines) -> Version | None:
    """What the name of the real libcuda.so.1 says; a stub of somebody's says nothing."""
    match = DRIVER_VERSION.fullmatch(lines.text("driver_library") or "")
    return tables.ExactVersion(match[1]) if match else None


def kernels(lines: Lines) -> tuple[Kernel, ...]:
    """Every kernel that is installed."""
    return tuple(
        Kernel(release, headers == "yes", nvidia == "yes")
        for release, headers, nvidia in lines.words("kernel_installed", 3)
    )


def dkms(lines: Lines) -> tuple[DkmsModule, ...]:
    """From DKMS's own folders."""

    def of(key: str, module: tuple[str, str]) -> tuple[str, ...]:
        return tuple(words[2] for words in lines.words(key, 3) if words[:2] == module)

    return tuple(
        DkmsModule(*module, of("dkms_built", module), of("dkms_failed", module))
        for module in lines.pairs("dkms")
    )


def secure_boot(lines: Lines) -> bool | None:
    """Whether the firmware and shim let signed modules in only."""
    value = lines.text("secure_boot")
    return {"0": False, "1": True}.get(value or "")


def mok_keys(lines: Lines) -> Mapping[str, Mok]:
    """What `mokutil --test-key` says of each certificate that is there."""
    found: dict[str, Mok] = {}
    for value in lines.all("mok_key"):
        path, _, answer = value.partition(" ")
        if "enrollment request" in answer:
            found[path] = "pending"
        else:
            found[path] = "enrolled" if "already enrolled" in answer else "unknown"
    return found


def apt_sources(lines: Lines) -> tuple[AptSource, ...]:
    """Lines and stanzas of apt's source files that have to do with NVIDIA."""
    found = [_source_line(path, text) for path, text in lines.pairs("apt_line")]
    stanzas: dict[str, list[dict[str, str]]] = {}
    for value in lines.all("apt_stanza"):
        path, _, text = value.partition(" ")
        of_file = stanzas.setdefault(path, [{}])
        name, colon, content = text.partition(":")
        if colon:
            of_file[-1][name.lower()] = content.strip()
        else:
            of_file.append({})
    for path, of_file in stanzas.items():
        for stanza in of_file:
            found += _source_stanza(path, stanza)
    return tuple(each for each in found if each is not None)


def _source_line(path: str, text: str) -> AptSource | None:
    match = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)", text)
    if match is None:
        return None
    signed = re.search(r"signed-by=(\S+)", match[1] or "", re.IGNORECASE)
    return AptSource(path, match[2], match[3], signed[1] if signed else None)


def _source_stanza(path: str, stanza: Mapping[str, str]) -> list[AptSource | None]:
    if stanza.get("enabled", "yes").lower() in ("no", "false"):
        return []
    signed = stanza.get("signed-by")
    return [
        AptSource(path, uri, suite, signed or None)
        for uri in stanza.get("uris", "").split()
        for suite in stanza.get("suites", "/").split()
    ]


def apt_pins(lines: Lines) -> tuple[AptPin, ...]:
    """Stanzas of apt's preferences that have to do with NVIDIA."""
    found = []
    stanza: dict[str, str] = {}
    for path, name, value in lines.words("apt_pin", 3):
        if name == "Package":
            stanza = {}
        stanza[name] = value
        priority = number(stanza.get("Pin-Priority"))
        if "Package" in stanza and "Pin" in stanza and priority is not None:
            found.append(AptPin(path, stanza["Package"], stanza["Pin"], priority))
            stanza = {}
    return tuple(found)


def engines(lines: Lines) -> dict[str, Version]:
    """Versions of docker, podman and containerd."""
    return {
        name: tables.ExactVersion(match[1])
        for name, text in lines.pairs("engine")
        if (match := re.search(r"\bv?(\d+\.\d+(?:\.\d+)?)", text))
    }


def container_toolkit(lines: Lines) -> Version | None:
    """From `nvidia-ctk --version`."""
    match = re.search(r"\b(\d+\.\d+\.\d+)", lines.text("container_toolkit") or "")
    return tables.ExactVersion(match[1]) if match else None


def docker_runtimes(lines: Lines) -> tuple[str, ...]:
    """Names of the runtimes in Docker's configuration."""
    try:
        told = json.loads(lines.text("docker_config") or "{}")
    except ValueError:
        return ()
    runtimes = told.get("runtimes") if isinstance(told, dict) else None
    return tuple(str(name) for name in runtimes) if isinstance(runtimes, dict) else ()


def windows(lines: Lines) -> tuple[tuple[Gpu, ...], Version | None]:
    """Cards and driver as Windows's nvidia-smi tells them."""
    gpus, driver = [], None
    for value in lines.all("wsl_gpu"):
        match = re.fullmatch(
            r"([0-9A-Fa-f:.]+), 0x([0-9A-Fa-f]{4})10DE, *(\d*)[^,]*, (\d+\.\d+)", value
        )
        if match is not None:
            address, device, _, told = match.groups()
            gpus.append(Gpu(address.lower(), NVIDIA, int(device, 16), VGA, None, None))
            driver = tables.ExactVersion(told)
    return tuple(gpus), driver
