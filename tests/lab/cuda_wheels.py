"""The real CUDA toolkit in NVIDIA's packages: PyPI has the same files as wheels.

The wheels are fetched once, by their hashes, and laid out as NVIDIA's packages for Debian lay
them out. Names and relations are those of the shells (nvidia_packages.py). Two things are made
here: the versioned names of libraries, which wheels don't have, and the stub of libcuda, which is
in no wheel.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from . import deb, nvidia_packages
from .deb import Package
from .tools import LabError, cache_directory, locked, run, say

RELEASE = "13.2.2"
"""What deploys choose by themselves where nothing speaks against it."""
NVCC = "13.2.86"
CUBLAS = "13.4.1.3"
ROOT = "/usr/local/cuda-13.2"

_TARGET = "targets/x86_64-linux"
_DASH = "13-2"
_REQUIREMENTS = {
    f"nvidia-cublas=={CUBLAS}": "a5917cb642cfb07f4a0231ee16aec7e2e0357d8cb8b1b78a0c9c68dba3e6afc7",
    f"nvidia-cuda-cccl=={NVCC}": "35da671cf0cecd3539da214a11bb8e7634366c9e950da9c5feecf6c490a65b20",
    f"nvidia-cuda-crt=={NVCC}": "e3ab08801bf9b1e6dc979275d25e816bb5000521b648e19c324d5eef0c79f1da",
    f"nvidia-cuda-cuobjdump=={NVCC}": (
        "d332c2ffe78e703ca0a3894be927f83124244e2acf0d792b8c12b4362d44d837"
    ),
    f"nvidia-cuda-nvcc=={NVCC}": "7d3f56c8d705bad35bbba69eb0470d90856fd5d4dc48c6a6173aaf1e9f887cf5",
    f"nvidia-cuda-runtime=={NVCC}": (
        "3498247680dfddce31bad102af7e3e26fc795342a3cac64722bb0fa95e7f60f0"
    ),
    f"nvidia-nvvm=={NVCC}": "a9244f3209922d655612c11ebb4117ea1f80983cb2b215c9cccded127282cebc",
}
"""Wheels of the release, as the package cuda-toolkit 13.2.2 on PyPI names them, by SHA-256."""


@dataclass(frozen=True)
class Place:
    """Where a part of a wheel goes: into which package, and where on the host."""

    wheel: str
    pattern: str
    """Anchored expression over the path in the wheel, after nvidia/cu13/."""
    package: str
    target: str
    """Beneath the toolkit's root; groups of the pattern may be named."""


_PLACES = (
    Place("nvidia_cuda_nvcc", r"include/(.*)", "cuda-nvcc", rf"{_TARGET}/include/\1"),
    Place("nvidia_cuda_nvcc", r"(bin/.*)", "cuda-nvcc", r"\1"),
    Place("nvidia_cuda_crt", r"include/(.*)", "cuda-crt", rf"{_TARGET}/include/\1"),
    Place("nvidia_nvvm", r"(nvvm/.*)", "libnvvm", r"\1"),
    Place("nvidia_nvvm", r"lib/(.*)", "libnvvm", r"nvvm/lib64/\1"),
    Place("nvidia_nvvm", r"include/(.*)", "libnvvm", r"nvvm/include/\1"),
    Place("nvidia_cuda_runtime", r"(lib/.*\.so\..*)", "cuda-cudart", rf"{_TARGET}/\1"),
    Place("nvidia_cuda_runtime", r"((?:lib|include)/.*)", "cuda-cudart-dev", rf"{_TARGET}/\1"),
    Place("nvidia_cuda_cccl", r"(include/.*)", "cuda-cccl", rf"{_TARGET}/\1"),
    Place("nvidia_cuda_cccl", r"cuda_cccl/(lib/.*)", "cuda-cccl", rf"{_TARGET}/\1"),
    Place("nvidia_cublas", r"(lib/.*)", "libcublas", rf"{_TARGET}/\1"),
    Place("nvidia_cublas", r"(include/.*)", "libcublas-dev", rf"{_TARGET}/\1"),
    Place("nvidia_cuda_cuobjdump", r"(bin/.*)", "cuda-cuobjdump", r"\1"),
)
"""The first that fits a file counts."""

_VERSIONS = {"libcublas": CUBLAS, "libcublas-dev": CUBLAS}
_DEVELOPMENT = {"cuda-cudart": "cuda-cudart-dev", "libcublas": "libcublas-dev"}
"""Packages of libraries, and those that have the names to link with."""


def link_packages(folder: Path) -> None:
    """Put the packages into a folder, in the place of any of the same names."""
    cache = cache_directory("nvidia")
    # Another checkout may make them from another recipe, and takes ours away then.
    with locked(cache / ".toolkit.lock"):
        for package in _made(cache).glob("*.deb"):
            target = folder / package.name
            target.unlink(missing_ok=True)  # what is there is shared with a cache
            os.link(package, target)


def _made(cache: Path) -> Path:
    """The packages in the cache, made if they aren't there."""
    made = cache / f"toolkit-{_recipe()}"
    if not made.is_dir():
        for old in cache.glob("toolkit-*"):
            shutil.rmtree(old)
        unfinished = cache / ".unfinished-toolkit"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        wheels = _wheels()
        say(f"packing CUDA {RELEASE}, once")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for package in _packages(wheels, Path(folder)):
                deb.build(package, unfinished)
        unfinished.rename(made)
    return made


def _recipe() -> str:
    """Fingerprint of everything that the packages are made from."""
    sources = [Path(module.__file__ or "") for module in (deb, nvidia_packages)]
    texts = [path.read_bytes() for path in (*sources, Path(__file__))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _wheels() -> list[Path]:
    """The wheels, fetched if they aren't there."""
    folder = cache_directory("wheels", f"cuda-{RELEASE}")
    if len(list(folder.glob("*.whl"))) < len(_REQUIREMENTS):
        say(f"fetching CUDA {RELEASE} from the package index, once: 520 MB")
        lines = [f"{name} --hash=sha256:{value}\n" for name, value in _REQUIREMENTS.items()]
        requirements = folder / "requirements.txt"
        requirements.write_text("".join(lines))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:"]
        run([*pip, *options, "--requirement", requirements, "--dest", folder])
    return sorted(folder.glob("*.whl"))


def _packages(wheels: list[Path], work: Path) -> list[Package]:
    """The packages, with their files laid out in a folder."""
    for wheel in wheels:
        _lay_out(wheel, work)
    for package, development in _DEVELOPMENT.items():
        for library in (work / package).rglob("*.so.*"):
            _name(library, _VERSIONS.get(package, NVCC), work / development)
    _as_installed(work / f"cuda-nvcc{ROOT}/bin/nvcc.profile")
    _stub(
        work / f"cuda-cudart-dev{ROOT}/{_TARGET}/include/cuda.h",
        work / f"cuda-driver-dev{ROOT}/{_TARGET}/lib/stubs/libcuda.so",
    )
    links = {"lib64": f"{_TARGET}/lib", "include": f"{_TARGET}/include"}
    trees = sorted(work.iterdir())
    for tree in trees:
        for name, target in links.items():
            link = tree / ROOT.lstrip("/") / name
            if (link.parent / target).is_dir():
                link.symlink_to(target)
    shells = {
        shell.name.removesuffix(f"-{_DASH}"): shell
        for shell in nvidia_packages.toolkit(RELEASE, NVCC, with_driver=True)
    }
    return [_filled(shells, tree.name, tree) for tree in trees]


def _filled(shells: Mapping[str, Package], name: str, tree: Path) -> Package:
    """A package of the release with what is really in it."""
    if name not in shells:
        raise LabError(f"NVIDIA has no package {name}-{_DASH}")
    version = f"{_VERSIONS.get(name, NVCC)}-1"
    return replace(shells[name], version=version, files={}, tree=tree)


def _lay_out(wheel: Path, work: Path) -> None:
    """Put the files of a wheel where NVIDIA's packages have them, with the times of the wheel."""
    distribution = wheel.name.partition("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            inside = member.filename.partition("nvidia/cu13/")[2]
            for place in _PLACES:
                match = re.fullmatch(place.pattern, inside)
                if place.wheel != distribution or match is None or member.is_dir():
                    continue
                target = work / place.package / ROOT.lstrip("/") / match.expand(place.target)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)
                target.chmod(0o755 if member.external_attr >> 16 & 0o100 else 0o644)
                # A compiler cache takes another time for another compiler.
                made = datetime(*member.date_time, tzinfo=timezone.utc).timestamp()
                os.utime(target, (made, made))
                break


def _name(library: Path, version: str, development: Path) -> None:
    """Give a library its names: libx.so.13 of a wheel is libx.so.13.4.1.3 with two links to it."""
    stem, _, major = library.name.rpartition(".so.")
    full = library.with_name(f"{stem}.so.{version}")
    library.rename(full)
    library.symlink_to(full.name)
    folder = development / ROOT.lstrip("/") / _TARGET / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.so").symlink_to(f"{stem}.so.{major}")


def _as_installed(profile: Path) -> None:
    """Let nvcc look for headers and libraries where packages have them, not where wheels do."""
    text = profile.read_text()
    for name in ("include", "lib"):
        size = "$(_TARGET_SIZE_)" if name == "lib" else ""
        text = text.replace(f'-I$(TOP)/{name}"', f'-I$(TOP)/$(_TARGET_DIR_)/{name}"')
        text = re.sub(rf"\$\(TOP\)/{name}(?=[/\"])", f"$(TOP)/$(_TARGET_DIR_)/{name}{size}", text)
    profile.write_text(text)


_STUB_LIBRARY = 34
"""CUDA_ERROR_STUB_LIBRARY: what every function of NVIDIA's stub answers."""


def _stub(header: Path, library: Path) -> None:
    """Compile a libcuda to link with: every function that its header declares, none that works."""
    text = header.read_text()
    names = set(re.findall(r"\bCUDAAPI\s+(cu\w+)\s*\(", text))
    names |= set(re.findall(r"^\s*#\s*define\s+cu\w+\s+(cu[A-Z]\w+)\s*$", text, re.MULTILINE))
    source = "".join(f"int {name}(void) {{ return {_STUB_LIBRARY}; }}\n" for name in sorted(names))
    library.parent.mkdir(parents=True)
    gcc = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    run([*gcc, "-o", library], stdin=source)
