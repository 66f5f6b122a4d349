from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.operations.job import (
    _WAIT_FOR,
    Job,
    _answer,
    _environment_value,
    _files,
    explain,
    start_command,
    wait_command,
)

JOB = Job(
    name="build",
    key="b1-abc",
    script="echo $A\n",
    variables={"A": "it's; $(here)"},
    user="llamastead",
    writable=("/var/cache/x",),
    timeout_seconds=60,
    environment={"URL": 'http://u:p"$`\\@h/'},
)


def test_the_commands_are_valid_shell() -> None:
    for command in (start_command(JOB), wait_command(JOB)):
        subprocess.run(["sh", "-n", "-c", command], check=True)


def test_a_unit_that_still_ends_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "systemctl").write_text(
        f"""#!/bin/sh
        case "$*" in *--value) echo x >>{tmp_path}/asked ;; *) echo Result=exit-code; exit ;; esac
        [ $(wc -l <{tmp_path}/asked) -gt 1 ] && echo failed || echo stop-sigterm
        """
    )
    (tmp_path / "systemctl").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for command in (wait_command(JOB), _WAIT_FOR.format(unit=JOB.unit)):
        subprocess.run(["sh", "-c", command], env=env, check=True, capture_output=True, timeout=20)
        asked = tmp_path / "asked"
        assert asked.read_text() == "x\nx\n"
        asked.unlink()


def test_what_may_be_secret_goes_by_a_pipe_into_files_that_only_root_reads() -> None:
    job = replace(JOB, secrets={"hf-token": "hf_s3cret"})
    command, files = start_command(job), _files(job)
    for secret in ("u:p", "hf_s3cret"):
        assert secret not in command
        assert secret not in repr(job)
        assert secret in "".join(files.values())
    sizes = dict(re.findall(r"head -c (\d+) >(\S+)", command)[::-1])
    assert {path: int(size) for size, path in sizes.items()} == {
        path: len(text) for path, text in files.items()
    }
    assert "LoadCredential=hf-token:/run/llamastead/build.hf-token" in command
    assert command.index("umask 077") < command.index("head -c")
    assert f"trap 'rm -f {' '.join(files)}' EXIT" in command


def test_a_value_survives_systemds_environment_file() -> None:
    assert _environment_value('a"b$c`d\\e') == '"a\\"b\\$c\\`d\\\\e"'


def test_a_jobs_own_words_are_what_is_told() -> None:
    lines = ["noise", "error: no such commit", "error: no such commit"]
    assert explain(JOB, {"Result": "exit-code"}, lines) == ["build: no such commit"]


@pytest.mark.parametrize(
    ("unit", "part"),
    [
        ({"Result": "oom-kill"}, "ran out of memory"),
        ({"Result": "timeout"}, "longer than 60 s"),
        ({"Result": "signal"}, "killed"),
        ({"Result": "exit-code", "ExecMainStatus": "7"}, "exit code 7"),
        ({"SubState": "dead", "Result": "success"}, "run this again"),
    ],
)
def test_a_job_without_words_is_explained_and_its_log_named(
    unit: dict[str, str], part: str
) -> None:
    first, *rest = explain(JOB, unit, ["last line"])
    assert part in first
    assert "/var/log/llamastead/build.log" in first
    assert rest == ["last line"]


def test_the_answer_is_properties_then_the_log() -> None:
    unit, lines = _answer(["SubState=running", "Result=success", "", "[1/2] x", ""])
    assert unit == {"SubState": "running", "Result": "success"}
    assert lines == ["[1/2] x"]
    assert _answer([]) == ({}, [])
