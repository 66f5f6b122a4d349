"""The Hub's API, as a server on loopback speaks it, with a CDN on another port."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks import hub, web
from tasks.hub import Hub, HubError, Resolved
from tasks.rules.findings import Severity
from tasks.rules.hub_files import HubModel, parse_reference
from tests.gguf_models import Dimensions, write
from tests.safetensors_model import repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_tHiSiSaSeCrEt"
REPO = "user/Model-GGUF"

Answer = Callable[["_Handler"], None]


@dataclass
class Server:
    """A server on loopback that notes what it was asked."""

    answers: dict[str, Answer] = field(default_factory=dict)
    """Path without the query: what to do."""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def tokens(self) -> set[str | None]:
        return {headers.get("authorization") for _, headers in self.asked}

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Server

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.of.asked.append((self.path, headers))
        path = self.path.split("?")[0].replace("%20", " ")
        self.of.answers.get(path, status(404))(self)

    def log_message(self, *arguments: object) -> None:
        pass

    def send(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def status(code: int, **headers: str) -> Answer:
    return lambda request: request.send(code, b"no", **headers)


def redirect(target: str, code: int = 302) -> Answer:
    return lambda request: request.send(code, Location=target)


def in_turn(*answers: Answer) -> Answer:
    """Each of them once, then the last for ever."""
    left = list(answers)

    def answer(request: _Handler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(request)

    return answer


def ranges(content: bytes) -> Answer:
    def answer(request: _Handler) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if found is None:
            request.send(200, content)
            return
        first, last = int(found[1]), min(int(found[2]), len(content) - 1)
        if first >= len(content):
            request.send(416, Content_Range=f"bytes */{len(content)}")
            return
        told = f"bytes {first}-{last}/{len(content)}"
        request.send(206, content[first : last + 1], Content_Range=told)

    return answer


@pytest.fixture
def serve() -> Iterator[Callable[[], Server]]:
    running = []

    def start() -> Server:
        server = Server()
        handler = type("Handler", (_Handler,), {"of": server})
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        running.append(http)
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def quick_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits, none sees what another asked; returns the waits."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub._repositories.clear()
    hub._headers.clear()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return waits


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A model in one piece, then the same in two."""
    folder = tmp_path_factory.mktemp("models")
    dims = Dimensions(
        "qwen2",
        layers=2,
        width=64,
        feed_forward=64,
        heads=2,
        heads_kv=1,
        head_size=32,
        vocabulary=16384,
    )
    paths = write(folder / "m.gguf", dims) + write(folder / "m.gguf", dims, parts=2)
    return [path.read_bytes() for path in paths]


@dataclass
class World:
    """A Hub and its CDN, with one repository."""

    hub: Server
    cdn: Server
    contents: dict[str, bytes]
    description: dict[str, Any]

    def client(self, token: str | None = None) -> Hub:
        return Hub(self.hub.url + "/", token)

    def find(self, text: str = REPO, token: str | None = None, **more: Any) -> Resolved:
        return hub.resolve(self.client(token), parse_reference(text), **more)

    def api(self, answer: Answer, revision: str = "main") -> None:
        self.hub.answers[f"/api/models/{REPO}/revision/{revision}"] = answer

    def publish(self) -> None:
        self.api(lambda request: request.send(200, json.dumps(self.description).encode()))
        for path, content in self.contents.items():
            place = f"/{REPO}/resolve/{COMMIT}/{path}"
            self.hub.answers[place] = redirect(
                f"{self.cdn.url}/cdn/{path.replace(' ', '%20')}?sig=SIGNATURE"
            )
            self.cdn.answers[f"/cdn/{path}"] = ranges(content)


def sibling(path: str, content: bytes) -> dict[str, Any]:
    return {
        "rfilename": path,
        "size": len(content),
        "lfs": {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "pointerSize": 134,
        },
    }


@pytest.fixture
def world(serve: Callable[[], Server], model_bytes: list[bytes]) -> World:
    whole, *halves = model_bytes
    contents = {
        "Model-Q8_0.gguf": whole,
        "Model-BF16-00001-of-00002.gguf": halves[0],
        "Model-BF16-00002-of-00002.gguf": halves[1],
        "mmproj-F16.gguf": b"GGUF",
        "folder/Model Q4_K_M.gguf": whole,
    }
    description = {
        "id": REPO,
        "sha": COMMIT,
        "gated": False,
        "siblings": [
            {"rfilename": "README.md", "size": 10},
            *(sibling(path, content) for path, content in reversed(contents.items())),
        ],
    }
    made = World(serve(), serve(), contents, description)
    made.publish()
    return made


def refusal(call: Callable[[], object]) -> HubError:
    with pytest.raises(HubError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert caught.value.finding.severity is Severity.ERROR
    return caught.value


# What is found


def test_a_quantisation_becomes_files_of_one_commit(world: World) -> None:
    found = world.find(f"{REPO}:q8_0")
    [file] = found.model.candidate.files
    assert found.model.commit == COMMIT
    assert not found.model.gated
    assert file.path == "Model-Q8_0.gguf"
    assert file.size == len(world.contents[file.path])
    assert file.sha256 == hashlib.sha256(world.contents[file.path]).hexdigest()
    assert file.url == f"{world.hub.url}/{REPO}/resolve/{COMMIT}/Model-Q8_0.gguf"
    assert found.model.projector is not None
    assert found.shape is not None
    assert found.shape.architecture == "qwen2"
    assert found.findings == ()


def test_a_split_model_is_whole_and_in_order_and_read_as_one(world: World) -> None:
    found = world.find(f"{REPO}:BF16")
    assert [file.path[-20:] for file in found.model.files[:2]] == [
        "-00001-of-00002.gguf",
        "-00002-of-00002.gguf",
    ]
    whole = world.find(f"{REPO}:Q8_0")
    assert found.shape == whole.shape


def test_a_path_with_a_space_is_quoted(world: World) -> None:
    found = world.find(f"{REPO}:Q4_K_M")
    assert found.model.first.url.endswith("/folder/Model%20Q4_K_M.gguf")
    assert found.shape is not None


def test_only_the_beginning_is_read(world: World) -> None:
    world.find(f"{REPO}:Q8_0")
    read = [headers["range"] for path, headers in world.cdn.asked if "Q8_0" in path]
    assert read == ["bytes=0-262143", "bytes=262144-786431"]


def test_many_hosts_ask_once(world: World) -> None:
    for _ in range(3):
        world.find(f"{REPO}:Q8_0")
    assert len([path for path in world.hub.paths() if path.startswith("/api/")]) == 1
    assert len([path for path in world.hub.paths() if "/resolve/" in path]) == 1


def test_a_revision_is_asked_for_as_one_word(world: World) -> None:
    world.api(
        lambda request: request.send(200, json.dumps(world.description).encode()), "refs%2Fpr%2F1"
    )
    assert world.find(f"{REPO}:Q8_0", revision="refs/pr/1").model.commit == COMMIT


def test_a_renamed_repository_goes_by_its_new_name(world: World) -> None:
    world.hub.answers["/api/models/old/name/revision/main"] = redirect(
        f"/api/models/{REPO}/revision/main?blobs=true", 307
    )
    found = world.find("old/name:Q8_0", token=TOKEN)
    assert f"/{REPO}/resolve/" in found.model.first.url
    assert world.hub.tokens() == {f"Bearer {TOKEN}"}


# The best that fits


def test_a_bare_repository_is_the_best_that_fits(world: World) -> None:
    found = world.find(fits=lambda _: True)
    assert found.model.candidate.label == "Q8_0"
    assert found.ranking is not None
    assert [each.label for each in found.ranking.runners_up] == ["Q4_K_M", "BF16"]
    assert [each.code for each in found.findings] == ["quant-chosen"]
    assert "next: Q4_K_M, BF16" in str(found.findings[0])


def test_what_is_too_large_by_its_size_is_not_even_read(world: World) -> None:
    for each in world.description["siblings"]:
        if each["rfilename"] == "folder/Model Q4_K_M.gguf":
            each["rfilename"] = "Model-Q4_K_M.gguf"
            each["lfs"]["size"] = 1000
    place = f"/{REPO}/resolve/{COMMIT}/Model-Q4_K_M.gguf"
    world.hub.answers[place] = ranges(world.contents["Model-Q8_0.gguf"])
    limit = len(world.contents["Model-Q8_0.gguf"]) // 2
    found = world.find(fits=lambda shape: shape.weights.total < limit)
    # By its size it would fit, by its header it does not; the others do neither.
    assert found.ranking is not None
    assert found.ranking.chosen is None
    assert found.model.candidate.label == "Q4_K_M"
    assert not any("BF16" in path for path in world.cdn.paths())


# Tokens


def test_the_token_goes_to_the_hub_and_nowhere_else(world: World) -> None:
    world.find(f"{REPO}:BF16", token=TOKEN)
    assert world.hub.tokens() == {f"Bearer {TOKEN}"}
    assert world.cdn.tokens() == {None}


def test_without_a_token_none_is_sent_even_if_netrc_has_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password something\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    world.find(f"{REPO}:Q8_0")
    world.find(f"{REPO}:BF16", token=TOKEN)
    basic = base64.b64encode(b"someone:something").decode()
    for server in (world.hub, world.cdn):
        assert not any(basic in str(token) for token in server.tokens())


def test_the_token_is_in_no_text(world: World) -> None:
    client = world.client(TOKEN)
    texts = [repr(client), str(client), repr(client.credential)]
    found = world.find(f"{REPO}:Q8_0", token=TOKEN)
    texts += [repr(found.model), found.model.as_json(), *map(str, found.findings)]
    for answer in (status(401), status(403), status(404), status(500), redirect("ftp://x/y")):
        hub._repositories.clear()
        world.api(answer)
        problem = refusal(lambda: world.find(token=TOKEN))
        texts += [repr(problem), str(problem), repr(problem.finding), repr(problem.__context__)]
    assert not any(TOKEN in text for text in texts)


def test_another_port_of_the_same_host_gets_no_token(world: World, serve: Any) -> None:
    elsewhere = serve()
    elsewhere.answers["/x"] = lambda request: request.send(
        200, json.dumps(world.description).encode()
    )
    world.api(redirect(f"{elsewhere.url}/x"))
    world.find(f"{REPO}:Q8_0", token=TOKEN)
    assert elsewhere.tokens() == {None}


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://huggingface.co", True),
        ("http://127.0.0.1:8080", True),
        ("http://localhost", True),
        ("http://mirror.example", False),
        ("http://[::1]:8080", True),
        ("http://127.0.0.1.example", False),
    ],
)
def test_where_a_token_would_be_seen(url: str, private: bool) -> None:
    assert web.is_private(url) is private


def test_a_token_in_the_clear_is_warned_of(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "is_private", lambda _: False)
    found = world.find(f"{REPO}:Q8_0", token=TOKEN)
    assert [each.code for each in found.findings] == ["token-in-clear"]
    assert world.find(f"{REPO}:Q8_0").findings == ()


# Gates


def test_a_gated_repository_without_a_token(world: World) -> None:
    world.description["gated"] = "manual"
    world.hub.answers[f"/{REPO}/resolve/{COMMIT}/Model-Q8_0.gguf"] = status(
        401, X_Error_Code="GatedRepo"
    )
    problem = refusal(lambda: world.find(f"{REPO}:Q8_0"))
    assert problem.finding.code == "model-gated"
    assert "set hf_token" in str(problem)
    assert not problem.unreachable


def test_a_gated_repository_that_does_not_let_the_token_in(world: World) -> None:
    world.description["gated"] = "auto"
    world.hub.answers[f"/{REPO}/resolve/{COMMIT}/Model-Q8_0.gguf"] = status(
        403, X_Error_Code="GatedRepo"
    )
    problem = refusal(lambda: world.find(f"{REPO}:Q8_0", token=TOKEN))
    assert problem.finding.code == "model-gated"
    assert f"{world.hub.url}/{REPO}" in str(problem)
    assert "account of hf_token may not read" in str(problem)


def test_a_gated_repository_that_lets_the_token_in(world: World) -> None:
    world.description["gated"] = "auto"
    found = world.find(f"{REPO}:Q8_0", token=TOKEN)
    assert found.model.gated
    assert world.cdn.tokens() == {None}


# Refusals


@pytest.mark.parametrize(
    ("answer", "token", "code", "words"),
    [
        (status(401, X_Error_Code="RepoNotFound"), None, "model-not-found", "or it is private"),
        (status(401), TOKEN, "token-refused", "does not accept it"),
        (status(401, X_Error_Code="GatedRepo"), None, "model-gated", "no hf_token is set"),
        (status(403), None, "model-not-found", "or it is private"),
        (status(403), TOKEN, "model-gated", "may not read"),
        (status(404, X_Error_Code="RepoNotFound"), TOKEN, "model-not-found", "spelling"),
        (status(404, X_Error_Code="RevisionNotFound"), None, "no-such-revision", "main"),
        (status(418), None, "hub-refused", "HTTP 418"),
        (status(204), None, "hub-answer", "hf_endpoint"),
    ],
)
def test_refusals(world: World, answer: Answer, token: str | None, code: str, words: str) -> None:
    world.api(answer)
    problem = refusal(lambda: world.find(token=token))
    assert problem.finding.code == code
    assert words in str(problem)
    assert not problem.unreachable


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'"x"',
        b"{}",
        b'{"sha": 1, "siblings": []}',
        b'{"sha": "main", "siblings": []}',
        b'{"sha": "' + COMMIT.encode() + b'", "siblings": {}}',
        b'{"sha": "' + COMMIT.encode() + b'", "siblings": [1]}',
        b'{"sha": "' + COMMIT.encode() + b'", "siblings": [{"size": 1}]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_hub_is_said_to_be_none(world: World, content: bytes) -> None:
    world.api(lambda request: request.send(200, content))
    assert refusal(world.find).finding.code == "hub-answer"


def test_paths_that_lead_elsewhere_are_left_out(world: World) -> None:
    content = world.contents["Model-Q8_0.gguf"]
    world.description["siblings"] = [
        sibling(path, content)
        for path in ("../x-Q8_0.gguf", "/etc/x-Q8_0.gguf", "a//b-Q8_0.gguf", "x\n-Q8_0.gguf")
    ]
    assert refusal(world.find).finding.code == "no-gguf"


def test_a_quantisation_that_is_not_there(world: World) -> None:
    problem = refusal(lambda: world.find(f"{REPO}:Q6_K"))
    assert problem.finding.code == "no-such-quant"
    assert "BF16, Q8_0, Q4_K_M" in str(problem)


def test_a_file_that_only_says_it_is_gguf(world: World) -> None:
    world.cdn.answers["/cdn/Model-Q8_0.gguf"] = ranges(b"<html>not that</html>")
    assert refusal(lambda: world.find(f"{REPO}:Q8_0")).finding.code == "model-not-gguf"


def test_a_damaged_header_is_no_reason_to_stop(world: World) -> None:
    world.cdn.answers["/cdn/Model-Q8_0.gguf"] = ranges(b"GGUF\3\0\0\0")
    found = world.find(f"{REPO}:Q8_0")
    assert found.shape is None
    assert [each.code for each in found.findings] == ["header-unreadable"]


@pytest.mark.parametrize("answer", [status(500), status(429)])
def test_files_that_only_the_host_may_reach_are_no_reason_to_stop(
    world: World, answer: Answer
) -> None:
    world.cdn.answers["/cdn/Model-Q8_0.gguf"] = answer
    found = world.find(f"{REPO}:Q8_0")
    assert found.model.first.path == "Model-Q8_0.gguf"
    assert [each.code for each in found.findings] == ["header-unread"]


# A Hub in trouble


def test_it_waits_as_long_as_the_hub_asks(world: World, quick_and_forgetful: list[float]) -> None:
    described = json.dumps(world.description).encode()
    world.api(
        in_turn(
            status(429, Retry_After="7"),
            status(503),
            status(429, Retry_After="99999"),
            lambda request: request.send(200, described),
        )
    )
    assert world.find(f"{REPO}:Q8_0").model.commit == COMMIT
    assert quick_and_forgetful == [7.0, 2.0, 30.0]


@pytest.mark.parametrize(
    "when", ["", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999 07:28:00 GMT"]
)
def test_a_strange_wish_to_wait_is_no_trouble(
    world: World, quick_and_forgetful: list[float], when: str
) -> None:
    world.api(status(429, Retry_After=when))
    refusal(world.find)
    assert len(quick_and_forgetful) == web.TRIES - 1
    assert all(0 <= each <= 30 for each in quick_and_forgetful)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_busy_hub_counts_as_out_of_reach(world: World, code: int) -> None:
    world.api(status(code))
    problem = refusal(world.find)
    assert problem.finding.code == "hub-busy"
    assert problem.unreachable


def test_a_redirect_in_circles_ends(world: World) -> None:
    world.api(redirect(f"/api/models/{REPO}/revision/main"))
    problem = refusal(world.find)
    assert "redirects in circles" in str(problem)
    assert len(world.hub.asked) == web.MOST_REDIRECTS


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example/x", "gopher://x"])
def test_a_redirect_to_something_else_is_not_followed(world: World, target: str) -> None:
    world.api(redirect(target))
    assert "redirects to" in str(refusal(world.find))


def test_a_hub_that_is_not_there(world: World) -> None:
    missing = Hub("http://127.0.0.1:9", TOKEN)
    problem = refusal(lambda: hub.resolve(missing, parse_reference(REPO)))
    assert problem.finding.code == "hub-unreachable"
    assert problem.unreachable
    assert "no connection" in str(problem)


def test_a_connection_that_breaks_off(world: World) -> None:
    def broken(request: _Handler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"{")
        request.close_connection = True

    world.api(broken)
    assert refusal(world.find).unreachable


def test_an_answer_without_end_is_cut_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_ANSWER_BYTES", 1000)
    world.api(lambda request: request.send(200, b" " * 100_000))
    assert refusal(world.find).finding.code == "hub-answer"


# What is on the host already


@pytest.fixture
def pinned(world: World) -> HubModel:
    kept = HubModel.from_json(world.find(f"{REPO}:Q8_0").model.as_json())
    assert kept is not None
    hub._repositories.clear()
    world.hub.asked.clear()
    return kept


def test_a_pinned_model_stands_in_while_the_hub_is_out_of_reach(
    world: World, pinned: HubModel
) -> None:
    world.api(status(503))
    found = world.find(f"{REPO}:Q8_0", pinned=pinned)
    assert found.model == pinned
    [said] = found.findings
    assert said.severity is Severity.WARNING
    assert said.code == "hub-out-of-reach"


def test_it_does_not_stand_in_for_a_refusal_or_another_model(
    world: World, pinned: HubModel
) -> None:
    world.api(status(404))
    assert refusal(lambda: world.find(f"{REPO}:Q8_0", pinned=pinned)).finding.code
    world.api(status(503))
    hub._repositories.clear()
    assert refusal(lambda: world.find(f"{REPO}:BF16", pinned=pinned)).unreachable


def test_a_commit_that_is_on_the_host_is_not_asked_for(world: World, pinned: HubModel) -> None:
    found = world.find(f"{REPO}:Q8_0", revision=COMMIT, pinned=pinned)
    assert found.model == pinned
    assert world.hub.asked == []


# Ranges


def test_a_file_is_looked_up_once_and_again_when_its_address_expires(world: World) -> None:
    content = world.contents["Model-Q8_0.gguf"]
    url = f"{world.hub.url}/{REPO}/resolve/{COMMIT}/Model-Q8_0.gguf"
    remote = web.RemoteFile(url)
    assert remote.read(10, 20) == content[10:30]
    assert remote.read(1000, 5) == content[1000:1005]
    assert len(world.hub.asked) == 1
    world.cdn.answers["/cdn/Model-Q8_0.gguf"] = in_turn(status(403), ranges(content))
    assert remote.read(7, 3) == content[7:10]
    assert len(world.hub.asked) == 2
    assert remote.size == len(content)
    assert remote.read(len(content), 5) == b""
    assert remote.read(len(content) - 2, 5) == content[-2:]


def test_a_server_without_ranges_is_read_from_the_beginning(serve: Callable[[], Server]) -> None:
    server = serve()
    server.answers["/x"] = lambda request: request.send(200, bytes(range(256)) * 10)
    remote = web.RemoteFile(f"{server.url}/x")
    assert remote.read(0, 4) == bytes([0, 1, 2, 3])
    assert remote.read(1000, 3) == (bytes(range(256)) * 10)[1000:1003]


def test_beyond_the_end_there_is_nothing(serve: Callable[[], Server]) -> None:
    server = serve()
    server.answers["/x"] = ranges(b"12345")
    assert web.RemoteFile(f"{server.url}/x").read(10, 5) == b""


@pytest.mark.parametrize("told", ["bytes 5-9/100", "bytes x", ""])
def test_another_range_than_asked_for_is_not_taken(serve: Callable[[], Server], told: str) -> None:
    server = serve()
    server.answers["/x"] = lambda request: request.send(206, b"12345", Content_Range=told)
    with pytest.raises(web.WebError, match="another range"):
        web.RemoteFile(f"{server.url}/x").read(0, 5)


def test_a_range_that_is_cut_short_is_no_end_of_file(serve: Callable[[], Server]) -> None:
    server = serve()
    server.answers["/x"] = lambda request: request.send(206, b"123", Content_Range="bytes 0-9/100")
    with pytest.raises(web.WebError, match="broke"):
        web.RemoteFile(f"{server.url}/x").read(0, 10)


def test_no_message_has_a_signature(world: World) -> None:
    world.cdn.answers["/cdn/Model-Q8_0.gguf"] = status(404)
    problem = refusal(lambda: world.find(f"{REPO}:Q8_0"))
    assert problem.finding.code == "no-such-file"
    assert "SIGNATURE" not in f"{problem!r} {problem} {problem.finding!r}"
    assert web.shown("https://user:pass@host:1/a?b=c#d") == "https://host:1/a"


# What a quantisation is made from


@pytest.fixture
def weights(world: World) -> World:
    """A repository of which the Hub tells the SHA-256 of the large file only."""
    files = repository(parts=1)
    world.contents.clear()
    world.contents |= files
    large = "model-00001-of-00001.safetensors"
    world.description["siblings"] = [
        sibling(name, content) if name == large else {"rfilename": name, "size": len(content)}
        for name, content in files.items()
    ]
    world.publish()
    return world


def find_source(world: World, **more: Any) -> Resolved:
    return hub.resolve_source(world.client(), parse_reference(REPO), **more)


def test_weights_have_every_sha256_and_only_small_files_were_read(weights: World) -> None:
    found = find_source(weights)
    assert {each.path: each.sha256 for each in found.model.files} == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in weights.contents.items()
        if not name.endswith((".md", ".py"))
    }
    assert found.config is not None
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert found.shape is not None
    assert len(found.shape.layers) == 2
    assert not [path for path in weights.cdn.paths() if "safetensors" in path.split("?")[0]
                and "index" not in path]  # fmt: skip
    # What an earlier run found at this commit is not read again.
    weights.cdn.asked.clear()
    assert find_source(weights, pinned=found.model).model == found.model
    assert weights.cdn.asked == []


def test_a_small_file_of_another_size_is_refused(weights: World) -> None:
    weights.cdn.answers["/cdn/config.json"] = ranges(b"{}")
    with pytest.raises(HubError, match="gives another size"):
        find_source(weights)


def test_a_config_that_is_no_json_tells_nothing(weights: World) -> None:
    for each in weights.description["siblings"]:
        if each["rfilename"] == "config.json":
            each["size"] = 3
    weights.contents["config.json"] = b"[[["
    weights.publish()
    found = find_source(weights)
    assert found.config == {}
    assert found.shape is None


def test_a_gguf_is_looked_into_whatever_its_name_says(world: World) -> None:
    with pytest.raises(HubError, match=r"BF16-00001-of-00002.gguf is quantised already \(Q8_0\)"):
        find_source(world)
