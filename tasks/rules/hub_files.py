"""Which files of a Hugging Face repository are the model that was asked for.

A repository holds one model in many quantisations, each a file or a set of parts, and often files
beside it that are no model: projectors for images (mmproj), drafts, importance matrices. Names are
all there is to go by; they follow habits, and those are written down here.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from tasks.rules.findings import Finding, error

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?::(?P<quant>[^/:@\s]+)|/(?P<file>[^:@\s]+))?")

SHAPES = "user/repo, user/repo:QUANT or user/repo/file.gguf"
"""How a model on the Hub is written."""

_QUANT = re.compile(
    r"""(?<![A-Za-z0-9])
    (?P<dynamic>UD[-_])?
    (?P<quant>
        Q[1-8]_K(?:_(?:XXL|XL|L|M|S|XS|XXS|P|H))?   # k-quants and the mixes that people publish
      | Q[1-8]_[01](?:_[48]_[48])?                  # one scale for each block
      | IQ[1-8]_[A-Z0-9]+(?:_[A-Z0-9]{1,2})?        # non-linear
      | TQ[12]_0
      | MXFP4(?:_MOE)? | NVFP4
      | BF16 | FP?16 | FP?32
    )(?![A-Za-z0-9])""",
    re.IGNORECASE | re.VERBOSE,
)

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")

_BESIDE = re.compile(r"mmproj|imatrix|(?:^|[-_.])(?:mtp|eagle3|dflash|dspark)-", re.IGNORECASE)
"""In the name of a GGUF file that is no model by itself. The same words as llama.cpp looks for."""

PROJECTOR = re.compile(r"mmproj", re.IGNORECASE)

QUALITY = (
    "F32",
    "BF16",
    "F16",
    "Q8_K_XL",
    "Q8_0",
    "Q6_K_XL",
    "Q6_K_L",
    "Q6_K",
    "Q5_K_XL",
    "Q5_K_L",
    "Q5_K_M",
    "Q5_K",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_XL",
    "Q4_K_L",
    "Q4_K_M",
    "Q4_K",
    "Q4_K_S",
    "MXFP4",
    "MXFP4_MOE",
    "NVFP4",
    "IQ4_NL",
    "IQ4_XS",
    "Q4_1",
    "Q4_0",
    "Q3_K_XL",
    "Q3_K_L",
    "IQ3_M",
    "Q3_K_M",
    "Q3_K",
    "IQ3_S",
    "IQ3_XS",
    "Q3_K_S",
    "IQ3_XXS",
    "Q2_K_XL",
    "Q2_K_L",
    "Q2_K",
    "IQ2_M",
    "Q2_K_S",
    "IQ2_S",
    "IQ2_XS",
    "TQ2_0",
    "IQ2_XXS",
    "Q2_0",
    "TQ1_0",
    "IQ1_M",
    "IQ1_S",
    "Q1_0",
)
"""Quantisations, the best first: by the loss that llama-quantize states for each (perplexity of
Llama-3-8B), and where it states none, by bits per weight. A dynamic one (`UD-`) stands just before
the plain one of its name."""

AMPLE = "Q8_0"
"""What is better than this costs twice the memory and half the speed, and nobody can tell the
difference (+0.0026 perplexity): it is chosen only where nothing smaller is published."""

POOR = "Q3_K_S"
"""From here on down answers suffer visibly (+1.6 perplexity and more)."""

_PROJECTOR_ORDER = ("F16", "BF16", "Q8_0", "F32")
"""F16 first: every GPU computes in it, and a projector is small."""


@dataclass(frozen=True)
class Reference:
    """A model on the Hub, as people write it."""

    repo: str
    quant: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.quant:
            return f"{self.repo}:{self.quant}"
        return f"{self.repo}/{self.file}" if self.file else self.repo


def parse_reference(text: str) -> Reference:
    """The model that a text names. Raises ValueError, saying what would be right."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        if "@" in text:
            raise ValueError(f"must be {SHAPES}; the revision is a setting of its own")
        raise ValueError(f"must be {SHAPES}")
    repo, quant, file = found["repo"], found["quant"], found["file"]
    if file is not None and not file.lower().endswith(".gguf"):
        raise ValueError(f"must be {SHAPES}; {file} is no .gguf file")
    if file is not None and any(part in {"", ".", ".."} for part in file.split("/")):
        raise ValueError(f"must be {SHAPES}; {file} is no path inside a repository")
    return Reference(repo, quant, file)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, at one commit."""

    path: str
    size: int
    sha256: str | None
    """None where the Hub tells none: a small file that is kept in git itself."""
    url: str
    """Address of exactly this content: the commit stands in it."""


@dataclass(frozen=True)
class Candidate:
    """One whole model of a repository: a file, or all its parts in order."""

    name: str
    """Path without `.gguf` and without the number of the part."""
    quant: str | None
    """Upper case, `UD-` included; None where the name tells none."""
    files: tuple[HubFile, ...]
    missing: tuple[int, ...] = ()
    """Numbers of the parts that the repository lacks."""

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(file.size for file in self.files)

    @property
    def label(self) -> str:
        """How to call it in a sentence."""
        return self.quant or posixpath.basename(self.name)


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub, down to the bytes."""

    reference: Reference
    commit: str
    gated: bool
    candidate: Candidate
    projector: HubFile | None
    """For models that see: what turns images into tokens."""

    @property
    def files(self) -> tuple[HubFile, ...]:
        """Everything that has to be on the host, the parts in order, the projector last."""
        return (*self.candidate.files, *([self.projector] if self.projector else []))

    @property
    def first(self) -> HubFile:
        """The file that llama-server is given; it finds the other parts by itself."""
        return self.candidate.files[0]

    def as_json(self) -> str:
        """One line from which it can be read again: what a host keeps of where a model is from."""
        return TypeAdapter(HubModel).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> HubModel | None:
        """What was kept; None for what is damaged, or from another version of this software."""
        try:
            return TypeAdapter(HubModel).validate_json(text)
        except ValidationError:
            return None


class ChoiceError(Exception):
    """Nothing, or more than one thing, is what was asked for."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(str(finding))


# Names


def _stem(path: str) -> str:
    return path[: -len(".gguf")]


def _normal(quant: str) -> str:
    upper = quant.upper().replace("UD_", "UD-")
    return re.sub(r"\bFP(16|32)\b", r"F\1", upper)


def quant_of(path: str) -> str | None:
    """The quantisation that a file's name tells; failing that, the one its folder's name tells."""
    stem = _stem(path) if path.lower().endswith(".gguf") else path
    for part in reversed(stem.split("/")):
        found = list(_QUANT.finditer(part))
        if found:
            return _normal(found[-1].group())
    return None


def rank(quant: str | None) -> tuple[int, int]:
    """Place in the order of quality, smaller is better.

    What is unknown comes last within its number of bits.
    """
    if quant is None:
        return (len(QUALITY), 0)
    plain = quant.removeprefix("UD-")
    if plain in QUALITY:
        return (QUALITY.index(plain), 0 if plain != quant else 1)
    alike = [place for place, each in enumerate(QUALITY) if _bits(each) == _bits(plain)]
    return (max(alike, default=len(QUALITY)), 2)


def _bits(quant: str) -> int:
    found = re.search(r"\d+", quant)
    return int(found.group()) if found else 0


def is_poor(quant: str | None) -> bool:
    """Whether answers suffer visibly from it."""
    return quant is not None and QUALITY.index(POOR) <= rank(quant)[0] < len(QUALITY)


def is_model(path: str) -> bool:
    """Whether a file is a model rather than something beside one."""
    return path.lower().endswith(".gguf") and not _BESIDE.search(posixpath.basename(path))


# Groups


def candidates(files: Iterable[HubFile]) -> tuple[Candidate, ...]:
    """The models of a repository, the best first."""
    groups: dict[tuple[str, int], dict[int, HubFile]] = defaultdict(dict)
    for file in files:
        if not is_model(file.path):
            continue
        part = _PART.fullmatch(_stem(file.path))
        if part is None:
            groups[_stem(file.path), 1][1] = file
        else:
            # Parts of another count are another model, even if everything else is the same.
            groups[part["stem"], int(part["count"])][int(part["number"])] = file
    found = [_candidate(stem, count, parts) for (stem, count), parts in groups.items()]
    return tuple(sorted(found, key=lambda each: (*rank(each.quant), -each.size, each.name)))


def _candidate(stem: str, count: int, parts: dict[int, HubFile]) -> Candidate:
    # A count of 99999 in a single file's name must not become a list of 99998 numbers.
    missing = [number for number in range(1, min(count, 1000) + 1) if number not in parts]
    ordered = tuple(parts[number] for number in sorted(parts) if 1 <= number <= count)
    return Candidate(stem, quant_of(stem), ordered or tuple(parts.values()), tuple(missing))


# Choice


def select(reference: Reference, files: Sequence[HubFile]) -> tuple[Candidate, ...]:
    """The models that a reference may mean, in the order in which they should be tried.

    A quantisation or a file is one model; a bare repository is all of its whole ones. Raises
    ChoiceError, which says what there is instead.
    """
    found = candidates(files)
    if not found:
        raise ChoiceError(_no_gguf(reference, files))
    if reference.file is not None:
        chosen = [_by_file(reference, found, files)]
    elif reference.quant is not None:
        chosen = [_by_quant(reference, found)]
    else:
        chosen = [each for each in in_order_of_trial(found) if not each.missing]
        if not chosen:
            raise ChoiceError(_incomplete(reference, found[0]))
    if chosen[0].missing:
        raise ChoiceError(_incomplete(reference, chosen[0]))
    if reference.quant is None and reference.file is None:
        chosen = [each for each in chosen if all(file.sha256 for file in each.files)] or chosen
    for file in chosen[0].files:
        if file.sha256 is None:
            raise ChoiceError(_no_sha256(reference, file))
    return tuple(chosen)


def in_order_of_trial(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Models from the best that is worth its memory downwards.

    What is more than ample comes last, the smallest first.
    """
    limit = QUALITY.index(AMPLE)
    worth = [each for each in found if rank(each.quant)[0] >= limit]
    more = [each for each in found if rank(each.quant)[0] < limit]
    return (
        *sorted(worth, key=lambda each: (*rank(each.quant), -each.size)),
        *sorted(more, key=lambda each: (each.size, each.name)),
    )


@dataclass(frozen=True)
class Ranking:
    """What was chosen from a bare repository, and what else there was."""

    chosen: Candidate | None
    """None where nothing fits."""
    too_large: tuple[Candidate, ...]
    """Better ones that do not fit."""
    runners_up: tuple[Candidate, ...]
    """Those after the chosen one."""


def first_that_fits(tried: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> Ranking:
    """The first model, in the order given, that fits."""
    for index, each in enumerate(tried):
        if fits(each):
            return Ranking(each, tuple(tried[:index]), tuple(tried[index + 1 :]))
    return Ranking(None, tuple(tried), ())


def _by_file(
    reference: Reference, found: Sequence[Candidate], files: Sequence[HubFile]
) -> Candidate:
    assert reference.file is not None
    for each in found:
        # Any part of a split model means all of it: one alone does not load.
        if any(file.path == reference.file for file in each.files):
            return each
    for file in files:
        if file.path == reference.file:  # a projector or the like, asked for by name
            return Candidate(_stem(file.path), quant_of(file.path), (file,))
    raise ChoiceError(
        error(
            "no-such-file",
            f"model: {reference.repo} has no file {reference.file}",
            fix=f"It has {_listed([file.path for each in found for file in each.files[:1]])}.",
        )
    )


def _by_quant(reference: Reference, found: Sequence[Candidate]) -> Candidate:
    assert reference.quant is not None
    wanted = _normal(reference.quant)
    within = re.compile(rf"(?<![A-Z0-9]){re.escape(wanted)}(?![A-Z0-9])")
    tests: tuple[Callable[[Candidate], bool], ...] = (
        lambda each: each.quant == wanted,
        # `Q4_K_XL` is what people call unsloth's UD-Q4_K_XL.
        lambda each: each.quant is not None and each.quant.removeprefix("UD-") == wanted,
        # llama-quantize takes `Q4_K` for Q4_K_M.
        lambda each: re.fullmatch(r"Q\dx?_K", wanted) is not None and each.quant == f"{wanted}_M",
        lambda each: each.quant == f"{wanted}_MOE",
        lambda each: within.search(each.name.upper()) is not None,
    )
    for test in tests:
        matching = [each for each in found if test(each)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            names = [each.files[0].path for each in matching]
            raise ChoiceError(
                error(
                    "ambiguous-quant",
                    f"model: {reference} can be any of {_listed(names)}",
                    fix=f"Name the file: {reference.repo}/{names[0]}.",
                )
            )
    labels = dict.fromkeys(each.label for each in found)
    raise ChoiceError(
        error(
            "no-such-quant",
            f"model: {reference.repo} has no {reference.quant}",
            fix=f"It has {_listed(list(labels))}.",
        )
    )


def projector(candidate: Candidate, files: Iterable[HubFile]) -> HubFile | None:
    """The projector for images that belongs to a model, where the repository has one."""
    home = posixpath.dirname(candidate.name).split("/")
    best: tuple[tuple[int, int, str], HubFile] | None = None
    for file in files:
        if not file.path.lower().endswith(".gguf"):
            continue
        if not PROJECTOR.search(posixpath.basename(file.path)) or file.sha256 is None:
            continue
        folder = posixpath.dirname(file.path)
        parts = folder.split("/") if folder else []
        if parts != home[: len(parts)]:
            continue  # belongs to another model of the repository
        quant = quant_of(file.path)
        order = _PROJECTOR_ORDER.index(quant) if quant in _PROJECTOR_ORDER else 9
        key = (-len(parts), order, file.path)
        if best is None or key < best[0]:
            best = (key, file)
    return best[1] if best else None


# What a model is made from

_WEIGHTS = ".safetensors"
_BESIDE_WEIGHTS = re.compile(
    r"[^/]+\.json|[^/]+\.(?:model|tiktoken|jinja)|(?:merges|vocab)\.txt|[0-9]_\w+/config\.json"
)
"""What convert_hf_to_gguf.py looks at beside the weights: no code, and nothing that holds any."""
_TOKENIZERS = re.compile(
    r"tokenizer\.json|tokenizer\.model|spiece\.model|vocab\.(?:json|txt)|tekken\.json|.+\.tiktoken"
)
_PLAIN_ORDER = ("BF16", "F16", "F32")
"""Of a model in several, the first: most are published in BF16, and F32 is only larger."""


def is_weights(path: str) -> bool:
    """Whether a file holds weights that have to be converted."""
    return path.endswith(_WEIGHTS)


def source_names(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """Files of a folder or repository that a GGUF is converted from, by their names alone.

    Raises ChoiceError for one that is not whole; nothing where there are no weights.
    """
    there = tuple(names)
    weights = sorted(name for name in there if is_weights(name) and "/" not in name)
    # Beside them lie adapters, and the same weights once more in Mistral's own names.
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights:
        return ()
    parts = {name: _PART.fullmatch(name[: -len(_WEIGHTS)]) for name in weights}
    for part in (found for found in parts.values() if found is not None):
        count = int(part["count"])
        numbers = {int(other["number"]) for other in parts.values() if other is not None}
        gone = [number for number in range(1, min(count, 1000) + 1) if number not in numbers]
        if gone:
            shown = _listed([str(number) for number in gone], most=8)
            raise ChoiceError(
                error(
                    "model-incomplete",
                    f"model: {where} lacks part {shown} of its weights",
                    "they are converted only whole",
                )
            )
    if "config.json" not in there:
        raise ChoiceError(
            error(
                "no-config",
                f"model: {where} has weights, but no config.json",
                "nothing says what model they are of",
                "Name the repository of the whole model: adapters and parts of one have none.",
            )
        )
    if not any(_TOKENIZERS.fullmatch(name) for name in there):
        raise ChoiceError(
            error(
                "no-tokenizer",
                f"model: {where} has weights, but no tokenizer (tokenizer.json, tokenizer.model)",
                "a GGUF holds both",
                "Name a repository that has both, or put the tokenizer of its base model beside "
                "the weights, in a folder of your own.",
            )
        )
    beside = (name for name in there if _BESIDE_WEIGHTS.fullmatch(name))
    return (*weights, *sorted(beside))


def select_source(reference: Reference, files: Sequence[HubFile]) -> Candidate:
    """What a quantisation is made from.

    Of a bare repository its GGUF that nothing was taken from yet, or else its weights, with what
    belongs to them. Raises ChoiceError.
    """
    if reference.quant is not None or reference.file is not None:
        chosen = select(reference, files)[0]
        if chosen.quant not in (None, *_PLAIN_ORDER):
            raise ChoiceError(requantised(str(reference), chosen.quant or ""))
        return chosen
    found = candidates(files)
    whole = [each for each in found if not each.missing and all(file.sha256 for file in each.files)]
    for quant in _PLAIN_ORDER:
        for each in whole:
            if each.quant == quant:
                return each
    names = source_names(reference.repo, (file.path for file in files))
    if names:
        by_name = {file.path: file for file in files}
        name = posixpath.basename(reference.repo)
        return Candidate(name, None, tuple(by_name[name] for name in names))
    if found:
        labels = _listed(list(dict.fromkeys(each.label for each in found)))
        raise ChoiceError(requantised(reference.repo, labels))
    raise ChoiceError(
        error(
            "no-source",
            f"model: {reference.repo} has neither safetensors nor a GGUF in F16, BF16 or F32",
            "there is nothing to quantise",
            "Name the repository that the model was published in first.",
        )
    )


def requantised(name: str, has: str) -> Finding:
    """What to say of a model that is quantised already."""
    return error(
        "requantising",
        f"model: {name} is quantised already ({has}), and model_quantize would do it again",
        "each time takes something away: it would be worse than its size allows",
        "Take out model_quantize to serve it as it is, or start from its BF16, F16 or safetensors.",
    )


# What to say


def _listed(names: Sequence[str], most: int = 24) -> str:
    shown = list(names[:most])
    text = ", ".join(shown) if shown else "none"
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def _no_gguf(reference: Reference, files: Sequence[HubFile]) -> Finding:
    weights = any(file.path.endswith(".safetensors") for file in files)
    return error(
        "no-gguf",
        f"model: {reference.repo} has no GGUF model"
        + (", only safetensors" if weights else f" among its {len(files)} files"),
        "llama.cpp reads GGUF only",
        f"Look for a repository with {posixpath.basename(reference.repo)}-GGUF in its name"
        + (", or set model_quantize to make one of it." if weights else "."),
    )


def _incomplete(reference: Reference, candidate: Candidate) -> Finding:
    numbers = _listed([str(number) for number in candidate.missing], most=8)
    return error(
        "model-incomplete",
        f"model: {reference.repo} lacks part {numbers} of {candidate.label}",
        "llama.cpp loads a split model only whole",
        "Choose another quantisation or another repository.",
    )


def _no_sha256(reference: Reference, file: HubFile) -> Finding:
    return error(
        "no-sha256",
        f"model: the Hub tells no SHA-256 of {reference.repo}/{file.path}",
        "what is downloaded could not be checked",
        f"Set `model` to {file.url} and `model_sha256` to its SHA-256.",
    )
