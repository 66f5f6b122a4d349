"""Keys are known by their whole fingerprint, and a file holds no other than the one expected."""

from __future__ import annotations

import base64
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.rules.openpgp import OpenPgpError, certificates, only, without

# Made for this test with gpg, which says these fingerprints.
ED25519 = "0F9D0F0F2B37B091DCB027C6BA64ED9763166702"
RSA = "790E54743A4B831DF1016EA5D5912DD7EAC74ED3"
ED25519_FILE = b"""-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEZZNSABYJKwYBBAHaRw8BAQdArbKxuahW6KPINHiloD2A+5jraHdoxTIfvccV
2sWG4RG0HWVkMjU1MTkgPGVkMjU1MTlAbGFiLmludmFsaWQ+iJAEExYIADgWIQQP
nQ8PKzewkdywJ8a6ZO2XYxZnAgUCZZNSAAIbAwULCQgHAgYVCgkICwIEFgIDAQIe
AQIXgAAKCRC6ZO2XYxZnAnQcAP9vnoHvvP+UdlM3cXWAEF4BU6kZP7/iXF56pdbb
6jYY9AD/ZOQZsoQ3l/svfjyf5HWHIix9TMaDx1yehWjHz/AHPgQ=
=ypu/
-----END PGP PUBLIC KEY BLOCK-----
"""
RSA_FILE = b"""-----BEGIN PGP PUBLIC KEY BLOCK-----
Comment: with a comment

mQENBGWTUgABCADNAQmyg0fhps7aLabdRYARXVPsE7xZR899khATYtFr/yHfd2Yl
cIGxql0Jbmesub1rAzmrMJxFdlEGeN7fq6Tr0U5tLua5CNcgimjkFBFz0jkces2p
svu9apTXY+JVjngMaMGBfvITkvJFhonlhsbMzQdMc/AD57zzQgZ8fBM3rua5FVPf
2dyGUaTuxSl9N8dXlAplBxUrxdPsIkheIM5obNgF9rA82LrZR7IPBg1k+49WAkgl
fYktvZ32iv3ckZ+nWQOWoOD8jTYq7dp4T7QeKG34x9VfxXcmikPbQBJzVaPpti6K
78zHEjXJrXJAPNGoqhpxMkhMx8GjvAFSD+INABEBAAG0HXJzYTIwNDggPHJzYTIw
NDhAbGFiLmludmFsaWQ+iQFOBBMBCgA4FiEEeQ5UdDpLgx3xAW6l1ZEt1+rHTtMF
AmWTUgACGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQ1ZEt1+rHTtMalgf+
LR+kJ8OIQ8RoPFPgoaUaBcsFLwU/8nlEQ4USBq4naNpNIH2AKMEXEtZ4OTa3hHAS
DdGybXn7mXEwD5TLtCZvtxp61g9Kaym07guxSFJo2W8TWoZb8R6XWKc4+4wLNAzR
j//cx5JAhQsGBFuMQdB6yH1xrvTiYmkCypWA6udEOQ933hJdwAhNLyKS/Abh+0fg
eOzShiWlc0neMz758E9v/Dhq4Q7GfAZF0ry72LD3gqgoEvJQx3Puov7zX9iCCX9F
pyqaJitaM3pe5B4TJRNPZD5hsnVfEoZjMeVXUrs9ND8nNItLKu/3uTDlUlogE1Lv
rDeJ3UWkW1ocyG9FNogyZg==
=p9qI
-----END PGP PUBLIC KEY BLOCK-----
"""


def raw(armoured: bytes) -> bytes:
    lines = [line for line in armoured.splitlines() if b":" not in line and b"-" not in line]
    return base64.b64decode(b"".join(line for line in lines if not line.startswith(b"=")))


@pytest.mark.parametrize(("file", "fingerprint"), [(ED25519_FILE, ED25519), (RSA_FILE, RSA)])
def test_the_fingerprint_is_gpgs_armoured_or_not(file: bytes, fingerprint: str) -> None:
    for content in (file, raw(file), file.replace(b"\n", b"\r\n")):
        (key,) = certificates(content)
        assert key.fingerprint == fingerprint
        assert key.content == raw(file)
    assert only(file, fingerprint) == raw(file)


def test_a_file_with_several_keys_tells_them_apart() -> None:
    for content in (ED25519_FILE + RSA_FILE, raw(ED25519_FILE) + raw(RSA_FILE)):
        assert [key.fingerprint for key in certificates(content)] == [ED25519, RSA]


def test_a_second_key_in_the_file_would_be_trusted_too_and_so_is_refused() -> None:
    with pytest.raises(OpenPgpError, match=f"it has the fingerprint {RSA}, not {ED25519}"):
        only(ED25519_FILE + RSA_FILE, ED25519)


def test_another_key_is_refused() -> None:
    with pytest.raises(OpenPgpError, match=f"it has the fingerprint {RSA}, not {ED25519}"):
        only(RSA_FILE, ED25519)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>", "it is no OpenPGP key"),
        (b"", "it holds no public key"),
        (raw(RSA_FILE)[:200], "it was cut short"),
        (RSA_FILE[:200], "its armour is damaged"),
        (b"\x95" + raw(RSA_FILE)[1:], "it holds something else than public keys"),
        (raw(RSA_FILE)[272:], "it does not begin with a public key"),
    ],
)
def test_what_is_no_key_is_named(content: bytes, said: str) -> None:
    with pytest.raises(OpenPgpError, match=said):
        certificates(content)


def test_one_key_is_taken_out_of_a_keyring_and_the_others_stay() -> None:
    both = raw(ED25519_FILE) + raw(RSA_FILE)
    assert without(both, RSA) == raw(ED25519_FILE)
    assert without(both, ED25519) == raw(RSA_FILE)
    assert without(raw(RSA_FILE), RSA) is None
    assert without(raw(RSA_FILE), ED25519) == raw(RSA_FILE)


@given(st.binary(max_size=300))
def test_whatever_the_file_nothing_but_that_error_comes_of_it(content: bytes) -> None:
    with suppress(OpenPgpError):
        assert certificates(content)


@given(st.integers(0, len(raw(RSA_FILE)) - 1), st.integers(1, 255))
def test_a_key_with_one_byte_changed_is_not_taken_for_another(at: int, change: int) -> None:
    content = bytearray(raw(RSA_FILE))
    content[at] ^= change
    in_the_key = at < 272
    try:
        accepted = only(bytes(content), RSA)
    except OpenPgpError:
        return
    assert not in_the_key or accepted[:272] == raw(RSA_FILE)[:272]
