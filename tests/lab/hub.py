"""The Hugging Face Hub of the outside: its API, and files that it redirects to a CDN for.

It stands under `/hub` of the web server; the CDN is the same server on another port, as it is on
another host in the world: what is meant for the Hub only must not be seen there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote

from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Request, Response

from .tools import write_whole

MOUNT = "/hub"
CDN = "cdn"
"""Folder of the files, each named by its SHA-256."""


@dataclass(frozen=True)
class HubRepository:
    """A repository at its only commit."""

    name: str
    """`user/Model-GGUF`."""
    files: dict[str, str]
    """Path to SHA-256."""
    gated: bool = False
    private: bool = False
    token: str | None = None
    """The one that its owner has let in."""
    small: int = 0
    """Smaller files are kept in git itself: their SHA-256 is not told."""

    @property
    def commit(self) -> str:
        """40 hex digits, from everything that is in it."""
        told = json.dumps([self.name, sorted(self.files.items())])
        return hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest()


class HubStore:
    """What the Hub has, handed from a test to the server through a file."""

    def __init__(self, path: Path, files: Path) -> None:
        self._path = path
        self._files = files / CDN

    def read(self) -> dict[str, HubRepository]:
        """Return the repositories by name."""
        if not self._path.exists():
            return {}
        return {each["name"]: HubRepository(**each) for each in json.loads(self._path.read_text())}

    def put(
        self,
        name: str,
        files: Mapping[str, Path | bytes],
        *,
        gated: bool = False,
        private: bool = False,
        token: str | None = None,
        small: int = 0,
    ) -> HubRepository:
        """Publish a repository, or another commit of it."""
        hashes = {path: self._store(content) for path, content in files.items()}
        made = HubRepository(name, hashes, gated, private, token, small)
        others = [each for each in self.read().values() if each.name != name]
        write_whole(self._path, json.dumps([asdict(each) for each in (*others, made)]))
        return made

    def _store(self, content: Path | bytes) -> str:
        data = content if isinstance(content, bytes) else content.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        self._files.mkdir(parents=True, exist_ok=True)
        if not (self._files / sha256).exists():
            new = self._files / f".{sha256}.new"
            if isinstance(content, bytes):
                new.write_bytes(content)
            else:
                shutil.copyfile(content, new)
            new.rename(self._files / sha256)
        return sha256

    def size(self, sha256: str) -> int:
        """Return the length of a file."""
        return (self._files / sha256).stat().st_size


class Hub:
    """Answers what is asked of the Hub."""

    def __init__(self, store: HubStore, cdn: str) -> None:
        self._store = store
        self._cdn = cdn

    def answer(self, request: Request) -> Response:
        """Answer one request, whose path begins with the mount."""
        parts = unquote(request.path).removeprefix(f"{MOUNT}/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) == 6 and parts[4] == "revision":
            return self._model("/".join(parts[2:4]), parts[5], request)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), request)
        raise NotFound("the Hub has no such page")

    def _model(self, name: str, revision: str, request: Request) -> Response:
        found = self._store.read().get(name)
        if found is None or (found.private and not self._let_in(found, request)):
            # To those whom it does not know, it does not tell private from missing.
            return _refusal(401, "RepoNotFound")
        if revision not in {"main", found.commit}:
            return _refusal(404, "RevisionNotFound")
        told = {
            "id": name,
            "sha": found.commit,
            "gated": "manual" if found.gated else False,
            "siblings": [
                self._sibling(path, sha256, found.small) for path, sha256 in found.files.items()
            ],
        }
        return Response(json.dumps(told), mimetype="application/json")

    def _sibling(self, path: str, sha256: str, small: int) -> dict[str, object]:
        size = self._store.size(sha256)
        told: dict[str, object] = {"rfilename": path, "size": size}
        return told if size < small else {**told, "lfs": {"sha256": sha256, "size": size}}

    def _file(self, name: str, commit: str, path: str, request: Request) -> Response:
        found = self._store.read().get(name)
        if found is None:
            return _refusal(401, "RepoNotFound")
        if (found.gated or found.private) and not self._let_in(found, request):
            return _refusal(403 if "Authorization" in request.headers else 401, "GatedRepo")
        sha256 = found.files.get(path)
        if commit not in {"main", found.commit} or sha256 is None:
            return _refusal(404, "EntryNotFound")
        response = Response(status=302)
        response.headers["Location"] = f"{self._cdn}/{CDN}/{sha256}?Signature=signed"
        response.headers["X-Repo-Commit"] = found.commit
        response.headers["X-Linked-ETag"] = f'"{sha256}"'
        response.headers["X-Linked-Size"] = str(self._store.size(sha256))
        return response

    def _let_in(self, found: HubRepository, request: Request) -> bool:
        told = request.headers.get("Authorization", "")
        return found.token is not None and told == f"Bearer {found.token}"


def _refusal(status: int, code: str) -> Response:
    return Response(f"{code}\n", status=status, headers={"X-Error-Code": code})
