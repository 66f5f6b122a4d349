"""What the host is told when it asks for the first bytes of the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from pyinfra.api import FactBase

from tasks.rules.model import Reach

_SCRIPT = (Path(__file__).parent / "reach.sh").read_text()


def told(url: str, environment: Mapping[str, str]) -> StringIO:
    """Standard input for ModelReach: what a proxy wants, or signs an address, is a secret.

    Not as text: pyinfra prints what a fact is given.
    """
    exports = (f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    return StringIO("".join([f"url={shlex.quote(url)}\n", *exports]))


class ModelReach(FactBase[Reach]):
    """Asks for four bytes of a URL, with curl or Python, whichever the host has.

    Where it has neither, nothing is known and the download will tell. Exits 0 whatever happens.
    """

    shell_executable = "sh"

    def command(self) -> str:
        """The script; URL and proxies come by standard input, see told()."""
        return f'eval "$(cat)"\n{_SCRIPT}'

    def process(self, output: list[str]) -> Reach:
        """Reach from lines of `key<TAB>value`."""
        told = dict(line.split("\t", 1) for line in output if "\t" in line)
        size = told.get("size", "")
        return Reach(
            error=told.get("error"),
            size=int(size) if size.isdigit() else None,
            magic=told.get("magic"),
        )
