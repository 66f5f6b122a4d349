"""Running deploy.py and check.py as a user would, and reading what they did."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import Lab, LabHost

REPOSITORY = Path(__file__).parents[2]
PYINFRA = Path(sys.executable).with_name("pyinfra")
SMALL = {"server_ctx_size": 512, "llama_cpp_targets": ["llama-server"]}
"""Settings that keep a test quick."""


@dataclass(frozen=True)
class Run:
    """What one run of pyinfra did."""

    code: int
    said: str
    """Everything for the person who watches."""
    out: str
    """Standard output: for programs."""

    @property
    def operations(self) -> list[dict[str, Any]]:
        """Operations with the hosts that they changed in `success`."""
        results: list[dict[str, Any]] = json.loads(self.out)["results"]["operations"]
        return results

    @property
    def changed(self) -> list[str]:
        """Names of the operations that changed anything anywhere."""
        return [operation["name"] for operation in self.operations if operation["success"]]

    @property
    def commands(self) -> list[str]:
        """Commands sent to hosts."""
        return re.findall(r"^.*>>> (.*)$", self.said, flags=re.MULTILINE)

    @property
    def errors(self) -> list[str]:
        """Lines that say what is wrong; pyinfra adds one of its own that counts commands."""
        return re.findall(r"Error: (?!executed \d).*", self.said)

    # Of several hosts, one

    def errors_on(self, host: LabHost) -> list[str]:
        """Lines that say what is wrong with a host."""
        return re.findall(rf"\[{host.name}\] +(Error: (?!executed \d).*)", self.said)

    def operations_on(self, host: LabHost) -> list[str]:
        """Operations that a host went through, whatever came of them, in order."""
        return [
            each["name"]
            for each in self.operations
            if any(host.name in each[outcome] for outcome in ("success", "error", "no_change"))
        ]

    def commands_on(self, host: LabHost) -> list[str]:
        """Commands sent to a host."""
        return re.findall(rf"\[{host.name}\] +>>> (.*)$", self.said, flags=re.MULTILINE)


def access(lab: Lab, host: LabHost, *, sudo: bool = False) -> dict[str, Any]:
    """Host data that lets pyinfra in: as root, or as a user whose sudo wants a password."""
    data: dict[str, Any] = {
        "ssh_hostname": host.address,
        "ssh_key": str(lab.ssh_key),
        "ssh_known_hosts_file": str(lab.known_hosts),
        "ssh_user": host.admin_user if sudo else "root",
    }
    if sudo:
        data |= {"_sudo": True, "_sudo_password": host.admin_password}
    return data


def wanted(lab: Lab) -> dict[str, Any]:
    """Settings for a tiny server out of what the lab serves."""
    outside = lab.outside
    return {
        **SMALL,
        "llama_cpp_repo": outside.git_url,
        "llama_cpp_version": outside.llama_cpp_commit,
        "model": outside.model_url,
        "model_sha256": outside.model_sha256,
        "proxy_http": outside.proxy_url,
        "proxy_https": outside.proxy_url,
    }


def write_inventory(folder: Path, hosts: Mapping[str, Mapping[str, Any]]) -> Path:
    """An inventory file, as a user writes one."""
    path = folder / "inventory.py"
    path.write_text(f"hosts = {[(name, dict(data)) for name, data in hosts.items()]!r}\n")
    return path


def served(host: LabHost) -> str:
    """The model that llama-server was started with."""
    command = "tr '\\0' '\\n' </proc/$(systemctl show llama-server -p MainPID --value)/cmdline"
    words = host.run(command).stdout.splitlines()
    return words[words.index("--model") + 1]


def command(inventory: Path | str, script: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line of a run whose commands and results can be read."""
    return [str(PYINFRA), str(inventory), script, "-y", "-vv", "--json", *arguments]


def environment() -> dict[str, str]:
    """Without what a person's shell may say about proxies: the lab is all there is."""
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    kept = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    return {**kept, "PYINFRA_PROGRESS": "off"}


def run(
    inventory: Path | str,
    script: str = "deploy.py",
    arguments: Sequence[str] = (),
    timeout: float = 1500,
) -> Run:
    """Run pyinfra to its end."""
    done = subprocess.run(
        command(inventory, script, arguments),
        cwd=REPOSITORY, env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return Run(done.returncode, done.stderr, done.stdout)


class Terminal:
    """A deploy at work on a terminal, with somebody at its keyboard."""

    def __init__(self, inventory: Path | str, script: str = "deploy.py") -> None:
        self._keyboard, inside = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command(inventory, script)],
            cwd=REPOSITORY, env=environment(), stdin=inside, stdout=inside, stderr=inside,
        )  # fmt: skip
        os.close(inside)

    def control_c(self, timeout: float = 60) -> tuple[str, float]:
        """Press it. What the deploy said in all, and the seconds that it took to leave."""
        began = time.monotonic()
        os.write(self._keyboard, b"\x03")
        said = b""
        try:
            while select.select([self._keyboard], [], [], timeout)[0]:
                said += os.read(self._keyboard, 65536)
        except OSError:  # the terminal is gone with the last who had it
            pass
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)
        return said.decode(errors="replace"), time.monotonic() - began


@contextmanager
def running(inventory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A deploy at work. It is killed at the end, if it is not done by then."""
    process = subprocess.Popen(
        command(inventory, "deploy.py"),
        cwd=REPOSITORY, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
