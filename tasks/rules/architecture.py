"""What a model is like, as far as its memory depends on it: layers, heads, windows, states.

Everything comes from the header of the GGUF file; where the file is silent, llama.cpp's own
defaults stand in tables/architectures.toml.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from tasks.rules.gguf import GgufError, Header

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_LAYERS = 512
"""As llama.cpp's own limit."""
_LARGEST = 2**24
"""No width, head or vocabulary is larger: a file that claims so is broken, or means harm."""

_TABLE = Path(__file__).parent / "tables" / "architectures.toml"
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_MIXER = re.compile(r"\.ssm_in\.weight$")


class CacheKind(str, Enum):
    """What a model keeps between tokens."""

    ATTENTION = "attention"
    NONE = "none"
    STATE = "state"
    MIXED = "mixed"
    SPECIAL = "special"


@dataclass(frozen=True)
class Architecture:
    """A row of the table."""

    names: tuple[str, ...]
    cache: CacheKind
    window: int | None = None
    fixed_window: int | None = None
    period: int | None = None
    first_full: bool = False
    only_layers: int | None = None
    kv_layers: int | None = None
    states: str | None = None
    interval: int | None = None
    dense_apart: bool = False
    guess: bool = False


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every row, by each of its names."""
    rows = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["architecture"]
    found = TypeAdapter(tuple[Architecture, ...]).validate_python(rows)
    return {name: row for row in found for name in row.names}


@dataclass(frozen=True)
class Layer:
    """One layer: what it keeps for each token, and for each slot."""

    keys: int
    """Values in the K cache for each token; 0 where there is none."""
    values: int
    """The same for V."""
    window: int | None
    """Tokens that it sees; None for all."""
    state: int
    """Values of the state (32-bit floats) that it keeps for each slot."""
    heads: int
    queries: int
    """Width of the queries."""


@dataclass(frozen=True)
class Weights:
    """Where the bytes of a model are."""

    layers: tuple[int, ...]
    """Of each layer that is loaded."""
    input: int
    """The embedding: always in the host's memory."""
    output: int
    """What comes after the last layer."""
    tied: bool
    """Whether the embedding is the output too, and so is on the GPU once more."""
    unused: int = 0
    """Layers for drafting ahead, which are loaded only if asked for."""

    @property
    def total(self) -> int:
        """Bytes in the file."""
        return sum(self.layers) + self.input + self.output + self.unused

    def scaled(self, size: int) -> Weights:
        """The same model in another quantisation, of which only the size is known."""
        factor = size / max(self.total, 1)
        return Weights(
            tuple(round(each * factor) for each in self.layers),
            round(self.input * factor),
            round(self.output * factor),
            self.tied,
            round(self.unused * factor),
        )


@dataclass(frozen=True)
class Shape:
    """A model, as far as its memory depends on it."""

    architecture: str
    cache: CacheKind
    layers: tuple[Layer, ...]
    width: int
    vocabulary: int
    context: int
    """Tokens that it was trained for."""
    feed_forward: int
    """Width of the widest dense part of a layer."""
    gated: bool
    experts_used: int
    expert_feed_forward: int
    mixer: int
    """Width of what goes into a recurrence; 0 where there is none."""
    compressed: int
    """Width of the compressed cache (MLA) for each token; 0 without."""
    weights: Weights
    doubts: tuple[str, ...]
    """Why what is predicted may be wrong."""

    def with_adapters(self, size: int) -> Shape:
        """With LoRA adapters of so many bytes, which lie where the weights are that they change."""
        return replace(self, weights=self.weights.scaled(self.weights.total + size))

    @property
    def windows(self) -> frozenset[int]:
        """Every sliding window among the layers."""
        return frozenset(layer.window for layer in self.layers if layer.window is not None)


def shape_of(header: Header) -> Shape:
    """What a header says. Raises GgufError where it makes no sense."""
    name = header.architecture
    if name is None:
        raise GgufError("names no general.architecture: it is no model")
    row = architectures().get(name) or Architecture((name,), CacheKind.ATTENTION)
    trunk, extra = _layer_counts(header)
    tensors = {tensor.name: tensor.shape for tensor in header.tensors}
    feed_forward, gated, inner = _feed_forward(header, tensors, trunk)
    mla = _compressed(header)
    return Shape(
        architecture=name,
        cache=row.cache,
        layers=_layers(header, row, trunk, trunk + extra, bool(mla)),
        width=_bounded(header, "embedding_length", least=1),
        vocabulary=_vocabulary(header, tensors),
        context=_bounded(header, "context_length", most=2**31),
        feed_forward=feed_forward,
        gated=gated,
        experts_used=_largest(header, "expert_used_count"),
        expert_feed_forward=inner,
        mixer=max((shape[1] for name, shape in tensors.items() if _MIXER.search(name)), default=0),
        compressed=mla,
        weights=_weights(header, trunk, row),
        doubts=_doubts(name, row, name in architectures()),
    )


def _doubts(name: str, row: Architecture, known: bool) -> tuple[str, ...]:
    if not known:
        return (f"the architecture {name} is new to this software",)
    if row.cache is CacheKind.SPECIAL:
        return (f"the architecture {name} has a cache of its own kind",)
    if row.guess:
        return (f"the working memory of {name} models is a guess",)
    return ()


def _bounded(header: Header, name: str, least: int = 0, most: int = _LARGEST) -> int:
    value = header.number(name)
    if value is None:
        if least > 0:
            raise GgufError(f"has no {header.architecture}.{name}")
        return 0
    if not least <= value <= most:
        raise GgufError(f"has an impossible {header.architecture}.{name}: {value:,}")
    return value


def _largest(header: Header, name: str) -> int:
    values = header.numbers(name)
    if values:
        return min(max(0, *values), _LARGEST)
    return _bounded(header, name)


def _layer_counts(header: Header) -> tuple[int, int]:
    """Layers that answer, and layers that only draft ahead."""
    count = _bounded(header, "block_count", least=1, most=MAX_LAYERS)
    extra = _bounded(header, "nextn_predict_layers", most=MAX_LAYERS)
    return (count - extra, extra) if extra < count else (count, 0)


def _each(header: Header, name: str, count: int, default: int) -> list[int]:
    """A number for each layer: from an array, or the same for all."""
    values = header.numbers(name)
    if values is None:
        single = header.number(name)
        values = (default if single is None else single,) * count
    if any(not 0 <= value <= _LARGEST for value in values):
        raise GgufError(f"has an impossible {header.architecture}.{name}")
    return [*values, *[default] * (count - len(values))][:count]


def _layers(
    header: Header, row: Architecture, trunk: int, total: int, is_mla: bool
) -> tuple[Layer, ...]:
    heads = _each(header, "attention.head_count", total, 0)
    heads_kv = header.numbers("attention.head_count_kv")
    if heads_kv is None and header.number("attention.head_count_kv") is None:
        each_kv = list(heads)
    else:
        each_kv = _each(header, "attention.head_count_kv", total, 0)
    width = _bounded(header, "embedding_length", least=1)
    default = width // heads[0] if heads[0] else 0
    key, value = (_head_size(header, f"attention.{each}_length", default) for each in _KV)
    key_near, value_near = (
        _head_size(header, f"attention.{each}_length_swa", full)
        for each, full in zip(_KV, (key, value), strict=True)
    )
    near = _near(header, row, trunk)
    window = row.fixed_window or header.number("attention.sliding_window") or row.window
    kept = _kept(header, row, trunk)
    state, with_state = _states(header, row, heads[0], key), _with_state(header, row, each_kv)
    found = []
    for number in range(trunk):
        keys, values = (key_near, value_near) if near[number] else (key, value)
        has_cache = number < kept and _has_attention(row, number, with_state)
        found.append(
            Layer(
                keys=keys * each_kv[number] if has_cache else 0,
                values=0 if is_mla or not has_cache else values * each_kv[number],
                window=window if near[number] else None,
                state=state if number in with_state else 0,
                heads=heads[number],
                queries=heads[number] * keys,
            )
        )
    return tuple(found)


_KV = ("key", "value")


def _head_size(header: Header, name: str, default: int) -> int:
    return default if header.number(name) is None else _bounded(header, name)


def _near(header: Header, row: Architecture, trunk: int) -> list[bool]:
    """Which layers see a window only."""
    given = header.number("attention.sliding_window")
    none = [False] * trunk
    if row.period is None or row.only_layers not in (None, trunk):
        return none
    if given == 0 or (given is None and row.window is None):
        return none
    pattern = header.numbers("attention.sliding_window_pattern")
    if pattern is not None:
        return [bool(each) for each in (*pattern, *[0] * trunk)][:trunk]
    period = header.number("attention.sliding_window_pattern")
    period = row.period if period is None else period
    if period <= 0:
        return [True] * trunk
    full = 0 if row.first_full else period - 1
    return [number % period != full for number in range(trunk)]


def _kept(header: Header, row: Architecture, trunk: int) -> int:
    """How many layers, from the first on, keep keys and values of their own."""
    shared = _bounded(header, "attention.shared_kv_layers")
    return min(trunk if row.kv_layers is None else row.kv_layers, max(trunk - shared, 0))


def _with_state(header: Header, row: Architecture, heads_kv: list[int]) -> frozenset[int]:
    """Layers that keep a state."""
    numbers = range(len(heads_kv))
    if row.states == "all":
        return frozenset(numbers)
    if row.states == "no_kv_heads":
        dense = _each(header, "feed_forward_length", len(heads_kv), 0)
        return frozenset(
            n for n in numbers if not heads_kv[n] and not (row.dense_apart and dense[n])
        )
    if row.states == "interval":
        marked = header.numbers("attention.recurrent_layers")
        if marked is not None:
            return frozenset(n for n, each in enumerate(marked) if each)
        every = header.number("full_attention_interval") or row.interval or 1
        return frozenset(n for n in numbers if (n + 1) % max(every, 1))
    return frozenset()


def _has_attention(row: Architecture, number: int, with_state: frozenset[int]) -> bool:
    if row.cache is CacheKind.NONE or row.cache is CacheKind.STATE:
        return False
    return row.states == "all" or number not in with_state


def _states(header: Header, row: Architecture, heads: int, key: int) -> int:
    """Values of the state of one layer for one slot: the convolution's and the recurrence's."""
    if row.states is None:
        return 0
    width = _bounded(header, "embedding_length", least=1)
    if size := _bounded(header, "wkv.head_size"):  # RWKV
        shifts = header.number("token_shift_count")
        return (2 if shifts is None else shifts) * width + width * size
    if length := _bounded(header, "shortconv.l_cache"):  # LFM2
        return width * (length - 1)
    kernel = _bounded(header, "ssm.conv_kernel")
    if size := _bounded(header, "kda.head_dim"):  # Kimi
        return 3 * (kernel - 1 if kernel else 3) * heads * size + size * size * heads
    if header.architecture == "minimax-01":
        return key * key * heads
    inner, state, groups = (
        _bounded(header, f"ssm.{each}") for each in ("inner_size", "state_size", "group_count")
    )
    return max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner


def _compressed(header: Header) -> int:
    """Width of the compressed cache; 0 for a model, or an older file of one, without it."""
    if not all(header.number(f"attention.{each}_length_mla") for each in _KV):
        return 0
    return _bounded(header, "attention.kv_lora_rank")


def _vocabulary(header: Header, tensors: Mapping[str, tuple[int, ...]]) -> int:
    embedding = tensors.get("token_embd.weight", ())
    if len(embedding) == 2:
        return embedding[1]
    return header.length("tokenizer.ggml.tokens") or 0


def _feed_forward(
    header: Header, tensors: Mapping[str, tuple[int, ...]], trunk: int
) -> tuple[int, bool, int]:
    """Width of the widest dense part, whether it has a gate, and width of one expert."""
    dense = inner = 0
    gated = False
    for name, shape in tensors.items():
        found = _LAYER.fullmatch(name)
        if found is None or int(found[1]) >= trunk or len(shape) < 2:
            continue
        part = found[2]
        if part in {"ffn_up.weight", "ffn_up_shexp.weight"}:
            # Without a gate of its own, twice the width may hold both (phi3).
            fused = shape[1] == 2 * _largest(header, "feed_forward_length")
            dense = max(dense, shape[1] // 2 if fused else shape[1])
            gated = gated or fused
        elif part in {"ffn_gate.weight", "ffn_gate_shexp.weight"}:
            gated = True
        elif part in {"ffn_up_exps.weight", "ffn_gate_exps.weight"}:
            inner = max(inner, shape[1])
        elif part == "ffn_gate_up_exps.weight":
            inner = max(inner, shape[1] // 2)
    return dense, gated, inner


def _weights(header: Header, trunk: int, row: Architecture) -> Weights:
    layers = [0] * trunk
    beginning = end = unused = 0
    for tensor in header.tensors:
        found = _LAYER.fullmatch(tensor.name)
        if found is not None:
            if int(found[1]) < trunk:
                layers[int(found[1])] += tensor.size
            else:
                unused += tensor.size
        elif re.match(r"(token_embd|per_layer_token_embd|position_embd|token_types)", tensor.name):
            beginning += tensor.size
        else:
            end += tensor.size
    names = {tensor.name for tensor in header.tensors}
    tied = "output.weight" not in names and row.cache is not CacheKind.NONE
    return Weights(tuple(layers), beginning, end, tied, unused)
