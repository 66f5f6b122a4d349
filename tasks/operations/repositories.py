"""NVIDIA's repositories in apt's sources, with exactly the keys that were rehearsed."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Generator, Sequence

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks.facts.fetched import SmallFile
from tasks.facts.told import told
from tasks.operations import shell
from tasks.operations.rehearsal import NEW
from tasks.probe import AptSource
from tasks.rules import openpgp, tables


@operation()
def trusted() -> Generator[PyinfraCommand, None, None]:
    """Put keys, sources and preferences of the rehearsal where apt looks for them."""
    yield shell.command(
        f"cd {NEW} && find . -type f -exec sh -c '"
        'cmp -s "$1" "/$1" || install -D -m 644 "$1" "/$1"\' - {} \\;'
    )


@operation()
def superseded(sources: Sequence[AptSource]) -> Generator[PyinfraCommand, None, None]:
    """Take back what apt was told of the same repositories elsewhere, in another way.

    In a .list file the line becomes a comment; a .sources file is renamed, so that apt ignores it.
    """
    for source in sources:
        path, uri = shlex.quote(source.path), shlex.quote(source.uri)
        if source.path.endswith(".sources"):
            yield shell.command(f"[ ! -e {path} ] || mv {path} {path}.disabled")
        else:
            script = f"\\|^[^#]*{source.uri}|s|^|# |"
            yield shell.command(f"! grep -qsF {uri} {path} || sed -i {shlex.quote(script)} {path}")


@operation()
def without_retired_key(keyrings: Sequence[str]) -> Generator[PyinfraCommand, None, None]:
    """Take NVIDIA's old key (7fa2af80) out of keyrings; one with nothing else in it goes."""
    retired = tables.key("cuda-retired").fingerprint
    for path in keyrings:
        quoted = shlex.quote(path)
        if not state.is_executing:
            yield shell.command(f"rm {quoted}")
            continue
        fetched = host.get_fact(SmallFile, _stdin=told({"url": f"file://{path}"}))
        try:
            rest = openpgp.without(fetched.content, retired)
        except openpgp.OpenPgpError as problem:
            shell.say(host, f"{path} keeps NVIDIA's retired key: {problem}")
            continue
        if rest is None:
            yield shell.command(f"rm -f {quoted}")
        elif rest != fetched.content:
            text = base64.b64encode(rest).decode()
            yield shell.command(
                f"echo {text} | base64 -d >{quoted}.new && chmod 644 {quoted}.new && "
                f"mv {quoted}.new {quoted}"
            )
