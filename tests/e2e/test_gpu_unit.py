"""The unit that counts on a GPU, under a real systemd; llama-server pretends to see one."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator

import pytest

from tasks import probe as at
from tasks.facts.probe import HostProbe, parse
from tasks.probe import Probe
from tasks.rules import model, server, stack
from tasks.settings import load
from tests.lab import Distribution, Lab, LabHost
from tests.unit.hosts import WITH_DRIVER, settings

pytestmark = pytest.mark.lab

PRETENDER = """#!/usr/bin/python3
import http.server, os, sys
if "--list-devices" in sys.argv:
    seen = os.path.exists("/srv/gpu")
    if not seen:
        print("ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected")
    print("Available devices:")
    print("  CUDA0: NVIDIA Pretended (32607 MiB, 32000 MiB free)" if seen else "  (none)")
    sys.exit(0)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *ignored):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("gpu-unit")
    lab.down()
    with lab:
        yield lab


def put(host: LabHost, path: str, content: str, mode: int = 0o644) -> None:
    folder, where = shlex.quote(path.rpartition("/")[0]), shlex.quote(path)
    host.run(f"mkdir -p {folder} && cat >{where} && chmod {mode:o} {where}", stdin=content)


@pytest.fixture(scope="module", params=["debian-13", "debian-12"])
def host(lab: Lab, request: pytest.FixtureRequest) -> LabHost:
    """A host with everything in place but a GPU."""
    distribution: Distribution = request.param
    host = lab.host(distribution, name=distribution.replace("-", ""))
    version = parse(host.run(HostProbe().command()).stdout.splitlines()).systemd_version
    wanted = settings(server_start_timeout_seconds=30)
    probe = Probe(**{**WITH_DRIVER.__dict__, "systemd_version": version})
    model_plan = model.plan(wanted, probe)
    assert model_plan is not None
    plan = server.plan(wanted, probe, model_plan, None, stack.plan(wanted, probe))
    host.run(f"useradd --system --shell /usr/sbin/nologin --no-create-home {at.SERVER_USER}")
    put(host, f"{at.RELEASES}/b1/bin/llama-server", PRETENDER, 0o755)
    host.run(f"ln -sfn releases/b1 {at.CURRENT}")
    for file in plan.files:
        put(host, file.path, file.content, file.mode)
    host.run("systemctl daemon-reload")
    return host


def state(host: LabHost) -> str:
    return host.run(f"systemctl show {at.SERVER_UNIT} -p ActiveState --value").stdout.strip()


def journal(host: LabHost) -> str:
    return host.run(f"journalctl -q -o cat -u {at.SERVER_UNIT} -u {server.GPU_UNIT}").stdout


def test_systemd_reads_the_units_without_complaint(host: LabHost) -> None:
    units = f"{at.SERVER_UNIT} {server.GPU_UNIT}"
    assert "Unknown" not in host.run(f"systemd-analyze verify {units}", check=False).stderr


def test_with_the_gpus_devices_the_sandbox_is_as_tight(host: LabHost) -> None:
    said = host.run(f"systemd-analyze security {at.SERVER_UNIT} --no-pager").stdout
    exposure = float(said.rpartition("level for")[2].split()[1])
    assert exposure <= 1.2


def test_without_a_gpu_the_server_does_not_start_and_says_why(host: LabHost) -> None:
    done = host.run(f"systemctl start {at.SERVER_UNIT}", check=False)
    assert done.returncode != 0
    assert state(host) != "active"
    said = journal(host)
    assert "sees 0 of 1 GPUs and would serve from the CPU: it is not started" in said
    assert "no CUDA-capable device is detected" in said
    assert "the kernel does not load the nvidia module" in said


def test_the_next_check_knows_what_the_gate_saw(host: LabHost) -> None:
    probe = parse(host.run(HostProbe().command()).stdout.splitlines())
    service = probe.services[at.SERVER_UNIT]
    assert service.gate == (
        "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
    )
    assert service.is_ours
    found = server.findings(load({}), probe)
    assert "unit-not-ours" not in {each.code for each in found}


def test_a_gpu_that_comes_up_late_is_served_from_without_anybodys_help(host: LabHost) -> None:
    host.run("touch /srv/gpu")
    for _ in range(120):
        if state(host) == "active":
            break
        time.sleep(0.5)
    assert state(host) == "active", journal(host)
    host.run(f"systemctl stop {at.SERVER_UNIT}; rm /srv/gpu")
