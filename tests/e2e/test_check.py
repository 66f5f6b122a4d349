"""check.py on a real host: what it costs, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.lab import RTX_5090, Lab, LabHost
from tests.lab.gguf_model import tiny_model

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("check")
    lab.down()
    with lab:
        yield lab


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    return lab.host("debian-13", name="checked")


def check(lab: Lab, host: LabHost, folder: Path, **data: object) -> deploys.Run:
    wanted = {**deploys.access(lab, host), **deploys.wanted(lab), **data}
    return deploys.run(deploys.write_inventory(folder, {host.name: wanted}), "check.py")


def test_one_command_tells_everything_about_a_host_and_one_more_reads_its_model(
    lab: Lab, host: LabHost, tmp_path: Path
) -> None:
    (host.root / "srv/model.gguf").write_bytes(tiny_model().read_bytes())
    (host.root / "srv/model.gguf").chmod(0o644)
    local = {"model": "/srv/model.gguf", "model_sha256": None}
    done = check(lab, host, tmp_path, **local)
    assert done.code == 0, done.said
    assert len(done.commands) == 2, done.commands


def test_one_more_asks_for_a_model_from_elsewhere(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    done = check(lab, host, tmp_path)
    assert done.code == 0, done.said
    assert len(done.commands) == 2, done.commands


def test_a_pretended_rtx_5090_gets_a_plan_and_nothing_is_changed(
    lab: Lab, host: LabHost, tmp_path: Path
) -> None:
    host.plug_in_pci([RTX_5090])
    before = host.run("dpkg -l; find /etc /opt /var/lib -newer /srv/model.gguf -type f").stdout
    done = check(lab, host, tmp_path, report_format="json")
    assert done.code == 0, done.said
    told = next(json.loads(line) for line in done.out.splitlines() if '"findings"' in line)
    assert told["nvidia"]["architectures"] == ["120a-real"]
    assert told["nvidia"]["driver"]["install"] is True
    assert told["llama_cpp"]["backend"] == "cuda"
    after = host.run("dpkg -l; find /etc /opt /var/lib -newer /srv/model.gguf -type f").stdout
    assert after == before


SMI = """#!/bin/sh
echo "00000000:01:00.0, 0x2B8510DE, 32607, 581.15"
"""


def test_inside_pretended_wsl_the_toolkit_alone_is_planned(
    lab: Lab, host: LabHost, tmp_path: Path
) -> None:
    host.plug_in_pci([])
    host.pretend_kernel_release("6.6.87.2-microsoft-standard-WSL2")
    host.run(
        "mkdir -p /usr/lib/wsl/lib && cd /usr/lib/wsl/lib && touch libcuda.so.1 /dev/dxg && "
        "cat >nvidia-smi && chmod 755 nvidia-smi",
        stdin=SMI,
    )
    done = check(lab, host, tmp_path, report_format="json")
    assert done.code == 0, done.said
    told = next(json.loads(line) for line in done.out.splitlines() if '"findings"' in line)
    assert told["nvidia"]["driver"]["source"] == "windows"
    assert told["nvidia"]["driver"]["version"] == "581.15"
    assert told["nvidia"]["toolkit"]["install"] is True
    assert told["nvidia"]["architectures"] == ["120a-real"]
    assert [found["code"] for found in told["findings"]] == ["wsl-keepalive"]
