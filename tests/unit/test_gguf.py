"""The header of a GGUF file: read as the gguf package reads it, and never believed."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.rules.architecture import architectures, shape_of
from tasks.rules.gguf import (
    MAX_READ_BYTES,
    TENSOR_TYPES,
    Array,
    Bytes,
    GgufError,
    Header,
    merge,
    read_header,
)
from tests.gguf_models import MODELS, Dimensions, write


@dataclass
class Counting:
    """A source that notes what was asked of it."""

    content: bytes
    asked: int = 0
    calls: int = 0

    def read(self, offset: int, length: int) -> bytes:
        self.calls += 1
        self.asked += length
        return self.content[offset : offset + length]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    dims = Dimensions("qwen2", layers=1, width=64, feed_forward=64, heads=2, heads_kv=1)
    write(path, replace(dims, head_size=32, vocabulary=300), data=False)
    return path.read_bytes()


def parse(content: bytes) -> Header:
    return read_header(Bytes(content))


# What others write


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_read_as_the_gguf_package_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, MODELS[name])
    theirs = gguf.GGUFReader(path)
    ours = parse(path.read_bytes())
    assert [(each.name, each.shape, each.type, each.size) for each in ours.tensors] == [
        (each.name, tuple(map(int, each.shape)), each.tensor_type.name, each.n_bytes)
        for each in theirs.tensors
    ]
    assert ours.data_offset == theirs.data_offset
    for key, value in ours.metadata.items():
        if not isinstance(value, Array):
            assert value == theirs.fields[key].contents()
        elif value.values is not None:
            assert list(value.values) == theirs.fields[key].contents()
        else:
            assert value.count == len(theirs.fields[key].data)
    assert shape_of(ours).doubts == ()


def test_block_sizes_are_the_gguf_packages() -> None:
    theirs = {
        int(kind): (kind.name, block, size)
        for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()
        # Never in a file; the package counts the two halves at its head as two floats.
        if kind.name != "Q8_1"
    }
    assert {number: TENSOR_TYPES[number] for number in theirs} == theirs


def test_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    dims = MODELS["llama (every head its own)"]
    [whole] = write(tmp_path / "whole.gguf", dims, data=False)
    parts = write(tmp_path / "split.gguf", dims, data=False, parts=3)
    headers = [parse(part.read_bytes()) for part in parts]
    assert [header.parts for header in headers] == [3, 3, 3]
    assert shape_of(merge(headers)) == shape_of(parse(whole.read_bytes()))


# How much is read


def test_only_the_header_is_read_and_in_few_steps(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    dims = replace(MODELS["llama (every head its own)"], vocabulary=150_000, layers=1)
    write(path, dims, data=False)
    source = Counting(path.read_bytes() + bytes(64 * 1024**2))
    header = read_header(source)
    assert header.length("tokenizer.ggml.tokens") == 150_000
    assert source.asked < header.data_offset + 5 * 1024**2
    assert source.calls <= 8


def test_numbers_of_the_vocabulary_are_skipped_without_being_fetched() -> None:
    content = (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 2)
        + kv("scores", 9, struct.pack("<IQ", 6, 2**22) + bytes(4 * 2**22))
        + kv("general.architecture", 8, text(b"llama"))
    )
    source = Counting(content)
    assert read_header(source).architecture == "llama"
    assert source.asked < 2 * 1024**2


# What is wrong


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def kv(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def head(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: bytes, shape: tuple[int, ...], kind: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, 0)


HOSTILE = {
    "empty": (b"", "less than four bytes"),
    "a web page": (b"<!DOCTYPE html><html>", "begins with b'<!DO'"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1", "pointer"),
    "only the magic": (b"GGUF", "ends within"),
    "the first version": (head(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (head(tensors=2**60), "tensors"),
    "many keys": (head(keys=2**60), "keys"),
    "a long key": (head(keys=1) + struct.pack("<Q", 2**40), "bytes of key"),
    "a long text": (head(keys=1) + kv("k", 8, struct.pack("<Q", 2**62)), "text in 'k'"),
    "a long array": (head(keys=1) + kv("k", 9, struct.pack("<IQ", 4, 2**61)), "values in 'k'"),
    "many texts": (head(keys=1) + kv("k", 9, struct.pack("<IQ", 8, 2**22)), "ends within"),
    "a long text in a list": (
        head(keys=1) + kv("k", 9, struct.pack("<IQQ", 8, 2000, 2**50)),
        "text in a list",
    ),
    "an array of arrays": (head(keys=1) + kv("k", 9, struct.pack("<IQ", 9, 1)), "type 9"),
    "an unknown type": (head(keys=1) + kv("k", 99, b""), "type 99"),
    "a key twice": (head(keys=2) + 2 * kv("k", 0, b"\1"), "twice"),
    "a strange alignment": (
        head(keys=1) + kv("general.alignment", 4, struct.pack("<I", 3)),
        "power of two",
    ),
    "many dimensions": (head(tensors=1) + tensor(b"t", (1,) * 5, 0), "dimensions"),
    "an unknown quantisation": (head(tensors=1) + tensor(b"t", (32,), 99), "type 99"),
    "no values": (head(tensors=1) + tensor(b"t", (0, 4), 0), "impossible shape"),
    "too many values": (head(tensors=1) + tensor(b"t", (2**62, 2**62), 0), "impossible shape"),
    "half a block": (head(tensors=1) + tensor(b"t", (33,), 8), "rows of 33"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_said(name: str) -> None:
    content, expected = HOSTILE[name]
    with pytest.raises(GgufError, match=expected) as caught:
        parse(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_takes_no_memory(name: str) -> None:
    content = HOSTILE[name][0]
    tracemalloc.start()
    try:
        with pytest.raises(GgufError):
            parse(content)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024**2
    finally:
        tracemalloc.stop()


def test_a_header_without_an_end_is_given_up() -> None:
    begin = head(keys=1) + kv("k", 9, struct.pack("<IQ", 8, 2**22))
    period = struct.pack("<Q", 2**20) + bytes(2**20)

    class Endless:
        given = 0

        def read(self, offset: int, length: int) -> bytes:
            self.given += length
            content = begin[offset : offset + length]
            while len(content) < length:
                at = (offset + len(content) - len(begin)) % len(period)
                content += period[at : at + length - len(content)]
            return content

    source = Endless()
    with pytest.raises(GgufError, match="64 MiB"):
        read_header(source)
    assert source.given <= MAX_READ_BYTES


# Whatever comes


def only_gguf_errors(content: bytes) -> None:
    with suppress(GgufError):
        shape_of(parse(content))


@given(st.binary(max_size=400))
def test_any_bytes(content: bytes) -> None:
    only_gguf_errors(content)
    only_gguf_errors(b"GGUF" + struct.pack("<I", 3) + content)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["block_count", "attention.head_count", "embedding_length", "x"]),
            st.sampled_from([0, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
            st.binary(max_size=24),
        ),
        max_size=6,
    ),
    st.sampled_from(sorted(architectures())),
)
def test_any_keys(keys: list[tuple[str, int, bytes]], arch: str) -> None:
    body = kv("general.architecture", 8, text(arch.encode()))
    body += b"".join(kv(f"{arch}.{key}", kind, value) for key, kind, value in keys)
    only_gguf_errors(head(keys=1 + len(keys)) + body)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_real_file(small: bytes, data: st.DataObject) -> None:
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 8))):
        # Near the beginning, where the counts are, as often as anywhere else.
        reach = data.draw(st.sampled_from([64, 2000, len(content)]))
        at = data.draw(st.integers(0, min(reach, len(content)) - 1))
        content[at] = data.draw(st.integers(0, 255))
    only_gguf_errors(bytes(content[: data.draw(st.integers(0, len(content)))]))
    only_gguf_errors(bytes(content))


NUMBERS = ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
STRANGE = (0, 1, 2**31, 2**63, 2**64 - 1)


@pytest.mark.parametrize("arch", sorted(architectures()))
@pytest.mark.parametrize("strange", STRANGE)
def test_strange_numbers_make_no_trouble(arch: str, strange: int) -> None:
    usual: Callable[[str], int] = {
        "block_count": 4,
        "embedding_length": 256,
        "attention.head_count": 4,
        "attention.key_length": 64,
    }.__getitem__
    for name in NUMBERS:
        pairs = {**{each: usual(each) for each in NUMBERS}, name: strange}
        body = kv("general.architecture", 8, text(arch.encode())) + b"".join(
            kv(f"{arch}.{key}", 10, struct.pack("<Q", value)) for key, value in pairs.items()
        )
        only_gguf_errors(head(keys=1 + len(pairs)) + body)
