"""The keys in a file that signs an apt repository, by their whole fingerprints (RFC 9580).

Read here rather than by a gpg on the host: few hosts have one, and what was checked is then
byte for byte what is put there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

PUBLIC_KEY = 6
"""Tag of the packet that a certificate begins with."""
CERTIFICATE_TAGS = frozenset({2, PUBLIC_KEY, 12, 13, 14, 17})
"""Signatures, keys, subkeys, user names; 12 is how gpg marks whom its user trusts."""
_ARMOR = re.compile(
    r"-----BEGIN PGP PUBLIC KEY BLOCK-----\s*?\n(?:[^\n:]+: [^\n]*\n)*\s*\n?"
    r"(?P<body>[A-Za-z0-9+/=\s]*?)\n?(?:=[A-Za-z0-9+/]{4}\s*)?-----END PGP PUBLIC KEY BLOCK-----"
)


class OpenPgpError(ValueError):
    """What is wrong with a file that should hold keys."""


@dataclass(frozen=True)
class Certificate:
    """A public key with everything that belongs to it."""

    fingerprint: str
    """40 hex digits, in capitals."""
    content: bytes
    """As a keyring holds it."""


def certificates(content: bytes) -> tuple[Certificate, ...]:
    """The keys of a file, armoured or not.

    Raises OpenPgpError if it holds anything but public keys, or none.
    """
    raw = _without_armor(content)
    found: list[Certificate] = []
    for tag, start, body, end in _packets(raw):
        if tag not in CERTIFICATE_TAGS:
            raise OpenPgpError("it holds something else than public keys")
        if tag == PUBLIC_KEY:
            found.append(Certificate(_fingerprint(raw[body:end]), raw[start:end]))
        elif not found:
            raise OpenPgpError("it does not begin with a public key")
        else:
            last = found.pop()
            found.append(Certificate(last.fingerprint, last.content + raw[start:end]))
    if not found:
        raise OpenPgpError("it holds no public key")
    return tuple(found)


def only(content: bytes, fingerprint: str) -> bytes:
    """A keyring with exactly the key of this fingerprint, from a file that holds nothing else.

    Raises OpenPgpError if the file is anything else: every key in it would be trusted.
    """
    found = certificates(content)
    others = [each.fingerprint for each in found if each.fingerprint != fingerprint]
    if others:
        raise OpenPgpError(f"it has the fingerprint {others[0]}, not {fingerprint}")
    return found[0].content


def without(content: bytes, fingerprint: str) -> bytes | None:
    """A keyring without the key of this fingerprint; None if nothing is left.

    Raises OpenPgpError if the file cannot be read.
    """
    kept = [each.content for each in certificates(content) if each.fingerprint != fingerprint]
    return b"".join(kept) or None


def _without_armor(content: bytes) -> bytes:
    if b"-----BEGIN PGP PUBLIC KEY BLOCK-----" not in content:
        return content
    blocks = _ARMOR.finditer(content.decode("ascii", errors="replace").replace("\r\n", "\n"))
    try:
        decoded = [
            base64.b64decode("".join(block["body"].split()), validate=True) for block in blocks
        ]
    except binascii.Error:
        raise OpenPgpError("its armour is damaged") from None
    if not decoded:
        raise OpenPgpError("its armour is damaged")
    return b"".join(decoded)


def _packets(raw: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Tag, start, start of the body, and end of each packet (RFC 9580, section 4.2)."""
    at = 0
    while at < len(raw):
        first = raw[at]
        if not first & 0x80:
            raise OpenPgpError("it is no OpenPGP key")
        try:
            if first & 0x40:
                tag, (length, body) = first & 0x3F, _new_length(raw, at + 1)
            else:
                tag, (length, body) = (first & 0x3C) >> 2, _old_length(raw, at + 1, first & 3)
        except IndexError:
            raise OpenPgpError("it was cut short") from None
        if body + length > len(raw):
            raise OpenPgpError("it was cut short")
        yield tag, at, body, body + length
        at = body + length


def _new_length(raw: bytes, at: int) -> tuple[int, int]:
    first = raw[at]
    if first < 192:
        return first, at + 1
    if first < 224:
        return ((first - 192) << 8) + raw[at + 1] + 192, at + 2
    if first == 255:
        return _number(raw, at + 1, 4), at + 5
    raise OpenPgpError("it is no OpenPGP key")  # lengths in parts are for data only


def _old_length(raw: bytes, at: int, kind: int) -> tuple[int, int]:
    if kind == 3:  # to the end of the file, which nobody writes for keys
        raise OpenPgpError("it is no OpenPGP key")
    size = 1 << kind
    return _number(raw, at, size), at + size


def _number(raw: bytes, at: int, size: int) -> int:
    if at + size > len(raw):
        raise IndexError
    return int.from_bytes(raw[at : at + size], "big")


def _fingerprint(body: bytes) -> str:
    """By RFC 9580, section 5.5.4.2: what all of apt's verifiers and all of NVIDIA's keys use."""
    if not body or body[0] != 4:
        raise OpenPgpError("its key is not of version 4")
    hashed = b"\x99" + len(body).to_bytes(2, "big") + body
    return hashlib.sha1(hashed).hexdigest().upper()  # noqa: S324  # the standard's choice
