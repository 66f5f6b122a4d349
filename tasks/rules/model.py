"""Which model files are fetched, where they are kept, what is served, and whether it fits."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules import making, model_record
from tasks.rules.architecture import Shape
from tasks.rules.findings import Finding, error
from tasks.rules.hub_files import HubFile, HubModel
from tasks.rules.making import Folder, Ingredient, Making
from tasks.rules.model_record import Made, Original, Record
from tasks.rules.outside import shown
from tasks.rules.space import Need
from tasks.settings import Settings

GGUF_MAGIC = "47475546"
"""`GGUF`, the first four bytes of every model file that llama.cpp reads."""

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_PLAIN = re.compile(r"[-._](?:b?f16|f32)(?=$|-\d{5}-of-)|-\d{5}-of-\d{5}$", re.IGNORECASE)
"""In a file's name: what the quantisation takes the place of."""


@dataclass(frozen=True)
class Reach:
    """What the host was told when it asked for the first bytes of the model."""

    error: str | None
    """Why it could not be had; None if it can."""
    size: int | None = None
    magic: str | None = None
    """First four bytes, as hex."""


@dataclass(frozen=True)
class Found:
    """What was looked up beside the host: on the Hub, on the controller, in a file's header."""

    hub: HubModel | None = None
    originals: tuple[Original, ...] = ()
    """Files on the controller."""
    shape: Shape | None = None
    """None where no header could be read, or none was needed."""
    alternatives: tuple[str, ...] = ()
    """Smaller quantisations that fit as they are."""
    chat_template: str | None = None
    """What server_chat_template_file holds."""
    reach: Reach | None = None
    """None where the host was not asked."""
    config: Mapping[str, Any] | None = None
    """config.json of one that has to be converted."""
    folder: Folder | None = None
    """What it is made from, where that is on the host."""
    imatrix: Ingredient | None = None


@dataclass(frozen=True)
class ModelFile:
    """One file of a model."""

    path: str
    """Where the host has it, by its own name."""
    sha256: str | None
    size: int | None
    """Bytes, where known."""
    url: str | None = None
    original: str | None = None
    """Path on the controller."""
    blob_stored: bool = False
    """Whether its bytes are in the store, perhaps under another name."""
    linked: bool = False

    @property
    def name(self) -> str:
        """Without its folder."""
        return posixpath.basename(self.path)

    @property
    def blob(self) -> str:
        """Where the bytes are kept, once for each SHA-256."""
        return f"{at.BLOBS}/{self.sha256}"

    @property
    def target(self) -> str:
        """What the link under its own name says."""
        return posixpath.relpath(self.blob, posixpath.dirname(self.path))


@dataclass(frozen=True)
class ModelPlan:
    """A model: its parts in order, and what sees for it."""

    name: str
    """How people call it."""
    parts: tuple[ModelFile, ...]
    """llama-server is given the first and finds the others beside it."""
    projector: ModelFile | None = None
    on_host: bool = False
    """Whether the user named it by its path on the host: it stays where it is."""
    verified: bool = False
    """For such a file: whether it is there and known to be right."""
    record: Record | None = None
    record_path: str = ""
    recorded: bool = False
    has_served: bool = False
    making: Making | None = None
    """For one that has to be made first, or was: from what, and how."""
    draft: ModelPlan | None = None
    """What drafts for it."""
    adapters: tuple[tuple[ModelPlan, float], ...] = ()
    """LoRA adapters, each with its scale."""

    @property
    def everything(self) -> tuple[ModelPlan, ...]:
        """It and all that is loaded with it."""
        drafts = (self.draft,) if self.draft else ()
        return (self, *drafts, *(adapter for adapter, _ in self.adapters))

    @property
    def files(self) -> tuple[ModelFile, ...]:
        """Everything that has to be on the host."""
        return (*self.parts, *([self.projector] if self.projector else []))

    @property
    def path(self) -> str:
        """What llama-server is given."""
        return self.parts[0].path

    @property
    def url(self) -> str | None:
        """Where its first file is fetched from; None for one that is not fetched."""
        return self.parts[0].url

    @property
    def sha256(self) -> str | None:
        """Of its first file."""
        return self.parts[0].sha256

    @property
    def hub(self) -> HubModel | None:
        """What it is on the Hub."""
        return self.record.hub if self.record else None

    @property
    def identity(self) -> tuple[str, ...]:
        """What it cannot change without being another model."""
        if self.making is not None:
            return (self.making.key,)
        return tuple(file.sha256 or "" for file in self.files)

    @property
    def to_make(self) -> bool:
        """Whether it has to be made."""
        return self.making is not None and not self.stored

    @property
    def missing(self) -> tuple[ModelFile, ...]:
        """Files that have to be brought to the host, each content once."""
        if self.on_host:
            return ()
        if self.making is not None:
            return _to_bring(self.making) if self.to_make else ()
        return tuple({file.sha256: file for file in self.files if not file.blob_stored}.values())

    @property
    def stored(self) -> bool:
        """Whether it is there, whole, and known to be right."""
        if self.on_host:
            return self.verified
        return self.recorded and all(file.blob_stored and file.linked for file in self.files)

    @property
    def size(self) -> int | None:
        """Bytes of all its files, where known."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None


def file_name(url: str) -> str:
    """A harmless file name for what a URL points at.

    Only letters, digits, dot, dash and underscore, ending in .gguf.
    """
    last = posixpath.basename(unquote(urlsplit(url).path))
    stem = re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE)
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", stem)[-120:].lstrip(".-")
    return f"{stem or 'model'}.gguf"


def part_paths(path: str) -> tuple[str, ...]:
    """All parts of a split model, of which the path of one is given; any other path by itself."""
    found = _PART.fullmatch(path)
    if found is None or not 1 < int(found[2]) < 1000:
        return (path,)
    stem, count = found[1], found[2]
    return tuple(f"{stem}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1))


def _harmless(path: str) -> str:
    """A path in a repository as a path in the store: each part of it a plain file name."""
    parts = (re.sub(r"[^A-Za-z0-9._-]", "_", part).lstrip(".-") for part in path.split("/"))
    return "/".join(part or "_" for part in parts)


def plan(settings: Settings, probe: Probe, found: Found | None = None) -> ModelPlan | None:
    """The model that the settings name; None if they name none, or if it could not be looked up."""
    model, sha256 = settings.model, settings.model_sha256
    found = found or Found()
    if model is None:
        return None
    if settings.model_quantize is not None:
        return _made(settings, probe, found)
    if model.startswith("/"):
        return _on_host(model, sha256, probe)
    if settings.model_upload is not None:
        return _of_originals(settings, probe, found) if found.originals else None
    if settings.model_reference is not None:
        return _of_hub(settings, probe, found.hub) if found.hub else None
    assert sha256 is not None  # settings refuse a URL without it
    path = f"{at.MODELS}/{sha256[:12]}/{file_name(model)}"
    before = _recorded(settings, probe)
    sizes = before.told_sizes if before else {}
    if found.reach is not None:
        sizes = {sha256: found.reach.size} if found.reach.size else {}
    file = _file(probe, path, sha256, sizes.get(sha256), url=model)
    record = Record(_shown(model), {}, told_sizes=sizes)
    return _kept(settings, probe, file_name(model), (file,), record)


def _shown(model: str) -> str:
    """A model as it may be printed: an address without credentials, and what may sign it."""
    return shown(model) if model.startswith("http") else model


def _on_host(path: str, sha256: str | None, probe: Probe) -> ModelPlan:
    there = probe.model_paths.get(path)
    first, *others = part_paths(path)
    parts = [ModelFile(first, sha256, there.size if there else None)]
    parts += [ModelFile(other, None, None) for other in others]
    return ModelPlan(
        name=posixpath.basename(first),
        parts=tuple(parts),
        on_host=True,
        verified=there is not None and there.exists and sha256 in (None, there.sha256),
    )


def _of_originals(settings: Settings, probe: Probe, found: Found) -> ModelPlan:
    folder = f"{at.MODELS}/{found.originals[0].sha256[:12]}"
    parts = tuple(
        _file(
            probe,
            f"{folder}/{_harmless(posixpath.basename(each.path))}",
            each.sha256,
            each.size,
            original=each.path,
        )
        for each in found.originals
    )
    record = Record(settings.model or "", {}, originals=found.originals)
    return _kept(settings, probe, parts[0].name, parts, record)


def _of_hub(settings: Settings, probe: Probe, hub: HubModel) -> ModelPlan:
    # Parts keep their names and lie side by side: that is how llama.cpp finds them.
    folder = f"{at.MODELS}/{_harmless(hub.reference.repo)}/{hub.commit[:12]}"

    def file(each: HubFile) -> ModelFile:
        assert each.sha256 is not None  # what has none is not chosen
        path = f"{folder}/{_harmless(each.path)}"
        return _file(probe, path, each.sha256, each.size, url=each.url)

    parts = tuple(file(each) for each in hub.candidate.files)
    projector = file(hub.projector) if hub.projector else None
    name = f"{posixpath.basename(_harmless(hub.candidate.name))}.gguf"
    return _kept(settings, probe, name, parts, Record(settings.model or "", {}, hub), projector)


def _to_bring(made: Making) -> tuple[ModelFile, ...]:
    """What has to be on the host before work begins."""
    if made.worked:
        return ()
    lacking = {
        each.sha256: ModelFile(each.name, each.sha256, each.size, each.url, each.original)
        for each in made.ingredients
        if each.path is None and not each.stored
    }
    return tuple(lacking.values())


def _ingredients(settings: Settings, found: Found) -> tuple[tuple[Ingredient, ...], str]:
    """What a model is made from, and what that is called."""
    wanted, hub, folder = settings.model or "", found.hub, found.folder
    if folder is not None:
        on_host = (
            Ingredient(each.name, each.size, path=f"{folder.path}/{each.name}", mtime=each.mtime)
            for each in folder.files
        )
        return tuple(on_host), posixpath.basename(wanted.rstrip("/"))
    if hub is not None:
        name = posixpath.basename(hub.candidate.name)
        files = hub.candidate.files
        return tuple(
            Ingredient(each.path, each.size, each.sha256, each.url) for each in files
        ), name
    if found.originals:
        paths = [each.path for each in found.originals]
        home = posixpath.commonpath([posixpath.dirname(path) for path in paths])
        uploaded = (
            Ingredient(
                posixpath.relpath(each.path, home), each.size, each.sha256, original=each.path
            )
            for each in found.originals
        )
        return tuple(uploaded), posixpath.basename(wanted.removeprefix("file:").rstrip("/"))
    if wanted.startswith("http"):
        name = file_name(wanted)
        size = found.reach.size if found.reach else None
        return (Ingredient(name, size, settings.model_sha256, url=wanted),), name
    return (), ""


def _made(settings: Settings, probe: Probe, found: Found) -> ModelPlan | None:
    """A model that is made on the host, or was."""
    sources, origin = _ingredients(settings, found)
    if not sources or (settings.model_imatrix is not None and found.imatrix is None):
        return None
    made = making.make(settings, probe, sources, found.imatrix, found.config)
    stem = _PLAIN.sub("", _harmless(origin).removesuffix(".gguf"))
    name = f"{stem or 'model'}-{made.quantisation.name}.gguf"
    path = f"{at.MODELS}/made/{made.key[:12]}/{name}"
    before = pinned(settings, probe)
    if before is None or before.made is None or before.made.key != made.key:
        before = None
    record = before or Record(
        f"{_shown(settings.model or '')} in {made.quantisation.name}",
        {path: ""},
        found.hub,
        found.originals,
        Made(made.key, made.quantisation.name),
    )
    sha256 = record.files.get(path) or None
    size = probe.blobs.get(sha256) if sha256 else None
    file = ModelFile(path, sha256, size or made.size, blob_stored=size is not None)
    if sha256 is not None:
        file = replace(file, linked=probe.links.get(path) == file.target)
    record_path = model_record.path_of(settings)
    time, _ = probe.records.get(record_path, (0, ""))
    return ModelPlan(
        name=name,
        parts=(file,),
        record=record,
        record_path=record_path,
        recorded=before is not None,
        has_served=before is not None and time > 0,
        making=made,
    )


def _file(
    probe: Probe,
    path: str,
    sha256: str,
    size: int | None,
    url: str | None = None,
    original: str | None = None,
) -> ModelFile:
    stored = probe.blobs.get(sha256)
    size = stored if size is None else size
    # One of another size was damaged after it was stored.
    file = ModelFile(path, sha256, size, url, original, stored is not None and stored == size)
    return replace(file, linked=probe.links.get(path) == file.target)


def _kept(
    settings: Settings,
    probe: Probe,
    name: str,
    parts: tuple[ModelFile, ...],
    origin: Record,
    projector: ModelFile | None = None,
) -> ModelPlan:
    """A model in the store, with its record: where it is from, and its files."""
    files: Mapping[str, str] = {
        file.path: file.sha256 or "" for file in (*parts, *([projector] if projector else []))
    }
    record = replace(origin, files=files)
    path = model_record.path_of(settings)
    time, text = probe.records.get(path, (0, ""))
    return ModelPlan(
        name=name,
        parts=parts,
        projector=projector,
        record=record,
        record_path=path,
        recorded=text == record.as_json(),
        has_served=time > 0,
    )


def shape_of(model: ModelPlan | None, found: Found) -> Shape | None:
    """What it is like, or will be once it is made."""
    if model is not None and model.making is not None and model.to_make:
        return making.shape(model.making, found.shape)
    return found.shape


def pinned(settings: Settings, probe: Probe) -> Record | None:
    """The record of the wanted model, if all that it tells of is whole on the host."""
    record = _recorded(settings, probe)
    return record if record is not None and record.is_whole(probe.blobs) else None


def _recorded(settings: Settings, probe: Probe) -> Record | None:
    _, text = probe.records.get(model_record.path_of(settings), (0, ""))
    return Record.from_json(text) if text else None


def findings(
    settings: Settings, model: ModelPlan | None, probe: Probe, reach: Reach | None = None
) -> Iterator[Finding]:
    """What stands in the way of having the model."""
    wanted = settings.model
    if wanted is None:
        yield error(
            "no-model",
            "no model is set",
            "llama-server without a model serves nothing",
            "Set `model`, for instance to `user/repo:Q4_K_M` of the Hugging Face Hub.",
        )
    if wanted is None or model is None:
        return
    if model.on_host:
        yield from _path_findings(wanted, model, probe)
        return
    if model.making is not None and model.to_make:
        yield from making.findings(settings, model.making, probe)
    if wanted.startswith("http") and len(part_paths(file_name(wanted))) > 1:
        yield error(
            "model-incomplete",
            f"model: {model.name} is one part of a split model",
            "llama.cpp loads a split model only whole",
            "Name it as `user/repo:QUANT` if it is on the Hub, else join the parts with "
            "`llama-gguf-split --merge`.",
        )
    if reach is not None:
        yield from _reach_findings(model, reach)


def sentence(model: ModelPlan) -> str:
    """What is done about it, for people."""
    if model.making is not None and model.to_make:
        fetched = sum(file.size or 0 for file in model.missing)
        return making.sentence(model.making, model.name, fetched)
    size = f"{model.size / 1e6:,.1f} MB" if model.size else "size unknown"
    count = f", {len(model.files)} files" if len(model.files) > 1 else ""
    hub = model.hub
    where = f" of {hub.reference.repo} at commit {hub.commit[:12]}" if hub else ""
    missing = [file.size or 0 for file in model.missing]
    doing = "use"
    if missing:
        doing = "copy" if model.missing[0].original else "fetch"
        if model.size and 0 < sum(missing) < model.size:
            count += f", {sum(missing) / 1e6:,.1f} MB of them missing"
    return f"{doing} {model.name}{where} ({size}{count})"


def _path_findings(wanted: str, model: ModelPlan, probe: Probe) -> Iterator[Finding]:
    there = probe.model_paths.get(wanted)
    if there is None or not there.exists:
        yield error(
            "model-missing",
            f"model: there is no file {model.path} on the host",
            fix="Copy it there, or set `model` to a URL.",
        )
        return
    if there.magic != GGUF_MAGIC:
        yield _not_gguf(model.path, there.magic)
    if not there.world_readable:
        yield error(
            "model-unreadable",
            f"model: {model.path} can be read by its owner only",
            "llama-server runs as a user of its own",
            f"On the host: `chmod o+r {model.path}`.",
        )


def _reach_findings(model: ModelPlan, reach: Reach) -> Iterator[Finding]:
    if reach.error is not None:
        if model.record and model.record.hub and re.search(r"\b40[13]\b", reach.error):
            return  # asked without the token; the controller was let in
        yield error(
            "model-unreachable",
            f"model: the host cannot get {model.url}: {reach.error}",
            fix="Check the address, and proxy_http/proxy_https if the host needs a proxy.",
        )
    elif (
        reach.magic is not None
        and reach.magic != GGUF_MAGIC
        and not (model.making is not None and model.making.converts)
    ):
        yield _not_gguf(model.url or model.path, reach.magic)


def missing(models: Iterable[ModelPlan]) -> tuple[ModelFile, ...]:
    """Files of all of them whose bytes the store lacks, each content once."""
    return tuple({file.sha256: file for each in models for file in each.missing}.values())


def needs(models: Sequence[ModelPlan], probe: Probe) -> Iterator[Need]:
    """Disk space that their files take."""
    kept = [each for each in models if each.making is None]
    for each in models:
        if each.making is not None and each.to_make:
            yield from making.needs(each.making, probe)
    for file in missing(kept):
        if file.size and file.sha256:
            lacking = max(0, file.size - probe.partials.get(file.sha256, 0))
            yield Need(at.STATE, lacking, file.name)


def _not_gguf(where: str, magic: str | None) -> Finding:
    begins = bytes.fromhex(magic or "")
    return error(
        "model-not-gguf",
        f"model: {where} is not a GGUF file: it begins with {begins!r}",
        "llama.cpp reads GGUF only",
        "Give the address of the file itself, not of a page about it.",
    )
