"""Each building block of our own on a real host: once, and a second time."""

from __future__ import annotations

import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.e2e.deploys import Run, Terminal
from tests.lab import Fault, Lab, LabHost

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("operations")
    lab.down()
    with lab:
        yield lab


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    host = lab.host("debian-13", name="operations")
    host.run(
        "useradd --system --shell /usr/sbin/nologin --no-create-home llamastead && "
        "chown llamastead /srv"
    )
    return host


class Scripts:
    """Runs a few lines of deploy code against the host."""

    def __init__(self, lab: Lab, host: LabHost, folder: Path) -> None:
        self.folder = folder
        self.inventory = deploys.write_inventory(folder, {host.name: deploys.access(lab, host)})

    def write(self, code: str) -> Path:
        path = self.folder / "code.py"
        path.write_text(textwrap.dedent(code))
        return path

    def run(self, code: str) -> Run:
        return deploys.run(self.inventory, str(self.write(code)), timeout=120)

    def start(self, code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            deploys.command(self.inventory, str(self.write(code))),
            cwd=deploys.REPOSITORY, env=deploys.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture
def scripts(lab: Lab, host: LabHost, tmp_path: Path) -> Scripts:
    return Scripts(lab, host, tmp_path)


# Long work as a transient unit


def job(script: str, key: str = "k", timeout: int = 60, variables: str = "{}") -> str:
    return f"""
    from tasks.operations import job
    job.finished(name="Work", job=job.Job(
        name="work", key={key!r}, script={script!r}, variables={variables}, user="llamastead",
        writable=("/srv",), timeout_seconds={timeout},
        environment={{"SECRET": "a\\"b$c"}},
    ))
    """


def test_a_job_runs_as_its_user_and_tells_its_last_words(scripts: Scripts) -> None:
    done = scripts.run(job('echo "I am $(id -un), $WORD, $SECRET"', variables="{'WORD': \"it's\"}"))
    assert done.code == 0, done.said
    assert "I am llamastead, it's, a\"b$c" in done.said


def test_a_finished_job_leaves_no_unit(scripts: Scripts, host: LabHost) -> None:
    assert scripts.run(job("true")).code == 0
    assert host.run("systemctl list-units 'llamastead-*' --all --no-legend").stdout == ""


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("echo 'error: no such commit'; exit 1", "work: no such commit"),
        ("echo last; exit 7", "exit code 7"),
        ("kill -9 $$", "it was killed"),
        ("touch /etc/x; touch /home/x || echo 'error: read-only'; exit 1", "read-only"),
    ],
)
def test_a_failed_job_is_explained_and_leaves_no_unit(
    scripts: Scripts, host: LabHost, script: str, part: str
) -> None:
    done = scripts.run(job(script))
    assert done.code == 1
    assert part in done.said
    assert "Traceback" not in done.said
    assert host.run("systemctl list-units 'llamastead-*' --all --no-legend").stdout == ""


def test_a_job_that_takes_too_long_is_stopped(scripts: Scripts) -> None:
    done = scripts.run(job("sleep 60", timeout=2))
    assert done.code == 1
    assert "longer than 2 s" in done.said


def until(condition: str, host: LabHost) -> None:
    host.run(f"n=0; until {condition}; do n=$((n+1)); [ $n -lt 200 ] || exit 1; sleep .1; done")


def test_a_job_outlives_its_deploy_and_the_next_waits_for_it(
    scripts: Scripts, host: LabHost
) -> None:
    slow = "echo x >>/srv/started; sleep 6; echo finished"
    first = scripts.start(job(slow, key="slow"))
    until("systemctl is-active -q llamastead-work", host)
    first.kill()
    first.wait()
    began = time.monotonic()
    second = scripts.run(job(slow, key="slow"))
    assert second.code == 0, second.said
    assert "waiting for the one that an earlier run started" in second.said
    assert "finished" in second.said
    assert time.monotonic() - began < 12
    assert host.run("cat /srv/started; rm /srv/started").stdout == "x\n"


def test_who_presses_control_c_leaves_and_the_next_run_joins_the_job(
    scripts: Scripts, host: LabHost
) -> None:
    code = job("echo x >>/srv/started; sleep 12", key="long")
    terminal = Terminal(scripts.inventory, str(scripts.write(code)))
    until("systemctl is-active -q llamastead-work", host)
    time.sleep(1)
    said, seconds = terminal.control_c()
    assert seconds < 5
    assert "run this again to wait for it" in said
    assert "systemctl stop llamastead-work.service" in said
    assert "Traceback" not in said
    assert host.run("systemctl is-active llamastead-work").stdout == "active\n"
    second = scripts.run(code)
    assert second.code == 0, second.said
    assert "waiting for the one that an earlier run started" in second.said
    assert host.run("cat /srv/started; rm /srv/started").stdout == "x\n"


def test_who_presses_control_c_waits_for_no_other_work_either(
    scripts: Scripts, host: LabHost
) -> None:
    """Such as reading package lists, or starting a server."""
    code = """
    from pyinfra import host, state
    from pyinfra.api import operation
    from tasks.operations import shell
    @operation()
    def slow():
        if state.is_executing:
            shell.run(host, "touch /run/slow; sleep 30; touch /run/done")
        yield shell.command("true")
    slow(name="Slow")
    """
    terminal = Terminal(scripts.inventory, str(scripts.write(code)))
    until("[ -e /run/slow ]", host)
    said, seconds = terminal.control_c()
    assert seconds < 5
    assert "Traceback" not in said


def test_a_job_about_something_else_is_stopped_first(scripts: Scripts, host: LabHost) -> None:
    first = scripts.start(job("sleep 100", key="old"))
    until("systemctl is-active -q llamastead-work", host)
    first.kill()
    first.wait()
    done = scripts.run(job("echo new", key="new"))
    assert done.code == 0, done.said
    assert "waiting" not in done.said


# The lock


LOCKED = """
from pyinfra.operations import server
from tasks.operations import lock
lock.held(name="Lock")
server.shell(name="Work", commands=["{command}"])
"""


def test_the_lock_changes_nothing_and_goes_with_its_holder(scripts: Scripts) -> None:
    for _ in range(2):
        done = scripts.run(LOCKED.format(command="true"))
        assert done.code == 0, done.said
        assert done.changed == ["Work"]


def test_a_second_holder_is_refused_with_the_name_of_the_first(
    scripts: Scripts, host: LabHost
) -> None:
    first = scripts.start(LOCKED.format(command="touch /run/working; sleep 20"))
    try:
        until("[ -e /run/working ]", host)
        second = scripts.run(LOCKED.format(command="true"))
    finally:
        first.kill()
        first.wait()
        host.run("rm -f /run/working; pkill -f '[s]leep 20' || true")
    assert second.code == 1
    assert len([line for line in second.errors if "another deploy" in line]) == 1
    assert f"process {first.pid}" in second.said
    assert scripts.run(LOCKED.format(command="true")).code == 0


# Model files


def model(lab: Lab, url: str, sha256: str) -> str:
    return f"""
    from pyinfra.operations import files
    from tasks.operations import model_file
    from tasks.probe import Probe, INCOMING, STATE
    from tasks.rules import model
    from tasks.settings import load
    settings = load({{
        "model": {url!r}, "model_sha256": {sha256!r},
        "proxy_http": {lab.outside.proxy_url!r},
    }})
    files.directory(name="Store", path=STATE)
    files.directory(name="Incoming", path=INCOMING, user="llamastead", group="llamastead")
    wanted = model.plan(settings, Probe())
    model_file.fetched(name="Fetch", files=wanted.missing, from_hub=False, settings=settings)
    model_file.stored(name="Store", model=wanted)
    """


def stored(host: LabHost) -> list[str]:
    found = host.run(
        "cd /var/lib/llamastead/models/blobs 2>/dev/null && sha256sum * 2>/dev/null", check=False
    ).stdout.splitlines()
    for line in found:
        digest, name = line.split()
        assert digest == name, f"{name} is not what its name says"
    return [line.split()[1] for line in found]


@pytest.fixture
def empty_store(host: LabHost) -> None:
    host.run("rm -rf /var/lib/llamastead")


def test_a_model_is_fetched_whole(
    lab: Lab, host: LabHost, scripts: Scripts, empty_store: None
) -> None:
    outside = lab.outside
    done = scripts.run(model(lab, outside.model_url, outside.model_sha256))
    assert done.code == 0, done.said
    assert stored(host) == [outside.model_sha256]
    link = f"/var/lib/llamastead/models/{outside.model_sha256[:12]}/tiny.gguf"
    assert host.run(f"head -c 4 {link}").stdout == "GGUF"
    assert host.run("find /var/lib/llamastead -name '*.part*' -o -name '.new'").stdout == ""


def test_a_download_that_was_cut_is_resumed(
    lab: Lab, host: LabHost, scripts: Scripts, empty_store: None
) -> None:
    outside = lab.outside
    outside.play(Fault(path="/tiny.gguf", cut_after=1_000_000, times=1))
    try:
        done = scripts.run(model(lab, outside.model_url, outside.model_sha256))
    finally:
        outside.heal()
    assert done.code == 0, done.said
    assert stored(host) == [outside.model_sha256]
    ranges = [access.range for access in outside.requests("web") if access.range]
    assert any(asked.startswith("bytes=1000") for asked in ranges), ranges


@pytest.mark.parametrize(
    "fault",
    [
        Fault(path="/tiny.gguf", status=503, times=2),
        Fault(path="/tiny.gguf", no_ranges=True, cut_after=500_000, times=1),
        Fault(path="/tiny.gguf", corrupt_at=700_000, cut_after=900_000, times=1),
    ],
    ids=str,
)
def test_a_fault_that_passes_is_overcome(
    lab: Lab, host: LabHost, scripts: Scripts, empty_store: None, fault: Fault
) -> None:
    outside = lab.outside
    outside.play(fault)
    try:
        done = scripts.run(model(lab, outside.model_url, outside.model_sha256))
    finally:
        outside.heal()
    assert done.code == 0, done.said
    assert stored(host) == [outside.model_sha256]


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (Fault(path="/tiny.gguf", status=404), "404"),
        (Fault(path="/tiny.gguf", corrupt_at=700_000), "has SHA-256"),
    ],
    ids=str,
)
def test_a_fault_that_stays_is_told_in_one_line_and_leaves_nothing(
    lab: Lab, host: LabHost, scripts: Scripts, empty_store: None, fault: Fault, part: str
) -> None:
    outside = lab.outside
    outside.play(fault)
    try:
        done = scripts.run(model(lab, outside.model_url, outside.model_sha256))
    finally:
        outside.heal()
    assert done.code == 1
    assert part in done.said
    assert "Traceback" not in done.said
    assert stored(host) == []


# Releases


SWITCH = """
from pyinfra.operations import server
from tasks.operations import release
server.shell(name="Switch", commands=[release.switch("{name}")])
"""


def test_current_is_switched_and_previous_remembers(host: LabHost, scripts: Scripts) -> None:
    host.run(
        "cd /opt && mkdir -p llama.cpp/releases/a llama.cpp/releases/b && "
        "touch llama.cpp/releases/a/release.json llama.cpp/releases/b/release.json"
    )
    for name in ("a", "b", "b"):
        assert scripts.run(SWITCH.format(name=name)).code == 0
    links = host.run("cd /opt/llama.cpp && readlink current previous").stdout.split()
    assert links == ["releases/b", "releases/a"]


def test_current_never_points_at_a_release_that_is_not_complete(
    host: LabHost, scripts: Scripts
) -> None:
    host.run("mkdir -p /opt/llama.cpp/releases/half")
    before = host.run("readlink /opt/llama.cpp/current").stdout
    assert scripts.run(SWITCH.format(name="half")).code == 1
    assert host.run("readlink /opt/llama.cpp/current").stdout == before


# The API key


KEY = """
from tasks.operations import service
service.api_key(name="Key")
"""


def test_the_api_key_is_made_once_and_only_root_reads_it(host: LabHost, scripts: Scripts) -> None:
    keys = []
    for _ in range(2):
        assert scripts.run(KEY).code == 0
        keys.append(host.run("cat /etc/llamastead/api-key").stdout)
    assert keys[0] == keys[1]
    assert len(keys[0]) == 64
    host.run("chmod 644 /etc/llamastead/api-key")
    assert scripts.run(KEY).code == 0
    assert host.run("stat -c %a /etc/llamastead/api-key").stdout == "600\n"
