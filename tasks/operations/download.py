"""Downloads on a host, as a job: resumed, checked by SHA-256, shown while they run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tasks.operations.job import Job
from tasks.settings import Settings

_SCRIPT = (Path(__file__).parents[2] / "files" / "fetch-model.sh").read_text()


@dataclass(frozen=True)
class Kind:
    """What a file is meant to be, and the four bytes that it begins with then, if it has any."""

    name: str
    magic: bytes


GGUF = Kind("a GGUF file", b"GGUF")
ANY = Kind("a file", b"")
DEBIAN_PACKAGE = Kind("a Debian package", b"!<ar")


@dataclass(frozen=True)
class Wanted:
    """A file to fetch."""

    sha256: str
    name: str
    """For people."""
    url: str
    size: int = 0
    """In bytes; 0 if it is not known."""


@dataclass(frozen=True)
class Download:
    """Files to fetch into a folder of a user's, each as SHA256.part."""

    name: str
    """Of the job: the unit is llamastead-NAME.service."""
    files: Sequence[Wanted]
    kind: Kind
    folder: str
    user: str
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    token_server: str = ""
    """Who gets to see the token among the secrets."""

    def job(self, settings: Settings) -> Job:
        """What fetches them."""
        files = self.files
        return Job(
            name=self.name,
            key=hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:16],
            script=_SCRIPT,
            variables={
                "INCOMING": self.folder,
                "FILES": "\n".join(f"{file.sha256} {file.size} {file.name}" for file in files),
                "KIND": self.kind.name,
                "MAGIC": self.kind.magic.hex(),
                "TOKEN_SERVER": self.token_server,
                "STALL": "60",
                "PAUSE": "2",
            },
            # An address can be signed, and a proxy's can hold a password.
            environment={
                **settings.proxy_environment,
                "URLS": " ".join(file.url for file in files),
            },
            secrets=self.secrets,
            user=self.user,
            writable=(self.folder,),
            timeout_seconds=settings.model_download_timeout_seconds,
        )
