"""Debian's own driver, whose DKMS builds a real module with the headers of a real kernel.

A pretended RTX 4090, as the archive's driver knows nothing newer. The kernel that runs is this
machine's; the headers are those of Debian's kernel under its name (tests/lab/kernel.py), so the
module is whole but cannot be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import deploys
from tests.e2e.deploys import Run
from tests.e2e.snapshots import changes, snapshot
from tests.lab import Lab, LabHost, PciDevice, pretences
from tests.lab.kernel import offer_headers
from tests.lab.nvidia_repository import NvidiaRepository

pytestmark = [pytest.mark.lab, pytest.mark.slow]

RTX_4090 = PciDevice(vendor="0x10de", device="0x2684", class_="0x030000")
CACHE = ("/var/cache/llamastead", "/var/cache/man", "/var/lib/logrotate")


@dataclass(frozen=True)
class Site:
    """A host with a card that the archive's driver knows."""

    lab: Lab
    host: LabHost
    data: dict[str, Any]
    folder: Path

    def run(self) -> Run:
        """Deploy NVIDIA's part."""
        inventory = deploys.write_inventory(self.folder, {self.host.name: self.data})
        return deploys.run(inventory, "tests/e2e/nvidia_stack.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    lab = Lab("debian-driver")
    lab.down()  # what a killed run left
    with lab:
        host = lab.host("debian-12", name="bookworm")
        host.plug_in_pci([RTX_4090])
        data = {
            **deploys.access(lab, host),
            **deploys.wanted(lab),
            **NvidiaRepository(lab.outside).publish().settings,
            "driver_source": "distro",
        }
        yield Site(lab, host, data, tmp_path_factory.mktemp("debian-driver"))


@pytest.fixture(scope="module")
def refused(site: Site) -> tuple[Run, list[str]]:
    """A run where the archive has no headers of the running kernel, and what it changed."""
    first = site.run()  # installs what the plan needs besides NVIDIA's packages
    assert first.code == 1
    before = snapshot(site.host)
    return site.run(), changes(before, snapshot(site.host), CACHE)


@pytest.fixture(scope="module")
def installed(site: Site, refused: tuple[Run, list[str]]) -> Run:
    """The deploy with such headers, which ends with the need to reboot."""
    assert refused[0].code == 1
    offer_headers(site.lab.outside, site.host)
    return site.run()


def test_a_kernel_that_the_archive_has_no_headers_of(
    site: Site, refused: tuple[Run, list[str]]
) -> None:
    run, changed = refused
    (line,) = run.errors
    kernel = site.host.run("uname -r").stdout.strip()
    assert f"the archive has no package linux-headers-{kernel}" in line
    assert "reboot into the archive's newest kernel" in line
    assert changed == []


def test_it_ends_with_one_line_about_the_reboot(installed: Run) -> None:
    assert installed.code == 1, installed.said[-4000:]
    (line,) = installed.errors
    assert re.search(r"reboot needed: driver 535\.\d+\.\d+ is installed and cannot be", line)


def test_a_real_module_was_compiled_with_real_headers(site: Site, installed: Run) -> None:
    assert installed.errors
    kernel = site.host.run("uname -r").stdout.strip()
    status = site.host.run(f"dkms status -k {kernel}").stdout
    assert re.search(rf"^nvidia-current/535\S+, {re.escape(kernel)}, x86_64: installed", status)
    said = site.host.run("modinfo nvidia-current; modinfo -F vermagic nvidia-current-uvm").stdout
    assert re.search(r"^license: +NVIDIA$", said, re.MULTILINE)
    assert len(re.findall(r"6\.1\.0-\d+-amd64 SMP", said)) == 2


def test_the_driver_is_the_archives_and_the_toolkit_nvidias(site: Site, installed: Run) -> None:
    assert installed.errors
    listed = site.host.run("dpkg-query -W -f '${Package} ${Version}\\n'").stdout.splitlines()
    versions = dict(line.split() for line in listed)
    for name in ("nvidia-kernel-dkms", "libcuda1", "libnvidia-ml1", "nvidia-smi"):
        assert versions[name].startswith("535."), name
    assert not [name for name in versions if name.startswith("nvidia-driver-pinning")]
    assert versions["cuda-nvcc-12-9"] == "12.9.86-1"
    held = set(site.host.run("apt-mark showhold").stdout.split())
    assert {"nvidia-kernel-dkms", "libcuda1", "libnvidia-ml1"} <= held


def test_once_it_is_loaded_a_second_run_changes_nothing(site: Site, installed: Run) -> None:
    assert installed.errors
    version = site.host.run("modinfo -F version nvidia-current").stdout.strip()
    pretences.load_driver(site.host, version)
    again = site.run()
    assert (again.code, again.changed) == (0, []), again.said[-4000:]
