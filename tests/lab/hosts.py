"""A host: a disk of its own, a real systemd and a real SSH server, in systemd-nspawn."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .disk import Disk
from .processes import ProcessGroup
from .roots import ADMIN_PASSWORD, ADMIN_USER, Distribution, Variant
from .tools import LabError, locked, run, say, write_whole

_ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
}
_BOOT_SECONDS = 90


@dataclass(frozen=True)
class PciDevice:
    """A PCI device to pretend, by the files that sysfs would show for it."""

    vendor: str
    device: str
    class_: str
    slot: str = "0000:01:00.0"
    files: Mapping[str, str] = field(default_factory=dict)
    """More files, for instance `resource` or `subsystem_vendor`."""


RTX_5090 = PciDevice(vendor="0x10de", device="0x2b85", class_="0x030000")
H200 = PciDevice(vendor="0x10de", device="0x2335", class_="0x030200")


@dataclass(frozen=True)
class HostRecord:
    """What is written down about a host, so that any process can take it over."""

    name: str
    machine: str
    distribution: Distribution
    variant: Variant
    address: str
    bridge: str
    ssh_host_key: str
    binds: dict[str, str] = field(default_factory=dict)
    pci: list[PciDevice] | None = None
    kernel_release: str | None = None


class LabHost:
    """A throwaway host. Its disk outlives `poweroff` and `kill`; `remove` takes all of it away."""

    admin_user = ADMIN_USER
    admin_password = ADMIN_PASSWORD

    def __init__(self, directory: Path, ssh_config: Path) -> None:
        self.directory = directory
        self.ssh_config = ssh_config
        self._record_file = directory / "host.json"
        self.record = self._read()
        self.name = self.record.name
        self.address = self.record.address
        self.distribution = self.record.distribution
        self._disk = Disk(directory)
        self.root = self._disk.root
        self.processes = ProcessGroup(f"{self.record.bridge}/{self.name}")

    def __repr__(self) -> str:
        return f"LabHost({self.name}, {self.distribution}, {self.address})"

    def _read(self) -> HostRecord:
        data = json.loads(self._record_file.read_text())
        if data["pci"] is not None:
            data["pci"] = [PciDevice(**device) for device in data["pci"]]
        return HostRecord(**data)

    def _write(self, **changes: object) -> None:
        data = {**asdict(self.record), **changes}
        write_whole(self._record_file, json.dumps(data, indent=1))
        self.record = self._read()

    # Power

    @property
    def is_running(self) -> bool:
        """Whether the host has power, booted or not."""
        return not self.processes.is_empty

    def start(self) -> None:
        """Boot the host unless it runs, and wait until its systemd is up and SSH answers."""
        with locked(self.directory / "lock"):
            if not self.is_running:
                self._clear()
                self._disk.mount()
                self.processes.start(
                    self._nspawn(),
                    log=self.directory / "console.log",
                    env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                )
        self._wait_booted()
        if self.record.pci is not None:
            self._show_pci(self.record.pci)
        if self.record.kernel_release is not None:
            self._show_kernel_release(self.record.kernel_release)

    def _nspawn(self) -> list[str | Path]:
        record = self.record
        return [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            f"--directory={self.root}",
            f"--machine={record.machine}",
            f"--hostname={record.name}",
            f"--network-bridge={record.bridge}",
            "--register=no",  # this machine need not run systemd itself
            "--keep-unit",
            "--settings=no",
            "--link-journal=no",
            "--resolv-conf=off",
            "--timezone=off",
            "--console=pipe",
            # The sandboxes of the units in it need to set filters and mount.
            "--capability=all",
            "--system-call-filter=@keyring @privileged bpf",
            *(f"--bind={outside}:{inside}" for outside, inside in record.binds.items()),
        ]

    def _wait_booted(self) -> None:
        deadline = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < deadline:
            if not self.is_running:
                raise LabError(f"{self.name} ended while booting: {self._last_words()}")
            if self._systemd_is_up() and self._ssh_answers():
                return
            time.sleep(0.05)
        raise LabError(f"{self.name} is not up after {_BOOT_SECONDS} s: {self._last_words()}")

    def _systemd_is_up(self) -> bool:
        if self._leader() is None:
            return False
        state = self.run("systemctl is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def _ssh_answers(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _last_words(self) -> str:
        console = self.directory / "console.log"
        lines = console.read_text(errors="replace").split("\n") if console.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def poweroff(self) -> None:
        """Shut the host down in an orderly way; its disk stays."""
        if self.is_running:
            self.run("systemctl poweroff", check=False)
            if not self.processes.wait_empty(60):
                say(f"{self.name} does not shut down: cutting its power")
        self.kill()

    def kill(self) -> None:
        """Cut the power: every process of the host ends at once; its disk stays as it is."""
        self.processes.kill()
        self._clear()

    def reboot(self) -> None:
        """Shut the host down and boot it again."""
        self.poweroff()
        self.start()

    def remove(self) -> None:
        """Cut the power and throw the disk away."""
        self.kill()
        self._record_file.unlink()
        self._disk.throw_away()

    def _clear(self) -> None:
        """Remove what a killed nspawn leaves behind."""
        for leftover in ("propagate", "unix-export"):
            path = Path("/run/systemd/nspawn") / leftover / self.record.machine
            if path.is_mount():
                run(["umount", "--lazy", path])
            if path.is_dir():
                shutil.rmtree(path)
        inode = self.root.stat()
        lock = Path(f"/run/systemd/nspawn/locks/inode-{inode.st_dev}:{inode.st_ino}")
        lock.unlink(missing_ok=True)
        self.root.with_name(f".#{self.root.name}.lck").unlink(missing_ok=True)

    # Commands

    def run(
        self,
        command: str,
        *,
        user: str = "root",
        check: bool = True,
        timeout: float | None = 300,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the host, without SSH and so within milliseconds."""
        inside = ["/bin/sh", "-c", command]
        if user != "root":
            inside = ["runuser", "-u", user, "--", *inside]
        done = subprocess.run(
            self._enter(inside),
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise LabError(f"{self.name}: `{command[:120]}` ended with {done.returncode}: {said}")
        return done

    def nsenter(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a program of the host in all its namespaces, from outside, as its root."""
        done = subprocess.run(
            self._enter(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"{self.name}: {shlex.join(command)}: {done.stderr.strip()}")
        return done

    def ssh(
        self, command: str, *, user: str = "root", timeout: float | None = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command over SSH, logged in with the lab's key."""
        return subprocess.run(
            [*self.ssh_command(user), command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def ssh_command(self, user: str = "root") -> list[str]:
        """Return the command line that logs in; what is appended to it runs there."""
        return ["ssh", "-F", str(self.ssh_config), "-l", user, self.name]

    def shell(self) -> int:
        """Give the person at the keyboard a root shell in the host; return its exit status."""
        return subprocess.run(self._enter(["/bin/bash", "-l"]), check=False).returncode

    def _enter(self, command: Sequence[str]) -> list[str]:
        leader = self._leader()
        if leader is None:
            raise LabError(f"{self.name} is not running")
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        environment = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        enter = ["nsenter", f"--target={leader}", *namespaces, "env", "--ignore-environment"]
        return [*enter, *environment, *command]

    def _leader(self) -> int | None:
        """Return the number that the host's systemd has on this machine."""
        for pid in self.processes.processes():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            numbers = status.partition("NSpid:")[2].partition("\n")[0].split()
            if len(numbers) == 2 and numbers[1] == "1":
                # Before it is systemd it is nspawn, still busy with making the namespaces.
                return pid if "Name:\tsystemd\n" in status else None
        return None

    def reaches(self, address: str, port: int) -> bool:
        """Whether the host can open a TCP connection."""
        connect = f"timeout 5 bash -c 'exec 3<>/dev/tcp/{address}/{port}'"
        return self.run(connect, check=False).returncode == 0

    # Pretended hardware

    def plug_in_pci(self, devices: Iterable[PciDevice]) -> None:
        """Let the host see these PCI devices and no others, also after a reboot."""
        self._write(pci=[asdict(device) for device in devices])
        if self.is_running:
            self._show_pci(self.record.pci or [])

    def _show_pci(self, devices: Iterable[PciDevice]) -> None:
        script = ["rm -rf /run/lab/pci; mkdir -p /run/lab/pci; cd /run/lab/pci"]
        for device in devices:
            files = {"vendor": device.vendor, "device": device.device, "class": device.class_}
            script += [f"mkdir -p {device.slot}"]
            for name, text in {**files, **device.files}.items():
                script += [f"echo {shlex.quote(text)} >{device.slot}/{shlex.quote(name)}"]
        script += ["umount /sys/bus/pci/devices 2>/dev/null || true"]
        script += ["mount --bind /run/lab/pci /sys/bus/pci/devices"]
        self.run("set -e\n" + "\n".join(script))

    def pretend_kernel_release(self, release: str) -> None:
        """Let /proc/sys/kernel/osrelease say this, also after a reboot (`uname -r` does not)."""
        self._write(kernel_release=release)
        if self.is_running:
            self._show_kernel_release(release)

    def _show_kernel_release(self, release: str) -> None:
        self.run(
            "set -e; mkdir -p /run/lab; umount /proc/sys/kernel/osrelease 2>/dev/null || true\n"
            f"echo {shlex.quote(release)} >/run/lab/osrelease\n"
            "mount --bind /run/lab/osrelease /proc/sys/kernel/osrelease"
        )


def make_host(
    directory: Path,
    base: Path,
    *,
    machine: str,
    address: str,
    bridge: str,
    distribution: Distribution,
    variant: Variant,
    authorized_key: str,
    binds: Mapping[Path, str],
) -> None:
    """Make a host's folder, with a disk that is ready to boot, in one step."""
    unfinished = directory.with_name(f".{directory.name}.tmp")
    for leftover in (directory, unfinished):  # of one whose making or removal was interrupted
        if leftover.exists():
            Disk(leftover).throw_away()
    disk = Disk.make(unfinished, base)
    root = disk.root
    (root / "etc/hostname").write_text(f"{directory.name}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {directory.name}\n")
    # Sorts before systemd's own 80-container-host0.network, which asks for an address by DHCP.
    (root / "etc/systemd/network/10-host0.network").write_text(
        f"[Match]\nName=host0\n\n[Network]\nAddress={address}/24\nLinkLocalAddressing=no\n"
    )
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", directory.name, "-f", host_key])
    for home in (root / "root", root / "home" / ADMIN_USER):
        _authorize(home, authorized_key)
    record = HostRecord(
        name=directory.name,
        machine=machine,
        distribution=distribution,
        variant=variant,
        address=address,
        bridge=bridge,
        ssh_host_key=host_key.with_suffix(".pub").read_text().strip(),
        binds={str(outside): inside for outside, inside in binds.items()},
    )
    (unfinished / "host.json").write_text(json.dumps(asdict(record), indent=1))
    disk.unmount()
    unfinished.rename(directory)


def _authorize(home: Path, key: str) -> None:
    folder = home / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / "authorized_keys"
    file.write_text(key)
    file.chmod(0o600)
    owner = home.stat()
    for path in (folder, file):
        os.chown(path, owner.st_uid, owner.st_gid)
