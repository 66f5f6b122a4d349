"""What the model is that the settings name, down to the bytes: asked on the controller.

The Hub is asked for its models; a file of this machine is read through. Of what is elsewhere, the
header is read where that can be done before anything is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Lock

from tasks import hub, web
from tasks.hub import Hub, HubError, Resolved
from tasks.probe import Probe
from tasks.rules import memory, model
from tasks.rules.architecture import Shape, shape_of
from tasks.rules.findings import Finding, error, warning
from tasks.rules.gguf import GgufError, Header, Source, merge, read_header
from tasks.rules.hub_files import HubModel, Reference, candidates, in_order_of_trial
from tasks.rules.memory import Neighbour
from tasks.rules.model import Found
from tasks.rules.model_record import Original
from tasks.rules.outside import shown
from tasks.settings import Settings

_BLOCK = 8 * 1024**2


def hub_of(settings: Settings) -> Hub:
    """The Hub that the settings name."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    return Hub(settings.hf_endpoint, token)


def resolve(
    settings: Settings, probe: Probe, others: Iterable[Neighbour] = (), adapter: bool = False
) -> tuple[Found, tuple[Finding, ...]]:
    """The model, as far as it is not on the host, and what there is to say about it.

    Others are models that it has to fit beside. Of an adapter there is no shape to be known.

    What an earlier run found and the host has whole is not asked for again without need, and stands
    in where the Hub is out of reach.
    """
    if settings.model_upload is not None:
        return _originals(settings, probe, adapter)
    reference = settings.model_reference
    if reference is None:
        return Found(), ()
    record = model.pinned(settings, probe)
    fits = memory.fits(settings, probe, others)
    try:
        resolved = hub.resolve(
            hub_of(settings),
            reference,
            settings.model_revision,
            fits=fits,
            pinned=record.hub if record else None,
        )
        chosen = resolved.model
        if record is None or chosen != record.hub:
            chosen = _with_projector(settings, resolved)
        smaller = _alternatives(settings, reference, resolved, fits)
    except HubError as problem:
        return Found(), (problem.finding,)
    said = resolved.findings
    if adapter:
        said = tuple(each for each in said if each.code not in _OF_MODELS)
        said += _unless_adapter(resolved.header, str(reference))
    return Found(hub=chosen, shape=resolved.shape, alternatives=smaller), said


_OF_MODELS = ("header-unreadable", "quant-poor")
"""Findings that say nothing about an adapter."""


def _unless_adapter(header: Header | None, name: str) -> tuple[Finding, ...]:
    if header is None or header.metadata.get("general.type") == "adapter":
        return ()
    return (
        error(
            "not-an-adapter",
            f"model: {name} is no LoRA adapter in GGUF",
            "llama-server would not start with it",
            "llama.cpp's convert_lora_to_gguf.py makes one.",
        ),
    )


def _with_projector(settings: Settings, resolved: Resolved) -> HubModel:
    wanted, found = settings.model_mmproj, resolved.model
    if wanted == "auto":
        return found
    if wanted == "none":
        return replace(found, projector=None)
    repo = hub.repository(hub_of(settings), found.reference.repo, settings.model_revision)
    files = [file for file in repo.files if file.path == wanted]
    if not files or files[0].sha256 is None:
        there = [file.path for file in repo.files if "mmproj" in file.path.lower()]
        raise HubError(
            error(
                "no-such-file",
                f"model_mmproj: {found.reference.repo} has no file {wanted}",
                fix=f"It has {', '.join(there) or 'no projector'}.",
            )
        )
    return replace(found, projector=files[0])


def _alternatives(
    settings: Settings,
    reference: Reference,
    resolved: Resolved,
    fits: Callable[[Shape], bool] | None,
) -> tuple[str, ...]:
    """Smaller quantisations of the same repository that fit, where the one asked for does not."""
    shape, chosen = resolved.shape, resolved.model.candidate
    if shape is None or fits is None or fits(shape) or resolved.ranking is not None:
        return ()
    repo = hub.repository(hub_of(settings), reference.repo, settings.model_revision)
    smaller = [
        each
        for each in in_order_of_trial(candidates(repo.files))
        if each.size < chosen.size and not each.missing
    ]
    fitting = [
        each for each in smaller if fits(replace(shape, weights=shape.weights.scaled(each.size)))
    ]
    return tuple(each.label for each in fitting[:3])


# Files of this machine

_MOST_OF_A_TEMPLATE = 1024**2


def chat_template(settings: Settings) -> tuple[str | None, tuple[Finding, ...]]:
    """What server_chat_template_file holds."""
    if settings.server_chat_template_file is None:
        return None, ()
    path = Path(settings.server_chat_template_file).expanduser().absolute()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(_MOST_OF_A_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "it is no text"
        return None, (_no_template(f"{path} cannot be read on this machine: {reason}"),)
    if not text.strip() or len(text) > _MOST_OF_A_TEMPLATE or "\0" in text:
        what = "is empty" if not text.strip() else "is no chat template"
        return None, (_no_template(f"{path} {what}"),)
    return text, ()


def _no_template(cause: str) -> Finding:
    return error(
        "chat-template",
        f"server_chat_template_file: {cause}",
        fix="Name a Jinja template on the machine that this runs on.",
    )


_lock = Lock()
_hashes: dict[tuple[str, int, int], str] = {}


def _originals(
    settings: Settings, probe: Probe, adapter: bool
) -> tuple[Found, tuple[Finding, ...]]:
    given = Path(settings.model_upload or "").expanduser().absolute()
    paths = [Path(path) for path in model.part_paths(str(given))]
    record = model.pinned(settings, probe)
    known = {each.path: each for each in record.originals} if record else {}
    try:
        originals = tuple(original(path, known.get(str(path))) for path in paths)
        header = merge(read_header(LocalFile(path)) for path in paths)
        shape = None if adapter else shape_of(header)
    except OSError as problem:
        return Found(), (
            error(
                "model-missing",
                f"model: {problem.filename or given} cannot be read on this machine: "
                f"{problem.strerror}",
                fix="`file:` names a path on the machine that this runs on; a path on the host "
                "begins with a slash.",
            ),
        )
    except GgufError as problem:
        return Found(), (
            error("model-not-gguf", f"model: {given} {problem}", "llama.cpp reads GGUF only"),
        )
    if settings.model_sha256 not in (None, originals[0].sha256):
        return Found(), (
            error(
                "model-sha256",
                f"model: {given} has SHA-256 {originals[0].sha256}, not the one in model_sha256",
                fix="Get the file anew, or correct model_sha256.",
            ),
        )
    said = _unless_adapter(header, str(given)) if adapter else ()
    return Found(originals=originals, shape=shape), said


def original(path: Path, known: Original | None) -> Original:
    """A file with its SHA-256, which the host may remember of an unchanged one."""
    stat = path.stat()
    if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return known
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    with _lock:
        if key not in _hashes:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            _hashes[key] = digest.hexdigest()
    return Original(str(path), stat.st_size, stat.st_mtime_ns, _hashes[key])


class LocalFile:
    """A file of this machine, of which ranges are read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from an offset on."""
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def _shape_of(sources: tuple[Source, ...]) -> Shape:
    return shape_of(merge(read_header(source) for source in sources))


def shape_of_url(url: str) -> tuple[Shape | None, tuple[Finding, ...]]:
    """The shape of a model at an address, where this machine can ask for it."""
    try:
        return _shape_of((web.RemoteFile(url),)), ()
    except (GgufError, web.WebError) as problem:
        return None, (unread(shown(url), problem),)


def shape_of_sources(
    name: str, sources: tuple[Source, ...]
) -> tuple[Shape | None, tuple[Finding, ...]]:
    """The shape of a model that is on the host."""
    try:
        return _shape_of(sources), ()
    except GgufError as problem:
        return None, (unread(name, problem),)


def unread(name: str, problem: Exception) -> Finding:
    """What to say of a header that could not be read."""
    return warning("header-unread", f"model: {name}: {problem}", "whether it fits is not known")
