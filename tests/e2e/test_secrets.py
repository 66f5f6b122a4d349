"""A proxy's password, while NVIDIA's packages are tried, fetched and installed: nobody sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.e2e.watcher import Watcher, kept
from tests.lab import RTX_5090, Lab, pretences
from tests.lab.kernel import offer_headers
from tests.lab.nvidia_repository import NvidiaRepository

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SCRIPT = "tests/e2e/nvidia_stack.py"
PASSWORD = "s3cret-of-nothing"


def test_a_proxys_password_is_seen_by_nobody(lab: Lab, tmp_path: Path) -> None:
    host = lab.host("debian-12", name="secrets")
    host.plug_in_pci([RTX_5090])
    offer_headers(lab.outside, host)
    proxy = lab.outside.proxy_url.replace("://", f"://me:{PASSWORD}@")
    data = {
        **deploys.access(lab, host),
        **deploys.wanted(lab),
        **NvidiaRepository(lab.outside).publish().settings,
        "proxy_http": proxy,
        "proxy_https": proxy,
    }
    inventory = deploys.write_inventory(tmp_path, {host.name: data})
    with Watcher(host, PASSWORD, user=host.admin_user) as watcher:
        run = deploys.run(inventory, SCRIPT, arguments=("-v", "--debug"))
    assert "reboot needed: driver" in run.said
    assert watcher.looks > 100
    assert watcher.seen == {}
    assert PASSWORD not in run.said + run.out
    assert kept(host, PASSWORD) == ""
    (loaded,) = host.run("dpkg-query -W -f '${Version}' libcuda1").stdout.split()
    pretences.load_driver(host, loaded.partition("-")[0])
    again = deploys.run(inventory, SCRIPT)
    assert (again.code, again.changed) == (0, []), again.said[-4000:]
