"""NVIDIA's part of a deploy, through real apt with real signatures, on pretended RTX 5090s.

The packages are shells (tests/lab/nvidia_packages.py): what is shown is the way, not CUDA. Each run
is of Debian 13 and 12 at a time, as a user with several hosts has them.
"""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tasks.rules import tables
from tests.e2e import deploys
from tests.e2e.deploys import Run
from tests.e2e.snapshots import changes, snapshot
from tests.lab import RTX_5090, Fault, Lab, LabHost, pretences
from tests.lab.deb import Package
from tests.lab.kernel import offer_headers
from tests.lab.nvidia_repository import NvidiaRepository, signing_key

pytestmark = pytest.mark.lab

T = TypeVar("T")

SCRIPT = "tests/e2e/nvidia_stack.py"
DRIVER = {"debian-12": "580.178.04", "debian-13": "595.99.02"}
"""What is chosen for an RTX 5090: in the repositories there are newer ones."""
CACHE = ("/var/cache/llamastead", "/var/cache/man", "/var/lib/logrotate")
"""Where a rehearsal may leave downloads, and what Debian's own timers do."""
KEYRINGS = "/etc/apt/trusted.gpg.d"


@dataclass(frozen=True)
class Site:
    """Hosts with a card and nothing of NVIDIA's yet, and the repositories that they see."""

    lab: Lab
    hosts: tuple[LabHost, ...]
    """Debian 13 and 12, which the card is plugged into."""
    wsl: LabHost
    """Debian 12 inside WSL, where the card is in Windows."""
    nvidia: NvidiaRepository
    folder: Path
    fresh: Mapping[str, str]
    """Snapshots of the hosts before anything was deployed."""

    def run(
        self,
        *hosts: LabHost,
        script: str = SCRIPT,
        each: Callable[[LabHost], dict[str, Any]] = lambda _: {},
        **data: Any,
    ) -> Run:
        """Deploy NVIDIA's part to some hosts, else to those with a card."""
        inventory = deploys.write_inventory(
            self.folder,
            {
                host.name: {
                    **deploys.access(self.lab, host),
                    **deploys.wanted(self.lab),
                    **self.nvidia.settings,
                    **data,
                    **each(host),
                }
                for host in hosts or self.hosts
            },
        )
        return deploys.run(inventory, script)

    def refused(
        self, *hosts: LabHost, before: Mapping[str, str] | None = None, **data: Any
    ) -> list[str]:
        """Deploy, and expect of each host one error line, and that nothing changed since before.

        Returns the lines.
        """
        hosts = hosts or self.hosts
        # What an earlier refusal left would not be fetched again.
        on_each(hosts, lambda host: host.run("rm -rf /var/cache/llamastead/apt"))
        run = self.run(*hosts, **data)
        assert run.code == 1, run.said[-4000:]
        assert "Traceback" not in run.said
        assert [len(run.errors_on(host)) for host in hosts] == [1] * len(hosts), run.errors
        before, after = before or self.fresh, snapshots(hosts)
        for host in hosts:
            assert changes(before[host.name], after[host.name], CACHE) == []
        return [run.errors_on(host)[0] for host in hosts]


def on_each(hosts: tuple[LabHost, ...], do: Callable[[LabHost], T]) -> list[T]:
    """Do something on all hosts at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(do, hosts))


def snapshots(hosts: tuple[LabHost, ...]) -> dict[str, str]:
    """Snapshots, by the host's name."""
    names = (host.name for host in hosts)
    return dict(zip(names, on_each(hosts, snapshot), strict=True))


def repository(host: LabHost) -> str:
    """What NVIDIA calls the repository for a host: debian12, debian13."""
    return host.distribution.replace("-", "")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("nvidia")
    lab.down()  # what a killed run left
    with lab:
        yield lab


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    hosts = (lab.host("debian-13"), lab.host("debian-12"))
    wsl = lab.host("debian-12", name="wsl")
    pretences.enter_wsl(wsl, "595.10")
    for host in hosts:
        host.plug_in_pci([RTX_5090])
        offer_headers(lab.outside, host)
    everyone = (*hosts, wsl)
    # dpkg's locks are files, which an overlay counts as changed by whoever takes them first.
    prepare = "mkdir -p /var/cache/llamastead && dpkg --configure -a"
    on_each(everyone, lambda host: host.run(prepare))
    nvidia = NvidiaRepository(lab.outside).publish()
    folder = tmp_path_factory.mktemp("nvidia")
    return Site(lab, hosts, wsl, nvidia, folder, snapshots(everyone))


@pytest.fixture(autouse=True)
def _whole_again(lab: Lab) -> Iterator[None]:
    """Each test finds the repositories as they should be."""
    NvidiaRepository(lab.outside).publish()
    yield
    lab.outside.heal()


class TestRefused:
    """One clear line, and the host is as it was."""

    def test_another_key_beside_the_repository(self, site: Site) -> None:
        for host in site.hosts:
            site.nvidia.show_key(repository(host), "stranger")
        for line in site.refused():
            assert "is not the key of NVIDIA's CUDA repository: it has the fingerprint" in line
            assert signing_key("stranger").fingerprint in line

    def test_a_page_instead_of_the_key(self, site: Site) -> None:
        for host in site.hosts:
            site.nvidia.show_key(repository(host), None)
        for line in site.refused():
            assert "it is no OpenPGP key" in line

    def test_a_repository_signed_with_another_key(self, site: Site) -> None:
        for host in site.hosts:
            site.nvidia.sign(repository(host), "stranger")
        for line in site.refused():
            assert "it is signed with another key" in line

    def test_an_expired_signature(self, site: Site) -> None:
        for host in site.hosts:
            site.nvidia.sign(repository(host), expired=True)
        for line in site.refused():
            assert "its signature has expired" in line

    def test_a_list_of_packages_that_was_changed(self, site: Site) -> None:
        for host in site.hosts:
            site.nvidia.tamper(repository(host))
        for line in site.refused():
            assert "is not what was signed (hash sum mismatch)" in line

    @pytest.mark.parametrize("what", ["InRelease", "Packages*", "*.pub"])
    def test_404(self, site: Site, what: str) -> None:
        names = ["*/Release*", "*/InRelease"] if what == "InRelease" else [f"*/{what}"]
        for name in names:
            site.lab.outside.play(Fault(f"/nvidia/compute/{name}", status=404))
        for line in site.refused():
            assert "404" in line or "there is none at" in line

    def test_a_package_that_arrives_half(self, site: Site) -> None:
        site.lab.outside.play(Fault("/nvidia/*/nvidia-kernel-open-dkms_*", cut_after=300))
        for line in site.refused():
            assert "packages cannot be had" in line
            assert "nvidia-kernel-open-dkms" in line

    def test_a_package_that_was_changed(self, site: Site) -> None:
        site.lab.outside.play(Fault("/nvidia/*/cuda-nvcc-13-2_*", corrupt_at=300))
        for line in site.refused():
            assert "hash sum mismatch" in line

    def test_a_dependency_that_brings_a_driver_along(self, site: Site) -> None:
        """Also inside WSL, where it would hide the driver of Windows."""
        for name in (*map(repository, site.hosts), "wsl-ubuntu"):
            site.nvidia.add(
                name,
                Package("cuda-cccl-13-2", "13.2.99-1", ["cuda-drivers-fabricmanager"]),
                Package("cuda-drivers-fabricmanager", "595.99.02-1"),
            )
        for line in site.refused(*site.hosts, site.wsl):
            assert "apt would install cuda-drivers-fabricmanager: " in line

    def test_something_of_the_users_in_the_way(self, site: Site) -> None:
        for host in site.hosts:
            package = Package("cuda-cccl-13-2", "13.2.99-1", conflicts=["curl"])
            site.nvidia.add(repository(host), package)
        for line in site.refused():
            assert "apt would remove curl" in line

    def test_only_a_patch_release_with_a_known_fault(self, site: Site) -> None:
        for name in map(repository, site.hosts):
            for file in site.nvidia.folder(name).glob("cuda-toolkit-13-2_13.2.2*"):
                file.unlink()
            site.nvidia.add(name)
        for line in site.refused():
            assert "has cuda-toolkit-13-2 13.2.1, not 13.2.2 or newer" in line

    def test_no_headers_for_the_running_kernel(self, site: Site) -> None:
        site.lab.outside.play(Fault("/kernel/*", status=404))
        for line in site.refused():
            assert "the archive has no package linux-headers-" in line
            assert "reboot" in line

    def test_secure_boot_that_would_refuse_the_modules(self, site: Site) -> None:
        for host in site.hosts:
            pretences.switch_secure_boot(host, on=True)
        try:
            lines = site.refused()
        finally:
            for host in site.hosts:
                pretences.switch_secure_boot(host, on=False)
        for line in lines:
            assert "Secure Boot is on" in line
            assert "mokutil --import /var/lib/dkms/mok.pub" in line


@pytest.fixture(scope="module")
def installed(site: Site) -> tuple[Site, Run]:
    """The site after the first deploy, which ends with the need to reboot."""
    site.nvidia.publish()
    for host in site.hosts:
        # Of another time: the same repository in the old form, which would contradict ours.
        url = f"{site.nvidia.settings['cuda_repo_url']}/{repository(host)}/x86_64/"
        host.run(f"echo 'deb [trusted=yes] {url} /' >/etc/apt/sources.list.d/cuda-old.list")
    packages = {site.wsl.name: "full"}
    return site, site.run(
        *site.hosts,
        site.wsl,
        each=lambda host: {"cuda_packages": packages.get(host.name, "minimal")},
    )


@pytest.fixture
def rebooted(installed: tuple[Site, Run]) -> Site:
    """As it would be after the reboot: the driver is loaded."""
    site, _ = installed
    for host in site.hosts:
        pretences.load_driver(host, DRIVER[host.distribution])
    return site


class TestInstalled:
    def test_in_the_right_order(self, installed: tuple[Site, Run]) -> None:
        site, run = installed
        for host in site.hosts:
            wanted = [
                "Take the host's lock",
                "Rehearse the installation, and fetch what it needs",
                "Take back older sources",
                "Trust NVIDIA's repositories",
                "Read the package lists",
                "Remember that the driver is ours",
                "Pin driver",
                "Install driver",
                "Check the kernel modules",
                "Keep the driver as it is",
                "Install CUDA 13.2.2",
                "Remove what is installed by now from the cache",
                "Load the driver",
            ]
            # The branch is the host's own; an operation goes by the name of one of them.
            done = run.operations_on(host)
            assert len(done) == len(wanted), done
            for name, part in zip(done, wanted, strict=True):
                assert part in name

    def test_it_ends_with_one_line_about_the_reboot(self, installed: tuple[Site, Run]) -> None:
        site, run = installed
        assert run.code == 1
        for host in site.hosts:
            (line,) = run.errors_on(host)
            assert f"reboot needed: driver {DRIVER[host.distribution]} is installed" in line

    def test_until_then_it_says_so_again_and_changes_nothing(
        self, installed: tuple[Site, Run]
    ) -> None:
        site, _ = installed
        for line in site.refused(before=snapshots(site.hosts)):
            assert "reboot needed" in line

    def test_a_second_run_changes_nothing(self, rebooted: Site) -> None:
        again = rebooted.run()
        assert again.code == 0, again.said[-4000:]
        assert again.changed == []
        for host in rebooted.hosts:
            assert len(again.commands_on(host)) <= 6, again.commands

    def test_the_driver_is_of_the_branch_that_was_chosen(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        for host in site.hosts:
            version = DRIVER[host.distribution]
            told = host.run(
                "dpkg-query -W nvidia-driver-cuda nvidia-kernel-open-dkms libcuda1 "
                f"nvidia-driver-pinning-{version.partition('.')[0]} | cut -f2"
            ).stdout.split()
            assert told == [f"{version}-1"] * 4

    def test_its_modules_are_compiled_for_the_running_kernel(
        self, installed: tuple[Site, Run]
    ) -> None:
        site, _ = installed
        for host in site.hosts:
            kernel = host.run("uname -r").stdout.strip()
            assert re.search(
                rf"^nvidia/\S+, {re.escape(kernel)}, x86_64: installed",
                host.run("dkms status").stdout,
                re.MULTILINE,
            )
            version = host.run("modinfo -F version nvidia").stdout.strip()
            assert version == DRIVER[host.distribution]

    def test_it_is_held_awake_and_has_the_card_for_itself(
        self, installed: tuple[Site, Run]
    ) -> None:
        site, _ = installed
        for host in site.hosts:
            held = host.run("apt-mark showhold").stdout.split()
            assert {"libcuda1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms"} <= set(held)
            assert not [name for name in held if name.startswith(("cuda-", "linux-"))]
            config = host.run("apt-config dump | grep Package-Blacklist").stdout
            assert '"nvidia-"' in config
            assert '"libnvidia-"' in config
            assert "blacklist nouveau" in host.run("modprobe --showconfig").stdout
            units = "nvidia-persistenced nvidia-suspend nvidia-hibernate nvidia-resume"
            assert host.run(f"systemctl is-enabled {units}").stdout.split() == ["enabled"] * 4

    def test_the_toolkit_is_the_smallest_that_compiles(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        more = {"cuda", "cuda-13-2", "cuda-drivers", "cuda-runtime-13-2", "cuda-toolkit-13-2"}
        for host in site.hosts:
            assert "V13.2.86" in host.run("/usr/local/cuda-13.2/bin/nvcc --version").stdout
            names = host.run("dpkg-query -W -f '${Package}\\n'").stdout.split()
            assert "libcublas-dev-13-2" in names
            assert not more & set(names)

    def test_apt_trusts_exactly_the_right_key_for_it(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        for host in site.hosts:
            name = f"cuda-{repository(host)}-x86_64"
            source = host.run(f"cat /etc/apt/sources.list.d/{name}.sources").stdout
            assert "Signed-By: /usr/share/keyrings/cuda-archive-keyring.gpg" in source
            assert "Trusted" not in source
            old = host.run("cat /etc/apt/sources.list.d/cuda-old.list").stdout
            assert old.startswith("# ")
            pin = host.run("cat /etc/apt/preferences.d/cuda-repository-pin-600").stdout
            assert "Pin: release l=NVIDIA CUDA\nPin-Priority: 600" in pin
            proxy = f"-o Acquire::http::Proxy={site.lab.outside.proxy_url}"
            told = host.run(f"apt-get {proxy} update 2>&1").stdout
            assert "W:" not in told
            assert "E:" not in told

    def test_nothing_is_left_of_the_rehearsal(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        for host in site.hosts:
            assert host.run("ls -A /var/cache/llamastead").stdout.split() == []
            assert host.run("ls /var/lib/llamastead").stdout.split() == ["driver-is-ours"]


class TestWsl:
    """Inside a pretended WSL: the toolkit, and nothing of a Linux driver, ever."""

    def test_the_whole_toolkit_and_no_driver(self, installed: tuple[Site, Run]) -> None:
        site, run = installed
        assert run.errors_on(site.wsl) == []
        names = site.wsl.run("dpkg-query -W -f '${Package}\\n'").stdout.split()
        assert {"cuda-toolkit-13-2", "cuda-nvcc-13-2"} <= set(names)
        assert [name for name in names if tables.forbidden(name, wsl=True)] == []
        source = site.wsl.run("cat /etc/apt/sources.list.d/cuda-*.sources").stdout
        assert "/wsl-ubuntu/x86_64/" in source
        assert not site.wsl.run("ls /etc/modprobe.d | grep llamastead", check=False).stdout
        assert not [name for name in run.operations_on(site.wsl) if "driver" in name.lower()]

    def test_a_second_run_changes_nothing(self, installed: tuple[Site, Run]) -> None:
        site, _ = installed
        again = site.run(site.wsl)
        assert (again.code, again.changed) == (0, [])


class TestLater:
    """On hosts that have it all."""

    def test_what_somebody_undid_is_put_right(self, rebooted: Site) -> None:
        undo = (
            "apt-mark unhold libcuda1; systemctl disable --quiet nvidia-resume; "
            "rm /etc/apt/apt.conf.d/52llamastead-nvidia"
        )
        on_each(rebooted.hosts, lambda host: host.run(undo))
        mended = rebooted.run()
        assert mended.code == 0
        assert len(mended.changed) == 1
        for host in rebooted.hosts:
            assert "libcuda1" in host.run("apt-mark showhold").stdout
            assert host.run("systemctl is-enabled nvidia-resume").stdout == "enabled\n"
        assert rebooted.run().changed == []

    def test_the_steps_for_secure_boot_make_a_key_and_sign_the_modules(
        self, rebooted: Site
    ) -> None:
        """The ones that check.py prints; enrolling the key takes a firmware and a person."""

        def signed_again(host: LabHost) -> tuple[str, str]:
            boot = tables.secure_boot(tables.distribution("debian", host.distribution[-2:]))
            key = "modinfo -F sig_key nvidia"
            before = host.run(f"{key}; rm {boot.key} {boot.private}").stdout
            host.run(f"test -e {boot.key} || {boot.create}")
            name = f"nvidia/{DRIVER[host.distribution]}"
            # A kernel with no other modules is one that was removed, to newer versions of DKMS.
            host.run(f"dkms build --force {name} && dkms install --force {name} && depmod")
            assert host.run(f"stat -c %a {boot.private}").stdout == "600\n"
            return before, host.run(key).stdout

        for before, after in on_each(rebooted.hosts, signed_again):
            assert before.strip()
            assert after.strip()
            assert before != after
        assert rebooted.run().changed == []

    def test_a_power_cut_in_dpkg_is_repaired(self, rebooted: Site) -> None:
        cut = (
            "set -e; cd /tmp; mkdir -p cut/DEBIAN; "
            "printf 'Package: cut-short\\nVersion: 1\\nArchitecture: all\\nMaintainer: x\\n"
            "Description: x\\n' >cut/DEBIAN/control; dpkg-deb -b cut cut.deb; "
            "dpkg --unpack cut.deb; echo '--no-install-recommends install cuda-tools-13-2' "
            ">/var/lib/llamastead/apt.pending"
        )
        on_each(rebooted.hosts, lambda host: host.run(cut))
        mended = rebooted.run()
        assert mended.code == 0, mended.said[-3000:]
        for host in rebooted.hosts:
            told = host.run("dpkg-query -W -f '${db:Status-Abbrev} ' cut-short cuda-tools-13-2")
            assert told.stdout.split() == ["ii", "ii"]
        assert rebooted.run().changed == []

    def test_locks_of_apt_are_waited_for(self, rebooted: Site) -> None:
        """The holder lets go of each once it has seen that somebody waits for it."""
        holder = """\
            import fcntl, pathlib, time

            def hold(name):
                file = open(name, "w")
                fcntl.lockf(file, fcntl.LOCK_EX)
                return file

            def somebody_waits():
                logs = pathlib.Path("/var/log/llamastead").glob("*.log")
                return any("Waiting for cache lock" in log.read_text() for log in logs)

            dpkg = hold("/var/lib/dpkg/lock-frontend")
            lists = hold("/var/lib/apt/lists/lock")
            while not somebody_waits():
                time.sleep(0.1)
            dpkg.close()
            while not pathlib.Path("/var/cache/llamastead/apt/arguments.toolkit").exists():
                time.sleep(0.1)
            time.sleep(3)  # it asks every two seconds
            lists.close()
            """
        command = (
            "rm -f /var/log/llamastead/*.log; cat >/root/holder.py; "
            "systemd-run -q --unit=lock-holder -p Type=exec -p RuntimeMaxSec=120 "
            "-p RemainAfterExit=yes python3 /root/holder.py"
        )
        for host in rebooted.hosts:
            host.run("apt-get -qq -y purge cuda-nvcc-13-2 cuda-tools-13-2")
            host.run(command, stdin=textwrap.dedent(holder))
        waited = rebooted.run()
        assert waited.code == 0, waited.said[-3000:]
        for host in rebooted.hosts:
            told = host.run("systemctl show lock-holder -p SubState,Result --value").stdout.split()
            assert sorted(told) == ["exited", "success"]
            host.run("test -e /usr/local/cuda-13.2/bin/nvcc")

    def test_the_retired_key_is_taken_out(self, rebooted: Site) -> None:
        """With a stranger's key in its place, whose secret half is lost."""
        retired, other = signing_key("stranger"), signing_key("container")
        for host in rebooted.hosts:
            both = _base64(retired.binary + other.binary)
            host.run(f"base64 -d >{KEYRINGS}/old.gpg", stdin=both)
            host.run(f"base64 -d >{KEYRINGS}/only.gpg", stdin=_base64(retired.binary))
        code = rebooted.folder / "retired.py"
        code.write_text(
            "from dataclasses import replace\n"
            "from tasks.operations import repositories\n"
            "from tasks.rules import tables\n"
            f"retired = replace(tables.key('cuda-retired'), fingerprint='{retired.fingerprint}')\n"
            "tables.key = lambda name: retired\n"
            f"repositories.without_retired_key(['{KEYRINGS}/old.gpg', '{KEYRINGS}/only.gpg'])\n"
        )
        run = rebooted.run(script=str(code))
        assert run.code == 0, run.said[-3000:]
        for host in rebooted.hosts:
            left = host.run(f"cd {KEYRINGS} && ls && base64 -w0 old.gpg").stdout.split()
            host.run(f"rm {KEYRINGS}/old.gpg")
            assert "only.gpg" not in left
            assert left[-1] == _base64(other.binary)

    def test_a_local_installer_is_used_and_taken_away(self, rebooted: Site) -> None:
        made = {
            host.name: rebooted.nvidia.local_installer(repository(host), "13.3.1")
            for host in rebooted.hosts
        }
        data = {"cuda_version": "13.3.1", "cuda_install_method": "local"}

        def theirs(host: LabHost) -> dict[str, Any]:
            installer = made[host.name]
            return {
                "cuda_local_installer_url": installer.url,
                "cuda_local_installer_sha256": installer.sha256,
            }

        def wrong(host: LabHost) -> dict[str, Any]:
            return {**theirs(host), "cuda_local_installer_sha256": "0" * 64}

        refused = rebooted.run(each=wrong, **data)
        assert refused.code == 1
        for host in rebooted.hosts:
            assert f"{made[host.name].url.rpartition('/')[2]} has SHA-256" in refused.said
            assert "cuda-repo" not in host.run("dpkg -l").stdout
        run = rebooted.run(each=theirs, **data)
        assert run.code == 0, run.said[-4000:]
        for host in rebooted.hosts:
            assert "V13.3.73" in host.run("/usr/local/cuda-13.3/bin/nvcc --version").stdout
            left = host.run(
                "ls -d /var/cuda-repo-* /etc/apt/sources.list.d/*local* "
                "/etc/apt/preferences.d/*local* /usr/share/keyrings/cuda-????????-keyring.gpg "
                "/var/cache/llamastead/*",
                check=False,
            )
            assert left.stdout == ""
            assert "cuda-repo" not in host.run("dpkg -l").stdout
        again = rebooted.run(each=theirs, **data)
        assert (again.code, again.changed) == (0, [])

    def test_pretended_engines_get_the_container_toolkit(self, rebooted: Site) -> None:
        """Docker on both; on Debian 12 a Podman beside it that reads CDI up to 0.6."""
        trixie, bookworm = rebooted.hosts
        for host in rebooted.hosts:
            pretences.run_docker(host)
        pretences.have_podman(bookworm, "4.3.1")
        trixie.run("echo 'GPU 0: NVIDIA GeForce RTX 5090 (UUID: GPU-0)' >/root/image")
        run = rebooted.run()
        assert run.code == 0, run.said[-4000:]
        names = "nvidia-container-toolkit nvidia-container-toolkit-base "
        names += "libnvidia-container-tools libnvidia-container1"
        for host, version in ((trixie, "1.20.0-1"), (bookworm, "1.19.0-1")):
            assert host.run(f"dpkg-query -W {names} | cut -f2").stdout.split() == [version] * 4
            assert set(names.split()) <= set(host.run("apt-mark showhold").stdout.split())
            assert '"nvidia"' in host.run("cat /etc/docker/daemon.json").stdout
            assert host.run("cat /var/log/docker-reloads").stdout == "reloaded\n"
            assert host.run("systemctl show docker -p NRestarts --value").stdout == "0\n"
        assert bookworm.run("cat /var/run/cdi/nvidia.yaml").stdout
        assert bookworm.run("systemctl is-enabled nvidia-cdi-refresh.path").stdout == "enabled\n"
        assert f"[{trixie.name}] a container sees the GPU: GPU 0: NVIDIA GeForce RTX" in run.said
        assert f"[{bookworm.name}] whether containers see the GPU was not tried: podman" in run.said
        again = rebooted.run()
        assert (again.code, again.changed) == (0, [])

    def test_containers_that_do_not_see_the_gpu_are_an_error(self, rebooted: Site) -> None:
        trixie, _ = rebooted.hosts
        trixie.run("rm /etc/docker/daemon.json")
        trixie.run("echo 'docker: Error response from daemon: no such device' >/root/image")
        run = rebooted.run(trixie)
        assert run.code == 1
        (line,) = run.errors_on(trixie)
        assert line.startswith("Error: containers do not see the GPU: docker: Error response")

    def test_another_driver_takes_the_place_of_the_old_one(self, rebooted: Site) -> None:
        """Also of what a `.run` installer left, if asked to; the container toolkit stays."""
        _, bookworm = rebooted.hosts
        proxy = f"http_proxy={rebooted.lab.outside.proxy_url}"
        bookworm.run(f"{proxy} apt-get -qq -y install nvidia-settings")
        uninstaller = '#!/bin/sh\necho "$@" >/root/uninstalled\nrm "$0"\n'
        bookworm.run(
            "cat >/usr/bin/nvidia-uninstall && chmod 755 /usr/bin/nvidia-uninstall",
            stdin=uninstaller,
        )
        hosts = (bookworm,)
        (line,) = rebooted.refused(bookworm, before=snapshots(hosts), driver_version="595")
        assert "a `.run` installation is on the host (/usr/bin/nvidia-uninstall)" in line
        data = {"driver_version": "595", "driver_remove_conflicts": True}
        run = rebooted.run(bookworm, **data)
        (line,) = run.errors_on(bookworm)
        assert "reboot needed: driver 580.178.04 is still loaded, 595.99.02 is installed" in line
        assert bookworm.run("cat /root/uninstalled").stdout == "--silent\n"
        there = dict(
            line.split("\t")
            for line in bookworm.run("dpkg-query -W 'nvidia-*' 'libcuda1'").stdout.splitlines()
        )
        assert there["libcuda1"] == there["nvidia-kernel-open-dkms"] == "595.99.02-1"
        assert there["nvidia-container-toolkit"] == "1.19.0-1"
        assert [name for name, version in there.items() if version.startswith("580")] == []
        pins = bookworm.run("ls /etc/apt/preferences.d").stdout.split()
        assert [name for name in pins if "driver" in name] == ["nvidia-driver-pinning-595"]
        pretences.load_driver(bookworm, "595.99.02")
        again = rebooted.run(bookworm, **data)
        assert (again.code, again.changed) == (0, []), again.said[-3000:]


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
