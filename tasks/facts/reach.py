"""What the host is told when it asks for the first bytes of the model."""

from __future__ import annotations

from pathlib import Path

from pyinfra.api import FactBase

from tasks.facts.told import LISTEN
from tasks.rules.model import Reach

_SCRIPT = (Path(__file__).parent / "reach.sh").read_text()


class ModelReach(FactBase[Reach]):
    """Asks for four bytes of a URL, with curl or Python, whichever the host has.

    By standard input it is told `url` and the proxies: what a proxy wants, or signs an address, is
    a secret. Where the host has neither program, nothing is known and the download will tell. Exits
    0 whatever happens.
    """

    shell_executable = "sh"

    def command(self) -> str:
        """The script; the rest comes by standard input, see tasks.facts.told."""
        return LISTEN + _SCRIPT

    def process(self, output: list[str]) -> Reach:
        """Reach from lines of `key<TAB>value`."""
        told = dict(line.split("\t", 1) for line in output if "\t" in line)
        size = told.get("size", "")
        return Reach(
            error=told.get("error"),
            size=int(size) if size.isdigit() else None,
            magic=told.get("magic"),
        )
