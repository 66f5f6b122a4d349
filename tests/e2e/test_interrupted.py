"""Killed at random moments: the next run finishes, and nothing half-made is ever served."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.e2e.conftest import new_host
from tests.lab import Lab, LabHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]

WHOLE = """
for release in /opt/llama.cpp/releases/*/; do
    [ ! -d "$release" ] || env -i "$release/bin/llama-server" --version >/dev/null 2>&1 ||
        echo "$release"
done
for blob in /var/lib/llamastead/models/blobs/*; do
    [ ! -e "$blob" ] || [ "$(sha256sum <"$blob" | cut -c1-64)" = "${blob##*/}" ] || echo "$blob"
done
[ ! -L /opt/llama.cpp/current ] || [ -e /opt/llama.cpp/current/release.json ] || echo current
"""
"""Names everything under a final name that is not whole."""


Process = subprocess.Popen[bytes]


def kill_pyinfra(_: LabHost, process: Process) -> None:
    process.kill()


def terminate_pyinfra(_: LabHost, process: Process) -> None:
    process.terminate()


def press_control_c(_: LabHost, process: Process) -> None:
    process.send_signal(signal.SIGINT)
    process.wait(300)  # pyinfra ends after the operation in hand


def cut_the_line(host: LabHost, process: Process) -> None:
    host.run("pkill -KILL -f '^sshd.*: root' || true")
    process.wait(300)


def cut_the_power(host: LabHost, process: Process) -> None:
    host.kill()
    process.kill()
    host.start()


WAYS: list[Callable[[LabHost, Process], None]] = [
    kill_pyinfra,
    cut_the_line,
    cut_the_power,
    terminate_pyinfra,
    press_control_c,
]


def test_killed_ten_times_at_random_moments(lab: Lab, tmp_path: Path) -> None:
    """A fresh host each few times, so that every stage is hit; the compiler cache is warm."""
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    print(f"seed {seed}")
    for round_number in range(2):
        host = new_host(lab, f"killed-{round_number}")
        data = {**deploys.access(lab, host), **deploys.wanted(lab)}
        inventory = deploys.write_inventory(tmp_path, {host.name: data})
        for number in range(5):
            way = WAYS[(round_number + number) % len(WAYS)]
            seconds = dice.uniform(2, 45)
            print(f"{host.name}: {way.__name__} after {seconds:.1f} s")
            with deploys.running(inventory) as process:
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    way(host, process)
            assert host.run(WHOLE).stdout == "", f"seed {seed}"
        finished = deploys.run(inventory)
        assert finished.code == 0, f"seed {seed}: {finished.said[-4000:]}"
        assert "tokens/s" in finished.said
        assert deploys.run(inventory).changed == []
        host.remove()
