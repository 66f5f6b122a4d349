"""NVIDIA's part of a deploy, through real apt with real signatures, on a pretended RTX 5090.

The packages are shells (tests/lab/nvidia_packages.py): what is shown is the way, not CUDA.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.rules import build, tables
from tasks.rules.plan import RUNTIME_PACKAGES
from tests.e2e import deploys
from tests.e2e.deploys import Run
from tests.e2e.snapshots import changes, snapshot
from tests.lab import RTX_5090, Distribution, Fault, Lab, LabHost, pretences
from tests.lab.deb import Package
from tests.lab.kernel import offer_headers
from tests.lab.nvidia_repository import NvidiaRepository, signing_key

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SCRIPT = "tests/e2e/nvidia_stack.py"
DRIVER = {"debian12": "580.178.04", "debian13": "595.99.02"}
"""What is chosen for an RTX 5090: in the repositories there are newer ones."""
CACHE = ("/var/cache/llamastead", "/var/cache/man", "/var/lib/logrotate")
"""Where a rehearsal may leave downloads, and what Debian's own timers do."""


@dataclass(frozen=True)
class Site:
    """A host with a card and nothing of NVIDIA's yet, and the repositories that it sees."""

    lab: Lab
    host: LabHost
    nvidia: NvidiaRepository
    folder: Path

    @property
    def repository(self) -> str:
        """debian12 or debian13."""
        return self.host.distribution.replace("-", "")

    def run(self, script: str = SCRIPT, **data: Any) -> Run:
        """Deploy NVIDIA's part."""
        merged = {
            **deploys.access(self.lab, self.host),
            **deploys.wanted(self.lab),
            **self.nvidia.settings,
            **data,
        }
        inventory = deploys.write_inventory(self.folder, {self.host.name: merged})
        return deploys.run(inventory, script)

    def refused(self, **data: Any) -> str:
        """Deploy, and expect one error line, exit 1, and nothing changed. The line."""
        # What an earlier refusal left would not be fetched again.
        self.host.run("mkdir -p /var/cache/llamastead && rm -rf /var/cache/llamastead/apt")
        before = snapshot(self.host)
        run = self.run(**data)
        assert run.code == 1, run.said[-4000:]
        assert "Traceback" not in run.said
        assert len(run.errors) == 1, run.errors
        assert changes(before, snapshot(self.host), CACHE) == []
        return run.errors[0]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("nvidia")
    lab.down()  # what a killed run left
    with lab:
        yield lab


def make_site(lab: Lab, name: str, distribution: Distribution, folder: Path) -> Site:
    host = lab.host(distribution, name=name)
    # Everything else that a deploy would install, so that what is seen to change is NVIDIA's.
    packages = " ".join({*build.PACKAGES, *RUNTIME_PACKAGES})
    host.run(
        f"export http_proxy={lab.outside.proxy_url} DEBIAN_FRONTEND=noninteractive; "
        f"apt-get -qq update && apt-get -qq -y --no-install-recommends install {packages}",
        timeout=600,
    )
    return Site(lab, host, NvidiaRepository(lab.outside).publish(), folder)


@pytest.fixture(scope="module", params=["debian-13", "debian-12"])
def site(
    lab: Lab, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Site:
    distribution: Distribution = request.param
    site = make_site(lab, distribution, distribution, tmp_path_factory.mktemp(distribution))
    site.host.plug_in_pci([RTX_5090])
    offer_headers(lab.outside, site.host)
    return site


@pytest.fixture(autouse=True)
def _whole_again(lab: Lab) -> Iterator[None]:
    """Each test finds the repositories as they should be."""
    NvidiaRepository(lab.outside).publish()
    yield
    lab.outside.heal()


class TestRefused:
    """One clear line, and the host is as it was."""

    def test_another_key_beside_the_repository(self, site: Site) -> None:
        site.nvidia.show_key(site.repository, "stranger")
        line = site.refused()
        assert "is not the key of NVIDIA's CUDA repository: it has the fingerprint" in line
        assert signing_key("stranger").fingerprint in line

    def test_a_page_instead_of_the_key(self, site: Site) -> None:
        site.nvidia.show_key(site.repository, None)
        assert "it is no OpenPGP key" in site.refused()

    def test_a_repository_signed_with_another_key(self, site: Site) -> None:
        site.nvidia.sign(site.repository, "stranger")
        assert "it is signed with another key" in site.refused()

    def test_an_expired_signature(self, site: Site) -> None:
        site.nvidia.sign(site.repository, expired=True)
        assert "its signature has expired" in site.refused()

    def test_a_list_of_packages_that_was_changed(self, site: Site) -> None:
        site.nvidia.tamper(site.repository)
        assert "is not what was signed (hash sum mismatch)" in site.refused()

    @pytest.mark.parametrize("what", ["InRelease", "Packages*", "*.pub"])
    def test_404(self, site: Site, what: str) -> None:
        names = ["*/Release*", "*/InRelease"] if what == "InRelease" else [f"*/{what}"]
        for name in names:
            site.lab.outside.play(Fault(f"/nvidia/compute/{name}", status=404))
        line = site.refused()
        assert "404" in line or "there is none at" in line

    def test_a_package_that_arrives_half(self, site: Site) -> None:
        site.lab.outside.play(Fault("/nvidia/*/nvidia-kernel-open-dkms_*", cut_after=300))
        line = site.refused()
        assert "packages cannot be had" in line
        assert "nvidia-kernel-open-dkms" in line

    def test_a_package_that_was_changed(self, site: Site) -> None:
        site.lab.outside.play(Fault("/nvidia/*/cuda-nvcc-13-2_*", corrupt_at=300))
        assert "hash sum mismatch" in site.refused().lower()

    def test_a_dependency_that_brings_a_driver_along(self, site: Site) -> None:
        site.nvidia.add(
            site.repository,
            Package("cuda-cccl-13-2", "13.2.99-1", ["cuda-drivers-fabricmanager"]),
            Package("cuda-drivers-fabricmanager", "595.99.02-1"),
        )
        assert "apt would install cuda-drivers-fabricmanager: " in site.refused()

    def test_something_of_the_users_in_the_way(self, site: Site) -> None:
        site.nvidia.add(
            site.repository, Package("cuda-cccl-13-2", "13.2.99-1", conflicts=["ccache"])
        )
        assert "apt would remove ccache" in site.refused()

    def test_only_a_patch_release_with_a_known_fault(self, site: Site) -> None:
        for file in site.nvidia.folder(site.repository).glob("cuda-toolkit-13-2_13.2.2*"):
            file.unlink()
        site.nvidia.add(site.repository)
        line = site.refused()
        assert "has cuda-toolkit-13-2 13.2.1, not 13.2.2 or newer" in line

    def test_no_headers_for_the_running_kernel(self, site: Site) -> None:
        site.host.run("mv /etc/apt/sources.list.d/lab-kernel.sources /root/")
        try:
            line = site.refused()
        finally:
            site.host.run("mv /root/lab-kernel.sources /etc/apt/sources.list.d/")
        assert "the archive has no package linux-headers-" in line
        assert "reboot" in line


@pytest.fixture(scope="module")
def installed(site: Site) -> tuple[Site, Run]:
    """The site after the first deploy, which ends with the need to reboot."""
    site.nvidia.publish()
    # Of another time: the same repository in the old form, which would contradict ours.
    old = f"deb [trusted=yes] {site.nvidia.settings['cuda_repo_url']}/{site.repository}/x86_64/ /"
    site.host.run(f"echo '{old}' >/etc/apt/sources.list.d/cuda-old.list")
    return site, site.run()


@pytest.fixture
def rebooted(installed: tuple[Site, Run]) -> Site:
    """As it would be after the reboot: the driver is loaded."""
    site, _ = installed
    pretences.load_driver(site.host, DRIVER[site.repository])
    return site


class TestInstalled:
    def test_in_the_right_order(self, installed: tuple[Site, Run]) -> None:
        _, run = installed
        operations = re.findall(r"Starting operation: .*? \| (.*?) *$", run.said, re.MULTILINE)
        wanted = ["Rehearse", "Take back", "Trust", "Read", "Remember", "Pin driver"]
        wanted += ["Install driver", "Check", "Keep", "Install CUDA 13.2.2", "Remove", "Load"]
        assert len(operations) == len(wanted)
        assert [
            name
            for name, start in zip(operations, wanted, strict=True)
            if not name.startswith(start)
        ] == []

    def test_it_ends_with_one_line_about_the_reboot(self, installed: tuple[Site, Run]) -> None:
        site, run = installed
        assert run.code == 1
        (line,) = run.errors
        assert f"reboot needed: driver {DRIVER[site.repository]} is installed" in line

    def test_until_then_it_says_so_again_and_changes_nothing(
        self, installed: tuple[Site, Run]
    ) -> None:
        site, _ = installed
        assert "reboot needed" in site.refused()

    def test_a_second_run_changes_nothing(self, rebooted: Site) -> None:
        again = rebooted.run()
        assert again.code == 0, again.said[-4000:]
        assert again.changed == []
        assert len(again.commands) <= 6, again.commands

    def test_the_driver_is_of_the_branch_that_was_chosen(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        version = DRIVER[site.repository]
        told = site.host.run(
            "dpkg-query -W nvidia-driver-cuda nvidia-kernel-open-dkms libcuda1 "
            f"nvidia-driver-pinning-{version.partition('.')[0]} | cut -f2"
        ).stdout.split()
        assert told == [f"{version}-1"] * 4

    def test_its_modules_are_compiled_for_the_running_kernel(
        self, installed: tuple[Site, Run]
    ) -> None:
        site, _ = installed
        kernel = site.host.run("uname -r").stdout.strip()
        assert re.search(
            rf"^nvidia/\S+, {re.escape(kernel)}, x86_64: installed",
            site.host.run("dkms status").stdout,
            re.MULTILINE,
        )
        assert site.host.run("modinfo -F version nvidia").stdout.strip() == DRIVER[site.repository]

    def test_it_is_held_awake_and_has_the_card_for_itself(
        self, installed: tuple[Site, Run]
    ) -> None:
        site, _ = installed
        held = site.host.run("apt-mark showhold").stdout.split()
        assert {"libcuda1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms"} <= set(held)
        assert not [name for name in held if name.startswith(("cuda-", "linux-"))]
        config = site.host.run("apt-config dump | grep Package-Blacklist").stdout
        assert '"nvidia-"' in config
        assert '"libnvidia-"' in config
        assert "blacklist nouveau" in site.host.run("modprobe --showconfig").stdout
        units = "nvidia-persistenced nvidia-suspend nvidia-hibernate nvidia-resume"
        assert site.host.run(f"systemctl is-enabled {units}").stdout.split() == ["enabled"] * 4

    def test_the_toolkit_is_the_smallest_that_compiles(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        assert "V13.2.86" in site.host.run("/usr/local/cuda-13.2/bin/nvcc --version").stdout
        names = site.host.run("dpkg-query -W -f '${Package}\\n'").stdout.split()
        assert "libcublas-dev-13-2" in names
        for never in (
            "cuda",
            "cuda-13-2",
            "cuda-drivers",
            "cuda-runtime-13-2",
            "cuda-toolkit-13-2",
        ):
            assert never not in names

    def test_apt_trusts_exactly_the_right_key_for_it(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        name = f"cuda-{site.repository}-x86_64"
        source = site.host.run(f"cat /etc/apt/sources.list.d/{name}.sources").stdout
        assert "Signed-By: /usr/share/keyrings/cuda-archive-keyring.gpg" in source
        assert "Trusted" not in source
        old = site.host.run("cat /etc/apt/sources.list.d/cuda-old.list").stdout
        assert old.startswith("# ")
        pin = site.host.run("cat /etc/apt/preferences.d/cuda-repository-pin-600").stdout
        assert "Pin: release l=NVIDIA CUDA\nPin-Priority: 600" in pin
        proxy = f"-o Acquire::http::Proxy={site.lab.outside.proxy_url}"
        told = site.host.run(f"apt-get {proxy} update 2>&1").stdout
        assert "W:" not in told
        assert "E:" not in told

    def test_nothing_is_left_of_the_rehearsal(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        assert site.host.run("ls -A /var/cache/llamastead").stdout.split() == []
        assert site.host.run("ls /var/lib/llamastead").stdout.split() == ["driver-is-ours"]


class TestLater:
    """On a host that has it all."""

    def test_what_somebody_undid_is_put_right(self, rebooted: Site) -> None:
        host = rebooted.host
        host.run(
            "apt-mark unhold libcuda1; systemctl disable --quiet nvidia-resume; "
            "rm /etc/apt/apt.conf.d/52llamastead-nvidia"
        )
        mended = rebooted.run()
        assert mended.code == 0
        assert len(mended.changed) == 1
        assert "libcuda1" in host.run("apt-mark showhold").stdout
        assert rebooted.run().changed == []

    def test_a_power_cut_in_dpkg_is_repaired(self, rebooted: Site) -> None:
        host = rebooted.host
        host.run(
            "set -e; cd /tmp; mkdir -p cut/DEBIAN; "
            "printf 'Package: cut-short\\nVersion: 1\\nArchitecture: all\\nMaintainer: x\\n"
            "Description: x\\n' >cut/DEBIAN/control; dpkg-deb -b cut cut.deb; "
            "dpkg --unpack cut.deb; echo 'install cuda-nvprune-13-2' >/dev/null; "
            "echo '--no-install-recommends install cuda-tools-13-2' "
            ">/var/lib/llamastead/apt.pending"
        )
        mended = rebooted.run()
        assert mended.code == 0, mended.said[-3000:]
        told = host.run("dpkg-query -W -f '${db:Status-Abbrev} ' cut-short cuda-tools-13-2")
        assert told.stdout.split() == ["ii", "ii"]
        assert rebooted.run().changed == []

    def test_locks_of_apt_are_waited_for(self, rebooted: Site) -> None:
        host = rebooted.host
        host.run("apt-get -qq -y purge cuda-nvcc-13-2 cuda-tools-13-2")
        hold = (
            "import fcntl, time\n"
            "names = ['/var/lib/apt/lists/lock', '/var/lib/dpkg/lock-frontend']\n"
            "held = [open(name, 'w') for name in names]\n"
            "[fcntl.lockf(file, fcntl.LOCK_EX) for file in held]\n"
            "time.sleep(25)\n"
        )
        host.run(f"systemd-run -q --unit=lock-holder python3 -c {hold!r}".replace("\\n", "\n"))
        waited = rebooted.run()
        assert waited.code == 0, waited.said[-3000:]
        assert host.run("systemctl is-active lock-holder", check=False).stdout.strip() != "active"
        assert host.run("test -e /usr/local/cuda-13.2/bin/nvcc", check=False).returncode == 0

    def test_the_retired_key_is_taken_out(self, rebooted: Site) -> None:
        """With a stranger's key in its place, whose secret half is lost."""
        host, retired = rebooted.host, signing_key("stranger")
        both = retired.binary + signing_key("container").binary
        host.run("base64 -d >/etc/apt/trusted.gpg.d/old.gpg", stdin=_base64(both))
        host.run("base64 -d >/etc/apt/trusted.gpg.d/only.gpg", stdin=_base64(retired.binary))
        code = rebooted.folder / "retired.py"
        code.write_text(
            "from dataclasses import replace\n"
            "from tasks.operations import repositories\n"
            "from tasks.rules import tables\n"
            f"retired = replace(tables.key('cuda-retired'), fingerprint='{retired.fingerprint}')\n"
            "tables.key = lambda name: retired\n"
            "folder = '/etc/apt/trusted.gpg.d/'\n"
            "repositories.without_retired_key([folder + 'old.gpg', folder + 'only.gpg'])\n"
        )
        run = rebooted.run(str(code))
        assert run.code == 0, run.said[-3000:]
        left = host.run("cd /etc/apt/trusted.gpg.d && ls && base64 -w0 old.gpg").stdout.split()
        host.run("rm /etc/apt/trusted.gpg.d/old.gpg")
        assert "only.gpg" not in left
        assert left[-1] == _base64(signing_key("container").binary)

    def test_a_local_installer_is_used_and_taken_away(self, rebooted: Site) -> None:
        host = rebooted.host
        made = rebooted.nvidia.local_installer(rebooted.repository, "13.3.1")
        data = {
            "cuda_version": "13.3.1",
            "cuda_install_method": "local",
            "cuda_local_installer_url": made.url,
        }
        wrong = rebooted.run(**data, cuda_local_installer_sha256="0" * 64)
        assert wrong.code == 1
        assert "has SHA-256" in wrong.said
        assert "cuda-repo" not in host.run("dpkg -l").stdout
        run = rebooted.run(**data, cuda_local_installer_sha256=made.sha256)
        assert run.code == 0, run.said[-4000:]
        assert "V13.3.73" in host.run("/usr/local/cuda-13.3/bin/nvcc --version").stdout
        left = host.run(
            "ls -d /var/cuda-repo-* /etc/apt/sources.list.d/*local* "
            "/etc/apt/preferences.d/*local* /usr/share/keyrings/cuda-????????-keyring.gpg "
            "/var/cache/llamastead/*",
            check=False,
        )
        assert left.stdout == ""
        assert "cuda-repo" not in host.run("dpkg -l").stdout
        again = rebooted.run(**data, cuda_local_installer_sha256=made.sha256)
        assert (again.code, again.changed) == (0, [])

    def test_pretended_engines_get_the_container_toolkit(self, rebooted: Site) -> None:
        host = rebooted.host
        pretences.run_docker(host)
        if rebooted.repository == "debian12":
            pretences.have_podman(host, "4.3.1")  # which reads CDI up to 0.6
        version = "1.19.0-1" if rebooted.repository == "debian12" else "1.20.0-1"
        run = rebooted.run()
        assert run.code == 0, run.said[-4000:]
        names = "nvidia-container-toolkit nvidia-container-toolkit-base "
        names += "libnvidia-container-tools libnvidia-container1"
        assert host.run(f"dpkg-query -W {names} | cut -f2").stdout.split() == [version] * 4
        assert set(names.split()) <= set(host.run("apt-mark showhold").stdout.split())
        assert '"nvidia"' in host.run("cat /etc/docker/daemon.json").stdout
        assert host.run("cat /var/log/docker-reloads").stdout == "reloaded\n"
        assert host.run("systemctl show docker -p NRestarts --value").stdout == "0\n"
        if rebooted.repository == "debian12":
            assert host.run("cat /var/run/cdi/nvidia.yaml").stdout
            assert host.run("systemctl is-enabled nvidia-cdi-refresh.path").stdout == "enabled\n"
        assert "was not tried" in run.said
        again = rebooted.run()
        assert (again.code, again.changed) == (0, [])


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


class TestWsl:
    """Inside a pretended WSL: the toolkit, and nothing of a Linux driver, ever."""

    @pytest.fixture(scope="class")
    def inside(self, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Site:
        site = make_site(lab, "wsl", "debian-12", tmp_path_factory.mktemp("wsl"))
        pretences.enter_wsl(site.host, "595.10")
        return site

    def test_the_toolkit_and_no_driver(self, inside: Site) -> None:
        run = inside.run()
        assert run.code == 0, run.said[-4000:]
        names = inside.host.run("dpkg-query -W -f '${Package}\\n'").stdout.split()
        assert "cuda-nvcc-13-2" in names
        assert [name for name in names if tables.forbidden(name, wsl=True)] == []
        source = inside.host.run("cat /etc/apt/sources.list.d/cuda-*.sources").stdout
        assert "/wsl-ubuntu/x86_64/" in source
        assert not inside.host.run("ls /etc/modprobe.d | grep llamastead", check=False).stdout
        assert "reboot" not in run.said.lower()

    def test_a_second_run_changes_nothing(self, inside: Site) -> None:
        again = inside.run()
        assert (again.code, again.changed) == (0, [])
