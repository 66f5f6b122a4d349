"""What a GGUF file says of itself, read from its first few megabytes.

The file may come from anywhere that can give a range of bytes: a disk, a web server. Nothing in it
is believed: counts and lengths are held against limits before anything is made of them, and what is
wrong gives a GgufError whose text says what, to be put after the name of the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_READ_BYTES = 64 * 1024**2
"""Headers of real models have up to 15 MB: nearly all of it is the vocabulary."""
MAX_KEYS = 16_384
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 8 * 1024**2
"""The longest real ones are chat templates, with some 100 kB."""
MAX_ARRAY = 2**22
"""The longest real ones are the merges of a vocabulary, with some 500,000."""
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
KEPT_ARRAY = 1024
"""Longer arrays are vocabularies, of which only the length matters here."""

_FIRST_BLOCK = 256 * 1024
_LARGEST_BLOCK = 4 * 1024**2

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""Number in the file: (name, values in a block, bytes of a block). Source: ggml.h and ggml-common.h
of llama.cpp 0c1e5709. A test holds it against the gguf package."""

_SCALARS: Mapping[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """The file is no GGUF file that llama.cpp could read."""


class Source(Protocol):
    """Something that bytes can be asked of."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on; fewer than asked for only where the file ends."""


@dataclass(frozen=True)
class Bytes:
    """A file that is in memory already."""

    content: bytes = field(repr=False)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on."""
        return self.content[offset : offset + length]


Scalar: TypeAlias = "bool | int | float | str"


@dataclass(frozen=True)
class Array:
    """An array among the metadata."""

    count: int
    values: tuple[Scalar, ...] | None
    """None for one that is too long to be worth keeping."""


Value: TypeAlias = "Scalar | Array"


@dataclass(frozen=True)
class Tensor:
    """One tensor: where it is, and what it weighs."""

    name: str
    shape: tuple[int, ...]
    """The first dimension is the one whose values lie beside each other."""
    type: str
    size: int
    """Bytes."""
    offset: int
    """From the beginning of the data."""


@dataclass(frozen=True)
class Header:
    """Everything before the data."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int

    @property
    def architecture(self) -> str | None:
        """llama, qwen3, gemma3, ..."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None

    def get(self, name: str) -> Value | None:
        """A value of the model's own architecture: `block_count` for `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def number(self, name: str) -> int | None:
        """A whole number of the model's architecture; None where there is none."""
        return _whole(self.get(name))

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """An array of whole numbers of the model's architecture (yes is 1)."""
        value = self.get(name)
        if not isinstance(value, Array) or value.values is None:
            return None
        whole = [_whole(each) for each in value.values]
        return tuple(each for each in whole if each is not None) if None not in whole else None

    def length(self, name: str) -> int | None:
        """Length of an array, by its full name."""
        value = self.metadata.get(name)
        return value.count if isinstance(value, Array) else None

    @property
    def parts(self) -> int:
        """Files that the model is split into."""
        return _whole(self.metadata.get("split.count")) or 1


def _whole(value: Value | None) -> int | None:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return int(value) if isinstance(value, int) else None


def merge(headers: Iterable[Header]) -> Header:
    """One header for all parts of a split model: the metadata of the first, the tensors of all."""
    first, *others = headers
    tensors = first.tensors + tuple(tensor for other in others for tensor in other.tensors)
    return Header(first.version, first.metadata, tensors, first.data_offset)


class _Cursor:
    """Reads on from where it is, in blocks, within the limit."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._buffer = b""
        self._start = 0  # offset of the buffer in the file
        self._at = 0  # offset in the buffer
        self._block = _FIRST_BLOCK
        self._read = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def need(self, length: int) -> int:
        """Have so many bytes in the buffer; returns where in it they begin."""
        if self._at + length > len(self._buffer):
            self._fill(length)
        return self._at

    def _fill(self, length: int) -> None:
        rest = self._buffer[self._at :]
        wanted = max(length - len(rest), self._block)
        if self._read + length - len(rest) > MAX_READ_BYTES:
            raise GgufError(f"has a header of more than {MAX_READ_BYTES // 1024**2} MiB")
        wanted = min(wanted, MAX_READ_BYTES - self._read)
        more = self._source.read(self.position + len(rest), wanted)
        self._read += len(more)
        self._start, self._at, self._buffer = self.position, 0, rest + more
        # Small models are told by one small request, large ones by few large ones.
        self._block = min(self._block * 2, _LARGEST_BLOCK)
        if len(self._buffer) < length:
            end = self._start + len(self._buffer)
            raise GgufError(f"ends within its header, after {end:,} bytes")

    def take(self, length: int) -> bytes:
        at = self.need(length)
        self._at += length
        return self._buffer[at : at + length]

    def skip(self, length: int) -> None:
        """Go on without looking; what is not in the buffer is not fetched."""
        rest = len(self._buffer) - self._at
        if length <= rest:
            self._at += length
        else:
            self._start, self._at, self._buffer = self.position + length, 0, b""

    def unpack(self, code: str) -> int | float | bool:
        """One value, little-endian."""
        unpacker = _UNPACKERS[code]
        at = self.need(unpacker.size)
        self._at += unpacker.size
        value: int | float | bool = unpacker.unpack_from(self._buffer, at)[0]
        return value

    def count(self, code: str, most: int, what: str) -> int:
        """A number of things, which is held against a limit."""
        value = int(self.unpack(code))
        if value > most:
            raise GgufError(f"claims {value:,} {what}, more than any real model has ({most:,})")
        return value

    def text(self, most: int, what: str) -> str:
        return self.take(self.count("Q", most, f"bytes of {what}")).decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Go past an array of texts; each has its length before it, so all have to be read."""
        unpacker = _UNPACKERS["Q"]
        for _ in range(count):
            at = self.need(8)
            (length,) = unpacker.unpack_from(self._buffer, at)
            if length > MAX_STRING_BYTES:
                raise GgufError(f"claims {length:,} bytes of text in a list")
            self._at += 8
            self.need(length)
            self._at += length


_UNPACKERS = {code: struct.Struct(f"<{code}") for code in "BbHhIifd?Qq"}


def read_header(source: Source) -> Header:
    """The header of a file, of which no more is read than that."""
    cursor = _Cursor(source)
    _check_magic(cursor)
    version = int(cursor.unpack("I"))
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        if swapped in VERSIONS:
            raise GgufError("is a GGUF file for big-endian machines")
        raise GgufError(f"has version {version} of the format; llama.cpp reads 2 and 3")
    tensors = cursor.count("Q", MAX_TENSORS, "tensors")
    keys = cursor.count("Q", MAX_KEYS, "keys")
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = cursor.text(MAX_KEY_BYTES, "key")
        if key in metadata:
            raise GgufError(f"has the key {key[:80]!r} twice")
        metadata[key] = _value(cursor, key)
    found = tuple(_tensor(cursor) for _ in range(tensors))
    alignment = _whole(metadata.get("general.alignment", DEFAULT_ALIGNMENT)) or 0
    if alignment <= 0 or alignment & (alignment - 1) or alignment > 2**30:
        raise GgufError(f"has an alignment of {alignment}, which is no power of two")
    return Header(version, metadata, found, _padded(cursor.position, alignment))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _check_magic(cursor: _Cursor) -> None:
    try:
        magic = cursor.take(4)
    except GgufError:
        raise GgufError("is not a GGUF file: it has less than four bytes") from None
    if magic == MAGIC:
        return
    if magic == b"vers":
        raise GgufError("is the pointer of a file in Git LFS, not the file itself")
    raise GgufError(f"is not a GGUF file: it begins with {magic!r}")


def _value(cursor: _Cursor, key: str) -> Value:
    kind = int(cursor.unpack("I"))
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind][1])
    if kind == _STRING:
        return cursor.text(MAX_STRING_BYTES, f"text in {key[:80]!r}")
    if kind == _ARRAY:
        return _array(cursor, key)
    raise GgufError(f"has a value of unknown type {kind} in {key[:80]!r}")


def _array(cursor: _Cursor, key: str) -> Array:
    kind = int(cursor.unpack("I"))
    count = cursor.count("Q", MAX_ARRAY, f"values in {key[:80]!r}")
    if kind == _STRING:
        if count > KEPT_ARRAY:
            cursor.skip_strings(count)
            return Array(count, None)
        what = f"text in {key[:80]!r}"
        return Array(count, tuple(cursor.text(MAX_STRING_BYTES, what) for _ in range(count)))
    if kind not in _SCALARS:
        raise GgufError(f"has an array of unknown type {kind} in {key[:80]!r}")
    code = _SCALARS[kind][1]
    if count > KEPT_ARRAY:
        cursor.skip(count * _UNPACKERS[code].size)
        return Array(count, None)
    return Array(count, tuple(cursor.unpack(code) for _ in range(count)))


def _tensor(cursor: _Cursor) -> Tensor:
    name = cursor.text(MAX_NAME_BYTES, "the name of a tensor")
    dimensions = cursor.count("I", MAX_DIMENSIONS, f"dimensions of {name[:80]!r}")
    shape = tuple(int(cursor.unpack("Q")) for _ in range(dimensions))
    kind = int(cursor.unpack("I"))
    offset = int(cursor.unpack("Q"))
    if kind not in TENSOR_TYPES:
        raise GgufError(f"has the tensor {name[:80]!r} of type {kind}, which is not known")
    type_name, block, size = TENSOR_TYPES[kind]
    values = math.prod(shape)
    if not 0 < values < 2**63:
        raise GgufError(f"has the tensor {name[:80]!r} of an impossible shape {shape}")
    if shape and shape[0] % block:
        raise GgufError(f"has the tensor {name[:80]!r} with rows of {shape[0]}, not of {block} n")
    return Tensor(name, shape, type_name, values // block * size, offset)


_: Callable[[bytes], Source] = Bytes
