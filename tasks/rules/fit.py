"""Whether a model fits: weights, cache and working memory against that of the cards or the host.

The cache is computed as llama.cpp allocates it, to the byte. The working memory (llama.cpp's
compute buffer) is an estimate: what lives at the same time at the widest place of a layer. A test
compares both with what llama-server logs. All of this holds for the llama.cpp that this software
was tested with; others differ in the working memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from tasks.rules.architecture import CacheKind, Layer, Shape
from tasks.rules.findings import Finding, error, warning
from tasks.rules.gguf import TENSOR_TYPES
from tasks.settings import Settings

MIB = 1024**2
GIB = 1024**3

CELLS_PADDED_TO = 256
"""Caches have a multiple of so many cells."""

CARD_MARGIN_BYTES = GIB
"""Left on each card for the driver's context, kernels and scratch memory: 600 MiB of it are taken
when a server has started, up to 780 MiB when it has worked (H200, driver 580, CUDA 13.0).
llama.cpp's own --fit leaves as much."""

COPIES = 4
"""Batches that several cards work on at once: GGML_SCHED_MAX_COPIES."""

HOST_MARGIN_BYTES = GIB
"""Left of the host's memory for the system."""

BLOCKS = {name.lower(): (block, size) for name, block, size in TENSOR_TYPES.values()}
"""Type of a cache: (values in a block, bytes of a block)."""

SMALLER_CACHE = "q8_0"
"""Half of f16, with no loss that has been measured."""

FEWEST_TOKENS = 1024
"""A smaller context than this is not proposed."""


@dataclass(frozen=True)
class Demand:
    """What a server is asked for, as far as its memory depends on it."""

    ctx_size: int
    """Tokens of each slot."""
    parallel: int
    batch_size: int = 2048
    ubatch_size: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: bool = True
    gpu_layers: int | Literal["all", "auto"] = "all"

    @classmethod
    def of(cls, settings: Settings) -> Demand:
        """What the settings ask for."""
        return cls(
            ctx_size=settings.server_ctx_size,
            parallel=settings.server_parallel,
            batch_size=settings.server_batch_size,
            ubatch_size=settings.server_ubatch_size,
            cache_type_k=settings.server_cache_type_k or "f16",
            cache_type_v=settings.server_cache_type_v or "f16",
            flash_attn=settings.server_flash_attn != "off",
            gpu_layers=settings.server_gpu_layers,
        )

    @property
    def cells(self) -> int:
        """Cells of each slot's cache."""
        return _padded(_padded(self.ctx_size * self.parallel) // self.parallel)

    @property
    def tokens(self) -> int:
        """Most tokens that are computed at a time."""
        return min(self.ubatch_size, self.batch_size, self.cells * self.parallel)


@dataclass(frozen=True)
class Memory:
    """What is needed in one place. Bytes."""

    weights: int = 0
    cache: int = 0
    """Keys and values."""
    state: int = 0
    compute: int = 0
    output: int = 0
    """What answers are sampled from."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.state + self.compute + self.output

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.weights + other.weights,
            self.cache + other.cache,
            self.state + other.state,
            self.compute + other.compute,
            self.output + other.output,
        )


@dataclass(frozen=True)
class Place:
    """A card, or the host's memory."""

    name: str
    """As a person would call it: `NVIDIA GeForce RTX 5090`."""
    size: int
    """Bytes that a server may use, before the margin."""
    taken: int = 0
    """Bytes beside them that the host's other servers are given."""

    @property
    def described(self) -> str:
        """How much there is."""
        beside = f" beside {_size(self.taken)} for other servers" if self.taken else ""
        return f"{_size(self.size)}{beside}"


@dataclass(frozen=True)
class Share:
    """What one place has to hold."""

    place: Place
    memory: Memory
    margin: int

    @property
    def left(self) -> int:
        """Bytes that stay free beyond the margin; negative where it does not fit."""
        return self.place.size - self.margin - self.memory.total


class Verdict(str, Enum):
    """How it stands."""

    FITS = "fits"
    FITS_CHANGED = "fits-changed"
    """Not as asked for, but with one of the changes."""
    TOO_LARGE = "too-large"


@dataclass(frozen=True)
class Change:
    """Settings with which it would fit."""

    settings: tuple[tuple[str, object], ...]
    costs: str
    """What is given up."""

    def __str__(self) -> str:
        told = ", ".join(f"{name} = {value!r}" for name, value in self.settings)
        return f"{told} ({self.costs})"


@dataclass(frozen=True)
class Fit:
    """Whether a model fits, and how."""

    verdict: Verdict
    shares: tuple[Share, ...]
    """Cards in their order, then the host."""
    gpu_layers: int
    """Layers on the cards, the output counted as one."""
    changes: tuple[Change, ...]
    doubts: tuple[str, ...]

    @property
    def inner(self) -> Fit:
        """The same as part of a process whose margins are counted with another part."""
        return replace(self, shares=tuple(replace(share, margin=0) for share in self.shares))

    @property
    def total(self) -> Memory:
        """Everything together."""
        return sum((share.memory for share in self.shares), Memory())


# What is needed


def _padded(size: int, to: int = CELLS_PADDED_TO) -> int:
    return -(-size // to) * to


def _row_bytes(values: int, kind: str) -> int:
    block, size = BLOCKS[kind]
    return -(-values // block) * size


def cells_of(layer: Layer, demand: Demand) -> int:
    """Cells that one slot has in the cache of a layer.

    Where only a window is seen, it is enough, with what is computed at a time.
    """
    if layer.window is None:
        return demand.cells
    return _padded(min(demand.cells, layer.window + demand.tokens))


def cache_bytes(layer: Layer, shape: Shape, demand: Demand) -> int:
    """Keys and values of a layer, for all slots."""
    values = layer.values
    if not demand.flash_attn and values:
        # Without flash attention V lies transposed, and has to be as wide everywhere.
        values = max(each.values for each in shape.layers)
    row = _row_bytes(layer.keys, demand.cache_type_k) + _row_bytes(values, demand.cache_type_v)
    return row * cells_of(layer, demand) * demand.parallel


def state_bytes(layer: Layer, demand: Demand) -> int:
    """State of a layer, for all slots."""
    return 4 * layer.state * demand.parallel


def compute_bytes(shape: Shape, demand: Demand) -> int:
    """Working memory: masks, and the widest place of a layer, for the tokens computed at a time."""
    widest = max(_feed_forward_values(shape), _attention_values(shape, demand))
    return _mask_bytes(shape, demand) + 4 * demand.tokens * widest + _gathered_bytes(shape, demand)


def card_compute_bytes(shape: Shape, demand: Demand, whole: bool = True, cards: int = 1) -> int:
    """Working memory of a card; whole means that the cards hold all layers.

    Then the embeddings that are given instead of tokens stay with the host, and several cards work
    on several batches at once, each with inputs of its own. A cache of another type than f16 is
    converted, a layer at a time.
    """
    mask = _mask_bytes(shape, demand)
    spared = shape.width if whole and shape.cache is not CacheKind.NONE else 0
    widest = 4 * demand.tokens * (_feed_forward_values(shape) - spared)
    attention = 4 * demand.tokens * max(_attention_values(shape, demand) - spared, 0)
    converted = _converted_bytes(shape, demand)
    inputs = (mask + 4 * demand.tokens * shape.width) * (COPIES - 1)
    both = max(widest, attention + converted) + _gathered_bytes(shape, demand)
    return mask + both + (inputs if whole and cards > 1 else 0)


def _converted_bytes(shape: Shape, demand: Demand) -> int:
    if not demand.flash_attn:
        return 0
    most = 0
    for layer in shape.layers:
        values = layer.keys if demand.cache_type_k != "f16" else 0
        values += layer.values if demand.cache_type_v != "f16" else 0
        most = max(most, 2 * values * cells_of(layer, demand) * demand.parallel)
    return most


def _gathered_bytes(shape: Shape, demand: Demand) -> int:
    """States are gathered from the slots, and written back."""
    if shape.cache is not CacheKind.STATE:
        return 0
    return 2 * max(state_bytes(layer, demand) for layer in shape.layers)


def _mask_bytes(shape: Shape, demand: Demand) -> int:
    """Which token sees which: one mask for the full layers, one for those with a window."""
    each = 2 if demand.flash_attn else 4
    if shape.cache is CacheKind.NONE:
        return each * demand.tokens**2 * (2 if shape.windows else 1)
    wide = {cells_of(layer, demand) for layer in shape.layers if layer.keys}
    return sum(each * demand.tokens * cells for cells in wide)


def _feed_forward_values(shape: Shape) -> int:
    """For each token, at the moment when the gate has been applied.

    Then live: the embeddings that are given instead of tokens, what came out of the attention, and
    three times the width of the feed-forward part; and what was freed before, the queries and what
    they were made from, if that is too small to be used again.
    """
    width, dense = shape.width, shape.feed_forward
    if shape.cache is CacheKind.NONE:
        return 2 * width + 3 * dense if shape.gated else 3 * width + dense
    if shape.cache is CacheKind.STATE:
        return width // 2 + 3 * (shape.mixer or 4 * width)
    freed = width + max(layer.queries for layer in shape.layers)
    values = 2 * width + freed + (2 * dense if shape.gated else dense)
    if shape.gated and dense > freed:
        values += dense
    if routed := shape.experts_used * shape.expert_feed_forward:
        each = shape.experts_used * width
        outputs = each + width if each > 2 * routed else 0
        values = max(values if dense else 0, 4 * width + 3 * routed + outputs)
    return values


def _attention_values(shape: Shape, demand: Demand) -> int:
    """For each token, at the moment when the attention has been computed."""
    values = 0
    for layer in shape.layers:
        queries = layer.queries
        if shape.cache is CacheKind.NONE:
            here = 3 * shape.width + 3 * queries
        elif not layer.keys:
            continue
        elif shape.compressed:
            # The queries are brought into the compressed space, and the result back out of it.
            queries = layer.heads * shape.compressed + layer.queries
            here = (6 if demand.flash_attn else 2) * shape.width + queries
            here += layer.heads * (layer.keys - shape.compressed) * 2
        else:
            own = layer.keys + layer.values if layer.keys == layer.queries else layer.keys
            here = 3 * shape.width + 2 * queries + own
        if not demand.flash_attn:
            seen = demand.tokens if shape.cache is CacheKind.NONE else cells_of(layer, demand)
            here += layer.heads * seen + (queries // 2 if layer.keys else 0)
        values = max(values, here)
    return values


def output_bytes(shape: Shape, demand: Demand) -> int:
    """What answers are sampled from, in the host's memory."""
    return 4 * demand.parallel * shape.vocabulary


def on_host(shape: Shape, demand: Demand) -> Memory:
    """Everything, for a host without a card."""
    return Memory(
        weights=shape.weights.total,
        cache=sum(cache_bytes(layer, shape, demand) for layer in shape.layers),
        state=sum(state_bytes(layer, demand) for layer in shape.layers),
        compute=compute_bytes(shape, demand),
        output=output_bytes(shape, demand),
    )


# Where it goes


def shares(
    shape: Shape, demand: Demand, cards: Sequence[Place], host: Place, gpu_layers: int
) -> tuple[Share, ...]:
    """What each place has to hold, as llama.cpp divides it.

    The last layers and the output go to the cards, in proportion to their memory.
    """
    weights = shape.weights
    count = len(shape.layers)
    memory = [Memory() for _ in cards]
    at_home = Memory(weights=weights.input + weights.unused, output=output_bytes(shape, demand))
    for number in range(count + 1):
        if number < count:
            layer = shape.layers[number]
            part = Memory(
                weights=weights.layers[number],
                cache=cache_bytes(layer, shape, demand),
                state=state_bytes(layer, demand),
            )
        else:
            part = Memory(weights=weights.output)
        card = _card_of(number, count, gpu_layers, cards)
        if card is None:
            at_home += part
        else:
            if number == count and weights.tied:
                part += Memory(weights=weights.input)
            memory[card] += part
    working = Memory(
        compute=card_compute_bytes(shape, demand, whole=gpu_layers > count, cards=len(cards))
    )
    on_cards = [
        Share(card, each + working if each.total else each, CARD_MARGIN_BYTES)
        for card, each in zip(cards, memory, strict=True)
    ]
    # Prompts are computed on the cards even for layers that are not there; the host prepares them.
    rest = _host_compute_bytes if cards and gpu_layers > 0 else compute_bytes
    at_home += Memory(compute=rest(shape, demand))
    return (*on_cards, Share(host, at_home, HOST_MARGIN_BYTES))


def _host_compute_bytes(shape: Shape, demand: Demand) -> int:
    return _mask_bytes(shape, demand) + 4 * demand.tokens * 2 * shape.width


def _card_of(number: int, count: int, gpu_layers: int, cards: Sequence[Place]) -> int | None:
    first = max(count + 1 - gpu_layers, 0)
    on_cards = min(gpu_layers, count + 1)
    if not cards or number < first or number - first >= on_cards:
        return None
    whole = sum(card.size for card in cards)
    reached = 0
    for index, card in enumerate(cards):
        reached += card.size
        if (number - first) / on_cards < reached / whole:
            return index
    return len(cards) - 1


def fit(shape: Shape, demand: Demand, cards: Sequence[Place], host: Place) -> Fit:
    """Whether a model fits as asked for; if not, what would have to change."""
    most = len(shape.layers) + 1 if cards else 0
    asked = demand.gpu_layers
    layers = most if isinstance(asked, str) else min(asked, most)
    if asked == "auto" and cards:
        layers = _most_layers(shape, demand, cards, host) or layers
    found = shares(shape, demand, cards, host, layers)
    if _all_fit(found):
        return Fit(Verdict.FITS, found, layers, (), shape.doubts)
    changes = tuple(_changes(shape, demand, cards, host, layers))
    verdict = Verdict.FITS_CHANGED if changes else Verdict.TOO_LARGE
    return Fit(verdict, found, layers, changes, shape.doubts)


def _all_fit(found: Iterable[Share]) -> bool:
    return all(share.left >= 0 for share in found)


def _fits(shape: Shape, demand: Demand, cards: Sequence[Place], host: Place, layers: int) -> bool:
    return _all_fit(shares(shape, demand, cards, host, layers))


def _last(low: int, high: int, good: Callable[[int], bool]) -> int | None:
    """The largest number that is good, where all below it are."""
    if high < low or not good(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if good(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _most_layers(shape: Shape, demand: Demand, cards: Sequence[Place], host: Place) -> int | None:
    """Layers that the cards can take while the host takes the rest."""
    most = len(shape.layers) + 1
    for layers in range(most, 0, -1):
        if _fits(shape, demand, cards, host, layers):
            return layers
    return None


def _changes(
    shape: Shape, demand: Demand, cards: Sequence[Place], host: Place, layers: int
) -> Iterator[Change]:
    """What would make it fit, the least painful first."""
    yield from _cache_change(shape, demand, cards, host, layers)
    size = _last(
        1,
        (demand.ctx_size - 1) // FEWEST_TOKENS,
        lambda n: _fits(shape, replace(demand, ctx_size=n * FEWEST_TOKENS), cards, host, layers),
    )
    if size is not None:
        yield Change((("server_ctx_size", size * FEWEST_TOKENS),), "shorter conversations")
    slots = _last(
        1,
        demand.parallel - 1,
        lambda n: _fits(shape, replace(demand, parallel=n), cards, host, layers),
    )
    if slots is not None:
        yield Change((("server_parallel", slots),), "fewer requests at a time")
    if cards and (fewer := _most_layers(shape, demand, cards, host)):
        yield Change(
            (("server_gpu_layers", fewer),),
            f"{len(shape.layers) + 1 - fewer} of {len(shape.layers) + 1} layers on the processor, "
            "several times slower",
        )


def _cache_change(
    shape: Shape, demand: Demand, cards: Sequence[Place], host: Place, layers: int
) -> Iterator[Change]:
    smaller = replace(demand, cache_type_k=SMALLER_CACHE, cache_type_v=SMALLER_CACHE)
    saves = on_host(shape, smaller).cache < on_host(shape, demand).cache
    # A quantised V needs flash attention, and heads that are a multiple of a block.
    if demand.flash_attn and saves and _fits(shape, smaller, cards, host, layers):
        yield Change(
            (("server_cache_type_k", SMALLER_CACHE), ("server_cache_type_v", SMALLER_CACHE)),
            "a cache of half the size, about a fifth slower",
        )


# What to say


def findings(found: Fit, name: str, alternatives: Sequence[str] = ()) -> Iterator[Finding]:
    """What there is to say about a model that was held against a host.

    alternatives are smaller quantisations that would fit as they are.
    """
    short = min(found.shares, key=lambda share: share.left)
    doubts = "; ".join(found.doubts)
    if found.verdict is Verdict.FITS:
        if doubts:
            yield warning(
                "memory-unsure",
                f"model: {name} needs at least {_size(short.memory.total)} on {short.place.name}, "
                f"which has {short.place.described}; {doubts}",
                "it may need more than that, and then will not start",
            )
        return
    ways = [str(change) for change in found.changes]
    ways += [f"model with {alternative}" for alternative in alternatives]
    fix = f"Set one of: {'; '.join(ways)}." if ways else "Choose a smaller model."
    yield error(
        "model-too-large",
        f"model: {name} needs {describe(short.memory)} on {short.place.name}, which has "
        f"{short.place.described}, of which {_size(short.margin)} stay free",
        f"it is {_size(-short.left)} too large" + (f" at the least ({doubts})" if doubts else ""),
        fix,
    )


def sentence(found: Fit) -> str:
    """Where it goes, for people: cards, and the host where it holds more than its part in that."""
    shares = [share for share in found.shares[:-1] if share.memory.total] or list(found.shares)
    told = "; ".join(
        f"{describe(share.memory)} of {_size(share.place.size)} on {share.place.name}"
        for share in shares
    )
    return told if found.verdict is Verdict.FITS else f"does not fit: {told}"


def describe(memory: Memory) -> str:
    """The sum and its parts."""
    parts = {
        "weights": memory.weights,
        "context": memory.cache + memory.state,
        "working memory": memory.compute + memory.output,
    }
    told = ", ".join(f"{what} {_size(size)}" for what, size in parts.items() if size)
    return f"{_size(memory.total)} ({told})"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if abs(size) >= GIB else f"{size / MIB:.0f} MiB"
