"""NVIDIA's apt repositories on the outside: their layout, names, signatures and pin files.

    compute/cuda/repos/debian13/x86_64/   Packages.gz, Release, InRelease, key, pin, cuda-keyring
    libnvidia-container/stable/deb/amd64/ the container toolkit, with its key in ../../../gpgkey
    compute/cuda/13.2.2/local_installers/ one .deb with a whole repository in it

What stands in the product's own tables about names and addresses is taken from there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.rules import tables

from . import cuda_wheels, deb, elf, nvidia_packages
from .deb import Package, SigningKey
from .outside import Outside
from .tools import cache_directory, locked, run, say

DRIVERS = {
    "debian12": ("580.178.04", "595.99.02", "610.57.04"),
    "debian13": ("595.99.02", "610.57.04", "615.71.09"),
    "wsl-ubuntu": (),
}
"""What each repository holds; the newest is not what is to be chosen."""
TOOLKITS = {
    "debian12": ("12.9.2", "13.2.1", "13.2.2", "13.3.1"),
    "debian13": ("13.2.1", "13.2.2", "13.3.1"),
    "wsl-ubuntu": ("12.9.2", "13.2.1", "13.2.2", "13.3.1"),
}
NVCC = {"12.9.2": "12.9.86", "13.2.1": "13.2.78", "13.2.2": "13.2.86", "13.3.1": "13.3.73"}
CONTAINER_TOOLKITS = ("1.20.0-1", "1.19.1-1", "1.19.0-1")
LABEL = "NVIDIA CUDA"

_FORGOTTEN_SECONDS = 24 * 3600
_MACHINE = "x86_64"
_FOLDER = "nvidia"
_KEYS = {"cuda": "cudatools", "container": "NVIDIA CORPORATION", "stranger": "somebody else"}


def signing_key(name: str = "cuda") -> SigningKey:
    """A key: `cuda` and `container` sign the repositories, `stranger` is nobody's."""
    file = cache_directory(_FOLDER, "keys") / f"{name}.asc"
    with locked(file.with_suffix(".lock")):
        return SigningKey.make(file, f"{_KEYS[name]} <{name}@lab.invalid>")


class NvidiaRepository:
    """The repositories as a lab serves them. Tests may spoil them, and publish them anew."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._files = outside.files / _FOLDER

    # Addresses, as the settings want them

    @property
    def settings(self) -> dict[str, str]:
        """Settings that make a deploy use these repositories and trust their keys."""
        return {
            "cuda_repo_url": self._outside.url(f"{_FOLDER}/compute/cuda/repos"),
            "cuda_key_fingerprint": signing_key("cuda").fingerprint,
            "container_toolkit_repo_url": self._outside.url(f"{_FOLDER}/libnvidia-container"),
            "container_toolkit_key_fingerprint": signing_key("container").fingerprint,
        }

    def folder(self, repository: str) -> Path:
        """Where the files of one repository lie: debian12, debian13, wsl-ubuntu or container."""
        if repository == "container":
            return self._files / "libnvidia-container/stable/deb/amd64"
        return self._files / "compute/cuda/repos" / repository / _MACHINE

    # To be had

    def publish(self) -> NvidiaRepository:
        """Serve the repositories, whole and right, whatever was there before."""
        made = _made()
        shutil.rmtree(self._files, ignore_errors=True)
        self._files.parent.mkdir(parents=True, exist_ok=True)
        run(["cp", "--archive", "--link", made, self._files])
        return self

    def local_installer(self, repository: str, release: str) -> LocalInstaller:
        """Serve NVIDIA's local installer of one toolkit release, made if it isn't there."""
        made = _made_installer(repository, release)
        url = self._outside.put(
            f"{_FOLDER}/compute/cuda/{release}/local_installers/{made.name}", made
        )
        return LocalInstaller(url, hashlib.sha256(made.read_bytes()).hexdigest())

    def add(self, repository: str, *packages: Package) -> None:
        """Let a repository have more packages."""
        folder = self.folder(repository)
        for package in packages:
            deb.build(package, folder)
        deb.index(folder, LABEL)
        self.sign(repository)

    def bring_real_toolkit(self, repository: str) -> None:
        """Let a repository have a toolkit that compiles, in the place of its shells."""
        folder = self.folder(repository)
        cuda_wheels.link_packages(folder)
        deb.index(folder, LABEL)
        self.sign(repository)

    # To be spoilt

    def sign(self, repository: str, key: str = "cuda", *, expired: bool = False) -> None:
        """Sign a repository anew, with another key or with a signature that has expired."""
        release = self.folder(repository) / "Release"
        signing_key(key).sign(release, expired=expired)

    def show_key(self, repository: str, key: str | None) -> None:
        """Show another key beside a repository, or a page that is none."""
        folder = self.folder(repository)
        is_container = repository == "container"
        shown = folder.parents[2] / "gpgkey" if is_container else folder / _key_file(repository)
        self._replace(shown, signing_key(key).public if key else "<!DOCTYPE html>\n")

    def tamper(self, repository: str) -> None:
        """Change the list of packages after it was signed."""
        folder = self.folder(repository)
        for name in ("Packages", "Packages.gz"):
            content = bytearray((folder / name).read_bytes())
            content[len(content) // 2] ^= 1
            self._replace(folder / name, bytes(content))

    def _replace(self, path: Path, content: str | bytes) -> None:
        # By a rename: the file itself is shared with the cache.
        self._outside.put(str(path.relative_to(self._outside.files)), content)


@dataclass(frozen=True)
class LocalInstaller:
    """An installer that is served."""

    url: str
    sha256: str


def _key_file(repository: str) -> str:
    file = tables.key(tables.repositories()[repository].key).file
    assert file is not None
    return file


def _recipe() -> str:
    """Fingerprint of everything that the repositories are made from."""
    sources = [Path(module.__file__ or "") for module in (deb, elf, nvidia_packages)]
    texts = [path.read_bytes() for path in (*sources, Path(__file__))]
    keys = [signing_key(name).fingerprint.encode() for name in ("cuda", "container")]
    return hashlib.sha256(b"\0".join([*texts, *keys])).hexdigest()[:12]


def _made() -> Path:
    """The repositories in the cache, made if they aren't there."""
    cache = cache_directory(_FOLDER)
    made = cache / f"repositories-{_recipe()}"
    with locked(cache / ".lock"):
        if made.is_dir():
            os.utime(made)
        else:
            say("making NVIDIA's repositories, once")
            # Not those that a test run of another checkout may use at this moment.
            for old in cache.glob("repositories-*"):
                if time.time() - old.stat().st_mtime > _FORGOTTEN_SECONDS:
                    shutil.rmtree(old)
            unfinished = cache / ".unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _make_all(unfinished)
            unfinished.rename(made)
    return made


def _make_all(root: Path) -> None:
    for repository in TOOLKITS:
        _make_cuda(root / "compute/cuda/repos" / repository / _MACHINE, repository)
    container = root / "libnvidia-container"
    packages = [
        package
        for version in CONTAINER_TOOLKITS
        for package in nvidia_packages.container_toolkit(version)
    ]
    key = signing_key("container")
    deb.make_repository(container / "stable/deb/amd64", packages, key, "libnvidia-container")
    (container / "gpgkey").write_text(key.public)


def _packages(repository: str) -> list[Package]:
    with_driver = bool(DRIVERS[repository])
    packages = [
        package for version in DRIVERS[repository] for package in nvidia_packages.driver(version)
    ]
    for release in TOOLKITS[repository]:
        packages += nvidia_packages.toolkit(release, NVCC[release], with_driver=with_driver)
    if repository != "wsl-ubuntu":  # the container toolkit is in the CUDA repositories too
        packages += nvidia_packages.container_toolkit(CONTAINER_TOOLKITS[1])
    return packages


def _make_cuda(folder: Path, repository: str) -> None:
    row, key = tables.repositories()[repository], signing_key("cuda")
    pin = tables.pin().text.lstrip("\n")
    folder.mkdir(parents=True)
    uri = row.url(_MACHINE, "https://repository.invalid")
    assert uri is not None
    keyring = nvidia_packages.keyring(
        repository, _MACHINE, uri, key.binary, pin if row.pin else None
    )
    deb.make_repository(folder, [keyring, *_packages(repository)], key, LABEL)
    (folder / _key_file(repository)).write_text(key.public)
    if row.pin:
        (folder / row.pin).write_text(pin)


def _made_installer(repository: str, release: str) -> Path:
    """A local installer in the cache, made if it isn't there."""
    row = tables.toolkit(release)
    assert row is not None
    record = next(each for each in row.releases if str(each.version) == release)
    name = tables.local_installer().file(tables.repositories()[repository], row, record, _MACHINE)
    cache = cache_directory(_FOLDER, f"installers-{_recipe()}")
    made = cache / name
    with locked(cache / ".lock"):
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                installer = _installer(Path(folder), name, repository, release)
                deb.build(installer, Path(folder)).rename(made)
    return made


def _installer(work: Path, file: str, repository: str, release: str) -> Package:
    """The package of a local installer. Each is signed with a key of its own, as NVIDIA's are."""
    title, version, _ = file.split("_")
    inside = work / "tree" / "var" / title
    packages = list(
        nvidia_packages.toolkit(release, NVCC[release], with_driver=bool(DRIVERS[repository]))
    )
    if DRIVERS[repository]:
        packages += nvidia_packages.driver(DRIVERS[repository][-1])
    key = SigningKey.make(work / "key.asc", "cudatools <cudatools@lab.invalid>")
    deb.make_repository(inside, packages, key, LABEL)
    short = key.fingerprint[-8:]
    (inside / f"cuda-{short}-keyring.gpg").write_bytes(key.binary)
    (inside / f"{short}.pub").write_text(key.public)
    signed_by = f"/usr/share/keyrings/cuda-{short}-keyring.gpg"
    line = f"deb [signed-by={signed_by}] file:///var/{title} /\n"
    sources = f"/etc/apt/sources.list.d/{title.replace('cuda-repo-', 'cuda-')}.list"
    return Package(title, version, files={sources: line}, tree=work / "tree")
