"""apt on the host: whoever holds its locks is waited for, what was cut short is repaired."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Mapping, Sequence

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.facts.told import LISTEN, exports
from tasks.operations import rehearsal, shell
from tasks.operations.job import Job, finished
from tasks.rules import apt
from tasks.rules.nvidia.installation import PackageSet

LOCK_SECONDS = 600
"""unattended-upgrades after boot takes minutes."""

QUIET = {
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_MODE": "l",  # it would restart services that nobody asked it to
    "LC_ALL": "C",
}

OPTIONS = (
    f"-o DPkg::Lock::Timeout={LOCK_SECONDS}",
    "-o Dpkg::Use-Pty=false",
    # The user's own configuration files stay.
    "-o Dpkg::Options::=--force-confdef",
    "-o Dpkg::Options::=--force-confold",
)

_UPDATE = f"""
n=0
until said=$(apt-get -q update 2>&1); do
  case $said in
    *"Could not get lock"*|*"Unable to lock"*) ;;
    *) printf '%s\\n' "$said"; exit 1 ;;
  esac
  if [ $n -ge {LOCK_SECONDS} ]; then printf '%s\\n' "$said"; exit 1; fi
  n=$((n + 2)); sleep 2
done
"""
"""apt waits for dpkg's lock by itself, but not for that of its lists."""


@operation()
def updated(environment: Mapping[str, str]) -> Generator[PyinfraCommand, None, None]:
    """Read the package lists anew."""
    if not state.is_executing:
        yield shell.command("apt-get update")
        return
    # A proxy's address can hold a password, which has no business in a process list.
    told = exports({**environment, "LC_ALL": "C"})
    succeeded, output = shell.run(host, LISTEN + _UPDATE, stdin=told)
    if not succeeded:
        said = apt.complaint(output.stdout_lines)
        yield shell.failure(f"Error: the package lists cannot be read: {said}.")


@operation()
def repaired(environment: Mapping[str, str]) -> Generator[PyinfraCommand, None, None]:
    """Finish what dpkg was interrupted at, and what an earlier run of ours was."""
    yield from run_apt(
        "repair",
        f"""
mkdir -p {rehearsal.ARCHIVES}/partial
dpkg --force-confdef --force-confold --configure -a
apt-get -q -y {" ".join(OPTIONS)} -f install || return
[ ! -s {at.APT_PENDING} ] || apt-get -q -y {" ".join(OPTIONS)} $(cat {at.APT_PENDING}) || return
rm -f {at.APT_PENDING}
""",
        environment,
        "an interrupted installation cannot be finished",
    )


@operation()
def added(
    packages: Sequence[str], environment: Mapping[str, str]
) -> Generator[PyinfraCommand, None, None]:
    """Install packages that the host lacks, without what they recommend."""
    yield from run_apt(
        "packages",
        f"apt-get -q -y {' '.join(OPTIONS)} --no-install-recommends install {shlex.join(packages)}",
        environment,
        "the packages cannot be installed",
    )


_FORGOTTEN_PINS = f"""
forgotten=$(dpkg-query -W -f '${{db:Status-Abbrev}} ${{Package}}\\n' '{apt.PINNING}*' 2>/dev/null |
  sed -n 's/^rc *//p')
[ -z "$forgotten" ] || dpkg --purge $forgotten || return
"""
"""Pins of before that were removed and not purged still hold."""


@operation()
def installed(
    packages: PackageSet, environment: Mapping[str, str], pins: bool = False, brings: str = ""
) -> Generator[PyinfraCommand, None, None]:
    """Install what was rehearsed (or first the packages that pin it), as it was rehearsed.

    Goes on if the connection breaks. What is being installed is written down first, so that after
    a power cut the next run finishes it. `brings` is a file that has to be there at the end.
    """
    if pins:
        # A pin that gives way has its preferences in a configuration file, which is to go too.
        arguments = ["--purge", *rehearsal.WHATEVER_IS_HELD, "install", *packages.pins]
    elif state.is_executing:
        arguments = rehearsal.arguments(packages.key)
    else:
        arguments = ["install", *packages.packages]
    archives = rehearsal.ARCHIVES
    command = " ".join([f"-oDir::Cache::archives={archives}", *arguments])
    yield from run_apt(
        packages.what,
        f"""
mkdir -p {at.STATE} {archives}/partial || return
printf '%s\\n' {shlex.quote(command)} >{at.APT_PENDING} && sync {at.APT_PENDING} || return
apt-get -q -y {" ".join(OPTIONS)} {command} || return
{_FORGOTTEN_PINS if pins else ""}
[ -z "{brings}" ] || [ -e "{brings}" ] || {{ echo "E: {brings} is not there"; return 1; }}
rm -f {at.APT_PENDING}
""",
        environment,
        f"{packages.what} cannot be installed",
    )


@operation()
def marked(mark: str, root: str) -> Generator[PyinfraCommand, None, None]:
    """Write down the version of a toolkit's nvcc, in a file that is named after the release."""
    number = "s/.*, V\\([0-9.]*\\).*/\\1/p"
    yield shell.command(f"{root}/bin/nvcc --version | sed -n '{number}' >{mark}")


def run_apt(
    what: str, script: str, environment: Mapping[str, str], failed: str
) -> Generator[PyinfraCommand, None, None]:
    """Commands of an operation that run apt, or dpkg, as a job.

    The job ends well even where apt does not, so that one line says what is wrong.
    """
    job = Job(
        name="apt",
        key=what,
        script=f"run() {{\n{script}\n}}\nif run 2>&1; then echo finished; else echo failed; fi\n",
        variables={},
        user="root",
        writable=(),
        timeout_seconds=0,
        environment={**environment, **QUIET},
        is_apt=True,
    )
    yield from finished._inner(job=job)
    if not state.is_executing:
        return
    _, output = shell.run(host, f"cat {job.log}")
    lines = output.stdout_lines
    if lines[-1:] != ["finished"]:
        yield shell.failure(f"Error: {failed}: {apt.complaint(lines[:-1])}. All of it: {job.log}")
