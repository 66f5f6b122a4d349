"""What llama-quantize can make of a model, how large that becomes, and what a conversion needs.

The tables are in tables/quantisations.toml.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tasks.rules.gguf import Header

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLE = Path(__file__).parent / "tables" / "quantisations.toml"

PLAIN = frozenset({"F32", "F16", "BF16"})
"""Types of tensors that nothing has been taken from yet."""


@dataclass(frozen=True)
class Quantisation:
    """A row of the table."""

    name: str
    bits: float
    """For each weight, all of the file counted."""
    source: str
    aliases: tuple[str, ...] = ()
    imatrix: bool = False
    """Whether it takes an importance matrix."""

    def size(self, plain: int, bits: float = 16) -> int:
        """Bytes of a model that has so many with so many bits for each weight."""
        return round(plain * self.bits / bits)


@dataclass(frozen=True)
class Python:
    """What a distribution has for the conversion."""

    os_id: str
    version_id: str
    version: str
    source: str
    torch: str | None = None
    """Its package of PyTorch, where that is new enough."""


@dataclass(frozen=True)
class Torch:
    """A build of PyTorch for the CPU alone."""

    python: str
    machine: str
    version: str
    sha256: str
    source: str

    def url(self, base: str) -> str:
        """Its address."""
        tag = f"cp{self.python.replace('.', '')}"
        name = f"torch-{self.version}%2Bcpu-{tag}-{tag}-manylinux_2_28_{self.machine}.whl"
        return f"{base.rstrip('/')}/{name}"


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


@cache
def quantisations() -> tuple[Quantisation, ...]:
    """Everything that llama-quantize makes, the best first."""
    rows = _table()["quantisation"]
    return TypeAdapter(tuple[Quantisation, ...]).validate_python(rows)


def quantisation(name: str) -> Quantisation:
    """The one of this name. Raises ValueError, saying what would be right."""
    wanted = name.upper()
    for each in quantisations():
        if wanted in (each.name, *each.aliases):
            return each
    names = [each.name for each in quantisations()]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    raise ValueError(f"llama-quantize makes no {name}; it makes {', '.join(near or names)}")


@cache
def pythons() -> Mapping[tuple[str, str], Python]:
    """By os_id and version_id."""
    found = TypeAdapter(tuple[Python, ...]).validate_python(_table()["python"])
    return {(each.os_id, each.version_id): each for each in found}


@cache
def torches() -> Mapping[tuple[str, str], Torch]:
    """By version of Python and kind of machine."""
    found = TypeAdapter(tuple[Torch, ...]).validate_python(_table()["torch"])
    return {(each.python, each.machine): each for each in found}


def quantised_types(header: Header) -> tuple[str, ...]:
    """Types of tensors that are quantised already."""
    return tuple(sorted({tensor.type for tensor in header.tensors} - PLAIN))
