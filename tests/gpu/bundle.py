"""Packs what tests/gpu needs, for a machine with a GPU that has nothing of this project.

    ./run python -m tests.gpu.bundle FOLDER --source /path/to/llama.cpp

makes FOLDER: wheels (for CPython of --python, x86-64), llama.cpp's source, a small model, run.sh.
There, in the root of a checkout:

    sh FOLDER/run.sh

runs the tests and leaves what they say in $OUT, if that is set.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.lab.gguf_model import tiny_model

ROOT = Path(__file__).parents[2]

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")

LEFT_OUT = ("models", "media", "docs", "benches", ".git", ".github")
"""Of llama.cpp: what no build needs, and most of its size."""

TOP_LEVEL = ("pyinfra", "requests", "gguf", "hypothesis", "pytest", "pytest-timeout")

RUN = """#!/bin/sh
# Runs tests/gpu with what lies beside this file. Made by tests/gpu/bundle.py.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
mkdir "$work/site" "$work/llama.cpp"
pip="python3 -m pip install -q --no-index --no-deps --no-compile"
$pip --target "$work/site" "$here"/wheels/*.whl
tar -C "$work/llama.cpp" -xJf "$here/llama.cpp.tar.xz"
export PYTHONPATH="$work/site:$PWD" PYTHONUNBUFFERED=1
export LLAMA_CPP_SOURCE="$work/llama.cpp" GPU_MODEL="$here/tiny.gguf" GPU_TEST_OUT="${OUT-}"
exec python3 -m pytest -p no:cacheprovider -m gpu -s -v tests/gpu
"""


def pinned() -> list[str]:
    """Everything in the lock, with its version."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line.split(" \\")[0] for line in lines if line[:1].isalnum()]


def closure(names: tuple[str, ...], python: str) -> list[str]:
    """Pins of these packages and of what they need, on another Python on Linux."""
    where = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }
    pins = {}
    for line in pinned():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(where):
            pins[canonicalize_name(requirement.name)] = str(requirement).partition(";")[0].strip()
    from importlib.metadata import PackageNotFoundError, requires  # noqa: PLC0415

    found: dict[str, str] = {}
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name not in pins:
            continue
        found[name] = pins[name]
        try:
            needed = [Requirement(each) for each in requires(name) or ()]
        except PackageNotFoundError:
            needed = []
        waiting += [
            canonicalize_name(each.name)
            for each in needed
            if each.marker is None or each.marker.evaluate(where)
        ]
    return sorted(found.values())


def bundle(folder: Path, source: Path, python: str) -> None:
    """Make the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    download += ["--python-version", python, "--implementation", "cp"]
    download += [word for each in PLATFORMS for word in ("--platform", each)]
    subprocess.run([*download, "-d", folder / "wheels", *closure(TOP_LEVEL, python)], check=True)
    with tarfile.open(folder / "llama.cpp.tar.xz", "w:xz") as archive:
        archive.add(source, ".", filter=without)
    shutil.copy(tiny_model(), folder / "tiny.gguf")
    (folder / "run.sh").write_text(RUN)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total / 2**20:.1f} MiB")


def without(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The member, unless it lies in a folder that is left out."""
    parts = Path(member.name).parts
    if parts and parts[0] in LEFT_OUT:
        # One template is compiled into the server.
        return member if member.name == "models" or parts[:2] == ("models", "templates") else None
    return member


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's source")
    parser.add_argument("--python", default="3.12", help="Python there (3.12)")
    given = parser.parse_args()
    bundle(given.folder, given.source, given.python)
