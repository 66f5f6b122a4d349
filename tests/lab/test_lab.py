"""The lab itself: hosts boot, the outside answers, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import RTX_5090, Fault, Lab, LabError, LabHost
from tests.lab.gguf_model import MODEL_NAME
from tests.lab.llama_source import LLAMA_CPP_TAG, NEXT_TAG
from tests.lab.machine import cgroup_root

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab(worker_id: str) -> Iterator[Lab]:
    lab = Lab(f"selftest-{worker_id}")
    lab.down()  # what a killed run left
    with lab:
        yield lab


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    return lab.host("debian-13")


@pytest.fixture(scope="module")
def bookworm(lab: Lab) -> LabHost:
    return lab.host("debian-12")


@pytest.fixture
def _healed(lab: Lab) -> Iterator[None]:
    yield
    lab.outside.heal()


class TestHost:
    @pytest.mark.parametrize("fixture", ["host", "bookworm"])
    def test_has_a_real_systemd(self, fixture: str, request: pytest.FixtureRequest) -> None:
        host: LabHost = request.getfixturevalue(fixture)
        assert host.run("systemctl is-system-running").stdout.strip() == "running"
        assert host.run("cat /proc/1/comm").stdout.strip() == "systemd"
        release = (host.root / "etc/os-release").read_text()
        assert f'VERSION_ID="{host.distribution.removeprefix("debian-")}"' in release

    def test_is_reached_by_ssh(self, host: LabHost) -> None:
        assert host.ssh("id -un").stdout == "root\n"
        assert host.ssh("exit 7").returncode == 7

    def test_has_a_user_whose_sudo_wants_a_password(self, host: LabHost) -> None:
        assert host.ssh("sudo -n id -un", user=host.admin_user).returncode != 0
        command = f"echo '{host.admin_password}' | sudo -S id -un"
        assert host.ssh(command, user=host.admin_user).stdout == "root\n"

    def test_knows_no_proxy_and_no_name_server(self, host: LabHost) -> None:
        assert host.run("env | grep -i _proxy", check=False).stdout == ""
        assert host.run("apt-config dump | grep -i proxy", check=False).stdout == ""
        assert host.run("getent hosts mirror.example", check=False).returncode == 2

    def test_can_run_sandboxed_services(self, host: LabHost) -> None:
        sandbox = "-p DynamicUser=yes -p ProtectSystem=strict -p PrivateTmp=yes"
        limits = "-p SystemCallFilter=@system-service -p IPAddressDeny=any"
        done = host.run(f"systemd-run --quiet --wait --pipe {sandbox} {limits} id -u")
        assert 61184 <= int(done.stdout) <= 65519  # the range of dynamic users

    def test_reaches_its_neighbours(self, host: LabHost, bookworm: LabHost) -> None:
        assert host.reaches(bookworm.address, 22)
        assert not host.reaches(bookworm.address, 23)

    def test_bare_has_little_but_ssh(self, lab: Lab) -> None:
        host = lab.host(variant="bare")
        assert host.ssh("systemctl is-system-running").stdout == "running\n"
        assert host.run("command -v python3 curl wget git", check=False).stdout == ""
        host.remove()
        assert host.name not in [other.name for other in lab.hosts()]
        assert not host.directory.exists()

    def test_is_found_again(self, lab: Lab, host: LabHost) -> None:
        began = time.monotonic()
        assert lab.host("debian-13").address == host.address
        assert time.monotonic() - began < 1
        with pytest.raises(LabError, match="is debian-13"):
            lab.host("debian-12", name=host.name)


class TestPower:
    def test_cut_leaves_the_disk(self, host: LabHost) -> None:
        host.run("echo text >/var/kept; sync")
        host.kill()
        assert not host.is_running
        with pytest.raises(LabError, match="not running"):
            host.run("true")
        host.start()
        assert host.run("cat /var/kept").stdout == "text\n"

    def test_off_and_on(self, host: LabHost) -> None:
        host.run("systemd-run --unit=long --property='ExecStop=touch /var/stopped' sleep infinity")
        host.poweroff()
        assert not host.is_running
        assert (host.root / "var/stopped").exists()
        host.start()
        assert host.run("systemctl is-system-running").stdout == "running\n"

    def test_pretended_hardware_survives_it(self, host: LabHost) -> None:
        host.plug_in_pci([RTX_5090])
        host.pretend_kernel_release("6.6.87.2-microsoft-standard-WSL2")
        for _ in range(2):
            assert host.run("cat /sys/bus/pci/devices/*/device").stdout == "0x2b85\n"
            assert host.run("cat /proc/sys/kernel/osrelease").stdout.endswith("WSL2\n")
            host.reboot()


class TestOutside:
    @pytest.mark.parametrize("fixture", ["host", "bookworm"])
    def test_packages_come_through_the_proxy(
        self, lab: Lab, fixture: str, request: pytest.FixtureRequest
    ) -> None:
        host: LabHost = request.getfixturevalue(fixture)
        proxy = f"-o Acquire::http::Proxy={lab.outside.proxy_url}"
        host.run(f"apt-get {proxy} --quiet update")
        host.run(f"apt-get {proxy} --quiet --yes --no-install-recommends install git")

    def test_nothing_else_does(self, lab: Lab, host: LabHost) -> None:
        for target in ("http://mirror.example/", "http://127.0.0.1:22/", f"http://{host.address}/"):
            code = f"curl --silent --proxy {lab.outside.proxy_url} -w '%{{http_code}}' {target}"
            assert host.run(code).stdout == "403"

    def test_llama_cpp_is_fetched_by_commit(self, lab: Lab, host: LabHost) -> None:
        outside = lab.outside
        folder = "cd $(mktemp -d) && git init --quiet"
        fetch = f"git fetch --quiet --depth 1 {outside.git_url} {outside.llama_cpp_commit}"
        show = "git show --no-patch --format=%H FETCH_HEAD && git ls-tree --name-only FETCH_HEAD"
        lines = host.run(f"{folder} && {fetch} && {show}").stdout.splitlines()
        assert lines[0] == outside.llama_cpp_commit
        assert "CMakeLists.txt" in lines

    def test_llama_cpp_has_two_tags(self, lab: Lab, host: LabHost) -> None:
        outside = lab.outside
        lines = host.run(f"git ls-remote {outside.git_url}").stdout.splitlines()
        refs = {ref: commit for commit, ref in (line.split() for line in lines)}
        assert refs[f"refs/tags/{LLAMA_CPP_TAG}"] == outside.llama_cpp_commit
        assert refs[f"refs/tags/{NEXT_TAG}"] == outside.next_commit == refs["refs/heads/master"]
        assert refs[f"refs/tags/{LLAMA_CPP_TAG}"] != refs[f"refs/tags/{NEXT_TAG}"]

    def test_tests_can_add_commits(self, lab: Lab, host: LabHost) -> None:
        outside = lab.outside
        commit = outside.repository.commit({"broken.txt": "text\n"}, tag="b10001")
        assert commit in host.run(f"git ls-remote {outside.git_url} b10001").stdout

    @pytest.mark.usefixtures("_healed")
    @pytest.mark.parametrize("by_proxy", [False, True])
    def test_an_interrupted_download_is_resumed(
        self, lab: Lab, host: LabHost, *, by_proxy: bool
    ) -> None:
        outside = lab.outside
        outside.play(Fault(f"/{MODEL_NAME}", cut_after=1_000_000, times=1))
        proxy = f"--proxy {outside.proxy_url}" if by_proxy else ""
        download = f"curl --silent {proxy} --continue-at - --output /tmp/model {outside.model_url}"
        host.run("rm -f /tmp/model")
        assert host.run(download, check=False).returncode == 18
        assert host.run("stat -c %s /tmp/model").stdout == "1000000\n"
        host.run(download)
        assert host.run("sha256sum /tmp/model").stdout.split()[0] == outside.model_sha256
        ranges = [access.range for access in outside.requests("web")]
        assert ranges[-1] == "bytes=1000000-"


def traces(lab: Lab, number: int) -> list[str]:
    """What there is of a lab on this machine."""
    bridge = f"llamalab{number}"
    root = cgroup_root()
    assert root is not None
    places = [
        Path("/sys/class/net") / bridge,
        root / bridge,
        Path("/sys/fs/cgroup/systemd") / bridge,
        lab.directory,
        *Path("/run/systemd/nspawn").glob(f"*/lab{number}-*"),
    ]
    found = [str(place) for place in places if place.exists()]
    found += [
        line
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if str(lab.directory) in line
    ]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if str(lab.directory) in command:
            found.append(command)
    return found


def killed_while_coming_up(name: str, seconds: float) -> Lab:
    """A lab whose maker was killed that long after it had begun."""
    script = f"from tests.lab import Lab; Lab({name!r}).host('debian-13')"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return Lab(name)


class TestDown:
    @pytest.fixture
    def name(self, worker_id: str) -> str:
        return f"selftest-{worker_id}-down"

    def test_leaves_nothing(self, name: str) -> None:
        lab = Lab(name)
        with lab:
            lab.host("debian-13")
            number = lab.network.number
            assert traces(lab, number)
        assert traces(lab, number) == []
        lab.down()

    @pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8, 1.2])
    def test_leaves_nothing_of_one_whose_maker_was_killed(self, name: str, seconds: float) -> None:
        lab = killed_while_coming_up(name, seconds)
        number = lab.network.number if lab.is_up else 0
        lab.down()
        assert traces(lab, number) == []

    def test_is_not_needed_before_it_comes_up_again(self, name: str) -> None:
        with killed_while_coming_up(name, 0.7) as lab:
            assert lab.host("debian-13").ssh("id -un").stdout == "root\n"
            assert lab.outside.is_running

    def test_does_not_touch_other_labs(self, lab: Lab, host: LabHost, name: str) -> None:
        with Lab(name) as other:
            assert other.network.number != lab.network.number
            assert other.host("debian-13").address != host.address
        assert host.run("systemctl is-system-running").stdout == "running\n"
        assert lab.outside.is_running
