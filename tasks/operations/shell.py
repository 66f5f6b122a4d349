"""Running commands on a host from inside an operation, with the operation's own sudo."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache, partial
from types import FrameType
from typing import Any, NoReturn

import gevent
from gevent import GreenletExit
from gevent.event import Event
from pyinfra.api import Host, State, StringCommand
from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS
from pyinfra.api.command import FunctionCommand
from pyinfra.connectors.util import CommandOutput
from pyinfra.context import ctx_host, ctx_state

Outcome = tuple[bool, CommandOutput]
"""Of a script: whether it succeeded, and what it said."""


class Interrupted(GreenletExit):
    """Somebody pressed ^C. Ends the operation at hand quietly if nobody catches it."""


def command(script: str) -> StringCommand:
    """A shell script as a command. Others can read what it makes, whatever root's umask is."""
    return StringCommand(f"umask 022\n{script}")


def run(host: Host, script: str, stdin: str = "") -> Outcome:
    """Run a shell script as the operation at hand would run it.

    stdin is where secrets go: a command is printed by -vv and stands in the host's process list.
    Raises Interrupted as soon as somebody presses ^C, whatever becomes of the script: pyinfra says
    that it exits and then waits for what is at work, which for us could be hours.
    """
    arguments = _as_the_operation(host)
    if stdin:
        arguments["_stdin"] = stdin
    asked = gevent.spawn(_outcome, partial(host.run_shell_command, command(script), **arguments))
    either: list[Any] = [asked, _interrupt()]
    gevent.wait(either, count=1)
    if not asked.ready():
        raise Interrupted
    outcome: Outcome | Exception = asked.get()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _outcome(ask: Callable[[], Outcome]) -> Outcome | Exception:
    """What came of it. A greenlet that raises would have its traceback printed."""
    try:
        return ask()
    except Exception as problem:
        return problem


@cache
def _interrupt() -> Event:
    """Is set once somebody presses ^C; what pyinfra does then, it does as well."""
    pressed = Event()
    before = signal.getsignal(signal.SIGINT)
    if callable(before):

        def note(number: int, frame: FrameType | None) -> None:
            pressed.set()
            before(number, frame)

        signal.signal(signal.SIGINT, note)
    return pressed


def start(host: Host, script: str) -> None:
    """Start a shell script beside the run; it ends with the connection at the latest."""
    gevent.spawn(host.run_shell_command, command(script), **_as_the_operation(host))


def _as_the_operation(host: Host) -> dict[str, Any]:
    arguments: Any = host.current_op_global_arguments or {}
    connector = {
        name: value for name, value in arguments.items() if name in CONNECTOR_ARGUMENT_KEYS
    }
    said = {"print_input": host.state.print_input, "print_output": host.state.print_output}
    return {**connector, **said}


def say(host: Host, message: str) -> None:
    """Tell the person who watches."""
    host.log(message)


def complain(host: Host, message: str) -> None:
    """Tell the person who watches that something is wrong."""
    host.log_styled(message, fg="red")


def _fail(
    state: State,  # noqa: ARG001  # pyinfra calls it so
    host: Host,
    messages: tuple[str, ...],
) -> bool:
    for message in messages:
        complain(host, message)
    return False


def failure(*messages: str) -> FunctionCommand:
    """A command that fails the operation on this host alone, with these lines and no traceback."""
    return FunctionCommand(_fail, [messages], {})


def abandon() -> NoReturn:
    """Take the host at hand out of the run; the others go on.

    Raises PyinfraError if no host is left, and GreenletExit otherwise: pyinfra loads the deploy
    file once for each host in a greenlet of its own, and GreenletExit ends that one quietly.
    """
    # The host itself: pyinfra keeps what it is given, and the name `host` means another later.
    ctx_state.get().fail_hosts({ctx_host.get()})  # type: ignore[no-untyped-call]
    raise GreenletExit
