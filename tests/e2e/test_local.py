"""A machine that deploys to itself, from a fresh copy of the repository."""

from __future__ import annotations

import shlex
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.e2e.conftest import new_host
from tests.lab import Lab, LabHost

pytestmark = pytest.mark.lab

COPY = "root/llamastead"


def package_index_hosts() -> list[str]:
    """Where pip gets packages from on this machine, so that the lab's proxy lets it there."""
    # pip itself is asked, in a process of its own: it is no package that this software asks for.
    code = (
        "from pip._internal.models.index import PyPI; print(PyPI.netloc, PyPI.file_storage_domain)"
    )
    asked = [sys.executable, "-c", code]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def host(lab: Lab) -> LabHost:
    lab.outside.allow(package_index_hosts())
    host = new_host(lab, "itself")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=deploys.REPOSITORY, capture_output=True, check=True
    ).stdout.split(b"\0")
    for name in filter(None, (file.decode() for file in files)):
        target = host.root / COPY / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(deploys.REPOSITORY / name, target)
    authorities = ssl.get_default_verify_paths().cafile
    if authorities and Path(authorities).exists():
        shutil.copy(authorities, host.root / "root/authorities.pem")
    return host


def deploy(lab: Lab, host: LabHost, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = lab.outside
    data = {
        "model": outside.model_url,
        "model_sha256": outside.model_sha256,
        "llama_cpp_repo": outside.git_url,
        "llama_cpp_targets": '["llama-server"]',
        "proxy_http": outside.proxy_url,
        "proxy_https": outside.proxy_url,
    }
    words = ["./run", "pyinfra", "inventories/local.py", "deploy.py", "-y", *arguments]
    for name, value in data.items():
        words += ["--data", f"{name}={value}"]
    environment = {
        "http_proxy": outside.proxy_url,
        "https_proxy": outside.proxy_url,
        "no_proxy": outside.git_url.split("/")[2].split(":")[0],
        "PIP_CERT": "/root/authorities.pem",
        "PYINFRA_PROGRESS": "off",
    }
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return host.run(
        f"cd /{COPY} && HOME=/root {exports} {shlex.join(words)} 2>&1", check=False, timeout=1500
    )


def test_a_machine_deploys_to_itself_and_a_second_time_changes_nothing(
    lab: Lab, host: LabHost
) -> None:
    first = deploy(lab, host)
    assert first.returncode == 0, first.stdout[-4000:]
    assert "host      @local" in first.stdout
    assert "tokens/s" in first.stdout
    assert host.run("systemctl is-active llama-server").stdout == "active\n"
    again = deploy(lab, host, "--json")
    assert again.returncode == 0, again.stdout[-4000:]
    assert '"success": 0' in again.stdout[again.stdout.rindex('"totals"') :]
