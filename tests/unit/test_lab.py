"""The lab's parts that need no host: its servers on loopback, its model, its repository."""

from __future__ import annotations

import hashlib
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server
from werkzeug.test import Client, TestResponse

from tests.lab import access, gguf_model, llama_source, roots
from tests.lab.access import AccessLog, read_log
from tests.lab.faults import Fault, FaultFile
from tests.lab.hub import Hub, HubStore
from tests.lab.proxy import Destination, Policy, Proxy, is_immutable, parse_target, upstream_proxy
from tests.lab.web import Web, read_cgi_headers

CONTENT = bytes(range(256)) * 1000


class TestParseTarget:
    @pytest.mark.parametrize(
        ("method", "target", "expected"),
        [
            ("GET", "http://mirror.example/debian/", Destination("mirror.example", 80)),
            ("GET", "http://mirror.example:8080/", Destination("mirror.example", 8080)),
            ("HEAD", "http://MIRROR.example", Destination("mirror.example", 80)),
            ("CONNECT", "mirror.example:443", Destination("mirror.example", 443)),
            ("CONNECT", "[::1]:443", Destination("::1", 443)),
        ],
    )
    def test_says_where_to(self, method: str, target: str, expected: Destination) -> None:
        assert parse_target(method, target) == expected

    @pytest.mark.parametrize(
        ("method", "target"),
        [
            ("GET", "/debian/"),
            ("GET", "https://mirror.example/"),
            ("GET", "ftp://mirror.example/"),
            ("GET", "http:///debian/"),
            ("GET", "http://mirror.example:http/"),
            ("GET", "http://user:secret@mirror.example/"),
            ("CONNECT", "mirror.example"),
            ("CONNECT", "mirror.example:99999"),
            ("CONNECT", "mirror.example:443/path"),
            ("CONNECT", "user@mirror.example:443"),
            ("CONNECT", ":443"),
        ],
    )
    def test_refuses_what_is_no_proxy_request(self, method: str, target: str) -> None:
        assert parse_target(method, target) is None


class TestPolicy:
    @pytest.fixture
    def policy(self, tmp_path: Path) -> Policy:
        hosts = tmp_path / "hosts"
        hosts.write_text("mirror.example\nother.example\n")
        return Policy("198.18.1.", hosts, [Destination("198.18.1.1", 21080)])

    @pytest.mark.parametrize(
        ("host", "port", "allowed"),
        [
            ("mirror.example", 80, True),
            ("mirror.example", 443, True),
            ("mirror.example", 22, False),
            ("other.example", 80, True),
            ("mirror.example.evil", 80, False),
            ("198.18.1.1", 21080, True),
            ("198.18.1.1", 80, False),
            ("127.0.0.1", 80, False),
        ],
    )
    def test_lets_through_to_mirrors_and_to_the_lab_only(
        self, policy: Policy, host: str, port: int, *, allowed: bool
    ) -> None:
        assert policy.allows(Destination(host, port)) is allowed

    def test_lets_nothing_through_before_a_mirror_is_known(self, tmp_path: Path) -> None:
        policy = Policy("198.18.1.", tmp_path / "none", [])
        assert not policy.allows(Destination("mirror.example", 80))


@pytest.mark.parametrize(
    ("url", "immutable"),
    [
        ("http://mirror.example/debian/pool/main/g/git/git_2.47_amd64.deb", True),
        ("http://mirror.example/debian/dists/trixie/main/by-hash/SHA256/77", True),
        ("http://mirror.example/debian/dists/trixie/InRelease", False),
        ("http://mirror.example/debian/pool/main/g/git/git_2.47.dsc", False),
        ("http://mirror.example/?/pool/x.deb", False),
    ],
)
def test_keeps_only_what_never_changes(url: str, *, immutable: bool) -> None:
    assert is_immutable(url) is immutable


def test_uses_the_proxy_that_the_machine_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    destination = Destination("mirror.example", 80)
    assert upstream_proxy(destination, "http") is None
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert upstream_proxy(destination, "http") == "http://proxy.example:3128"
    monkeypatch.setenv("no_proxy", "mirror.example")
    assert upstream_proxy(destination, "http") is None


class TestFault:
    @staticmethod
    def spoil(fault: Fault) -> tuple[bytes, bool]:
        received = bytearray()
        try:
            for chunk in fault.spoil([CONTENT[:1000], CONTENT[1000:2000]]):
                received += chunk
        except ConnectionAbortedError:
            return bytes(received), False
        return bytes(received), True

    @pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 1999])
    def test_cuts_at_the_byte(self, length: int) -> None:
        assert self.spoil(Fault("*", cut_after=length)) == (CONTENT[:length], False)

    def test_does_not_cut_what_is_shorter(self) -> None:
        assert self.spoil(Fault("*", cut_after=2000)) == (CONTENT[:2000], True)

    def test_stalls_before_it_cuts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []
        monkeypatch.setattr("time.sleep", slept.append)
        assert self.spoil(Fault("*", stall_after=1500)) == (CONTENT[:1500], False)
        assert len(slept) == 1

    def test_changes_one_byte(self) -> None:
        received, whole = self.spoil(Fault("*", corrupt_at=1001))
        assert whole
        assert [i for i in range(2000) if received[i] != CONTENT[i]] == [1001]

    def test_keeps_to_the_speed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []
        monkeypatch.setattr("time.sleep", slept.append)
        monkeypatch.setattr("time.monotonic", lambda: sum(slept))
        assert self.spoil(Fault("*", bytes_per_second=500)) == (CONTENT[:2000], True)
        assert sum(slept) == pytest.approx(4, abs=0.01)


class TestFaultFile:
    def test_plays_the_newest_until_its_times_are_over(self, tmp_path: Path) -> None:
        file = FaultFile(tmp_path / "faults.json")
        old = Fault("/*.gguf", status=500, serial=1)
        new = Fault("/tiny.gguf", cut_after=5, times=2, serial=2)
        file.write([old, new])
        assert [file.take("/tiny.gguf") for _ in range(3)] == [new, new, old]
        assert file.take("/other") is None

    def test_plays_nothing_when_there_is_nothing(self, tmp_path: Path) -> None:
        assert FaultFile(tmp_path / "faults.json").take("/tiny.gguf") is None


class NearClient(Client):
    """Asks from an address that is allowed to."""

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        return super().open(*args, **{"environ_base": {"REMOTE_ADDR": "127.0.0.1"}, **kwargs})


class World:
    """The web server's folder, faults and log."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "www"
        self.files.mkdir()
        (self.files / "data").write_bytes(CONTENT)
        self.repositories = folder / "git"
        self.faults = FaultFile(folder / "faults.json")
        self.log_file = folder / "access.jsonl"
        self.log = AccessLog(self.log_file)
        hub = Hub(HubStore(folder / "hub.json", self.files), "http://cdn")
        self.web = Web(self.files, self.repositories, hub, self.faults, self.log, "127.")
        self.client = NearClient(self.web)

    @property
    def accesses(self) -> list[access.Access]:
        return read_log(self.log_file)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class TestWeb:
    def test_serves_a_file(self, world: World) -> None:
        response = world.client.get("/data")
        assert (response.status_code, response.data) == (200, CONTENT)
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.content_length == len(CONTENT)

    @pytest.mark.parametrize(
        ("asked", "first", "last"),
        [
            ("0-0", 0, 0),
            ("100-199", 100, 199),
            ("255990-", 255990, 255999),
            ("-5", 255995, 255999),
            ("255990-999999", 255990, 255999),
        ],
    )
    def test_serves_a_range(self, world: World, asked: str, first: int, last: int) -> None:
        response = world.client.get("/data", headers={"Range": f"bytes={asked}"})
        assert (response.status_code, response.data) == (206, CONTENT[first : last + 1])
        assert response.headers["Content-Range"] == f"bytes {first}-{last}/256000"

    def test_refuses_a_range_beyond_the_end(self, world: World) -> None:
        assert world.client.get("/data", headers={"Range": "bytes=256000-"}).status_code == 416

    def test_resumes_only_the_same_file(self, world: World) -> None:
        tag = world.client.head("/data").headers["ETag"]
        asked = {"Range": "bytes=10-", "If-Range": tag}
        assert world.client.get("/data", headers=asked).status_code == 206
        assert world.client.get("/data", headers={**asked, "If-Range": '"x"'}).status_code == 200

    def test_answers_head_without_content(self, world: World) -> None:
        response = world.client.head("/data")
        assert (response.content_length, response.data) == (len(CONTENT), b"")

    @pytest.mark.parametrize("path", ["/none", "/", "/../faults.json", "/%2e%2e/faults.json"])
    def test_serves_nothing_else(self, world: World, path: str) -> None:
        world.faults.write([])
        assert world.client.get(path).status_code == 404

    def test_serves_the_lab_only(self, world: World) -> None:
        response = world.client.get("/data", environ_base={"REMOTE_ADDR": "192.0.2.1"})
        assert response.status_code == 403

    def test_plays_a_status(self, world: World) -> None:
        world.faults.write([Fault("/data", status=503, times=1, serial=1)])
        assert [world.client.get("/data").status_code for _ in range(2)] == [503, 200]

    def test_forgets_ranges(self, world: World) -> None:
        world.faults.write([Fault("/data", no_ranges=True, serial=1)])
        response = world.client.get("/data", headers={"Range": "bytes=5-"})
        assert (response.status_code, response.data) == (200, CONTENT)
        assert "Accept-Ranges" not in response.headers

    def test_announces_a_wrong_length(self, world: World) -> None:
        world.faults.write([Fault("/data", extra_length=7, serial=1)])
        assert world.client.head("/data").content_length == len(CONTENT) + 7

    def test_writes_down_what_was_asked(self, world: World) -> None:
        assert world.client.get("/data?x=1", headers={"Range": "bytes=5-9"}).data == CONTENT[5:10]
        (access,) = world.accesses
        assert (access.server, access.method, access.target) == ("web", "GET", "/data?x=1")
        assert (access.status, access.bytes, access.range) == (206, 5, "bytes=5-9")


def test_reads_cgi_headers() -> None:
    output = iter([b"Status: 404 Not Found\r\n", b"Content-Type: text/plain\r\n", b"\r\n", b"x: y"])
    assert read_cgi_headers(output) == (404, [("Content-Type", "text/plain")])
    assert next(output) == b"x: y"


@contextmanager
def serving(server: HTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TestProxy:
    @pytest.fixture
    def origin(self, world: World) -> Iterator[tuple[str, int]]:
        server = make_server("127.0.0.1", 0, world.web, threaded=True)
        with serving(server):
            yield "127.0.0.1", server.port

    @pytest.fixture
    def through(
        self, world: World, origin: tuple[str, int], tmp_path: Path
    ) -> Iterator[http.client.HTTPConnection]:
        packages = tmp_path / "packages"
        packages.mkdir()
        policy = Policy("127.", tmp_path / "hosts", [Destination(*origin)])
        proxy = Proxy(("127.0.0.1", 0), policy, world.log, packages)
        with serving(proxy):
            yield http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=10)

    def test_passes_on_what_it_is_asked_for(
        self, through: http.client.HTTPConnection, origin: tuple[str, int]
    ) -> None:
        for asked, status, content in (
            ({}, 200, CONTENT),
            ({"Range": "bytes=3-5"}, 206, CONTENT[3:6]),
        ):
            # Over the same connection, as apt does.
            through.request("GET", f"http://127.0.0.1:{origin[1]}/data", headers=asked)
            response = through.getresponse()
            assert (response.status, response.read()) == (status, content)

    def test_goes_to_the_lab_s_own_servers_directly(
        self,
        through: http.client.HTTPConnection,
        origin: tuple[str, int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, "http://proxy.invalid:3128")
        monkeypatch.setenv("no_proxy", "")
        through.request("HEAD", f"http://127.0.0.1:{origin[1]}/data")
        assert through.getresponse().status == 200

    def test_refuses_other_destinations(self, through: http.client.HTTPConnection) -> None:
        through.request("GET", "http://127.0.0.1:1/data")
        assert through.getresponse().status == 403

    def test_says_when_nobody_answers(
        self, through: http.client.HTTPConnection, tmp_path: Path
    ) -> None:
        (tmp_path / "hosts").write_text("name.invalid\n")
        through.request("GET", "http://name.invalid/data")
        assert through.getresponse().status == 502

    def test_cuts_what_was_cut(
        self, through: http.client.HTTPConnection, origin: tuple[str, int], world: World
    ) -> None:
        world.faults.write([Fault("/data", cut_after=1000, serial=1)])
        through.request("GET", f"http://127.0.0.1:{origin[1]}/data")
        with pytest.raises(http.client.IncompleteRead) as error:
            through.getresponse().read()
        assert error.value.partial == CONTENT[:1000]

    def test_keeps_packages(
        self, through: http.client.HTTPConnection, origin: tuple[str, int], world: World
    ) -> None:
        package = world.files / "pool" / "package.deb"
        package.parent.mkdir()
        package.write_bytes(CONTENT)
        for _ in range(2):
            through.request("GET", f"http://127.0.0.1:{origin[1]}/pool/package.deb")
            assert through.getresponse().read() == CONTENT
        assert [a.note for a in world.accesses if a.server == "proxy"] == ["", "cached"]
        assert sum(a.server == "web" for a in world.accesses) == 1

    def test_does_not_keep_half_a_package(
        self, through: http.client.HTTPConnection, origin: tuple[str, int], world: World
    ) -> None:
        (world.files / "pool").mkdir()
        (world.files / "pool" / "package.deb").write_bytes(CONTENT)
        world.faults.write([Fault("/pool/*", cut_after=1000, times=1, serial=1)])
        through.request("GET", f"http://127.0.0.1:{origin[1]}/pool/package.deb")
        with pytest.raises(http.client.IncompleteRead):
            through.getresponse().read()
        through.close()
        through.request("GET", f"http://127.0.0.1:{origin[1]}/pool/package.deb")
        assert through.getresponse().read() == CONTENT

    def test_tunnels(self, through: http.client.HTTPConnection, origin: tuple[str, int]) -> None:
        through.set_tunnel(*origin)
        through.request("GET", "/data")
        assert through.getresponse().read() == CONTENT

    def test_refuses_tunnels_to_other_destinations(
        self, through: http.client.HTTPConnection
    ) -> None:
        through.set_tunnel("127.0.0.1", 22)
        with pytest.raises(OSError, match="403"):
            through.request("GET", "/data")


class TestRepository:
    @pytest.fixture
    def repository(self, world: World) -> llama_source.Repository:
        repository = llama_source.new_repository(world.repositories / "some.git")
        tree = repository.git("mktree", stdin="")
        first = repository.git("commit-tree", tree, "-m", "first")
        repository.git("update-ref", "refs/heads/master", first)
        return repository

    def test_makes_the_same_commit_of_the_same_changes(
        self, repository: llama_source.Repository
    ) -> None:
        first = repository.resolve("master")
        changes = {"README.md": "text\n", "src/file.c": "int x;\n"}
        commits = {repository.commit(changes, tag=tag, parent=first, message="m") for tag in "ab"}
        assert commits == {repository.resolve("a")} == {repository.resolve("master")}
        assert repository.git("show", "master:src/file.c") == "int x;"

    def test_deletes_a_file(self, repository: llama_source.Repository) -> None:
        repository.commit({"a": "1", "b": "2"}, tag="b1")
        repository.commit({"a": None}, tag="b2")
        assert repository.git("ls-tree", "--name-only", "b2") == "b"

    def test_is_served(self, repository: llama_source.Repository, world: World) -> None:
        response = world.client.get("/some.git/info/refs?service=git-upload-pack")
        assert response.content_type == "application/x-git-upload-pack-advertisement"
        assert repository.resolve("master").encode() in response.data

    def test_others_are_not(self, world: World) -> None:
        assert world.client.get("/none.git/info/refs?service=git-upload-pack").status_code == 404


def test_the_model_is_the_same_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_model.write_model(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == gguf_model.MODEL_SHA256


class TestDebianSources:
    TARGETS = "\n".join(
        (
            "http://mirror.example/debian/\tbookworm\tmain\tDebian",
            "http://mirror.example/debian/\tbookworm\tcontrib\tDebian",
            "http://mirror.example/debian/\tbookworm-updates\tmain\tDebian",
            "http://mirror.example/debian/\tbookworm-backports\tmain\tDebian",
            "http://security.example/debian-security/\tbookworm-security\tmain\tDebian",
            "https://other.example/\tbookworm\tmain\tOther",
            "https://other.example/\tstable\tmain\t$(ORIGIN)",
        )
    )

    def test_follow_the_machine_s_own(self) -> None:
        assert roots.debian_sources("trixie", self.TARGETS) == (
            "deb http://mirror.example/debian/ trixie main",
            "deb http://mirror.example/debian/ trixie-updates main",
            "deb http://security.example/debian-security/ trixie-security main",
        )

    def test_are_left_to_mmdebstrap_on_other_systems(self) -> None:
        ubuntu = "http://mirror.example/ubuntu/\tnoble\tmain\tUbuntu"
        assert roots.debian_sources("trixie", ubuntu) == ()
        assert roots.debian_sources("trixie", "") == ()
