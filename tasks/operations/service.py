"""llama-server as a service: restarted for a reason, rolled back if it does not become healthy."""

from __future__ import annotations

import time
from collections.abc import Generator

from pyinfra import host, state
from pyinfra.api import Host, State, operation
from pyinfra.api.command import FunctionCommand, PyinfraCommand

from tasks import probe as at
from tasks.operations import shell
from tasks.operations.release import switch

POLL_SECONDS = 3
UNIT = at.SERVER_UNIT
PREVIOUS_UNIT = f"{at.STATE}/previous.service"
PREVIOUS_RELEASE = f"{at.STATE}/previous.release"


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
def remembered() -> Generator[PyinfraCommand, None, None]:
    """Keep the unit and the name of the release that serve now, in case the next do not.

    After a deploy that was killed half-way the unit file is newer than what runs; then the older
    memory is the right one and stays.
    """
    yield shell.command(
        f"""
if ! systemctl is-active --quiet {UNIT}; then
  rm -f {PREVIOUS_UNIT} {PREVIOUS_RELEASE}; exit 0
fi
pid=$(systemctl show {UNIT} -p MainPID --value)
exe=$(readlink /proc/$pid/exe)
release=${{exe#"$(readlink -f {at.RELEASES})"/}}
install -d -m 755 {at.STATE} && printf %s "${{release%%/*}}" >{PREVIOUS_RELEASE}
digest=$(tr '\\0' '\\n' </proc/$pid/environ | sed -n 's/^LLAMASTEAD_DIGEST=//p')
! grep -q "LLAMASTEAD_DIGEST=$digest\\$" {at.SERVER_UNIT_FILE} ||
  cp -p {at.SERVER_UNIT_FILE} {PREVIOUS_UNIT}
"""
    )


@operation()
def serving(digest: str) -> Generator[PyinfraCommand, None, None]:
    """llama-server enabled, and running from the unit with this digest and from `current`.

    It is restarted only if it runs from something else. If it does not become healthy, the unit
    and the release that served before are put back and started, and the operation fails with
    llama-server's own last words.
    """
    if state.is_executing:
        _, output = shell.run(host, _difference(digest))
        if output.stdout.strip() == "none":
            host.noop("llama-server runs from this unit and release")
            return
    yield shell.command(f"systemctl daemon-reload && systemctl enable --quiet {UNIT}")
    yield FunctionCommand(_restart, [], {})


def _difference(digest: str) -> str:
    return f"""
pid=$(systemctl show {UNIT} -p MainPID --value)
systemctl is-active --quiet {UNIT} && systemctl is-enabled --quiet {UNIT} &&
[ "$(systemctl show {UNIT} -p NeedDaemonReload --value)" = no ] &&
[ "$(readlink /proc/$pid/exe)" = "$(readlink -f {at.CURRENT})/bin/llama-server" ] &&
tr '\\0' '\\n' </proc/$pid/environ | grep -qx LLAMASTEAD_DIGEST={digest} &&
echo none || echo some
"""


def _restart(
    state: State,  # noqa: ARG001  # pyinfra calls it so
    host: Host,
) -> bool:
    if _start(host):
        return True
    for line in _last_words(host):
        shell.complain(host, line)
    if not _roll_back(host):
        shell.run(host, f"systemctl stop {UNIT}")
        shell.complain(host, "llama-server was stopped: there is nothing older to go back to.")
    return False


def _start(host: Host) -> bool:
    """Restart the unit and wait until it is healthy, saying how long it takes."""
    _, output = shell.run(host, f"systemctl show {UNIT} -p InvocationID --value")
    before = output.stdout.strip()
    queued, output = shell.run(
        host, f"systemctl reset-failed {UNIT} 2>/dev/null; systemctl restart --no-block {UNIT}"
    )
    if not queued:
        shell.complain(host, f"Error: systemd refuses to start {UNIT}: {output.stderr}")
        return False
    began = time.monotonic()
    while True:
        answered, output = shell.run(host, _wait(before))
        if not answered:
            return False
        words = output.stdout.split()
        if words[:1] == ["active"]:
            return True
        if words[:1] != ["activating"] or "auto-restart" in words:
            return False
        shell.say(host, f"llama-server is loading the model ({time.monotonic() - began:.0f} s)")


def _wait(before: str) -> str:
    """Shell that says the unit's state once it is another start than `before`, or after a while.

    `refused` if systemd has nothing left to do about the unit and there was no other start: a
    condition, or something that the unit requires, was not met.
    """
    return f"""
n=0
while [ $n -lt {POLL_SECONDS * 10} ]; do
  job=$(systemctl list-jobs --plain --no-legend {UNIT})
  now=$(systemctl show {UNIT} -p InvocationID --value)
  set -- $(systemctl show {UNIT} -p ActiveState,SubState --value)
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


def _last_words(host: Host) -> list[str]:
    _, output = shell.run(
        host,
        f"journalctl -q --no-pager -o cat -u {UNIT} -n 40 2>/dev/null | tail -n 15",
    )
    return ["Error: llama-server did not become healthy. Its last words:", *output.stdout_lines]


def _roll_back(host: Host) -> bool:
    """Put back what served before. True if it serves again."""
    there, _ = shell.run(
        host,
        f"""
[ -e {PREVIOUS_UNIT} ] && release=$(cat {PREVIOUS_RELEASE}) || exit 1
cp -p {PREVIOUS_UNIT} {at.SERVER_UNIT_FILE} && systemctl daemon-reload || exit 1
{switch("$release")}
""",
    )
    if not there or not _start(host):
        return False
    shell.complain(host, "The unit and release that served before are back and serving.")
    return True
