"""The wire: a bridge for each lab, with a /24 of its own from the range set aside for tests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tools import LabError, locked, run

WEB_PORT = 21080
PROXY_PORT = 21128
CDN_PORT = 21081

_LOCK = Path("/run/lock/llamastead-lab.lock")
_PREFIX = "llamalab"
_DEFAULT_NUMBER = 213
_NUMBERS = (_DEFAULT_NUMBER, *(number for number in range(1, 255) if number != _DEFAULT_NUMBER))


@dataclass(frozen=True)
class Network:
    """A bridge and its addresses: 198.18.NUMBER.0/24, which RFC 2544 sets aside for tests."""

    number: int

    @property
    def bridge(self) -> str:
        """Name of the bridge; it is also the lock on the number, since there can be only one."""
        return f"{_PREFIX}{self.number}"

    @property
    def address(self) -> str:
        """Address of this machine on the bridge."""
        return self.host_address(1)

    def host_address(self, number: int) -> str:
        """Return an address on the bridge."""
        return f"198.18.{self.number}.{number}"


def find(owner: Path) -> Network | None:
    """Return the network that belongs to the lab in this folder."""
    for link in _bridges():
        if link["address"] == _hardware_address(owner):
            return Network(int(link["ifname"].removeprefix(_PREFIX)))
    return None


def ensure(owner: Path, number: int | None = None) -> Network:
    """Make the lab's network unless it is there; with a number, that one and no other."""
    with locked(_LOCK):
        network = find(owner) or _add_bridge(owner, number)
        # Said again every time, for a bridge whose making was interrupted.
        run(["ip", "address", "replace", f"{network.address}/24", "dev", network.bridge])
        run(["ip", "link", "set", network.bridge, "up"])
        return network


def _add_bridge(owner: Path, number: int | None) -> Network:
    taken = {link["ifname"] for link in _bridges()}
    for candidate in (number,) if number is not None else _NUMBERS:
        network = Network(candidate)
        if network.bridge not in taken:
            address = _hardware_address(owner)
            run(["ip", "link", "add", network.bridge, "address", address, "type", "bridge"])
            return network
    raise LabError(
        f"network {number} of this lab is taken by another one: take one of them down"
        if number is not None
        else "all lab networks are taken: take labs down (`python -m tests.lab status`)"
    )


def remove(owner: Path) -> None:
    """Remove the lab's network, if it is there."""
    with locked(_LOCK):
        if (network := find(owner)) is not None:
            run(["ip", "link", "delete", network.bridge])


def _hardware_address(owner: Path) -> str:
    """Return the address by which the bridge of a lab is known: given to it as it is made.

    So there is no moment at which it exists and nobody knows whose it is.
    """
    digest = hashlib.sha256(str(owner).encode()).digest()
    locally_administered = 0x02
    return ":".join(f"{byte:02x}" for byte in (locally_administered, *digest[:5]))


def _bridges() -> list[dict[str, Any]]:
    links = json.loads(run(["ip", "-json", "link", "show", "type", "bridge"]) or "[]")
    return [link for link in links if link.get("ifname", "").startswith(_PREFIX)]
