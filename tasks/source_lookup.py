"""What a model is made from that has to be quantised first: on the Hub, on a host, on this machine.

Whether it can be is said before anything is downloaded, as far as names, headers and config.json
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks import hub, web
from tasks.hub import HubError
from tasks.model_lookup import LocalFile, hub_of, original, unread
from tasks.probe import Probe
from tasks.rules import model
from tasks.rules.architecture import Shape, shape_of
from tasks.rules.findings import Finding, error
from tasks.rules.gguf import GgufError, Source, merge, read_header
from tasks.rules.hub_files import ChoiceError, Reference, is_weights, requantised, source_names
from tasks.rules.making import Folder, Ingredient, shape_of_config
from tasks.rules.model import Found
from tasks.rules.model_record import Record
from tasks.rules.outside import json_object, shown
from tasks.rules.quantisation import quantised_types
from tasks.settings import Settings


@dataclass(frozen=True)
class OnHost:
    """How to look at a host."""

    listed: Callable[[str], Folder | None]
    """What lies at a path."""
    opened: Callable[[str], Source]


def resolve(settings: Settings, probe: Probe, on_host: OnHost) -> tuple[Found, tuple[Finding, ...]]:
    """What the model is made from, and what there is to say about it.

    What an earlier run made of the same is not asked for again without need, and stands in where
    the Hub is out of reach.
    """
    record = model.pinned(settings, probe)
    try:
        found, said = _sources(settings, record, on_host)
        found = replace(found, imatrix=_imatrix(settings, record, on_host))
    except (HubError, ChoiceError) as problem:
        return Found(), (problem.finding,)
    return found, said


def _sources(
    settings: Settings, record: Record | None, on_host: OnHost
) -> tuple[Found, tuple[Finding, ...]]:
    wanted, reference = settings.model or "", settings.model_reference
    if reference is not None:
        return _on_hub(settings, reference, record)
    if wanted.startswith("/"):
        return _on_the_host(wanted.rstrip("/"), on_host)
    if settings.model_upload is not None:
        return _here(Path(settings.model_upload).expanduser().absolute(), record)
    if not wanted or record is not None:
        return Found(), ()
    shape, said = _plain(shown(wanted), (web.RemoteFile(wanted),))
    return Found(shape=shape), said


def _on_hub(
    settings: Settings, reference: Reference, record: Record | None
) -> tuple[Found, tuple[Finding, ...]]:
    resolved = hub.resolve_source(
        hub_of(settings),
        reference,
        settings.model_revision,
        pinned=record.hub if record else None,
    )
    found = Found(hub=resolved.model, shape=resolved.shape, config=resolved.config)
    return found, resolved.findings


def _on_the_host(wanted: str, on_host: OnHost) -> tuple[Found, tuple[Finding, ...]]:
    folder = on_host.listed(wanted)
    if folder is None or not folder.files:
        raise ChoiceError(
            error(
                "model-missing",
                f"model: there is no {wanted} on the host, or nothing in it",
                fix="Name a GGUF file, or a folder with safetensors.",
            )
        )
    if folder.path != wanted:  # a file in it
        sources = [on_host.opened(f"{folder.path}/{each.name}") for each in folder.files]
        shape, said = _plain(wanted, sources)
        return Found(folder=folder, shape=shape), said
    names = source_names(wanted, [each.name for each in folder.files])
    if not names:
        raise ChoiceError(_no_weights(wanted))
    kept = tuple(each for each in folder.files if each.name in names)
    size = sum(each.size for each in kept if is_weights(each.name))
    shape = shape_of_config(folder.config or {}, size)
    return Found(folder=replace(folder, files=kept), shape=shape, config=folder.config), ()


def _here(given: Path, record: Record | None) -> tuple[Found, tuple[Finding, ...]]:
    known = {each.path: each for each in record.originals} if record else {}
    paths = [Path(path) for path in model.part_paths(str(given))]
    try:
        if given.is_dir():
            there = (*given.glob("*"), *given.glob("*/config.json"))
            inside = [str(path.relative_to(given)) for path in there if path.is_file()]
            paths = [given / name for name in source_names(str(given), inside)]
            if not paths:
                raise ChoiceError(_no_weights(str(given)))
        originals = tuple(original(path, known.get(str(path))) for path in paths)
        if not given.is_dir():
            shape, said = _plain(str(given), [LocalFile(path) for path in paths])
            return Found(originals=originals, shape=shape), said
        config = json_object((given / "config.json").read_bytes()) or {}
    except OSError as problem:
        raise ChoiceError(
            error(
                "model-missing",
                f"model: {problem.filename or given} cannot be read on this machine: "
                f"{problem.strerror}",
            )
        ) from None
    size = sum(each.size for each in originals if is_weights(each.path))
    return Found(originals=originals, shape=shape_of_config(config, size), config=config), ()


def _plain(name: str, sources: Sequence[Source]) -> tuple[Shape | None, tuple[Finding, ...]]:
    """The shape of a GGUF, which must not be quantised yet."""
    try:
        header = merge(read_header(source) for source in sources)
        types = quantised_types(header)
        if types:
            raise ChoiceError(requantised(name, types[-1]))
        return shape_of(header), ()
    except (GgufError, web.WebError) as problem:
        if "is not a GGUF" in str(problem):
            raise ChoiceError(
                error("model-not-gguf", f"model: {name} {problem}", "llama.cpp reads GGUF only")
            ) from None
        return None, (unread(name, problem),)


def _no_weights(where: str) -> Finding:
    return error(
        "no-source",
        f"model: {where} has no safetensors",
        "there is nothing to quantise",
        "Name a folder with safetensors, config.json and tokenizer, or a GGUF file.",
    )


# The importance matrix


def _imatrix(settings: Settings, record: Record | None, on_host: OnHost) -> Ingredient | None:
    wanted, sha256 = settings.model_imatrix, settings.model_imatrix_sha256
    if wanted is None:
        return None
    if wanted.startswith("http"):
        return Ingredient(model.file_name(wanted), None, sha256, url=wanted)
    if wanted.startswith("/"):
        folder = on_host.listed(wanted)
        if folder is None or not folder.files:
            raise ChoiceError(_no_imatrix(f"there is no file {wanted} on the host"))
        each = folder.files[0]
        return Ingredient(each.name, each.size, path=wanted, mtime=each.mtime)
    if wanted.startswith("file:"):
        return _imatrix_here(Path(wanted.removeprefix("file:")).expanduser().absolute(), sha256)
    user, name, inner = wanted.split("/", 2)
    if record is not None and record.made is not None and record.made.imatrix is not None:
        # It was asked for when the model was made.
        return Ingredient(Path(inner).name, None, record.made.imatrix)
    found = hub.file(hub_of(settings), f"{user}/{name}", inner, "main", "model_imatrix")
    return Ingredient(Path(inner).name, found.size, found.sha256, url=found.url)


def _imatrix_here(path: Path, sha256: str | None) -> Ingredient:
    try:
        own = original(path, None)
    except OSError as problem:
        text = f"{path} cannot be read on this machine: {problem.strerror}"
        raise ChoiceError(_no_imatrix(text)) from None
    if sha256 not in (None, own.sha256):
        raise ChoiceError(_no_imatrix(f"{path} has SHA-256 {own.sha256}, not the one asked for"))
    return Ingredient(path.name, own.size, own.sha256, original=own.path)


def _no_imatrix(cause: str) -> Finding:
    return error(
        "no-imatrix", f"model_imatrix: {cause}", fix="Correct it, or do without one: leave it out."
    )
