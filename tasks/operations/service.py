"""llama-server as a service: restarted for a reason, rolled back if it does not become healthy."""

from __future__ import annotations

import shlex
import time
from collections.abc import Generator

from pyinfra import host, state
from pyinfra.api import Host, State, operation
from pyinfra.api.command import FunctionCommand, PyinfraCommand

from tasks import probe as at
from tasks.operations import shell
from tasks.operations.release import switch
from tasks.rules.server import files_of

POLL_SECONDS = 3
PREVIOUS = f"{at.STATE}/previous"
"""Units with their files as they were when they last served, and the names of their releases."""


@operation()
def api_key() -> Generator[PyinfraCommand, None, None]:
    """An API key that only root reads, generated once; one that is there is kept."""
    key = at.API_KEY
    yield shell.command(
        f"install -d -m 755 {at.CONFIG} && if [ -s {key} ]; then chown root:root {key} && "
        f"chmod 600 {key}; else (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' "
        f">{key}.new && mv {key}.new {key}); fi"
    )


@operation()
def remembered(units: tuple[str, ...]) -> Generator[PyinfraCommand, None, None]:
    """Keep units, and the name of the release that each serves from, in case the next do not.

    After a deploy that was killed half-way the unit file is newer than what runs; then the older
    memory is the right one and stays.
    """
    each = "".join(map(_remember, units))
    yield shell.command(f"install -d -m 755 {at.STATE} {PREVIOUS} || exit 1\n{each}")


def _remember(unit: str) -> str:
    files = " ".join(path.lstrip("/") for path in files_of(unit))
    return f"""
if systemctl is-active --quiet {unit}; then
  pid=$(systemctl show {unit} -p MainPID --value)
  exe=$(readlink /proc/$pid/exe)
  release=${{exe#"$(readlink -f {at.RELEASES})"/}}
  printf %s "${{release%%/*}}" >{PREVIOUS}/{unit}.release
  digest=$(tr '\\0' '\\n' </proc/$pid/environ | sed -n 's/^LLAMASTEAD_DIGEST=//p')
  ! grep -q "LLAMASTEAD_DIGEST=$digest\\$" {at.UNITS}/{unit} ||
    tar -C / -cf {PREVIOUS}/{unit}.tar $(cd / && ls {files} 2>/dev/null) || exit 1
else
  rm -f {PREVIOUS}/{unit}.tar {PREVIOUS}/{unit}.release
fi
"""


@operation()
def stopped(unit: str) -> Generator[PyinfraCommand, None, None]:
    """A llama-server stopped, so that its port and memory are free.

    It stays enabled until it is removed: if what takes its place does not become healthy, it is
    started again.
    """
    yield shell.command(f"systemctl stop {unit}")


@operation()
def removed(unit: str) -> Generator[PyinfraCommand, None, None]:
    """A llama-server of ours stopped and off the host; drop-ins are the user's and stay."""
    files = shlex.join(files_of(unit))
    cache = f"/var/cache/{unit.removesuffix('.service')}"
    yield shell.command(
        f"""
grep -qsF '{at.UNIT_MARK}' {at.UNITS}/{unit} || exit 0
systemctl disable --now --quiet {unit} || exit 1
rm -rf {files} {cache} {PREVIOUS}/{unit}.tar {PREVIOUS}/{unit}.release
systemctl daemon-reload
systemctl reset-failed {unit} 2>/dev/null || true
"""
    )


@operation()
def serving(unit: str, digest: str) -> Generator[PyinfraCommand, None, None]:
    """A llama-server enabled, and running from the unit with this digest and from `current`.

    It is restarted only if it runs from something else. If it does not become healthy, the unit
    and the release that served before are put back and started, and the operation fails with
    llama-server's own last words.
    """
    if state.is_executing:
        _, output = shell.run(host, _difference(unit, digest))
        if output.stdout.strip() == "none":
            host.noop(f"{unit} runs from this unit and release")
            return
    yield shell.command(f"systemctl daemon-reload && systemctl enable --quiet {unit}")
    yield FunctionCommand(_restart, [unit], {})


def _difference(unit: str, digest: str) -> str:
    return f"""
pid=$(systemctl show {unit} -p MainPID --value)
systemctl is-active --quiet {unit} && systemctl is-enabled --quiet {unit} &&
[ "$(systemctl show {unit} -p NeedDaemonReload --value)" = no ] &&
[ "$(readlink /proc/$pid/exe)" = "$(readlink -f {at.CURRENT})/bin/llama-server" ] &&
tr '\\0' '\\n' </proc/$pid/environ | grep -qx LLAMASTEAD_DIGEST={digest} &&
echo none || echo some
"""


def _restart(
    state: State,  # noqa: ARG001  # pyinfra calls it so
    host: Host,
    unit: str,
) -> bool:
    if _start(host, unit):
        return True
    for line in _last_words(host, unit):
        shell.complain(host, line)
    if not _roll_back(host, unit):
        shell.run(host, f"systemctl stop {unit}")
        shell.complain(host, f"{unit} was stopped: there is nothing older to go back to.")
    for other in _stopped(host, unit):
        if _start(host, other):
            shell.complain(host, f"{other}: serves again.")
    return False


def _stopped(host: Host, unit: str) -> list[str]:
    """Other llama-servers of ours that should run and do not: stopped to make room."""
    _, output = shell.run(
        host,
        f"""
for file in {at.UNITS}/llama-server*.service; do
  other=${{file##*/}}
  [ "$other" != {unit} ] && grep -qsF '{at.UNIT_MARK}' "$file" &&
    systemctl is-enabled --quiet "$other" && ! systemctl is-active --quiet "$other" && echo "$other"
done
true
""",
    )
    return output.stdout_lines


def _start(host: Host, unit: str) -> bool:
    """Restart a unit and wait until it is healthy, saying how long it takes."""
    _, output = shell.run(host, f"systemctl show {unit} -p InvocationID --value")
    before = output.stdout.strip()
    queued, output = shell.run(
        host, f"systemctl reset-failed {unit} 2>/dev/null; systemctl restart --no-block {unit}"
    )
    if not queued:
        shell.complain(host, f"Error: systemd refuses to start {unit}: {output.stderr}")
        return False
    began = time.monotonic()
    while True:
        answered, output = shell.run(host, _wait(unit, before))
        if not answered:
            return False
        words = output.stdout.split()
        if words[:1] == ["active"]:
            return True
        if words[:1] != ["activating"] or "auto-restart" in words:
            return False
        shell.say(host, f"{unit} is loading the model ({time.monotonic() - began:.0f} s)")


def _wait(unit: str, before: str) -> str:
    """Shell that says the unit's state once it is another start than `before`, or after a while.

    `refused` if systemd has nothing left to do about the unit and there was no other start: a
    condition, or something that the unit requires, was not met.
    """
    return f"""
n=0
while [ $n -lt {POLL_SECONDS * 10} ]; do
  job=$(systemctl list-jobs --plain --no-legend {unit})
  now=$(systemctl show {unit} -p InvocationID --value)
  set -- $(systemctl show {unit} -p ActiveState,SubState --value)
  if [ "$now" != "{before}" ] && [ -n "$now" ]; then
    case "$1 $2" in
      "activating auto-restart"*) break ;;
      activating*|deactivating*) ;;
      *) break ;;
    esac
  elif [ -z "$job" ]; then
    echo refused
    exit
  fi
  n=$((n + 1)); sleep 0.1
done
if [ "$now" = "{before}" ]; then set -- activating stop; fi
[ "$1" != deactivating ] || set -- activating stop
echo "$1 $2"
"""


def _last_words(host: Host, unit: str) -> list[str]:
    _, output = shell.run(
        host,
        f"journalctl -q --no-pager -o cat -u {unit} -n 40 2>/dev/null | tail -n 15",
    )
    return [f"Error: {unit} did not become healthy. Its last words:", *output.stdout_lines]


def _roll_back(host: Host, unit: str) -> bool:
    """Put back what served before. True if it serves again.

    All llama-servers run from one release: if that goes back, so do those that this deploy had
    restarted from it already.
    """
    there, output = shell.run(
        host,
        f"""
[ -e {PREVIOUS}/{unit}.tar ] && release=$(cat {PREVIOUS}/{unit}.release) || exit 1
rm -f {shlex.join(files_of(unit))}
tar -C / -xpf {PREVIOUS}/{unit}.tar || exit 1
( {switch("$release")} ) || exit 1
for other in $(cd {PREVIOUS} && ls -- *.tar); do
  other=${{other%.tar}}
  [ $other != {unit} ] && [ "$(cat {PREVIOUS}/$other.release)" = "$release" ] || continue
  pid=$(systemctl show $other -p MainPID --value)
  [ "$pid" != 0 ] &&
    [ "$(readlink /proc/$pid/exe)" != "$(readlink -f {at.CURRENT})/bin/llama-server" ] || continue
  tar -C / -xpf {PREVIOUS}/$other.tar && echo $other
done
systemctl daemon-reload
""",
    )
    if not there or not _start(host, unit):
        return False
    others = [other for other in output.stdout_lines if _start(host, other)]
    which = " and ".join([unit, *others])
    shell.complain(host, f"{which}: unit and release of before are back and serving.")
    return True
