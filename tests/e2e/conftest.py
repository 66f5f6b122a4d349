"""Hosts that were deployed to, once for all tests that look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import deploys
from tests.e2e.deploys import Run
from tests.lab import Distribution, Lab, LabHost, compiler_cache

CCACHE = "/var/cache/llamastead/llama.cpp/ccache"


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The outside, and a wire for hosts."""
    lab = Lab("e2e")
    lab.down()  # what a killed run left
    with lab:
        yield lab


def new_host(lab: Lab, name: str, distribution: Distribution = "debian-13") -> LabHost:
    """A fresh host whose compiler cache outlives it: the second time a test runs, it is quick."""
    return lab.host(distribution, name=name, binds={compiler_cache(): CCACHE})


@dataclass(frozen=True)
class Deployed:
    """A host and the deploy that made it serve."""

    lab: Lab
    host: LabHost
    data: dict[str, Any]
    folder: Path
    first: Run

    def again(self, script: str = "deploy.py", **data: Any) -> Run:
        """Deploy again, with other settings where given. A value of None leaves one out."""
        merged = {key: value for key, value in {**self.data, **data}.items() if value is not None}
        inventory = deploys.write_inventory(self.folder, {self.host.name: merged})
        return deploys.run(inventory, script)


def deploy(
    lab: Lab,
    host: LabHost,
    folder: Path,
    *,
    sudo: bool,
    arguments: Sequence[str] = (),
    **data: Any,
) -> Deployed:
    """Deploy to a host for the first time."""
    merged = {**deploys.access(lab, host, sudo=sudo), **deploys.wanted(lab), **data}
    inventory = deploys.write_inventory(folder, {host.name: merged})
    first = deploys.run(inventory, arguments=arguments)
    assert first.code == 0, first.said[-6000:]
    return Deployed(lab, host, merged, folder, first)


@pytest.fixture(scope="session")
def debian_13(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Debian 13, deployed to as root, serving beyond loopback."""
    host = new_host(lab, "trixie", "debian-13")
    folder = tmp_path_factory.mktemp("trixie")
    return deploy(lab, host, folder, sudo=False, server_host=host.address)


@pytest.fixture(scope="session")
def debian_12(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Debian 12, deployed to as a user whose sudo wants a password, serving on loopback.

    With options of the user's own: less optimised, which compiles in half the time.
    """
    host = new_host(lab, "bookworm", "debian-12")
    quick = {f"CMAKE_{language}_FLAGS_RELEASE": "-O1 -DNDEBUG" for language in ("C", "CXX")}
    folder = tmp_path_factory.mktemp("bookworm")
    return deploy(lab, host, folder, sudo=True, llama_cpp_cmake_args=quick)
