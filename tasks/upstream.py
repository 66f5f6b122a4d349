"""Which commit a version of llama.cpp is: asked of the repository, on the controller.

The controller's own git does the asking; nothing is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from urllib.parse import unquote, urlsplit, urlunsplit

from tasks.probe import Probe
from tasks.rules.build import Source, build_number, label
from tasks.rules.findings import Finding, error, warning
from tasks.settings import Settings

ASK_SECONDS = 60

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Refs:
    """Branches and tags of a repository: name to commit."""

    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def tags_of(self, commit: str) -> tuple[str, ...]:
        """Names of the tags that name a commit."""
        return tuple(sorted(tag for tag, target in self.tags.items() if target == commit))

    def resolve(self, version: str) -> str | None:
        """Commit of a tag, a branch or `latest`."""
        if version == "latest":
            numbered = [tag for tag in self.tags if re.fullmatch(r"b\d+", tag)]
            version = max(numbered, key=lambda tag: int(tag[1:]), default="")
        return self.tags.get(version) or self.branches.get(version)


class RepositoryError(Exception):
    """The repository did not answer; the text is git's own last line."""


def parse_refs(output: str) -> Refs:
    """Refs from what `git ls-remote` prints. An annotated tag counts as the commit it names."""
    refs = Refs()
    for line in output.splitlines():
        commit, _, name = line.partition("\t")
        if name.startswith("refs/heads/"):
            refs.branches[name.removeprefix("refs/heads/")] = commit
        elif name.startswith("refs/tags/"):
            # `^{}` comes after the tag itself and is the commit that it names.
            refs.tags[name.removeprefix("refs/tags/").removesuffix("^{}")] = commit
    return refs


def without_credentials(repo: str) -> str:
    """A URL that may be shown."""
    parts = urlsplit(repo)
    if "@" not in parts.netloc:
        return repo
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def split_credentials(repo: str) -> tuple[str, dict[str, str]]:
    """An address without user and password, and the environment that tells git of them.

    git hands an address to its helpers on their command lines, where everybody on the machine can
    read it. The password is for that server only, wherever it redirects to.
    """
    parts = urlsplit(repo)
    if parts.scheme not in {"http", "https"} or "@" not in parts.netloc:
        return repo, {}
    server = parts.netloc.rpartition("@")[2]
    answer = 'printf "username=%s\\npassword=%s\\n" "$REPO_USER" "$REPO_PASSWORD"'
    return without_credentials(repo), {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"credential.{parts.scheme}://{server}.helper",
        "GIT_CONFIG_VALUE_0": f'!f() {{ [ "$1" != get ] || {answer}; }}; f',
        "REPO_USER": unquote(parts.username or ""),
        "REPO_PASSWORD": unquote(parts.password or ""),
    }


def _git(*arguments: str, secrets: Mapping[str, str] | None = None) -> str:
    # Credentials are never asked for, and nothing in the user's own configuration rewrites URLs
    # into something that does.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **(secrets or {})}
    environment.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError:
        raise RepositoryError("git is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise RepositoryError(f"no answer within {ASK_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RepositoryError(lines[-1] if lines else f"git exited {done.returncode}")
    return done.stdout


_lock = Lock()
_refs: dict[str, Refs | RepositoryError] = {}
_commits: dict[tuple[str, str], bool | RepositoryError] = {}


def refs(repo: str) -> Refs:
    """Branches and tags, asked for once in a run however many hosts want them."""
    with _lock:
        if repo not in _refs:
            try:
                address, secrets = split_credentials(repo)
                told = _git("ls-remote", "--heads", "--tags", "--", address, secrets=secrets)
                _refs[repo] = parse_refs(told)
            except RepositoryError as problem:
                _refs[repo] = problem
        found = _refs[repo]
    if isinstance(found, RepositoryError):
        raise found
    return found


def has_commit(repo: str, commit: str) -> bool:
    """Whether a repository has a commit: asks for it alone, without its files."""
    with _lock:
        key = (repo, commit)
        if key not in _commits:
            with tempfile.TemporaryDirectory(prefix="llamastead-") as folder:
                try:
                    _git("init", "-q", "--bare", folder)
                    fetch = ("fetch", "-q", "--depth=1", "--filter=tree:0", "--no-tags")
                    address, secrets = split_credentials(repo)
                    _git("-C", folder, *fetch, address, commit, secrets=secrets)
                    _commits[key] = True
                except RepositoryError as problem:
                    refused = re.search(
                        r"not our ref|couldn't find remote ref|unadvertised", str(problem)
                    )
                    _commits[key] = False if refused else problem
        found = _commits[key]
    if isinstance(found, RepositoryError):
        raise found
    return found


def resolve(settings: Settings, probe: Probe) -> tuple[Source | None, tuple[Finding, ...]]:
    """The version that the settings ask for, as a commit, and what there is to say about it.

    A commit that the host already has a release of is not asked for again: a converged host needs
    no repository.
    """
    version, repo = settings.llama_cpp_version, settings.llama_cpp_repo
    shown = without_credentials(repo)
    is_commit = COMMIT.fullmatch(version) is not None
    if is_commit:
        known = [release for release in probe.releases if release.commit == version]
        if known or repo.startswith("/"):
            named = known[0].name.rpartition("-")[0] if known else version[:9]
            return Source(repo, version, named, build_number((named,))), ()
    elif repo.startswith("/"):
        return None, (
            error(
                "version-on-host",
                f"llama_cpp_version: {version} cannot be looked up in {repo}, a path on the host",
                fix="Give the commit (40 hex digits) with a repository that is a path.",
            ),
        )
    try:
        found = refs(repo)
        commit = version if is_commit else found.resolve(version)
        if commit is None or (
            is_commit
            and version not in (*found.tags.values(), *found.branches.values())
            and not has_commit(repo, version)
        ):
            what = "commit" if is_commit else "tag or branch"
            return None, (
                error(
                    "no-such-version",
                    f"llama_cpp_version: {shown} has no {what} {version}",
                    fix=f"`git ls-remote {shown}` lists what there is.",
                ),
            )
    except RepositoryError as problem:
        if is_commit:
            # The host may reach what this machine does not.
            return Source(repo, version, version[:9], None), (
                warning(
                    "repository-unreachable",
                    f"llama_cpp_repo: this machine cannot ask {shown}: {problem}",
                    f"whether it has commit {version[:12]} shows only when the host fetches it",
                ),
            )
        return None, (
            error(
                "repository-unreachable",
                f"llama_cpp_repo: this machine cannot ask {shown} for {version}: {problem}",
                fix="Check the address and the network, or give a commit (40 hex digits).",
            ),
        )
    tags = found.tags_of(commit)
    return Source(repo, commit, label(version, commit, tags), build_number(tags)), ()
