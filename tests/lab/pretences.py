"""What a host is made to believe: the driver is loaded, it is inside WSL, it has an engine."""

from __future__ import annotations

import textwrap

from .hosts import LabHost

WSL_KERNEL = "6.6.87.2-microsoft-standard-WSL2"


def load_driver(host: LabHost, version: str) -> None:
    """Let the kernel look as it would after a reboot: NVIDIA's driver is loaded."""
    _in_sys(host, f"mkdir -p module/nvidia && echo {version} >module/nvidia/version")


def switch_secure_boot(host: LabHost, on: bool) -> None:
    """Let the firmware say that Secure Boot is on; or let there be no such firmware."""
    variable = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    write = f"mkdir -p firmware/efi/efivars && printf '\\6\\0\\0\\0\\1' >{variable}"
    _in_sys(host, write if on else "rm -rf firmware")


def _in_sys(host: LabHost, script: str) -> None:
    """In nspawn /sys is a folder like others, into which some of the real one is mounted."""
    host.run(f"mount -o remount,rw /sys && cd /sys && {script} && mount -o remount,ro /sys")


def have_driver(host: LabHost, version: str) -> None:
    """Let the host look like a container with a driver: loaded, its library out of ld.so's way."""
    load_driver(host, version)
    host.run(
        "set -e; mkdir -p /usr/local/nvidia/lib64; cd /usr/local/nvidia/lib64\n"
        f"touch libcuda.so.{version}; ln -sf libcuda.so.{version} libcuda.so.1"
    )


def enter_wsl(host: LabHost, windows_driver: str) -> None:
    """Let the host look like a distribution inside WSL, with an RTX 5090 in Windows."""
    host.pretend_kernel_release(WSL_KERNEL)
    told = f"00000000:01:00.0, 0x2B8510DE, 32607, {windows_driver}"
    host.run(
        "set -e; mkdir -p /usr/lib/wsl/lib; touch /dev/dxg /usr/lib/wsl/lib/libcuda.so.1\n"
        f"printf '#!/bin/sh\\necho \"{told}\"\\n' >/usr/lib/wsl/lib/nvidia-smi\n"
        "chmod 755 /usr/lib/wsl/lib/nvidia-smi\n"
        "printf '[boot]\\nsystemd=true\\n' >/etc/wsl.conf"
    )


def run_docker(host: LabHost) -> None:
    """Let the host have a Docker that says of itself what a deploy asks, and logs its reloads.

    It has an image if there is a file /root/image, which says what containers print.
    """
    _program(
        host,
        "docker",
        """
        case "$1" in
            --version) echo "Docker version 28.0.1, build 0000000" ;;
            info) cat /etc/docker/daemon.json 2>/dev/null ;;
            images) [ ! -e /root/image ] || echo 0123456789ab ;;
            run) cat /root/image; ! grep -q rror /root/image ;;
        esac
        """,
    )
    unit = """\
        [Service]
        ExecStart=/bin/sleep infinity
        ExecReload=/bin/sh -c 'echo reloaded >>/var/log/docker-reloads'
        """
    host.run("cat >/etc/systemd/system/docker.service", stdin=textwrap.dedent(unit))
    host.run("systemctl daemon-reload && systemctl start docker")


def have_podman(host: LabHost, version: str) -> None:
    """Let the host have a Podman that knows its version and has no image."""
    _program(host, "podman", f'[ "$1" != --version ] || echo "podman version {version}"')


def _program(host: LabHost, name: str, script: str) -> None:
    path = f"/usr/local/bin/{name}"
    host.run(f"cat >{path} && chmod 755 {path}", stdin=f"#!/bin/sh\n{textwrap.dedent(script)}\n")
