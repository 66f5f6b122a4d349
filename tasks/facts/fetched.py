"""A small file from an address, as the host gets it."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from pyinfra.api import FactBase

from tasks.facts.told import LISTEN

LIMIT_BYTES = 1_000_000

_SCRIPT = f"""
work=$(mktemp -d) || exit 0
trap 'rm -rf "$work"' EXIT
told() {{ printf 'url = "%s"\n' "$(printf %s "$url" | sed 's/[\\"]/\\&/g')"; }}
if told | curl -K - -fsSL --retry 2 --connect-timeout 20 --max-time 120 \\
    --max-filesize {LIMIT_BYTES} -o "$work/file" 2>"$work/problem" && [ -s "$work/file" ]
then printf 'content\\t'; base64 -w 0 "$work/file"; echo
else printf 'error\\t%s\\n' "$(sed -n 's/^curl: ([0-9]*) //p' "$work/problem" | tail -n 1)"
fi
"""


@dataclass(frozen=True)
class Fetched:
    """What came, or why nothing did."""

    content: bytes = b""
    error: str = ""


class SmallFile(FactBase[Fetched]):
    """Fetches a URL (`file://` for what is on the host) with curl, up to a megabyte.

    By standard input it is told `url` and the proxies. Leaves nothing behind, and exits 0 whatever
    happens.
    """

    shell_executable = "sh"

    def command(self) -> str:
        """The script; the rest comes by standard input, see tasks.facts.told."""
        return LISTEN + _SCRIPT

    def process(self, output: list[str]) -> Fetched:
        """From one line, `content` or `error`."""
        told = dict(line.split("\t", 1) for line in output if "\t" in line)
        if "content" in told:
            try:
                return Fetched(base64.b64decode(told["content"], validate=True))
            except binascii.Error:
                return Fetched(error="what came could not be read")
        return Fetched(error=told.get("error") or "nothing came")
