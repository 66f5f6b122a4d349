"""The smallest shared library that ldconfig takes for one: it has a name, and nothing to call."""

from __future__ import annotations

import struct

_LOAD, _DYNAMIC = 1, 2
_END, _STRINGS, _SYMBOLS, _STRINGS_SIZE, _NAME = 0, 5, 6, 10, 14
_SHARED, _X86_64 = 3, 62


def shared_library(soname: str) -> bytes:
    """An ELF file for x86-64 with a SONAME."""
    names = b"\0" + soname.encode() + b"\0"
    header_size, segment_size, entries = 64, 56, 5
    dynamic = header_size + 2 * segment_size
    strings = dynamic + 16 * entries
    size = strings + len(names)
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        identity, _SHARED, _X86_64, 1, 0, header_size, 0, 0, header_size, segment_size, 2, 0, 0, 0,
    )  # fmt: skip
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, 4, start, start, start, length, length, 8)
        for kind, start, length in ((_LOAD, 0, size), (_DYNAMIC, dynamic, 16 * entries))
    )
    told = {_NAME: 1, _STRINGS: strings, _STRINGS_SIZE: len(names), _SYMBOLS: strings, _END: 0}
    entries_packed = b"".join(struct.pack("<QQ", tag, value) for tag, value in told.items())
    return header + segments + entries_packed + names
