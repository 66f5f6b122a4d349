"""The lab: hosts, the wire between them and the outside, brought up and taken down together."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from . import network
from .disk import Disk
from .hosts import LabHost, make_host
from .machine import install_missing, obstacle
from .network import PROXY_PORT, Network
from .outside import Outside
from .processes import ProcessGroup
from .roots import DISTRIBUTIONS, Distribution, Variant, base_root, mirrors
from .tools import LabError, cache_directory, locked, run, say, write_whole

_FIRST_HOST_ADDRESS = 11


class Lab:
    """Throwaway hosts with the outside that they need, under a name.

    All state is on disk and in the kernel: another process, or the next one after a crash, finds
    the same lab by its name. `up` and `down` may be called at any time and any number of times.
    """

    def __init__(self, name: str = "default") -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
            raise LabError(f"lab name {name!r}: lower-case letters, digits and hyphens, please")
        if reason := obstacle():
            raise LabError(reason)
        self.name = name
        self.directory = _labs() / name
        self._lock = cache_directory("locks", _labs().name) / f"{name}.lock"
        self.ssh_key = self.directory / "ssh" / "id_ed25519"
        self.ssh_config = self.directory / "ssh" / "config"
        self.known_hosts = self.directory / "ssh" / "known_hosts"

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    # As a whole

    def up(self) -> Lab:
        """Bring the network and the outside up, and boot the hosts that the lab has."""
        with locked(self._lock):
            self._up()
        for host in self.hosts():
            host.start()
        return self

    def _up(self) -> None:
        install_missing()
        self.ssh_key.parent.mkdir(parents=True, exist_ok=True)
        if not self.ssh_key.exists():
            new = self.ssh_key.with_name("new")
            for file in (new, new.with_suffix(".pub")):
                file.unlink(missing_ok=True)
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", new])
            new.with_suffix(".pub").rename(self.ssh_key.with_suffix(".pub"))
            new.rename(self.ssh_key)
        Outside(self.directory, self._ensure_network()).start()

    def _ensure_network(self) -> Network:
        # The hosts that are there have their addresses on their disks.
        numbers = {int(host.address.split(".")[2]) for host in self.hosts()}
        return network.ensure(self.directory, next(iter(numbers), None))

    def down(self) -> None:
        """Take everything of this lab down and throw it away, however much of it is there."""
        with locked(self._lock):
            if (wire := network.find(self.directory)) is not None:
                say(f"taking lab {self.name} down")
                ProcessGroup(wire.bridge).kill()
            for host in self.hosts():
                host.remove()
            # Those whose making or removal was interrupted.
            for directory in self.directory.glob("hosts/*"):
                Disk(directory).throw_away()
            network.remove(self.directory)
            if self.directory.exists():
                shutil.rmtree(self.directory)

    @property
    def is_up(self) -> bool:
        """Whether the lab has its network."""
        return network.find(self.directory) is not None

    @property
    def network(self) -> Network:
        """The lab's network."""
        if (found := network.find(self.directory)) is None:
            raise LabError(f"lab {self.name} is not up")
        return found

    @property
    def outside(self) -> Outside:
        """The servers that the hosts reach: files, git, proxy."""
        return Outside(self.directory, self.network)

    # Hosts

    def hosts(self) -> list[LabHost]:
        """Return the hosts that the lab has, running or not, in the order of their addresses."""
        found = [
            LabHost(file.parent, self.ssh_config)
            for file in self.directory.glob("hosts/[!.]*/host.json")
        ]
        return sorted(found, key=lambda host: int(host.address.rpartition(".")[2]))

    def host(
        self,
        distribution: Distribution = "debian-13",
        *,
        name: str | None = None,
        variant: Variant = "standard",
        binds: Mapping[Path, str] | None = None,
    ) -> LabHost:
        """Return the host of this name, running; make it first if it isn't there.

        Without a name it is called after its distribution and variant. `binds` are folders of this
        machine that the host sees, by the path at which it sees them.
        """
        if name is None:
            name = distribution if variant == "standard" else f"{distribution}-{variant}"
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", name):
            raise LabError(f"host name {name!r}: lower-case letters, digits and hyphens, please")
        if distribution not in DISTRIBUTIONS:
            raise LabError(f"no distribution {distribution!r}: there is {', '.join(DISTRIBUTIONS)}")
        directory = self.directory / "hosts" / name
        with locked(self._lock):
            self._up()
            if not (directory / "host.json").exists():
                wire = self.network
                say(f"making host {name} ({distribution}, {variant})")
                base = base_root(distribution, variant)
                self.outside.allow(mirrors(base))
                make_host(
                    directory,
                    base,
                    machine=f"lab{wire.number}-{name}",
                    address=self._free_address(wire),
                    bridge=wire.bridge,
                    distribution=distribution,
                    variant=variant,
                    authorized_key=self.ssh_key.with_suffix(".pub").read_text(),
                    binds=binds or {},
                )
                self._write_ssh_files()
        host = LabHost(directory, self.ssh_config)
        if host.distribution != distribution or host.record.variant != variant:
            raise LabError(
                f"host {name} is {host.distribution} ({host.record.variant}) already: "
                "take the lab down, or choose another name"
            )
        host.start()
        if not host.reaches(self.network.address, PROXY_PORT):
            raise LabError(
                f"{name} can't reach this machine: let its firewall accept what comes in from "
                f"{self.network.bridge}"
            )
        return host

    def host_group(
        self,
        count: int,
        distribution: Distribution = "debian-13",
        *,
        binds: Mapping[Path, str] | None = None,
    ) -> list[LabHost]:
        """Return that many hosts of one distribution, called debian-13-1, debian-13-2 and so on."""
        names = [f"{distribution}-{number}" for number in range(1, count + 1)]

        def host(name: str) -> LabHost:
            return self.host(distribution, name=name, binds=binds)

        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(host, names))

    def _free_address(self, wire: Network) -> str:
        taken = {host.address for host in self.hosts()}
        for number in range(_FIRST_HOST_ADDRESS, 255):
            if (address := wire.host_address(number)) not in taken:
                return address
        raise LabError(f"lab {self.name} has no address left")

    def _write_ssh_files(self) -> None:
        hosts = self.hosts()
        key = "".join(f"{host.name},{host.address} {host.record.ssh_host_key}\n" for host in hosts)
        write_whole(self.known_hosts, key)
        common = {
            "User": "root",
            "IdentityFile": self.ssh_key,
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "ServerAliveInterval": 15,
        }
        lines = [f"Host {host.name} {host.address}\n  HostName {host.address}\n" for host in hosts]
        lines += ["Host *\n", *(f"  {option} {value}\n" for option, value in common.items())]
        write_whole(self.ssh_config, "".join(lines))


def labs() -> list[Lab]:
    """Return the labs of this user that are up, or were and have not been taken down."""
    return [Lab(path.name) for path in sorted(_labs().iterdir()) if path.is_dir()]


def _labs() -> Path:
    """Folder of the labs that this process knows.

    Two test runs at a time need two of them, or one takes down what the other has under the same
    name. What takes long to make, such as base roots, they share.
    """
    other = os.environ.get("LLAMASTEAD_LABS")
    return cache_directory(f"labs-{other}" if other else "labs")
