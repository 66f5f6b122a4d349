"""The script that downloads, on a host, with everything on the way that can go wrong."""

from __future__ import annotations

import hashlib
import random
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tasks.operations.model_file import hand_over
from tasks.probe import BLOBS, INCOMING
from tasks.rules.model import ModelFile
from tests.e2e import deploys
from tests.lab import Fault, Lab, LabHost

pytestmark = pytest.mark.lab

SCRIPT = (deploys.REPOSITORY / "files" / "fetch-model.sh").read_text()
CONTENT = b"GGUF" + random.Random(1).randbytes(1_999_996)  # only to be told apart
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)
TENTHS = range(SIZE // 10, SIZE, SIZE // 10)
PAGE = b"<!DOCTYPE html>" + b" " * 1000
TOKEN = "hf_" + "s3cretOfTheTest" * 2


@dataclass
class Download:
    """One file, on its way to one host."""

    lab: Lab
    host: LabHost
    files: list[tuple[str, int, str, str]] = field(default_factory=list)
    """SHA-256, bytes, name, address."""

    def script(
        self,
        *,
        sha256: str = SHA256,
        size: int = SIZE,
        url: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """The script with what it is to fetch in front."""
        url = url or self.lab.outside.url("file.gguf")
        files = self.files or [(sha256, size, "file.gguf", url)]
        settings = {
            "INCOMING": INCOMING,
            "FILES": "\n".join(f"{sha256} {size} {name}" for sha256, size, name, _ in files),
            "KIND": "a GGUF file",
            "MAGIC": b"GGUF".hex(),
            "TOKEN_SERVER": "",
            "STALL": "2",
            "PAUSE": "0",
            "URLS": " ".join(url for *_, url in files),
            **(variables or {}),
        }
        head = "".join(f"export {name}={shlex.quote(text)}\n" for name, text in settings.items())
        return head + SCRIPT

    def run(self, **what: Any) -> subprocess.CompletedProcess[str]:
        """Run the script, and hand over what it says is whole, as a deploy does."""
        done = self.host.run(self.script(**what), check=False)
        if done.returncode == 0:
            for sha256, _, name, _ in self.files or [(SHA256, 0, "file.gguf", "")]:
                path = f"/var/lib/llamastead/models/test/{name}"
                self.host.run(hand_over(ModelFile(path, sha256, None)))
        return done

    def stored(self) -> str:
        """What lies under final names, with what it really is."""
        return self.host.run(f"cd {BLOBS} 2>/dev/null && sha256sum * 2>/dev/null || true").stdout

    def is_whole(self) -> bool:
        """Whether the file is there; nothing else ever is."""
        assert self.stored() in ("", f"{SHA256}  {SHA256}\n")
        return bool(self.stored())

    def seed(self, content: bytes) -> None:
        """Leave the beginning of a download behind."""
        part = self.host.root / INCOMING.lstrip("/") / f"{SHA256}.part"
        part.write_bytes(content)

    def sent(self) -> int:
        """Bytes that the server has sent of it."""
        web = self.lab.outside.requests("web")
        return sum(each.bytes for each in web if each.target.startswith("/file.gguf"))


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    return lab.host("debian-13", name="downloads")


@pytest.fixture
def download(lab: Lab, host: LabHost) -> Iterator[Download]:
    lab.outside.put("file.gguf", CONTENT)
    host.run(f"rm -rf /var/lib/llamastead; mkdir -p {INCOMING}")
    yield Download(lab, host)
    lab.outside.heal()


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line."""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("at", [0, *TENTHS])
def test_cut_at_every_tenth_it_goes_on_from_there(download: Download, at: int) -> None:
    before = download.sent()
    download.lab.outside.play(Fault("/file.gguf", cut_after=at, times=1))
    done = download.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert download.is_whole()
    assert download.sent() - before == SIZE


ONCE = {
    "wrong ETag": [Fault("*", headers={"ETag": '"another"'}, cut_after=SIZE // 2, times=1)],
    "no Accept-Ranges": [Fault("*", no_ranges=True)],
    "no ranges, and cut": [Fault("*", no_ranges=True), Fault("*", cut_after=9000, times=1)],
    "changed upstream in between": [Fault("*", corrupt_at=7, cut_after=SIZE // 2, times=1)],
    "429": [Fault("*", status=429, times=2)],
    "429 with Retry-After": [
        Fault("*", status=429, headers={"Retry-After": "1"}, times=1),
    ],
    "408": [Fault("*", status=408, times=1)],
    "500": [Fault("*", status=500, times=4)],
    "502": [Fault("*", status=502, times=1)],
    "503 with Retry-After": [Fault("*", status=503, headers={"Retry-After": "1"}, times=1)],
    "504": [Fault("*", status=504, times=1)],
    "5xx after a cut": [
        Fault("*", status=500, times=1),
        Fault("*", cut_after=SIZE // 3, times=1),
    ],
    "longer than it is": [Fault("*", extra_length=1000, times=1)],
    "shorter than it is": [Fault("*", extra_length=-1000, times=1)],
    "stalled": [Fault("*", stall_after=SIZE // 4, times=1)],
    "always cut, a little further each time": [Fault("*", cut_after=SIZE // 9)],
    "slow": [Fault("*", bytes_per_second=SIZE)],
}


@pytest.mark.parametrize("faults", ONCE.values(), ids=ONCE)
def test_what_passes_is_waited_for(download: Download, faults: list[Fault]) -> None:
    for fault in faults:
        download.lab.outside.play(fault)
    done = download.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert download.is_whole()


def test_retry_after_is_honoured(download: Download) -> None:
    download.lab.outside.play(Fault("*", status=429, headers={"Retry-After": "4"}, times=1))
    began = time.monotonic()
    assert download.run().returncode == 0
    assert time.monotonic() - began >= 4


FOR_GOOD = {
    "redirect loop": (Fault("*", status=302, headers={"Location": "/file.gguf"}), "redirects"),
    "redirect to a file": (
        Fault("*", status=302, headers={"Location": "file:///etc/passwd"}),
        "Protocol",
    ),
    "401": (Fault("*", status=401), "the server says 401"),
    "403": (Fault("*", status=403), "hf_token"),
    "404": (Fault("*", status=404), "the server says 404"),
    "410": (Fault("*", status=410), "the server says 410"),
    "416": (Fault("*", status=416), "the server says 416"),
    "429": (Fault("*", status=429), "the server says 429"),
    "503": (Fault("*", status=503), "the server says 503"),
    "corrupt": (Fault("*", corrupt_at=SIZE // 2), "has SHA-256"),
    "cut, without ranges": (Fault("*", no_ranges=True, cut_after=SIZE // 2), "cannot go on"),
    "always shorter": (Fault("*", extra_length=-1000), "file.gguf"),
}


@pytest.mark.parametrize(("fault", "part"), FOR_GOOD.values(), ids=FOR_GOOD)
def test_what_does_not_pass_is_said_and_the_next_run_succeeds(
    download: Download, fault: Fault, part: str
) -> None:
    download.lab.outside.play(fault)
    done = download.run()
    assert done.returncode == 1
    assert part in said(done)
    assert not download.is_whole()
    download.lab.outside.heal()
    assert download.run().returncode == 0
    assert download.is_whole()


LEFT = {
    "half": CONTENT[: SIZE // 2],
    "wrong half": bytes(SIZE // 2),
    "wrong from the middle on": CONTENT[: SIZE // 2] + bytes(1000),
    "all, but not handed over": CONTENT,
    "all, but wrong": CONTENT[:-1] + b"x",
    "more than all": CONTENT + b"x",
    "nothing": b"",
}


@pytest.mark.parametrize("size", [SIZE, 0], ids=["known", "unknown"])
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_whatever_an_earlier_run_left(download: Download, left: bytes, size: int) -> None:
    download.seed(left)
    before = download.sent()
    done = download.run(size=size)
    assert done.returncode == 0, done.stdout
    assert download.is_whole()
    if CONTENT.startswith(left):
        # Whether there is more is asked where it is not known; the answer has no bytes of the file.
        assert SIZE - len(left) <= download.sent() - before < SIZE - len(left) + 1000


def test_a_page_is_no_model(download: Download) -> None:
    url = download.lab.outside.put("file.gguf", PAGE)
    assert "is not a GGUF file" in said(download.run(url=url, size=0))
    assert not download.is_whole()


@pytest.mark.parametrize("size", [SIZE, 0], ids=["known", "unknown"])
def test_a_full_disk(download: Download, size: int) -> None:
    download.host.run(f"mount -t tmpfs -o size=1m tmpfs {INCOMING}")
    try:
        done = download.run(size=size)
        assert done.returncode == 1
        told = "MB are free" if size else "is there space left?"
        assert told in said(done)
        assert not download.is_whole()
    finally:
        download.host.run(f"umount {INCOMING}")
    assert download.run().returncode == 0
    assert download.is_whole()


def test_killed_in_the_middle(download: Download) -> None:
    download.lab.outside.play(Fault("*", bytes_per_second=SIZE // 4))
    (download.host.root / "run-killed").write_text(download.script())
    download.host.run(
        "systemd-run --quiet --wait -p RuntimeMaxSec=2 -p KillSignal=SIGKILL sh /run-killed",
        check=False,
    )
    download.lab.outside.heal()
    before = download.sent()
    assert download.run().returncode == 0
    assert download.is_whole()
    assert 0 < download.sent() - before < SIZE


def test_several_files_of_which_one_is_cut(download: Download) -> None:
    outside = download.lab.outside
    for number in range(3):
        content = CONTENT[:-1] + bytes([number])
        url = outside.put(f"part-{number}.gguf", content)
        sha256 = hashlib.sha256(content).hexdigest()
        download.files.append((sha256, SIZE, f"part-{number}.gguf", url))
    outside.play(Fault("/part-1.gguf", cut_after=1000, times=1))
    done = download.run()
    assert done.returncode == 0, done.stdout
    lines = download.stored().splitlines()
    assert len(lines) == 3
    assert all(line[:64] == line[66:] for line in lines)


# A token


def test_a_token_is_seen_by_its_own_server_only(download: Download) -> None:
    outside = download.lab.outside
    repo = outside.hub.put("user/Gated-GGUF", {"m-Q8_0.gguf": CONTENT}, gated=True, token=TOKEN)
    url = f"{outside.hub_url}/user/Gated-GGUF/resolve/{repo.commit}/m-Q8_0.gguf"
    assert "hf_token" in said(download.run(url=url))

    download.host.run(f"mkdir -p /run/creds; printf '%s\\n' {TOKEN} >/run/creds/hf-token")
    given = {
        "CREDENTIALS_DIRECTORY": "/run/creds",
        "TOKEN_SERVER": "/".join(outside.hub_url.split("/")[:3]),
    }
    seen = len(outside.requests("web"))
    outside.play(Fault(f"/cdn/{SHA256}", cut_after=SIZE // 2, times=1))
    done = download.run(url=url, variables=given)
    assert done.returncode == 0, done.stdout
    assert download.is_whole()
    asked = outside.requests("web")[seen:]
    assert {each.token for each in asked if each.target.startswith("/cdn/")} == {False}
    assert {each.token for each in asked if each.target.startswith("/hub/")} == {True}
    assert TOKEN not in done.stdout + done.stderr


def test_a_redirect_loop_with_a_token(download: Download) -> None:
    outside = download.lab.outside
    url = outside.url("file.gguf")
    download.host.run(f"mkdir -p /run/creds; printf '%s\\n' {TOKEN} >/run/creds/hf-token")
    outside.play(Fault("*", status=302, headers={"Location": url}))
    given = {"CREDENTIALS_DIRECTORY": "/run/creds", "TOKEN_SERVER": "/".join(url.split("/")[:3])}
    assert "circles" in said(download.run(variables=given))


# How fast


@dataclass(frozen=True)
class Times:
    """How long something took, and what it cost. Seconds."""

    real: float
    cpu: float


def timed(host: LabHost, script: str) -> Times:
    """Run a script of sh in the host."""
    (host.root / "run-timed").write_text(script)
    told = host.run("bash -c \"TIMEFORMAT='%R %U %S'; time sh /run-timed >/dev/null\"").stderr
    real, user, system = map(float, told.split()[-3:])
    return Times(real, user + system)


@pytest.mark.bench  # judges seconds, which a busy machine decides
@pytest.mark.parametrize("rate", [80_000_000, None], ids=["paced", "unlimited"])
def test_it_is_as_fast_as_curl(download: Download, rate: int | None) -> None:
    """600 MB, one after the other in one run.

    Paced as a line to the world is, downloading has to be as fast as curl, though it hashes. Where
    nothing but memory limits, hashing does, on one processor, and is only reported.
    """
    url = download.lab.outside.put("large.gguf", CONTENT * 300)
    sha256 = hashlib.sha256(CONTENT * 300).hexdigest()
    if rate is not None:
        download.lab.outside.play(Fault("*", bytes_per_second=rate))
    plain = f"curl -sS -o {INCOMING}/plain {url}; rm {INCOMING}/plain"
    hashed = download.script(sha256=sha256, size=SIZE * 300, url=url)
    curl, ours = [], []
    for _ in range(3 if rate else 1):  # in turn, since other work on this machine comes and goes
        curl.append(timed(download.host, plain))
        ours.append(timed(download.host, f"rm -f {INCOMING}/*\n{hashed}"))
    print(f"{rate}: curl {curl}, with hash {ours}")
    if rate is not None:
        assert min(each.real for each in curl) / min(each.real for each in ours) >= 0.95
