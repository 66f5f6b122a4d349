"""A driver whose modules a real DKMS could not compile, until the cause of that was gone.

An RTX 5090 is pretended, and the driver is a shell (tests/lab/nvidia_packages.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.lab import RTX_5090, Lab, pretences
from tests.lab.kernel import offer_headers
from tests.lab.nvidia_packages import driver
from tests.lab.nvidia_repository import NvidiaRepository

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SCRIPT = "tests/e2e/nvidia_stack.py"
SOURCE = "/usr/src/nvidia-595.99.02/nvidia.c"
LOG = "/var/lib/dkms/nvidia/595.99.02/build/make.log"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("dkms")
    lab.down()  # what a killed run left
    with lab:
        yield lab


def test_a_module_that_does_not_compile_is_tried_again(lab: Lab, tmp_path: Path) -> None:
    host = lab.host("debian-13")
    host.plug_in_pci([RTX_5090])
    offer_headers(lab.outside, host)
    nvidia = NvidiaRepository(lab.outside).publish()
    shell = next(each for each in driver("595.99.02") if each.name == "nvidia-kernel-open-dkms")
    broken = f"#error this kernel is too new\n{shell.files[SOURCE]!s}"
    files = {**shell.files, SOURCE: broken}
    nvidia.add("debian13", replace(shell, version="595.99.02-2", files=files))
    data = {**deploys.access(lab, host), **deploys.wanted(lab), **nvidia.settings}
    inventory = deploys.write_inventory(tmp_path, {host.name: data})

    failed = deploys.run(inventory, SCRIPT)
    assert failed.code == 1
    (line,) = failed.errors
    assert f"the driver's modules could not be compiled, {LOG} says why" in line
    assert "this kernel is too new" in host.run(f"cat {LOG}").stdout
    host.run(f"sed -i '/#error/d' {SOURCE}")
    installed = deploys.run(inventory, SCRIPT)
    assert installed.errors
    assert "reboot needed: driver 595.99.02 is installed" in installed.errors[0]
    pretences.have_driver(host, "595.99.02")
    again = deploys.run(inventory, SCRIPT)
    assert (again.code, again.changed) == (0, []), again.said[-4000:]
