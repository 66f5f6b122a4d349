"""Debian packages with next to nothing in them, and signed apt repositories of such packages."""

from __future__ import annotations

import gzip
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .tools import LabError, run, write_whole

LINK = "-> "
"""What the text of a file begins with that is a symbolic link: `-> target`."""

_IN_2024 = ("--faked-system-time", "20240102T000000")
"""Keys are made in the past, so that they can sign something that has expired since."""


@dataclass(frozen=True)
class Package:
    """A package: its name, what it depends on, and the few files that somebody looks for."""

    name: str
    version: str
    depends: Sequence[str] = ()
    provides: Sequence[str] = ()
    conflicts: Sequence[str] = ()
    architecture: str = "amd64"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Path to content. What begins with `#!` is executable, what begins with `-> ` is a link."""
    scripts: Mapping[str, str] = field(default_factory=dict)
    """postinst and the like, as shell commands."""
    tree: Path | None = None
    """A folder with more files, as they are to lie on the host."""

    @property
    def file(self) -> str:
        """Name of the .deb."""
        return f"{self.name}_{self.version}_{self.architecture}.deb"

    @property
    def control(self) -> str:
        """The control file."""
        relations = {
            "Depends": self.depends,
            "Provides": self.provides,
            "Conflicts": self.conflicts,
            "Replaces": self.conflicts,
        }
        lines = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": self.architecture,
            "Maintainer": "cudatools <cudatools@nvidia.com>",
            "Section": "multiverse/devel",
            "Priority": "optional",
            **{name: ", ".join(names) for name, names in relations.items() if names},
            "Description": "a shell of the package of this name",
        }
        return "".join(f"{name}: {value}\n" for name, value in lines.items())


def build(package: Package, folder: Path) -> Path:
    """Write the .deb of a package into a folder."""
    target = folder / package.file
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if package.tree is not None:
            run(["cp", "--archive", "--link", f"{package.tree}/.", root])
        for path, text in package.files.items():
            _write(root / path.lstrip("/"), text)
        control = root / "DEBIAN"
        control.mkdir(mode=0o755)
        (control / "control").write_text(package.control)
        kept = [path for path in package.files if path.startswith("/etc/")]
        if kept:  # as debhelper does it: what is configured stays when the package goes
            (control / "conffiles").write_text("".join(f"{path}\n" for path in kept))
        for script, commands in package.scripts.items():
            _write(control / script, f"#!/bin/sh\nset -e\n{commands}\n")
        root.chmod(0o755)
        pack = "gzip" if package.tree is not None else "none"
        run(["dpkg-deb", "--root-owner-group", f"-Z{pack}", "-z1", "--build", root, target])
    return target


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str) and content.startswith(LINK):
        path.symlink_to(content.removeprefix(LINK))
        return
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data)
    path.chmod(0o755 if data.startswith(b"#!") else 0o644)


@dataclass(frozen=True)
class SigningKey:
    """A throwaway OpenPGP key. It protects nothing, so its secret half lies about in plain text."""

    file: Path
    """The secret key, armoured."""

    @classmethod
    def make(cls, file: Path, owner: str, algorithm: str = "ed25519") -> SigningKey:
        """Make a key, unless it is there."""
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with _gpg() as gpg:
                gpg(*_IN_2024, "--quick-generate-key", owner, algorithm, "sign", "never")
                write_whole(file, gpg("--armor", "--export-secret-keys"))
        return cls(file)

    @property
    def fingerprint(self) -> str:
        """The whole fingerprint, as the product's tables write it."""
        with self._imported() as gpg:
            listed = gpg("--with-colons", "--list-secret-keys").splitlines()
        return next(line.split(":")[9] for line in listed if line.startswith("fpr:"))

    @property
    def public(self) -> str:
        """The public key, armoured."""
        with self._imported() as gpg:
            return gpg("--armor", "--export")

    @property
    def binary(self) -> bytes:
        """The public key, as a keyring holds it."""
        with self._imported() as gpg, tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "key.gpg"
            gpg("--output", str(file), "--export")
            return file.read_bytes()

    def sign(self, release: Path, *, expired: bool = False) -> None:
        """Sign a Release file: Release.gpg and InRelease beside it."""
        options = [*_IN_2024, "--default-sig-expire", "1d"] if expired else []
        with self._imported() as gpg:
            for kind, name in (("--detach-sign", "Release.gpg"), ("--clear-sign", "InRelease")):
                new = release.with_name(f".{name}.new")
                new.unlink(missing_ok=True)
                gpg(*options, "--armor", "--output", str(new), kind, str(release))
                new.replace(release.with_name(name))

    @contextmanager
    def _imported(self) -> Iterator[_Gpg]:
        with _gpg() as gpg:
            gpg("--import", str(self.file))
            yield gpg


class _Gpg:
    """gpg with a home of its own."""

    def __init__(self, home: str) -> None:
        self.home = home

    def __call__(self, *arguments: str) -> str:
        options = ["--batch", "--quiet", "--no-tty", "--pinentry-mode=loopback", "--passphrase="]
        return run(["gpg", *options, *arguments], env={**os.environ, "GNUPGHOME": self.home})


@contextmanager
def _gpg() -> Iterator[_Gpg]:
    # Under /tmp, since the name of the agent's socket may not be long.
    with tempfile.TemporaryDirectory(prefix="lab-gpg-") as home:
        try:
            yield _Gpg(home)
        finally:
            environment = {**os.environ, "GNUPGHOME": home}
            subprocess.run(["gpgconf", "--kill", "all"], env=environment, check=False)


def make_repository(folder: Path, packages: Iterable[Package], key: SigningKey, label: str) -> None:
    """Build packages into a folder, and index and sign it as a flat repository."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda package: build(package, folder), packages))
    index(folder, label)
    key.sign(folder / "Release")


def index(folder: Path, label: str) -> None:
    """Write Packages, Packages.gz and Release, in place of older ones and their signatures."""
    for old in ("Packages", "Packages.gz", "Release", "Release.gpg", "InRelease"):
        (folder / old).unlink(missing_ok=True)
    try:
        listed = subprocess.run(
            ["apt-ftparchive", "packages", "."], cwd=folder, capture_output=True, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        raise LabError(f"apt-ftparchive: {error.stderr.decode().strip()}") from None
    (folder / "Packages").write_bytes(listed)
    (folder / "Packages.gz").write_bytes(gzip.compress(listed, mtime=0))
    fields = {"Origin": "NVIDIA", "Label": label, "Architectures": "amd64"}
    options = [f"-oAPT::FTPArchive::Release::{name}={value}" for name, value in fields.items()]
    (folder / "Release").write_text(run(["apt-ftparchive", *options, "release", "."], cwd=folder))
