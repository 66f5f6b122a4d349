"""The outside as a test sees it: addresses, files to put there, faults to play, what was asked."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from .access import Access, Server, read_log
from .faults import Fault, FaultFile
from .gguf_model import MODEL_NAME, MODEL_SHA256, tiny_model
from .hub import MOUNT, HubStore
from .llama_source import LLAMA_CPP_COMMIT, NEXT_TAG, Repository, make_repository
from .network import CDN_PORT, PROXY_PORT, WEB_PORT, Network
from .processes import ProcessGroup
from .tools import LabError, cache_directory, say, write_whole

_REPOSITORY = Path(__file__).resolve().parents[2]
_START_SECONDS = 30


class Outside:
    """The web server, the git server and the proxy of one lab."""

    model_sha256 = MODEL_SHA256
    llama_cpp_commit = LLAMA_CPP_COMMIT

    def __init__(self, directory: Path, network: Network) -> None:
        self.directory = directory
        self.files = directory / "www"
        self._network = network
        self._processes = ProcessGroup(f"{network.bridge}/outside")
        self._faults = FaultFile(directory / "faults.json")

    # Addresses

    @property
    def proxy_url(self) -> str:
        """The proxy through which hosts reach package mirrors, and the lab's own servers."""
        return f"http://{self._network.address}:{PROXY_PORT}"

    def url(self, path: str) -> str:
        """Return the address of a file."""
        return f"http://{self._network.address}:{WEB_PORT}/{path.lstrip('/')}"

    @property
    def model_url(self) -> str:
        """The address of a tiny model."""
        return self.url(MODEL_NAME)

    @property
    def hub_url(self) -> str:
        """The address of a Hugging Face Hub."""
        return self.url(MOUNT)

    @property
    def hub(self) -> HubStore:
        """What that Hub has."""
        return HubStore(self.directory / "hub.json", self.files)

    @property
    def git_url(self) -> str:
        """The address of llama.cpp's repository."""
        return self.url("llama.cpp.git")

    @property
    def repository(self) -> Repository:
        """llama.cpp's repository, to which a test may add commits."""
        return Repository(self.directory / "git" / "llama.cpp.git")

    @property
    def next_commit(self) -> str:
        """A later commit, which compiles to the same but for its name."""
        return self.repository.resolve(NEXT_TAG)

    # Files and faults

    def put(self, name: str, content: bytes | str | Path) -> str:
        """Serve a file, given as its content or as a path of this machine; return its address."""
        target = self.files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f".{target.name}.new")
        if isinstance(content, Path):
            shutil.copyfile(content, new)
        else:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.replace(target)
        return self.url(name)

    def play(self, fault: Fault) -> None:
        """Let something go wrong from now on, in addition to what does already."""
        faults = self._faults.read()
        self._faults.write([*faults, replace(fault, serial=time.monotonic_ns())])

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        self._faults.write([])

    def requests(self, server: Server | None = None) -> list[Access]:
        """Return what has been asked for and answered so far."""
        log = read_log(self.directory / "access.jsonl")
        return [access for access in log if server in (None, access.server)]

    def allow(self, hosts: Iterable[str]) -> None:
        """Let the proxy through to these hosts too."""
        known = self._allowed.read_text().split() if self._allowed.exists() else []
        write_whole(self._allowed, "".join(f"{host}\n" for host in {*known, *hosts}))

    # Power

    @property
    def _allowed(self) -> Path:
        return self.directory / "allowed_hosts"

    @property
    def is_running(self) -> bool:
        """Whether the servers answer."""
        return not self._processes.is_empty and all(
            map(self._answers, (WEB_PORT, CDN_PORT, PROXY_PORT))
        )

    def _answers(self, port: int) -> bool:
        try:
            socket.create_connection((self._network.address, port), timeout=1).close()
        except OSError:
            return False
        return True

    def start(self) -> None:
        """Start the servers unless they run; what they serve is made first if it isn't there."""
        if self.is_running:
            return
        self.files.mkdir(parents=True, exist_ok=True)
        if not (self.files / MODEL_NAME).exists():
            self.put(MODEL_NAME, tiny_model())
        make_repository(self.repository.path)
        self._processes.kill()  # one that hangs
        say(f"serving files, git and a proxy on {self._network.address}")
        log = self.directory / "outside.log"
        self._processes.start(
            [
                sys.executable,
                "-m",
                "tests.lab.supervisor",
                f"--directory={self.directory}",
                f"--address={self._network.address}",
                f"--packages={cache_directory('packages')}",
            ],
            log=log,
            cwd=_REPOSITORY,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self.is_running:
            if self._processes.is_empty or time.monotonic() > deadline:
                last = log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
                raise LabError(f"the servers of the outside did not start: {last[0]}")
            time.sleep(0.05)
