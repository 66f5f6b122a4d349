"""What a script on a host is told: in front of it, or by standard input where it may be secret.

A command line stands in the host's process list, and in what pyinfra prints with -vv.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from io import StringIO

LISTEN = 'eval "$(cat)"\n'
"""Stands before a script that is told so."""


def assignments(variables: Mapping[str, str]) -> str:
    """Shell that sets variables for the script alone."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())


def exports(variables: Mapping[str, str]) -> str:
    """Shell that sets variables for the script and what it starts."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def told(variables: Mapping[str, str]) -> StringIO:
    """Standard input for a fact.

    Not as text: pyinfra prints what a fact is given.
    """
    return StringIO(exports(variables))
