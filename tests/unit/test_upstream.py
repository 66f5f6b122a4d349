from __future__ import annotations

import os
import shutil
import subprocess
from base64 import b64encode
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tasks import upstream
from tasks.rules.build import Source
from tasks.rules.findings import Finding
from tasks.upstream import parse_refs

from .hosts import BARE, WITH_COMPILER, settings, with_release

LS_REMOTE = """\
1111111111111111111111111111111111111111\trefs/heads/master
2222222222222222222222222222222222222222\trefs/heads/b5
3333333333333333333333333333333333333333\trefs/tags/b9
4444444444444444444444444444444444444444\trefs/tags/b10
5555555555555555555555555555555555555555\trefs/tags/v1.0.0
6666666666666666666666666666666666666666\trefs/tags/v1.0.0^{}
4444444444444444444444444444444444444444\trefs/tags/stable
7777777777777777777777777777777777777777\trefs/pull/1/head
"""


@pytest.mark.parametrize(
    ("version", "digit"),
    [("master", "1"), ("b5", "2"), ("b9", "3"), ("latest", "4"), ("v1.0.0", "6"), ("none", None)],
)
def test_a_version_is_resolved_to_a_commit(version: str, digit: str | None) -> None:
    assert parse_refs(LS_REMOTE).resolve(version) == (digit and digit * 40)


def test_latest_of_a_repository_without_numbered_tags_is_nothing() -> None:
    assert parse_refs("").resolve("latest") is None


def test_the_tags_of_a_commit() -> None:
    assert parse_refs(LS_REMOTE).tags_of("4" * 40) == ("b10", "stable")


def test_an_address_is_shown_without_its_password() -> None:
    assert upstream.without_credentials("https://me:secret@host/x.git") == "https://host/x.git"
    assert upstream.without_credentials("git@host:x.git") == "git@host:x.git"
    assert upstream.without_credentials("/srv/x") == "/srv/x"


class Guarded(BaseHTTPRequestHandler):
    """A server that wants a password, and notes what it was told."""

    def do_GET(self) -> None:
        told = self.headers.get("Authorization")
        self.server.told.append(told)  # type: ignore[attr-defined]
        self.send_response(401 if told is None else 404)
        self.send_header("WWW-Authenticate", 'Basic realm="git"')
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_a_password_reaches_git_but_no_process_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("git")
    spy = tmp_path / "git"
    spy.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/said\nexec {real} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        server.told = []  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://m%65:s%24%22e%27cret@127.0.0.1:{server.server_port}/x.git"
        with pytest.raises(upstream.RepositoryError) as problem:
            upstream.refs(url)
        server.shutdown()
    wanted = "Basic " + b64encode(b"me:s$\"e'cret").decode()
    assert wanted in server.told  # type: ignore[attr-defined]
    assert "cret" not in (tmp_path / "said").read_text()
    assert "cret" not in str(problem.value)


def test_what_is_no_password_stays_in_the_address() -> None:
    for repo in ("ssh://git@host/x.git", "git@host:x.git", "https://host/x.git", "/srv/x@y"):
        assert upstream.split_credentials(repo) == (repo, {})


@pytest.fixture
def repo(tmp_path: Path) -> str:
    """A repository with a tagged commit, and one after it that only a branch names."""
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t",
        "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
    }  # fmt: skip
    folder = tmp_path / "repo"
    for command in (
        ["init", "-q", "-b", "master", str(folder)],
        ["-C", str(folder), "commit", "-q", "--allow-empty", "-m", "1"],
        ["-C", str(folder), "tag", "b7"],
        ["-C", str(folder), "commit", "-q", "--allow-empty", "-m", "2"],
        ["-C", str(folder), "commit", "-q", "--allow-empty", "-m", "3"],
        ["-C", str(folder), "config", "uploadpack.allowAnySHA1InWant", "true"],
        ["-C", str(folder), "config", "uploadpack.allowFilter", "true"],
    ):
        subprocess.run(["git", *command], check=True, env=environment)
    upstream._refs.clear()
    upstream._commits.clear()
    return f"file://{folder}"


def commit(repo: str, revision: str) -> str:
    folder = repo.removeprefix("file://")
    told = subprocess.run(
        ["git", "-C", folder, "rev-parse", revision], check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


def resolve(**data: object) -> tuple[Source | None, tuple[Finding, ...]]:
    return upstream.resolve(settings(**data), BARE)


def test_a_tag_is_resolved_with_its_build_number(repo: str) -> None:
    expected = Source(repo, commit(repo, "b7"), "b7", 7)
    for version in ("b7", "latest", commit(repo, "b7")):
        assert resolve(llama_cpp_repo=repo, llama_cpp_version=version) == (expected, ())


def test_a_branch_is_resolved_to_its_commit(repo: str) -> None:
    source, _ = resolve(llama_cpp_repo=repo, llama_cpp_version="master")
    head = commit(repo, "master")
    assert source == Source(repo, head, head[:9], None)


def test_a_commit_that_nothing_names_is_found(repo: str) -> None:
    between = commit(repo, "master~1")
    source, faults = resolve(llama_cpp_repo=repo, llama_cpp_version=between)
    assert source is not None
    assert faults == ()


@pytest.mark.parametrize("version", ["b8", "f" * 40])
def test_a_version_that_does_not_exist_is_an_error(repo: str, version: str) -> None:
    source, (fault,) = resolve(llama_cpp_repo=repo, llama_cpp_version=version)
    assert source is None
    assert fault.code == "no-such-version"
    assert version in str(fault)


def test_a_repository_out_of_reach_is_an_error_for_a_tag_and_a_warning_for_a_commit(
    tmp_path: Path,
) -> None:
    upstream._refs.clear()
    repo = f"file://{tmp_path}/none"
    source, (fault,) = resolve(llama_cpp_repo=repo, llama_cpp_version="b7")
    assert (source, fault.severity.value) == (None, "error")
    source, (fault,) = resolve(llama_cpp_repo=repo)
    assert source is not None
    assert fault.severity.value == "warning"


def test_a_host_that_has_the_release_needs_no_repository() -> None:
    built = with_release(WITH_COMPILER, settings())
    source, faults = upstream.resolve(settings(llama_cpp_repo="https://127.0.0.1:1/x"), built)
    assert source is not None
    assert source.label == "b9999"
    assert faults == ()


def test_a_tag_cannot_be_looked_up_in_a_path_that_only_the_host_has() -> None:
    source, (fault,) = resolve(llama_cpp_repo="/srv/llama.cpp", llama_cpp_version="b7")
    assert source is None
    assert fault.code == "version-on-host"
    source, faults = resolve(llama_cpp_repo="/srv/llama.cpp")
    assert source is not None
    assert faults == ()


def test_many_hosts_ask_once(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = upstream._git
    monkeypatch.setattr(upstream, "_git", lambda *a, **_: asked.append(a) or real(*a))
    for hostname in "abcd":
        upstream.resolve(
            settings(llama_cpp_repo=repo, llama_cpp_version="b7"), replace(BARE, hostname=hostname)
        )
    assert len(asked) == 1
