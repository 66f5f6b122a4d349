"""What root does with what the build user left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tasks import probe as at
from tasks.operations import release


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A staged release, and a `runuser` that notes where root's programs look for libraries."""
    stage = tmp_path / "stage"
    (stage / "bin").mkdir(parents=True)
    (stage / "release.json").write_text("{}")
    server = stage / "bin" / "llama-server"
    server.write_text(f'#!/bin/sh\necho "server ${{LD_LIBRARY_PATH-}}" >>{tmp_path}/said\n')
    server.chmod(0o4755)
    spy = tmp_path / "path" / "runuser"
    spy.parent.mkdir()
    spy.write_text(
        f'#!/bin/sh\necho "root ${{LD_LIBRARY_PATH-}}" >>{tmp_path}/said\nshift 3\nexec "$@"\n'
    )
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(at, "PREFIX", str(tmp_path / "opt"))
    monkeypatch.setattr(at, "RELEASES", str(tmp_path / "opt" / "releases"))
    monkeypatch.setattr(release, "STAGE", str(stage))
    monkeypatch.setattr(release, "STUBS", "/stubs")
    return tmp_path


def install() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"umask 077; {release._install('b1-abc')}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_roots_programs_take_no_library_from_the_build_user(installation: Path) -> None:
    assert install().returncode == 0
    said = (installation / "said").read_text().splitlines()
    assert set(said) == {"root ", "server /stubs"}


def test_nothing_installed_runs_with_another_users_rights(installation: Path) -> None:
    assert install().returncode == 0
    there = installation / "opt" / "releases" / "b1-abc" / "bin" / "llama-server"
    assert there.stat().st_mode & 0o7777 == 0o755


def test_a_release_that_does_not_run_is_not_installed_and_said(installation: Path) -> None:
    (installation / "stage" / "bin" / "llama-server").write_text("#!/bin/sh\nexit 1\n")
    done = install()
    assert done.returncode != 0
    assert "does not run from" in done.stderr
    assert not (installation / "opt" / "releases" / "b1-abc").exists()


def test_half_a_release_is_not_installed(installation: Path) -> None:
    (installation / "stage" / "release.json").unlink()
    done = install()
    assert done.returncode != 0
    assert "not copied whole" in done.stderr
