"""What check.py costs beside pyinfra. `./run pytest -m bench -s tests/bench/test_check.py`"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.lab import RTX_5090, Lab, LabHost

pytestmark = [pytest.mark.bench, pytest.mark.lab]

RUNS = 7


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("bench-check")
    lab.down()
    with lab:
        yield lab


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    host = lab.host("debian-13", name="checked")
    host.plug_in_pci([RTX_5090])
    return host


def test_bench_check(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.py"
    nothing.write_text("from pyinfra import host\nfrom pyinfra.facts.server import Kernel\n"
                       "host.get_fact(Kernel)\n")  # fmt: skip
    data = {**deploys.access(lab, host), **deploys.wanted(lab)}
    inventory = deploys.write_inventory(tmp_path, {host.name: data})
    seconds: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for what, script in (("one fact", str(nothing)), ("check.py", "check.py")):
            began = time.perf_counter()
            assert deploys.run(inventory, script).code == 0
            seconds.setdefault(what, []).append(time.perf_counter() - began)
    middle = {what: statistics.median(taken) for what, taken in seconds.items()}
    least = {what: min(taken) for what, taken in seconds.items()}
    print("\n\n| pyinfra with | seconds, median | least |\n|---|---|---|")
    for what in seconds:
        print(f"| {what} | {middle[what]:.2f} | {least[what]:.2f} |")
    print(f"\ncheck.py costs {middle['check.py'] - middle['one fact']:.2f} s more than one fact")
