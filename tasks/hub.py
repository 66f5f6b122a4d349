"""Which files a model on the Hugging Face Hub is: asked of its API, on the controller.

What was asked is remembered for the run, however many hosts want the same model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any
from urllib.parse import quote

from tasks import web
from tasks.rules.architecture import Shape, shape_of
from tasks.rules.findings import Finding, error, note, warning
from tasks.rules.gguf import GgufError, Header, merge, read_header
from tasks.rules.hub_files import (
    Candidate,
    ChoiceError,
    HubFile,
    HubModel,
    Ranking,
    Reference,
    first_that_fits,
    is_poor,
    is_weights,
    projector,
    requantised,
    select,
    select_source,
)
from tasks.rules.making import shape_of_config
from tasks.rules.outside import json_object, shown
from tasks.rules.quantisation import quantised_types

ENDPOINT = "https://huggingface.co"
MAX_ANSWER_BYTES = 32 * 1024**2
MAX_FILES = 20_000

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Hub:
    """A Hub, or a mirror of it, and the right to ask it."""

    endpoint: str = ENDPOINT
    token: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """Without a slash at the end."""
        return self.endpoint.rstrip("/")

    @property
    def shown(self) -> str:
        """As it may be printed."""
        return shown(self.address)

    @property
    def credential(self) -> web.Token | None:
        """The token, for this server only."""
        return web.Token(self.token, self.address) if self.token else None

    def file_url(self, repo: str, commit: str, path: str) -> str:
        """Address of a file as it is in one commit."""
        return f"{self.address}/{repo}/resolve/{commit}/{quote(path)}"


@dataclass(frozen=True)
class Repository:
    """What the Hub tells of a repository, at one commit."""

    repo: str
    commit: str
    gated: bool
    """Whether its owner has to let one in."""
    files: tuple[HubFile, ...]


@dataclass(frozen=True)
class Resolved:
    """A model that was looked up, and what there is to say about it."""

    model: HubModel
    header: Header | None
    """None where it could not be read."""
    shape: Shape | None
    ranking: Ranking | None
    """Only where the quantisation was left to us."""
    findings: tuple[Finding, ...] = ()
    config: Mapping[str, Any] | None = None
    """config.json of one that has to be converted."""


class HubError(Exception):
    """The Hub could not, or would not, tell."""

    def __init__(self, finding: Finding, unreachable: bool = False) -> None:
        self.finding = finding
        self.unreachable = unreachable
        """Whether a model that is on the host already may go on being served."""
        super().__init__(str(finding))


_lock = Lock()
_repositories: dict[tuple[Hub, str, str], Repository | HubError] = {}
_headers: dict[tuple[Hub, Candidate], Header | GgufError | HubError] = {}


def repository(hub: Hub, repo: str, revision: str = "main") -> Repository:
    """A repository, asked for once in a run."""
    key = (hub, repo, revision)
    with _lock:
        if key not in _repositories:
            try:
                _repositories[key] = _ask(hub, repo, revision)
            except HubError as problem:
                _repositories[key] = problem
        found = _repositories[key]
    if isinstance(found, HubError):
        raise found
    return found


def header(hub: Hub, candidate: Candidate) -> Header:
    """The header of a model, of all its parts, read before anything is downloaded.

    Raises GgufError for what is no model, HubError where it could not be had.
    """
    key = (hub, candidate)
    with _lock:
        if key not in _headers:
            try:
                _headers[key] = merge(
                    read_header(web.RemoteFile(file.url, hub.credential))
                    for file in candidate.files
                )
            except GgufError as problem:
                _headers[key] = problem
            except web.WebError as problem:
                first = candidate.files[0]
                repo = first.url.removeprefix(f"{hub.address}/").split("/resolve/")[0]
                _headers[key] = _refused(hub, repo, problem, file=first.path)
        found = _headers[key]
    if isinstance(found, Exception):
        raise found
    return found


def resolve(
    hub: Hub,
    reference: Reference,
    revision: str = "main",
    fits: Callable[[Shape], bool] | None = None,
    pinned: HubModel | None = None,
) -> Resolved:
    """The model that a reference means.

    Of a bare repository that is the best one that fits; where nothing does, it is the smallest, and
    whoever asked has to say so. pinned is what an earlier run found and left whole on the host: it
    is not asked for again if the revision is a commit, and stands in while the Hub is out of reach.
    Raises HubError.
    """
    return _unless_pinned(
        reference, revision, pinned, lambda: _looked_up(hub, reference, revision, fits)
    )


def resolve_source(
    hub: Hub, reference: Reference, revision: str = "main", pinned: HubModel | None = None
) -> Resolved:
    """What a quantisation of the model that a reference names is made from.

    Raises HubError.
    """
    return _unless_pinned(
        reference, revision, pinned, lambda: _looked_up_source(hub, reference, revision, pinned)
    )


def file(hub: Hub, repo: str, path: str, revision: str, setting: str) -> HubFile:
    """One file of a repository, with its SHA-256. Raises HubError."""
    for each in repository(hub, repo, revision).files:
        if each.path == path:
            return _hashed(hub, repo, each)[0] if each.sha256 is None else each
    raise HubError(error("no-such-file", f"{setting}: {repo} has no file {path}"))


def _unless_pinned(
    reference: Reference,
    revision: str,
    pinned: HubModel | None,
    look_up: Callable[[], Resolved],
) -> Resolved:
    if pinned is not None and pinned.reference != reference:
        pinned = None
    if pinned is not None and pinned.commit == revision:
        return Resolved(pinned, None, None, None)
    try:
        return look_up()
    except HubError as problem:
        if pinned is None or not problem.unreachable:
            raise
        return Resolved(pinned, None, None, None, (_stands_in(pinned, problem.finding),))


def _looked_up(
    hub: Hub, reference: Reference, revision: str, fits: Callable[[Shape], bool] | None
) -> Resolved:
    found = repository(hub, reference.repo, revision)
    try:
        tried = select(reference, found.files)
    except ChoiceError as problem:
        raise HubError(problem.finding) from None
    if found.gated:
        _check_access(hub, reference.repo, tried[0].files[0])
    ranking = _ranking(hub, tried, fits) if len(tried) > 1 else None
    chosen = tried[0]
    if ranking is not None:
        chosen = ranking.chosen or min(tried, key=lambda each: each.size)
    model = HubModel(reference, found.commit, found.gated, chosen, projector(chosen, found.files))
    return _read(hub, model, ranking)


def _looked_up_source(
    hub: Hub, reference: Reference, revision: str, pinned: HubModel | None
) -> Resolved:
    found = repository(hub, reference.repo, revision)
    if pinned is not None and pinned.commit == found.commit:
        return Resolved(pinned, None, None, None)
    try:
        chosen = select_source(reference, found.files)
    except ChoiceError as problem:
        raise HubError(problem.finding) from None
    if found.gated:
        _check_access(hub, reference.repo, chosen.files[0])
    if not any(is_weights(each.path) for each in chosen.files):
        model = HubModel(reference, found.commit, found.gated, chosen, None)
        resolved = _read(hub, model, None)
        types = quantised_types(resolved.header) if resolved.header else ()
        if types:
            raise HubError(requantised(f"{reference.repo}/{chosen.files[0].path}", types[-1]))
        return resolved
    # The Hub tells the SHA-256 of large files only. The small ones are read here, once.
    files, config = [], None
    for each in chosen.files:
        known, content = each, None
        if each.sha256 is None or each.path == "config.json":
            known, content = _hashed(hub, reference.repo, each)
        files.append(known)
        config = json_object(content or b"") or {} if each.path == "config.json" else config
    model = HubModel(
        reference, found.commit, found.gated, replace(chosen, files=tuple(files)), None
    )
    weights = sum(each.size for each in files if is_weights(each.path))
    shape = shape_of_config(config, weights) if config else None
    return Resolved(model, None, shape, None, tuple(_about_token(hub)), config)


def _hashed(hub: Hub, repo: str, each: HubFile) -> tuple[HubFile, bytes]:
    """A small file with its SHA-256, and what is in it."""
    try:
        with web.opened(each.url, hub.credential) as response:
            content = web.body(response, MAX_ANSWER_BYTES + 1)
    except web.WebError as problem:
        raise _refused(hub, repo, problem, file=each.path) from None
    if len(content) > MAX_ANSWER_BYTES or (each.sha256 is None and len(content) != each.size):
        raise HubError(
            error(
                "no-sha256",
                f"model: the Hub tells no SHA-256 of {repo}/{each.path}, and gives another size",
                "what is downloaded could not be checked",
                "Try again later.",
            )
        )
    actual = hashlib.sha256(content).hexdigest()
    if each.sha256 not in (None, actual):
        raise HubError(
            error(
                "model-sha256",
                f"model: {repo}/{each.path} has SHA-256 {actual}, not the one that the Hub tells",
                fix="Try again later.",
            )
        )
    return replace(each, sha256=actual), content


def _read(hub: Hub, model: HubModel, ranking: Ranking | None) -> Resolved:
    said = [*_about_token(hub), *_about_choice(model, ranking)]
    read, shape = None, None
    try:
        read = header(hub, model.candidate)
        shape = shape_of(read)
    except HubError as problem:
        if not problem.unreachable:
            raise
        # The files may be elsewhere than the Hub, where the host gets and this machine does not.
        said.append(warning("header-unread", problem.finding.cause, "whether it fits is not known"))
    except GgufError as problem:
        if read is None and "is not a GGUF" in str(problem):
            raise HubError(
                error(
                    "model-not-gguf",
                    f"model: {model.reference.repo}/{model.first.path} {problem}",
                    "llama.cpp reads GGUF only",
                )
            ) from None
        said.append(
            warning(
                "header-unreadable",
                f"model: {model.reference.repo}/{model.first.path} {problem}",
                "whether it fits is not known",
            )
        )
    return Resolved(model, read, shape, ranking, tuple(said))


def _about_token(hub: Hub) -> Iterator[Finding]:
    if hub.token and not web.is_private(hub.address):
        yield warning(
            "token-in-clear",
            f"hf_token: {hub.shown} is asked without encryption",
            "whoever is on the way can read the token",
            "Use an https:// address for hf_endpoint.",
        )


def _about_choice(model: HubModel, ranking: Ranking | None) -> list[Finding]:
    said = []
    if ranking is not None:
        others = [each.label for each in ranking.runners_up[:3]]
        larger = [each.label for each in ranking.too_large[-3:]]
        parts = [f"too large: {', '.join(larger)}"] if larger else []
        parts += [f"next: {', '.join(others)}"] if others else []
        said.append(
            note(
                "quant-chosen",
                f"model: {model.candidate.label} of {model.reference.repo} is taken"
                + (f" ({'; '.join(parts)})" if parts else ""),
                fix=f"To choose another: {model.reference.repo}:QUANT.",
            )
        )
    if is_poor(model.candidate.quant):
        said.append(
            warning(
                "quant-poor",
                f"model: {model.candidate.label} keeps less than 3.5 bits of each weight",
                "answers are visibly worse than the model's own",
                "A smaller model in a better quantisation usually answers better.",
            )
        )
    return said


def _ranking(
    hub: Hub, tried: tuple[Candidate, ...], fits: Callable[[Shape], bool] | None
) -> Ranking:
    """The first that fits. One header tells the shape of all; only what seems to fit is read."""
    if fits is None:
        return Ranking(tried[0], (), tried[1:])
    shape: Shape | None = None

    def does(each: Candidate) -> bool:
        nonlocal shape
        try:
            if shape is not None and not fits(
                replace(shape, weights=shape.weights.scaled(each.size))
            ):
                return False
            shape = shape_of(header(hub, each))
        except GgufError:
            return False
        return fits(shape)

    return first_that_fits(tried, does)


# The API


def _ask(hub: Hub, repo: str, revision: str) -> Repository:
    url = f"{hub.address}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        with web.opened(url, hub.credential) as response:
            content = web.body(response, MAX_ANSWER_BYTES)
    except web.WebError as problem:
        raise _refused(hub, repo, problem, revision=revision) from None
    try:
        return _parsed(hub, repo, json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise HubError(
            error(
                "hub-answer",
                f"model: {hub.shown} does not answer as the Hub does",
                fix="Check hf_endpoint.",
            )
        ) from None


def _parsed(hub: Hub, repo: str, answer: Mapping[str, Any]) -> Repository:
    commit = answer["sha"]
    if not _COMMIT.fullmatch(commit):
        raise ValueError
    siblings = answer["siblings"]
    if not isinstance(siblings, list) or len(siblings) > MAX_FILES:
        raise ValueError
    # A repository that was renamed tells its new name.
    named = answer.get("id")
    if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        repo = named
    files = (_file(hub, repo, commit, each) for each in siblings)
    return Repository(
        repo, commit, bool(answer.get("gated")), tuple(file for file in files if file)
    )


def _file(hub: Hub, repo: str, commit: str, told: Mapping[str, Any]) -> HubFile | None:
    path, large = told["rfilename"], told.get("lfs") or {}
    parts = path.split("/")
    if not path.isprintable() or any(part in {"", ".", ".."} for part in parts):
        return None
    size = large.get("size", told.get("size"))
    sha256 = large.get("sha256") or str(large.get("oid", "")).removeprefix("sha256:")
    return HubFile(
        path=path,
        size=size if isinstance(size, int) and size >= 0 else 0,
        sha256=sha256 if _SHA256.fullmatch(sha256) else None,
        url=hub.file_url(repo, commit, path),
    )


def _check_access(hub: Hub, repo: str, file: HubFile) -> None:
    """Whether a gated repository lets us in: its description is open to all, its files are not."""
    try:
        web.RemoteFile(file.url, hub.credential).read(0, 1)
    except web.WebError as problem:
        raise _refused(hub, repo, problem, file=file.path) from None


# What to say


def _refused(
    hub: Hub, repo: str, problem: web.WebError, *, revision: str = "", file: str = ""
) -> HubError:
    page = f"{hub.shown}/{repo}"
    what = f"{repo}/{file}" if file else repo
    if problem.status is None:
        return HubError(
            error(
                "hub-unreachable",
                f"model: {hub.shown} cannot be asked for {what}: {problem}",
                "a model that is not on the host yet cannot be looked up",
                "Check the network and the proxy of this machine, or set hf_endpoint to a mirror.",
            ),
            unreachable=True,
        )
    if problem.status == 429 or problem.status >= 500:
        return HubError(
            error(
                "hub-busy",
                f"model: {hub.shown} does not tell of {what} now ({problem})",
                fix="Try again later."
                + ("" if hub.token else " With hf_token it allows more requests."),
            ),
            unreachable=True,
        )
    if problem.code == "RevisionNotFound" and revision:
        return HubError(
            error(
                "no-such-revision",
                f"model_revision: {repo} has no branch, tag or commit {revision}",
                fix=f"{page}/commits/main lists the commits.",
            )
        )
    if problem.status == 404 and file:
        return HubError(
            error(
                "no-such-file",
                f"model: {hub.shown} lists {what}, but does not have it",
                fix="Choose another quantisation or another repository.",
            )
        )
    return HubError(_not_let_in(hub, repo, problem, page))


def _stands_in(pinned: HubModel, why: Finding) -> Finding:
    return warning(
        "hub-out-of-reach",
        why.cause,
        f"{pinned.candidate.label} of commit {pinned.commit[:12]}, which is on the host, is used",
        why.fix,
    )


def _not_let_in(hub: Hub, repo: str, problem: web.WebError, page: str) -> Finding:
    if problem.code == "GatedRepo" or (problem.status == 403 and hub.token):
        if hub.token:
            return error(
                "model-gated",
                f"model: the account of hf_token may not read {repo}",
                fix=f"Accept its conditions at {page} with that account, and let the token read "
                "gated repositories.",
            )
        return error(
            "model-gated",
            f"model: {repo} is gated, and no hf_token is set",
            fix=f"Accept its conditions at {page}, make a token there, and set hf_token.",
        )
    if problem.status in {401, 403}:
        if hub.token:
            return error(
                "token-refused",
                f"hf_token: {hub.shown} does not accept it, or {repo} does not exist",
                fix="Make a new token with the right to read, and check the spelling of `model`.",
            )
        # To those it does not know, the Hub does not tell private from missing.
        return error(
            "model-not-found",
            f"model: there is no repository {repo}, or it is private",
            fix="Check the spelling; for a private one set hf_token.",
        )
    if problem.status == 404:
        return error(
            "model-not-found",
            f"model: {hub.shown} has no {repo}",
            fix="Check the spelling, upper and lower case included.",
        )
    return error("hub-refused", f"model: {problem} for {repo}", fix="Check hf_endpoint.")
