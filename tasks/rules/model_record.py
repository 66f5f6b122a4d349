"""What a host keeps of the models that it was given, and which of them it may let go.

A record is a file of one line for each model that was asked for: where it is from, down to the
bytes, and which files are its. Its time is when the model was last proven to serve; 1970 if never.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from tasks import probe as at
from tasks.rules.hub_files import HubModel
from tasks.settings import Settings


@dataclass(frozen=True)
class Original:
    """A file on the controller, as it was when it was read through."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Made:
    """What a model was made from on the host, and how."""

    key: str
    """Of everything that it depends on."""
    quantization: str
    sources: Mapping[str, str] = field(default_factory=dict)
    """Name to SHA-256."""
    converted: bool = False
    imatrix: str | None = None
    """SHA-256 of the importance matrix."""
    llama_cpp: str = ""
    """Commit of the tools."""


@dataclass(frozen=True)
class Record:
    """A model that a host was given."""

    model: str
    """As the settings say it."""
    files: Mapping[str, str]
    """Path to SHA-256."""
    hub: HubModel | None = None
    originals: tuple[Original, ...] = ()
    made: Made | None = None
    told_sizes: Mapping[str, int] = field(default_factory=dict)
    """SHA-256 to bytes, as a web server told them."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """SHA-256 to bytes, where known: a file of another size on the host is a damaged one."""
        hub = self.hub.files if self.hub else ()
        return {
            **self.told_sizes,
            **{each.sha256: each.size for each in self.originals},
            **{each.sha256: each.size for each in hub if each.sha256},
        }

    def is_whole(self, blobs: Mapping[str, int]) -> bool:
        """Whether a store has all that it tells of."""
        return all(
            sha256 in blobs and self.sizes.get(sha256, blobs[sha256]) == blobs[sha256]
            for sha256 in self.files.values()
        )

    def as_json(self) -> str:
        """One line."""
        return TypeAdapter(Record).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """What was kept; None for what is damaged, or from another version of this software."""
        try:
            return TypeAdapter(Record).validate_json(text)
        except ValidationError:
            return None


@dataclass(frozen=True)
class Removal:
    """What goes once everything that is wanted serves."""

    records: tuple[str, ...] = ()
    """Paths."""
    links: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    """SHA-256 of each. One that a process has open stays all the same."""
    partials: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """What they were, for people."""
    bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.records or self.partials)


@dataclass(frozen=True)
class Kept:
    """A record on the host, and when its model was last proven to serve."""

    path: str
    time: int
    record: Record = field(compare=False)


def path_of(settings: Settings) -> str:
    """Where the record of the model that the settings name is kept.

    Another revision or projector is another model: where the Hub cannot be asked, one must not
    stand in for the other.
    """
    named = (
        *(settings.model, settings.model_sha256, settings.model_revision, settings.model_mmproj),
        *(settings.model_quantize, settings.model_imatrix, settings.model_imatrix_sha256),
    )
    key = hashlib.sha256("\n".join(each or "" for each in named).encode()).hexdigest()[:16]
    return f"{at.RECORDS}/{key}.json"


def read(told: Mapping[str, tuple[int, str]]) -> tuple[Kept, ...]:
    """The records that can be read, the last first."""
    kept = []
    for path, (time, text) in told.items():
        record = Record.from_json(text)
        if record is not None:
            kept.append(Kept(path, time, record))
    return tuple(sorted(kept, key=lambda each: (-each.time, each.path)))


def removal(
    wanted: Mapping[str, Record],
    probe: at.Probe,
    keep: int | str,
    protected: Iterable[str] = (),
    awaited: Iterable[str] = (),
) -> Removal:
    """What is neither one of the wanted models' nor one of the last ones before them.

    wanted is the records of all that is to be served, by path. What no record tells of is not
    touched; neither is a file whose path stands in protected, such as the servers' arguments.
    awaited are downloads that a wanted model is still to be made from.
    """
    others = [each for each in read(probe.records) if each.path not in wanted]
    # What never served is nothing to go back to.
    kept = others if keep == "all" else [each for each in others if each.time > 0][: int(keep)]
    gone = [each for each in others if each not in kept]
    needed: dict[str, str] = {}
    for record in wanted.values():
        needed |= record.files
    stays = dict(needed)
    for each in kept:
        stays |= each.record.files
    said = " ".join(protected)
    links, blobs = [], []
    for each in gone:
        for path, sha256 in each.record.files.items():
            if path in stays or not _is_ours(path) or path in said:
                continue
            links.append(path)
            if sha256 not in stays.values() and sha256 in probe.blobs and sha256 not in said:
                blobs.append(sha256)
    # A link of somebody's own holds what it points at.
    held = {
        posixpath.basename(target) for path, target in probe.links.items() if path not in set(links)
    }
    blobs = [sha256 for sha256 in dict.fromkeys(blobs) if sha256 not in held]
    begun = {*needed.values(), *awaited}
    partials = [sha256 for sha256 in probe.partials if sha256 not in begun]
    return Removal(
        records=tuple(each.path for each in gone),
        links=tuple(dict.fromkeys(links)),
        blobs=tuple(blobs),
        partials=tuple(partials),
        models=tuple(each.record.model for each in gone),
        bytes=sum(probe.blobs[sha256] for sha256 in blobs)
        + sum(probe.partials[sha256] for sha256 in partials),
    )


def sentence(removal: Removal) -> str:
    """What goes, for people."""
    parts = [f"remove {', '.join(removal.models)}"] if removal.models else []
    parts += ["remove downloads that were given up"] if removal.partials else []
    return f"{' and '.join(parts)} once it serves ({removal.bytes / 1e6:,.1f} MB)"


def _is_ours(path: str) -> bool:
    """Whether a record may name it: it was read from the host, and root is to remove it."""
    return path == posixpath.normpath(path) and path.startswith(f"{at.MODELS}/")
