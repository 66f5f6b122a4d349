"""Long work on a host, as a transient systemd unit.

A lost connection does not kill it, a second run waits for it instead of starting its own, and
what it prints is shown while it runs.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

from pyinfra.api import Host, State, operation
from pyinfra.api.command import FunctionCommand, PyinfraCommand

from tasks.facts.told import assignments
from tasks.operations import shell
from tasks.probe import LOGS

RUN = "/run/llamastead"
POLL_SECONDS = 5
"""One command asks for that long, so that a job of an hour costs 720 short commands at most."""
ENDED = ("exited", "dead", "failed")
"""States of a unit that is over. One that ends goes through others, such as stop-sigterm, for as
long as a process of its own is left."""


@dataclass(frozen=True)
class Job:
    """What to run, as whom, and what it may write."""

    name: str
    """The unit is llamastead-NAME.service, its log /var/log/llamastead/NAME.log."""
    key: str
    """What the work is about: a running job of another key is stopped, one of this key waited
    for."""
    script: str
    """A shell script. A line `error: ...` is what is shown when it fails."""
    variables: Mapping[str, str]
    """Set at the head of the script; LOG is the path of the log."""
    user: str
    writable: tuple[str, ...]
    timeout_seconds: int
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Goes by a pipe into a file that only root reads, since a proxy's address can hold a
    password; that is removed when the job has begun."""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The same, for what not even the environment of the job's processes shows: systemd puts each
    into a file of this name in $CREDENTIALS_DIRECTORY."""
    capabilities: str = ""
    is_apt: bool = False
    """Runs with all of root's rights, as what packages bring demands, and is never cut short: one
    that runs is waited for, whatever it is about."""

    @property
    def unit(self) -> str:
        """Name of the unit."""
        return f"llamastead-{self.name}.service"

    @property
    def log(self) -> str:
        """Path of the log on the host."""
        return f"{LOGS}/{self.name}.log"

    @property
    def description(self) -> str:
        """How a running unit is recognised as this job."""
        return f"llamastead {self.name} {self.key}"


@operation()
def finished(job: Job) -> Generator[PyinfraCommand, None, None]:
    """Run a job to its end, showing its progress.

    Not idempotent by itself: call it only where there is work to do.
    """
    yield FunctionCommand(run_to_end, [job], {})


def run_to_end(
    state: State,  # noqa: ARG001  # pyinfra calls it so
    host: Host,
    job: Job,
) -> bool:
    """Start a job or join the one that runs, and wait. True if it succeeded."""
    try:
        return _run_to_end(host, job)
    except shell.Interrupted:
        shell.complain(
            host,
            f"{job.name}: goes on there; run this again to wait for it, or stop it: "
            f"systemctl stop {job.unit}",
        )
        raise


def _run_to_end(host: Host, job: Job) -> bool:
    started, output = shell.run(host, start_command(job), stdin="".join(_files(job).values()))
    if not started:
        shell.complain(host, f"{job.name}: cannot be started: {output.stderr or output.stdout}")
        return False
    if output.stdout_lines[-1:] == ["joined"]:
        shell.say(host, f"{job.name}: waiting for the one that an earlier run started")
    began = time.monotonic()
    while True:
        answered, output = shell.run(host, wait_command(job))
        if not answered:
            shell.complain(host, f"{job.name}: lost sight of it: {output.stderr}")
            shell.complain(host, "It goes on; run this again to wait for it.")
            return False
        unit, lines = _answer(output.stdout_lines)
        if unit.get("SubState", "dead") in ENDED:
            break
        counted = [line for line in lines if re.match(r"\[\d+/\d+\]", line)]
        last = (counted or lines or ["starting"])[-1]
        shell.say(host, f"{last[:110]} ({time.monotonic() - began:.0f} s)")
    if unit.get("Result") == "success" and unit.get("SubState") == "exited":
        shell.run(host, f"systemctl stop {job.unit}")
        if lines:
            shell.say(host, lines[-1][:150])
        return True
    shell.run(host, f"systemctl reset-failed {job.unit}")
    for line in explain(job, unit, lines):
        shell.complain(host, line)
    return False


def start_command(job: Job) -> str:
    """Shell that starts the job and says `started`, or finds it running and says `joined`."""
    variables = {**job.variables, "LOG": job.log}
    head = assignments(variables)
    script, env = f"{RUN}/{job.name}.sh", f"{RUN}/{job.name}.env"
    files = _files(job)
    properties = {
        "StandardOutput": f"truncate:{job.log}",
        "StandardError": "inherit",
        "EnvironmentFile": env,
        "UMask": "0022",
        **({} if job.is_apt else _sandbox(job)),
    }
    words = ["systemd-run", "--quiet", "--remain-after-exit", f"--unit={job.unit}"]
    words += [f"--description={job.description}", "--service-type=exec"]
    words += [f"--property={name}={value}" for name, value in properties.items()]
    words += [f"--property=LoadCredential={name}:{RUN}/{job.name}.{name}" for name in job.secrets]
    words += ["/bin/sh", script]
    take = "\n".join(f"head -c {len(text.encode())} >{path}" for path, text in files.items())
    forget = f"rm -f {shlex.join(files)}"
    return f"""
if [ "$(systemctl show {job.unit} -p SubState --value)" = running ] &&
   [ "$(systemctl show {job.unit} -p Description --value)" = {shlex.quote(job.description)} ]
then cat >/dev/null; echo joined; exit 0; fi
{_WAIT_FOR.format(unit=job.unit) if job.is_apt else ""}
systemctl stop {job.unit} 2>/dev/null
systemctl reset-failed {job.unit} 2>/dev/null
mkdir -p {RUN} {LOGS} && chmod 755 {RUN} {LOGS} || exit 1
trap {shlex.quote(forget)} EXIT
(
umask 077
{forget}
{take}
) || exit 1
printf %s {shlex.quote(head + job.script)} >{script} || exit 1
{shlex.join(words)} </dev/null || exit 1
echo started
"""


_WAIT_FOR = f"""
until case $(systemctl show {{unit}} -p SubState --value) in {"|".join(ENDED)}) ;; *) false; esac
do sleep 1; done
""".strip()


def _sandbox(job: Job) -> dict[str, str]:
    """Out of everybody's way, and able to write where it has to and nowhere else."""
    return {
        "User": job.user,
        "RuntimeMaxSec": str(job.timeout_seconds),
        "Nice": "10",
        "CPUSchedulingPolicy": "batch",
        "IOSchedulingClass": "idle",
        "OOMScoreAdjust": "500",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "ReadWritePaths": " ".join(job.writable),
        "PrivateTmp": "yes",
        "PrivateDevices": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": job.capabilities,
        "RestrictSUIDSGID": "yes",
    }


def _files(job: Job) -> dict[str, str]:
    """What only root may read, by the path where systemd finds it when the job begins."""
    environment = "".join(
        f"{name}={_environment_value(value)}\n" for name, value in job.environment.items()
    )
    secrets = {f"{RUN}/{job.name}.{name}": f"{text}\n" for name, text in job.secrets.items()}
    # Never empty: what is sent by a pipe ends with a line's end anyway.
    return {f"{RUN}/{job.name}.env": environment or "\n", **secrets}


def wait_command(job: Job) -> str:
    """Shell that returns when the job has ended, or after a while with how far it is.

    The last counted step comes before the log's last lines: a compiler's warnings can push it far
    up.
    """
    return f"""
n=0
while [ $n -lt {POLL_SECONDS} ]; do
  case $(systemctl show {job.unit} -p SubState --value) in
    {"|".join(ENDED)}|"") break ;;
    *) sleep 1 ;;
  esac
  n=$((n + 1))
done
systemctl show {job.unit} -p SubState,Result,ExecMainStatus
echo
tail -c 1000000 {job.log} 2>/dev/null | grep -aE '^\\[[0-9]+/[0-9]+\\]' | tail -n 1
tail -n 15 {job.log} 2>/dev/null
grep '^error: ' {job.log} 2>/dev/null | tail -n 3
true
"""


def explain(job: Job, unit: Mapping[str, str], lines: list[str]) -> list[str]:
    """What to tell about a job that failed: its own words where it has some."""
    own = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
    if own:
        return [f"{job.name}: {line.removeprefix('error: ')}" for line in own]
    result = unit.get("Result")
    reasons = {
        "oom-kill": "the host ran out of memory; add swap or set fewer jobs",
        "timeout": f"it took longer than {job.timeout_seconds} s",
        "signal": "it was killed",
    }
    reason = reasons.get(result or "", f"exit code {unit.get('ExecMainStatus', 'unknown')}")
    if unit.get("SubState") == "dead":
        reason = "it was stopped before it ended (a reboot?); run this again"
    return [f"{job.name}: failed: {reason}. The end of {job.log}:", *lines[-15:]]


def _answer(output: list[str]) -> tuple[dict[str, str], list[str]]:
    """The unit's properties and the log's last lines."""
    blank = output.index("") if "" in output else len(output)
    pairs = (line.partition("=") for line in output[:blank])
    return {name: value for name, _, value in pairs}, [line for line in output[blank + 1 :] if line]


def _environment_value(value: str) -> str:
    """A value for systemd's EnvironmentFile, in double quotes."""
    for character in '\\"`$':
        value = value.replace(character, "\\" + character)
    return f'"{value}"'
