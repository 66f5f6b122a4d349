"""What a deploy costs: commands, seconds, files compiled. `./run pytest -m bench -s tests/bench`"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.e2e.conftest import CCACHE
from tests.lab import Lab, LabHost, cache_directory

pytestmark = [pytest.mark.bench, pytest.mark.lab, pytest.mark.timeout(7200)]

COUNTS = (1, 4, 8)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("bench")
    lab.down()
    with lab:
        yield lab


@pytest.fixture(scope="module")
def hosts(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[LabHost]:
    """Hosts with a compiler cache in common that the first of them fills."""
    cache = cache_directory("bench-ccache")
    cache.chmod(0o777)
    (cache / "ccache.conf").write_text("umask = 000\n")
    return [
        lab.host("debian-13", name=f"bench-{number}", binds={cache: CCACHE})
        for number in range(max(COUNTS))
    ]


def inventory(lab: Lab, hosts: list[LabHost], folder: Path) -> Path:
    wanted = deploys.wanted(lab)
    return deploys.write_inventory(
        folder, {host.name: {**deploys.access(lab, host), **wanted} for host in hosts}
    )


def built(host: LabHost) -> dict[str, object]:
    release: dict[str, object] = json.loads(
        host.run("cat /opt/llama.cpp/current/release.json").stdout
    )
    return release


def test_bench(lab: Lab, hosts: list[LabHost], tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = []

    def deploy(what: str, to: list[LabHost]) -> deploys.Run:
        began = time.monotonic()
        run = deploys.run(inventory(lab, to, tmp_path), timeout=5400)
        took = time.monotonic() - began
        assert run.code == 0, run.said[-3000:]
        rows.append((what, len(to), f"{took:.1f}", len(run.commands), len(run.changed)))
        return run

    deploy("first, nothing compiled before", hosts[:1])
    cold = built(hosts[0])
    deploy("first, compiler cache warm", hosts[1:2])
    warm = built(hosts[1])
    deploy("first, compiler cache warm", hosts)
    for count in COUNTS:
        assert deploy("converged", hosts[:count]).changed == []

    print("\n\n| run | hosts | seconds | commands sent | operations that changed something |")
    print("|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print("\n| compile | seconds | compiler cache |\n|---|---|---|")
    for what, release in (("cold", cold), ("warm", warm)):
        print(f"| {what} | {release['built_seconds']} | {release['ccache']} |")
    print("| nothing changed | 0 | no command but the probe |")
