"""The repository keeps its promises: what may stand in it, what is locked, how ./run behaves."""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tasks.rules import tables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ["3.10", "3.11", "3.12", "3.13"]


# What stands in the repository


def tracked_files() -> list[Path]:
    """The repository's files; of one that was unpacked without git, all but what tools make."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(git, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    else:
        made = {".venv", "__pycache__", ".git", ".hypothesis"}
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(part in made or part.endswith("_cache") for part in path.parts)
        ]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def texts() -> Iterator[tuple[str, str]]:
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content:
            yield str(path.relative_to(ROOT)), content.decode()


# In pieces, so that they don't stand here either.
REGISTRIES = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry.npm" + "js.org",
    "deb.deb" + "ian.org",
    "security.deb" + "ian.org",
    "archive.ubu" + "ntu.com",
    "index" + "-url",
    "find" + "-links",
]
THIS_MACHINE = ["/" + "work/", "/ro" + "ot/.pyenv", "/opt/" + "wheels"]


@pytest.mark.parametrize("needle", [*REGISTRIES, *THIS_MACHINE])
def test_no_package_registry_and_no_path_of_a_developers_machine(needle: str) -> None:
    assert [name for name, text in texts() if needle in text.lower()] == []


def test_not_where_this_checkout_lies() -> None:
    if len(ROOT.parts) < 3:
        pytest.skip(f"{ROOT} may stand in any text")
    assert [name for name, text in texts() if str(ROOT) in text] == []


def test_text_files_end_with_one_newline_and_have_unix_line_ends() -> None:
    assert [name for name, text in texts() if "\r\n" in text] == []
    assert [
        name for name, text in texts() if text and (text[-1] != "\n" or text.endswith("\n\n"))
    ] == []


# Scripts


SHELL_SHEBANG = re.compile(rb"#!\s*(/usr)?/bin/(env )?(ba|da)?sh\b")


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="no shellcheck: there is no wheel of it for this machine"
)
@pytest.mark.parametrize("kind", ["program", "fragment"])
def test_shell_scripts_are_clean(kind: str) -> None:
    programs = [path for path in tracked_files() if SHELL_SHEBANG.match(path.read_bytes()[:40])]
    if kind == "program":
        assert {ROOT / "run", ROOT / ".ci" / "run"} <= set(programs)
        options, scripts = [], programs
    else:  # sent to a host's sh, behind the variables that it uses
        options = ["--shell=sh", "--exclude=SC2154"]
        scripts = [path for path in tracked_files() if path.suffix == ".sh"]
        scripts = [path for path in scripts if path not in programs]
    checked = subprocess.run(
        ["shellcheck", "--color=never", *options, *scripts],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0 or not scripts, checked.stdout + checked.stderr


def test_what_has_a_shebang_is_executable() -> None:
    """But for files/: the deploy gives those their mode on the host."""
    scripts = [
        path
        for path in tracked_files()
        if path.read_bytes()[:2] == b"#!" and not path.is_relative_to(ROOT / "files")
    ]
    assert scripts
    assert [path for path in scripts if not path.stat().st_mode & stat.S_IXUSR] == []


def test_commands_are_made_where_the_umask_is_set() -> None:
    """Root's own may be 077, and then others could not read what ours make."""
    made = [name for name, text in texts() if re.search(r"\bString" + r"Command\(", text)]
    assert made == ["tasks/operations/shell.py"]


# Documentation


MAKERS = {"error", "warning", "note", "finding", "Finding"}
"""What makes a finding: its code is the first argument, the severity before it apart."""


def finding_codes() -> Iterator[str]:
    """Every code that the product can give a finding, as it stands in the source."""
    for path in (ROOT / "tasks").rglob("*.py"):
        if path == ROOT / "tasks" / "rules" / "findings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                maker, place = node.func.id, 1 if node.func.id == "Finding" else 0
                if maker in MAKERS and len(node.args) > place:
                    yield ast.unparse(node.args[place])


def explained_codes() -> Iterator[str]:
    """What the page says something about: the first column of its tables."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        yield from re.findall(r"`([^`]+)`", row)


def test_everything_that_is_found_on_a_host_is_explained() -> None:
    codes, explained = set(finding_codes()), list(explained_codes())
    assert "f'gpu-{symptom.id}'" in codes, "codes that are made of a table"
    codes.remove("f'gpu-{symptom.id}'")
    codes |= {repr(f"gpu-{each.id}") for each in tables.driver_faults() if each.pattern}
    assert {"'not-root'", "'gpu-window'", "'cuda-fault'", "'hub-busy'"} <= codes
    assert sorted(code for code in codes if ast.literal_eval(code) not in explained) == []
    assert sorted(code for code in explained if repr(code) not in codes) == []
    assert len(explained) == len(set(explained))


# The lock


class Pin(NamedTuple):
    requirement: Requirement
    hashes: list[str]


def lock() -> list[Pin]:
    text = (ROOT / "requirements.txt").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    pins = []
    for line in lines:
        entry = line.split(" #")[0].strip()
        if entry and not entry.startswith("#"):
            requirement, *hashes = entry.split(" --hash=")
            pins.append(Pin(Requirement(requirement), [each.strip() for each in hashes]))
    return pins


def pyproject() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return project


def asked_for() -> list[Requirement]:
    project = pyproject()
    return [
        Requirement(each)
        for each in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    ]


def test_every_requirement_is_pinned_with_hashes_and_says_nothing_else() -> None:
    pins = lock()
    assert len(pins) > 50
    for requirement, hashes in pins:
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", SUPPORTED)
def test_the_lock_has_what_pyproject_asks_for(python: str, machine: str) -> None:
    where = {
        "python_version": python,
        "python_full_version": f"{python}.99",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
    }

    def wanted(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(where)

    pinned = {
        canonicalize_name(pin.requirement.name): next(iter(pin.requirement.specifier)).version
        for pin in lock()
        if wanted(pin.requirement)
    }
    for requirement in filter(wanted, asked_for()):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked"


def test_one_version_at_most_for_each_python() -> None:
    for python in SUPPORTED:
        where = {"python_version": python, "python_full_version": f"{python}.99"}
        names = [
            canonicalize_name(pin.requirement.name)
            for pin in lock()
            if pin.requirement.marker is None or pin.requirement.marker.evaluate(where)
        ]
        assert len(names) == len(set(names))


def test_everybody_means_the_same_pythons() -> None:
    project = pyproject()
    accepted = SpecifierSet(project["project"]["requires-python"])
    minors = [f"3.{minor}" for minor in range(30) if accepted.contains(f"3.{minor}.1")]
    assert minors == SUPPORTED

    assert project["tool"]["ruff"]["target-version"] == "py" + minors[0].replace(".", "")
    assert project["tool"]["mypy"]["python_version"] == minors[0]
    assert project["tool"]["uv"]["pip"]["python-version"] == minors[0]
    run = (ROOT / "run").read_text()
    assert " | ".join(minors) + ")" in run
    assert " ".join(f"python{minor}" for minor in reversed(minors)) in run
    assert run.count(f"{minors[0]} to {minors[-1]}") >= 2


@pytest.mark.parametrize("module", ["tasks", "tests"])
def test_no_installed_package_goes_by_the_name_of_ours(module: str) -> None:
    spec = find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    assert list(spec.submodule_search_locations) == [str(ROOT / module)]


def imported(path: Path) -> set[str]:
    """Names of the packages that a module imports from outside the standard library."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"tasks", "tests", "tomllib", "_typeshed"}


@pytest.mark.parametrize("part", ["product", "tests"])
def test_what_is_imported_is_asked_for(part: str) -> None:
    """So that it isn't there by chance, as something that another package happens to need."""
    project = pyproject()
    requirements = list(project["project"]["dependencies"])
    if part == "tests":
        requirements += project["dependency-groups"]["dev"]
    asked = {canonicalize_name(Requirement(each).name) for each in requirements}
    brought_by = packages_distributions()
    for path in tracked_files():
        of_tests = path.is_relative_to(ROOT / "tests")
        if path.suffix == ".py" and of_tests == (part == "tests"):
            for name in imported(path):
                bringers = {canonicalize_name(each) for each in brought_by.get(name, [name])}
                assert bringers & asked, f"{path.relative_to(ROOT)} imports {name}"


# What may be skipped


@pytest.mark.parametrize(
    ("obstacle", "ci", "outcome"),
    [
        ("None", "", "1 passed"),
        ("None", "true", "1 passed"),
        ("'it needs root'", "", "1 skipped"),
        ("'it needs root'", "true", "1 error"),
    ],
)
def test_a_lab_that_can_not_be_is_skipped_with_the_reason_and_fails_in_ci(
    tmp_path: Path, obstacle: str, ci: str, outcome: str
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lab = tmp_path / "tests" / "lab"
    lab.mkdir(parents=True)
    (lab.parent / "__init__.py").touch()
    shutil.copy(ROOT / "tests" / "conftest.py", lab.parent)
    (lab / "__init__.py").write_text(f"def obstacle():\n    return {obstacle}\n")
    (lab / "test_it.py").write_text("import pytest\n\n@pytest.mark.lab\ndef test_it():\n    pass\n")
    pytest_run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in pytest_run.stdout.splitlines()[-1], pytest_run.stdout + pytest_run.stderr
    assert ("it needs root" in pytest_run.stdout) == (obstacle != "None")


# ./run, with a lock of one tiny package


class Checkout:
    """A checkout with nothing in it but ./run and a lock, and an index that is a folder."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.root = root
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND" + "_LINKS": str(wheels),
        }
        self.wheels = wheels
        root.mkdir()
        shutil.copy(ROOT / "run", root / "run")

    def require(self, version: str, sha256: str = "") -> None:
        """Locks `greeting`, which brings a program that says its version."""
        wheel = self.wheels / f"greeting-{version}-py3-none-any.whl"
        if not wheel.exists():
            make_wheel(wheel, version)
        sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
        (self.root / "requirements.txt").write_text(
            f"greeting=={version} \\\n    --hash=sha256:{sha256}\n"
        )

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "run", *command],
            env=self.env | env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*command, **env))


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def make_wheel(path: Path, version: str) -> None:
    info = f"greeting-{version}.dist-info"
    files = {
        "greeting.py": f"def main():\n    print('greeting {version}')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: greeting\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ngreet = greeting:main\n",
    }

    def digest(text: str) -> str:
        return (
            base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        )

    record = [f"{name},sha256={digest(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose .venv is made; its folder's name has a space."""
    folder = tmp_path_factory.mktemp("run")
    wheels = folder / "wheels"
    wheels.mkdir()
    checkout = Checkout(folder / "a checkout", wheels)
    checkout.require("1.0")
    first = checkout.run("greet")
    assert (first.returncode, first.stdout) == (0, "greeting 1.0\n"), first.stderr
    assert re.fullmatch(
        r"run: making \.venv with Python 3\.\d+ and .* \.\.\. \d+ s\n", first.stderr
    )
    return checkout


def test_run_says_nothing_of_its_own_the_second_time(checkout: Checkout) -> None:
    second = checkout.run("greet")
    assert (second.returncode, second.stdout, second.stderr) == (0, "greeting 1.0\n", "")


def test_run_takes_less_than_50_ms_the_second_time(checkout: Checkout) -> None:
    # With a lock as long as the real one, which is compared on every call.
    for lock_file in (checkout.root / "requirements.txt", checkout.root / ".venv/requirements.txt"):
        real = (ROOT / "requirements.txt").read_text()
        lock_file.write_text(
            lock_file.read_text() + "".join(f"# {line}\n" for line in real.splitlines())
        )

    def seconds() -> float:
        began = time.perf_counter()
        assert checkout.run("true").stderr == ""
        return time.perf_counter() - began

    assert min(seconds() for _ in range(20)) < 0.05


@pytest.mark.parametrize("code", [0, 1, 42])
def test_run_passes_the_exit_code_on(checkout: Checkout, code: int) -> None:
    assert checkout.run("sh", "-c", f"exit {code}").returncode == code


def test_run_passes_signals_on(checkout: Checkout) -> None:
    process = checkout.start("sh", "-c", "echo up; exec sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == -signal.SIGTERM


def test_run_passes_arguments_on_as_they_are(checkout: Checkout) -> None:
    arguments = ["two words", "", "*", "$HOME", "-x", 'quo"te']
    code = "import sys; print(sys.argv[1:])"
    assert checkout.run("python", "-c", code, *arguments).stdout == f"{arguments}\n"


def test_run_says_127_when_there_is_no_such_command(checkout: Checkout) -> None:
    assert checkout.run("no-such-command").returncode == 127


def test_run_without_a_command_says_how_it_is_used(checkout: Checkout) -> None:
    bare = checkout.run()
    assert bare.returncode == 2
    assert bare.stderr.startswith("usage: ./run COMMAND")
    asked = checkout.run("--help")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, bare.stderr, "")


def test_run_works_through_a_link_and_stays_in_the_callers_folder(
    checkout: Checkout, tmp_path: Path
) -> None:
    (tmp_path / "far").symlink_to(checkout.root / "run")
    (tmp_path / "near").symlink_to("far")
    (checkout.root / "ours.py").write_text("print('imported')\n")
    code = "import os, sys; sys.path.remove(''); import ours; print(os.getcwd(), sys.prefix)"
    ran = subprocess.run(
        ["./near", "python", "-c", code],
        cwd=tmp_path,
        env=checkout.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"imported\n{tmp_path} {checkout.root / '.venv'}\n"


def test_run_refuses_a_python_that_does_not_fit(checkout: Checkout, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3.9 /usr/bin/python3.9\n")
    old.chmod(0o755)
    for python, said in [(str(old), "is 3.9"), ("no-such-python", "not a Python")]:
        refused = checkout.run("true", PYTHON=python)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
        assert said in refused.stderr
    assert checkout.run("greet").stderr == "", "what was there is kept"


def test_run_refuses_what_is_not_as_locked(checkout: Checkout, tmp_path: Path) -> None:
    locked = (checkout.root / "requirements.txt").read_text()
    venv = checkout.root / ".venv"
    venv.rename(tmp_path / "kept")
    try:
        checkout.require("1.1", sha256="0" * 64)
        refused = checkout.run("touch", str(tmp_path / "began"))
        assert not (venv / "made-for").exists()
    finally:
        shutil.rmtree(venv)
        (tmp_path / "kept").rename(venv)
        (checkout.root / "requirements.txt").write_text(locked)
    assert refused.returncode == 1
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("run: requirements.txt could not be")
    assert not (tmp_path / "began").exists()


def test_run_makes_it_anew_after_a_new_lock_a_kill_and_a_move_once_for_two_at_once(
    checkout: Checkout,
) -> None:
    checkout.require("2.0")
    cut_short = checkout.start("greet")
    wait_until((checkout.root / ".venv" / "bin").exists)
    os.killpg(cut_short.pid, signal.SIGKILL)
    assert finish(cut_short).stdout == ""

    checkout.root = checkout.root.rename(checkout.root.with_name("another place"))
    both = [finish(each) for each in [checkout.start("greet"), checkout.start("greet")]]
    assert [each.stdout for each in both] == ["greeting 2.0\n"] * 2
    said = "".join(each.stderr for each in both)
    assert said.count("making .venv with") == 1
    assert said.count("another ./run is making .venv") == 1
    assert checkout.run("greet").stderr == ""


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_environment_is_what_the_lock_says() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not run with ./run")
    installed = {
        canonicalize_name(each.metadata["Name"]): each.version
        for each in distributions()
        if each.metadata["Name"] not in {"pip", "setuptools"}  # what venv itself puts there
    }
    locked = {
        canonicalize_name(pin.requirement.name): next(iter(pin.requirement.specifier)).version
        for pin in lock()
        if pin.requirement.marker is None or pin.requirement.marker.evaluate()
    }
    assert {name: Version(version) for name, version in installed.items()} == {
        name: Version(version) for name, version in locked.items()
    }
