"""Hosts for the rules' tests: a good one, and what to change about it."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from packaging.version import Version

from tasks.probe import CACHE, PREFIX, STATE, Gpu, KernelModule, Probe, Release
from tasks.rules import build, server, tables
from tasks.rules.build import Source
from tasks.rules.plan import RUNTIME_PACKAGES
from tasks.rules.tables import ExactVersion, Modules
from tasks.settings import Settings, load

GIB = 1024**3
SHA256 = "0123456789abcdef" * 4
URL = "https://models.example/tiny/model.gguf"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
SOURCE = Source("https://git.example/llama.cpp.git", COMMIT, "b9999", 9999)

BARE = Probe(
    uid=0,
    hostname="bare",
    arch="x86_64",
    kernel="6.12.48+deb13-amd64",
    os_id="debian",
    os_version="13",
    os_codename="trixie",
    os_name="Debian GNU/Linux 13 (trixie)",
    systemd_running=True,
    systemd_version=257,
    cores=8,
    memory_bytes=32 * GIB,
    cpu_model="A processor",
    disk_free_bytes=dict.fromkeys((PREFIX, STATE, CACHE), 50 * GIB),
    disk_mount={PREFIX: "/", STATE: "/", CACHE: "/var/cache"},
    glibc=Version("2.41"),
)
"""A fresh Debian 13 that nothing was installed on."""

WITH_COMPILER = replace(
    BARE,
    compilers={"g++": Version("14.2.0")},
    cpu_target="f" * 64,
    packages=dict.fromkeys((*build.PACKAGES, *RUNTIME_PACKAGES), "1.0"),
)


RTX_5090, RTX_4090, GTX_1080_TI, H200 = 0x2B85, 0x2684, 0x1B06, 0x2335


def card(device: int = RTX_5090, **changes: Any) -> Gpu:
    """An NVIDIA card on the bus, with nouveau's hands off it and all of its memory in sight."""
    gpu = Gpu("0000:01:00.0", 0x10DE, device, 0x030000, None, 64 * GIB)
    return replace(gpu, **changes)


WITH_CARD = replace(WITH_COMPILER, gpus=(card(),))
"""An RTX 5090, plugged in a minute ago."""


def with_driver(
    probe: Probe, version: str = "595.99.02", modules: Modules = "open", **changes: Any
) -> Probe:
    """The host with a driver that runs."""
    module = KernelModule(ExactVersion(version), modules)
    gpus = tuple(replace(gpu, driver="nvidia") for gpu in probe.gpus)
    return replace(
        probe,
        **{
            "gpus": gpus,
            "driver_loaded": module,
            "driver_on_disk": module,
            "driver_library": module.version,
            "nvidia_smi": "/usr/bin/nvidia-smi",
            **changes,
        },
    )


WITH_DRIVER = with_driver(WITH_CARD)


def on(system: str, probe: Probe = WITH_CARD, **changes: Any) -> Probe:
    """The same host with another distribution: `ubuntu 24.04`."""
    found = tables.distribution(*system.split())
    assert found is not None
    return replace(
        probe,
        **{
            "os_id": found.os_id,
            "os_version": found.version_id,
            "os_codename": found.codename,
            "os_name": found.title,
            "glibc": found.glibc,
            "compilers": {"g++": found.gcc} if probe.compilers else {},
            "kernel": f"{found.kernels[0]}-1-{'generic' if found.os_id == 'ubuntu' else 'amd64'}",
            **changes,
        },
    )


def in_wsl(system: str = "ubuntu 24.04", windows: str | None = "581.15", **changes: Any) -> Probe:
    """Inside WSL, with what Windows's driver tells of an RTX 5090."""
    told: dict[str, Any] = {}
    if windows is not None:
        told = {
            "windows_driver": ExactVersion(windows),
            "wsl_libcuda": True,
            "gpus": (card(bar1_bytes=None),),
        }
    plain = on(system, replace(WITH_COMPILER, gpus=()))
    return replace(
        plain,
        **{
            "wsl": True,
            "kernel": "6.6.87.2-microsoft-standard-WSL2",
            "wsl_gpu": True,
            "wsl_systemd": True,
            **told,
            **changes,
        },
    )


def settings(**data: Any) -> Settings:
    """Settings with a model from a URL, and what a test is about."""
    return load({"model": URL, "model_sha256": SHA256, **data})


def with_release(probe: Probe, wanted: Settings, **release: Any) -> Probe:
    """The host after a build."""
    made = build.plan(wanted, probe, SOURCE)
    there = Release(
        **{
            "name": f"b9999-{made.build_id}",
            "commit": COMMIT,
            "inputs": made.inputs,
            "server_options": frozenset(
                {*server.OPTIONS.values(), *chain.from_iterable(server.PURPOSES.values())}
            ),
            **release,
        }
    )
    return replace(probe, releases=(there,), current=there.name)
