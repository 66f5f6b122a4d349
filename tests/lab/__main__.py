"""The lab from the command line: `./run python -m tests.lab --help`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from .hosts import LabHost
from .lab import Lab, labs
from .machine import obstacle
from .roots import DISTRIBUTIONS
from .tools import LabError


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    # What follows `--` is for the host, whatever it looks like.
    here = given[: given.index("--")] if "--" in given else given
    options = _parser().parse_args(here)
    options.command = given[len(here) + 1 :]
    if reason := obstacle():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    try:
        return int(options.act(options))
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab",
        description="Throwaway hosts with a real systemd, and the outside that they reach.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, help_: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_, description=help_)
        added.set_defaults(act=globals()[f"_{name}"])
        added.add_argument("--name", default="default", help="name of the lab (%(default)s)")
        return added

    up = command("up", "bring a lab up, or add hosts to it")
    up.add_argument("--distribution", choices=DISTRIBUTIONS, default="debian-13")
    up.add_argument("--hosts", type=int, default=1, metavar="N", help="how many (%(default)s)")
    command("down", "take a lab down, with everything in it")
    command("status", "show what is up")
    ssh = command("ssh", "log in to a host; or, after --, run a command there")
    ssh.add_argument("--user", default="root", help="root or admin (%(default)s)")
    ssh.add_argument("host", nargs="?", help="its name (the first one)")
    return parser


def _up(options: argparse.Namespace) -> int:
    lab = Lab(options.name).up()
    lab.host_group(options.hosts, options.distribution)
    _show(lab)
    return 0


def _down(options: argparse.Namespace) -> int:
    Lab(options.name).down()
    return 0


def _status(_: argparse.Namespace) -> int:
    found = labs()
    for lab in found:
        _show(lab)
    if not found:
        print("no lab is up")
    return 0


def _ssh(options: argparse.Namespace) -> int:
    hosts = {host.name: host for host in Lab(options.name).hosts()}
    if not hosts:
        raise LabError(f"lab {options.name} has no hosts: bring one up first")
    name = options.host or next(iter(hosts))
    if name not in hosts:
        raise LabError(f"no host {name!r} in lab {options.name}: there is {', '.join(hosts)}")
    ssh = [*hosts[name].ssh_command(options.user), *options.command]
    return subprocess.run(ssh, check=False).returncode


def _show(lab: Lab) -> None:
    print(f"lab {lab.name}")
    if lab.is_up:
        outside = lab.outside
        print(f"  {'outside':16} {'running' if outside.is_running else 'stopped'}")
        print(f"  {'  proxy':16} {outside.proxy_url}")
        print(f"  {'  llama.cpp':16} {outside.git_url} {outside.llama_cpp_commit}")
        print(f"  {'  model':16} {outside.model_url} {outside.model_sha256}")
    else:
        print(f"  {'outside':16} down")
    for host in lab.hosts():
        print(f"  {host.name:16} {_state(host)} {host.address} {host.distribution}")


def _state(host: LabHost) -> str:
    return "running" if host.is_running else "stopped"


if __name__ == "__main__":
    sys.exit(main())
