"""A package index for hosts: what a list of requirements with hashes names, for another Python."""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

from .outside import Outside
from .tools import cache_directory, locked, run, say


def chosen(requirements: str, python: str, machine: str = "x86_64") -> list[str]:
    """Return the requirements, hashes included, that hold for a Python on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    lines = [line for line in requirements.splitlines() if not line.startswith("#")]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        named, *hashes = line.split(" --hash=")
        requirement = Requirement(named.strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            own = f"{requirement.name}{requirement.specifier}"
            found.append(" --hash=".join([own, *(each.strip() for each in hashes)]))
    return found


def publish(outside: Outside, requirements: Path, python: str) -> str:
    """Serve the packages that the requirements name; return the address of the index."""
    wanted = chosen(requirements.read_text(), python)
    store = cache_directory("python") / python
    store.mkdir(parents=True, exist_ok=True)
    with locked(store.with_suffix(".lock")):
        say(f"fetching {len(wanted)} Python packages, as far as they are not here")
        (store / "requirements.txt").write_text("\n".join(wanted) + "\n")
        tag = f"cp{python.replace('.', '')}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        kind = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
        platforms = ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
        target = ["--python-version", python, "--implementation", "cp"]
        target += [f"--abi={abi}" for abi in (tag, "abi3", "none")]
        target += [f"--platform={platform}" for platform in (*platforms, "any")]
        listed = ["--requirement", str(store / "requirements.txt")]
        run([*pip, *kind, *target, "--dest", str(store), *listed])
    names = {line.split("==")[0] for line in wanted}
    for name in names:
        stem = name.replace("-", "_")
        files = [path for path in store.glob("*.whl") if path.name.split("-")[0].lower() == stem]
        for path in files:
            outside.put(f"simple/{name}/{path.name}", path)
        links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in files)
        outside.put(
            f"simple/{name}/index.html", f"<!DOCTYPE html><html><body>{links}</body></html>"
        )
    return outside.url("simple")
