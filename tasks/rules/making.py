"""A model that is made on the host: what from, what that takes, and what it is known by."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules.architecture import CacheKind, Layer, Shape, Weights
from tasks.rules.findings import Finding, error
from tasks.rules.hub_files import is_weights, quant_of
from tasks.rules.quantisation import Quantisation, pythons, quantisation, torches
from tasks.rules.space import Need
from tasks.settings import Settings

WORK = f"{at.CACHE}/converter"
"""Environment of the conversion."""
UPLOADS = f"{at.STATE}/uploads"
"""What comes from the controller to be made something of."""
ENVIRONMENT_BYTES = 1_400_000_000
"""Of the conversion: 1.2 GB were seen, most of it PyTorch."""
BASE_PACKAGES = ("ca-certificates", "curl")
CONVERSION_PACKAGES = ("git", "python3-venv")
HEADER_BYTES = 16 * 1024**2
"""What a vocabulary may add."""


@dataclass(frozen=True)
class Listed:
    """A file on the host, as it was found there."""

    name: str
    """Within its folder."""
    size: int
    mtime: int


@dataclass(frozen=True)
class Folder:
    """What lies on the host where the user says that the model is."""

    path: str
    files: tuple[Listed, ...]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Ingredient:
    """A file that a model is made from."""

    name: str
    """By which the tools find it."""
    size: int | None
    sha256: str | None = None
    """None for one that is on the host already, where nobody has read it through."""
    url: str | None = None
    original: str | None = None
    """Path on the controller."""
    path: str | None = None
    """Path on the host, of the user's own file."""
    mtime: int = 0
    stored: bool = False
    """Whether the store has it, since it is, or was, served as it is."""

    @property
    def place(self) -> str:
        """Where it is when work begins."""
        if self.path is not None:
            return self.path
        if self.stored:
            return f"{at.BLOBS}/{self.sha256}"
        return f"{UPLOADS if self.original else at.INCOMING}/{self.sha256}" + (
            "" if self.original else ".part"
        )

    @property
    def identity(self) -> str:
        """What it cannot change without being another one."""
        return self.sha256 or f"{self.path} {self.size} {self.mtime}"


@dataclass(frozen=True)
class Environment:
    """What a conversion runs in."""

    packages: tuple[str, ...] = ()
    """Of the distribution."""
    torch: str = ""
    """A line of requirements; empty where it is one of the packages."""


@dataclass(frozen=True)
class Making:
    """What is done to have a model."""

    quantisation: Quantisation
    key: str
    """Of everything that the result depends on but the version of the tools, 64 hex digits."""
    sources: tuple[Ingredient, ...]
    imatrix: Ingredient | None = None
    architecture: str | None = None
    """As config.json names it."""
    environment: Environment | None = None
    """None where nothing has to be converted, or none is known to work."""
    base_size: int | None = None
    """Bytes of the model with 16 bits for each weight; where known."""
    worked: bool = False
    """Whether the work is done, and was not handed over."""

    @property
    def converts(self) -> bool:
        """Whether what it is made from is no GGUF."""
        return any(is_weights(each.name) for each in self.sources)

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """Everything that has to be on the host."""
        return (*self.sources, *([self.imatrix] if self.imatrix else []))

    @property
    def size(self) -> int | None:
        """Bytes of the result, as predicted."""
        if self.base_size is None:
            return None
        return self.quantisation.size(self.base_size)

    @property
    def work(self) -> str:
        """Folder for links and logs; short, since a socket is among them."""
        return f"{at.INCOMING}/making-{self.key[:12]}"

    @property
    def done(self) -> str:
        """File that says what was made."""
        return f"{at.INCOMING}/{mark('done', self.key)}.part"

    @property
    def result(self) -> str:
        """What is made, until it is known to be right."""
        return f"{at.INCOMING}/{mark('result', self.key)}.part"

    @property
    def partials(self) -> tuple[str, ...]:
        """What may lie among the downloads, by the names that the probe tells, and is needed."""
        names = [each.sha256 or "" for each in self.ingredients]
        return (*names, self.key, mark("result", self.key), mark("done", self.key))


def mark(what: str, key: str) -> str:
    """Name for a file of the work that the probe sees, and a later run removes, as a download."""
    return hashlib.sha256(f"{what} {key}".encode()).hexdigest()


def key_of(
    quantization: str, sources: Iterable[Ingredient], imatrix: Ingredient | None = None
) -> str:
    """Another one for everything that makes another model.

    The tools' version is not part of it: nobody wants to fetch and quantise a model once more with
    each version of llama.cpp.
    """
    told = [
        quantization,
        imatrix.identity if imatrix else None,
        sorted((each.name, each.identity) for each in sources),
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def make(
    settings: Settings,
    probe: Probe,
    sources: Sequence[Ingredient],
    imatrix: Ingredient | None,
    config: Mapping[str, Any] | None,
) -> Making:
    """What is done to have the model that the settings ask for."""
    assert settings.model_quantize is not None
    wanted = quantisation(settings.model_quantize)
    stocked = [_stocked(each, probe) for each in sources]
    key = key_of(wanted.name, stocked, imatrix)
    converts = any(is_weights(each.name) for each in stocked)
    return Making(
        quantisation=wanted,
        key=key,
        sources=tuple(stocked),
        imatrix=_stocked(imatrix, probe) if imatrix else None,
        architecture=architecture_of(config),
        environment=environment(settings, probe) if converts else None,
        base_size=_base_size(stocked, config),
        worked=mark("done", key) in probe.partials,
    )


def _stocked(each: Ingredient, probe: Probe) -> Ingredient:
    size = probe.blobs.get(each.sha256) if each.sha256 is not None else None
    return replace(each, stored=size is not None and each.size in (None, size))


def _base_size(sources: Sequence[Ingredient], config: Mapping[str, Any] | None) -> int | None:
    sizes = [each.size for each in sources if is_weights(each.name) or _is_gguf(each.name)]
    if not sizes or None in sizes:
        return None
    whole = sum(size or 0 for size in sizes)
    # As if it had 16 bits for each weight, as it has after a conversion.
    wide = dtype_of(config) == "float32" or quant_of(sources[0].name) == "F32"
    return whole // 2 if wide else whole


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def environment(settings: Settings, probe: Probe) -> Environment | None:
    """What a conversion runs in on this host; None where no PyTorch is known for it."""
    url, sha256 = settings.model_convert_torch_url, settings.model_convert_torch_sha256
    if url is not None and sha256 is not None:
        return Environment(CONVERSION_PACKAGES, f"torch @ {url} --hash=sha256:{sha256}")
    python = pythons().get((probe.os_id or "", probe.os_version or ""))
    if python is None:
        return None
    if python.torch is not None:
        return Environment((*CONVERSION_PACKAGES, python.torch))
    torch = torches().get((python.version, probe.arch or ""))
    if torch is None:
        return None
    address = torch.url(settings.model_convert_torch_base_url)
    return Environment(CONVERSION_PACKAGES, f"torch @ {address} --hash=sha256:{torch.sha256}")


def watched_packages() -> tuple[str, ...]:
    """Packages that the probe has to look at."""
    return (*CONVERSION_PACKAGES, *(each.torch for each in pythons().values() if each.torch))


def packages(making: Making | None) -> tuple[str, ...]:
    """Packages that the work takes."""
    if making is None or making.environment is None or making.worked:
        return ()
    return making.environment.packages


# What config.json says


def architecture_of(config: Mapping[str, Any] | None) -> str | None:
    """The class that the model is of, by which the conversion knows it."""
    named = (config or {}).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else None


def dtype_of(config: Mapping[str, Any] | None) -> str | None:
    """Type of the weights."""
    found = config or {}
    value = found.get("torch_dtype", found.get("dtype"))
    return value if isinstance(value, str) else None


def shape(making: Making, base: Shape | None) -> Shape | None:
    """What the result is like; base is what it is made from."""
    if base is None or making.size is None:
        return base
    return replace(base, weights=base.weights.scaled(making.size))


_STRANGE = ("kv_lora_rank", "layer_types", "ssm_state_size", "state_size", "mamba_d_state")
"""What makes a cache unlike that of the usual transformer."""


def shape_of_config(config: Mapping[str, Any], size: int) -> Shape | None:
    """What a model is like that has no GGUF yet, of so many bytes; None for an unusual one."""
    inner = config.get("text_config")
    found = inner if isinstance(inner, dict) else config

    def number(name: str, default: int = 0) -> int:
        value = found.get(name)
        return value if isinstance(value, int) and 0 < value < 2**24 else default

    heads, width = number("num_attention_heads"), number("hidden_size")
    layers = number("num_hidden_layers")
    if not (heads and width and 0 < layers <= 512) or any(name in found for name in _STRANGE):
        return None
    head = number("head_dim", width // heads)
    kept = number("num_key_value_heads", heads) * head
    vocabulary = number("vocab_size")
    embedding = min(2 * vocabulary * width, size // 3)
    tied = found.get("tie_word_embeddings") is True
    inside = size - embedding * (1 if tied else 2)
    layer = Layer(kept, kept, None, 0, heads, heads * head)
    return Shape(
        architecture=str(found.get("model_type", "unknown")),
        cache=CacheKind.ATTENTION,
        layers=(layer,) * layers,
        width=width,
        vocabulary=vocabulary,
        context=number("max_position_embeddings"),
        feed_forward=number("intermediate_size"),
        gated=True,
        experts_used=number("num_experts_per_tok"),
        expert_feed_forward=number("moe_intermediate_size"),
        mixer=0,
        compressed=0,
        weights=Weights((inside // layers,) * layers, embedding, 0 if tied else embedding, tied),
        doubts=("it is reckoned from its config.json",),
    )


# What to say


def sentence(making: Making, name: str, fetched: int) -> str:
    """What is done, for people."""
    size = f"about {making.size / 1e6:,.1f} MB" if making.size else "size unknown"
    if making.worked:
        return f"store {name}, which was made by an earlier run"
    steps = [f"fetch {fetched / 1e6:,.1f} MB"] if fetched else []
    steps += ["convert"] if making.converts else []
    matrix = " with an importance matrix" if making.imatrix else ""
    steps.append(f"quantise to {making.quantisation.name}{matrix}")
    return f"make {name} ({size}): {', '.join(steps)}"


def findings(settings: Settings, making: Making, probe: Probe) -> Iterator[Finding]:
    """What stands in the way of making it."""
    if making.quantisation.imatrix and making.imatrix is None:
        yield error(
            "imatrix-needed",
            f"model_quantize: {making.quantisation.name} takes an importance matrix",
            "llama-quantize refuses without one: the result would be garbage",
            "Set model_imatrix (many repositories of GGUF have one), or choose Q2_K or better.",
        )
    if making.converts and making.environment is None:
        where = f"{probe.os_name or probe.os_id or 'this system'} on {probe.arch}"
        yield error(
            "no-torch",
            f"model_quantize: no build of PyTorch for the CPU is known for {where}",
            "convert_hf_to_gguf.py computes with it",
            "Set model_convert_torch_url and model_convert_torch_sha256 to a wheel for this "
            "host's python3, or start from a GGUF in F16 or BF16.",
        )
    if making.converts and making.architecture is None:
        yield error(
            "no-architecture",
            f"model: the config.json of {settings.model} names no architecture",
            "nothing says what model the weights are of",
        )


def needs(making: Making, probe: Probe) -> Iterator[Need]:
    """Disk space that it takes: what it is made from, what lies between, and the result."""
    if making.worked:
        return
    for each in making.ingredients:
        if each.path is None and not each.stored and each.size and each.sha256:
            there = probe.partials.get(each.sha256, 0)
            yield Need(at.STATE, max(0, each.size - there), posixpath.basename(each.name))
    if making.converts:
        base = (making.base_size or 0) + HEADER_BYTES
        there = probe.partials.get(making.key, 0)
        yield Need(at.STATE, max(0, base - there), "the conversion")
        yield Need(at.CACHE, ENVIRONMENT_BYTES, "what converts")
    yield Need(at.STATE, (making.size or 0) + HEADER_BYTES, f"the {making.quantisation.name}")
