"""What is installed follows from what was chosen, and is never what must not be."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from tasks.probe import AptSource, Kernel, ManagedFile, Probe, Toolkit
from tasks.rules import apt, tables
from tasks.rules.nvidia import installation as rules
from tasks.rules.nvidia.installation import Expectation, Installation, kernel_meta
from tasks.rules.plan import make_plan
from tasks.settings import SettingsError
from tests.unit.hosts import (
    GTX_1080_TI,
    RTX_4090,
    RTX_5090,
    SOURCE,
    WITH_CARD,
    WITH_DRIVER,
    card,
    in_wsl,
    on,
)
from tests.unit.hosts import settings as wanted

FINGERPRINT = "0123456789ABCDEF0123456789ABCDEF01234567"


def installation(probe: Probe = WITH_CARD, **data: Any) -> Installation:
    return make_plan(wanted(**data), probe, SOURCE).installation


def packages(found: Installation, key: str) -> tuple[str, ...]:
    (only,) = [each for each in found.every_set if each.key == key]
    return only.packages


# Driver


def test_debian_gets_pin_headers_and_the_open_compute_set_of_the_branch() -> None:
    found = installation()
    assert found.driver is not None
    driver = found.driver.packages
    assert driver.pins == ("nvidia-driver-pinning-595",)
    assert driver.packages == (
        "linux-headers-6.12.48+deb13-amd64",
        "nvidia-driver-cuda",
        "nvidia-kernel-open-dkms",
    )
    assert driver.optional == ("linux-headers-amd64", "nvidia-persistenced")
    assert found.driver.dkms
    assert found.components == ("contrib",)


def test_headers_that_are_there_are_not_asked_for() -> None:
    kernel = "6.12.48+deb13-amd64"
    found = installation(replace(WITH_CARD, kernels=(Kernel(kernel, True, False),)))
    assert packages(found, "driver") == ("nvidia-driver-cuda", "nvidia-kernel-open-dkms")


def test_one_version_of_the_driver_is_pinned_whole() -> None:
    found = installation(driver_version="595.71.05")
    assert found.driver is not None
    driver = found.driver.packages
    assert driver.pins == ("nvidia-driver-pinning-595.71.05",)
    assert driver.downgrades
    (expected,) = [each for each in driver.expectations if each.package == "nvidia-driver-cuda"]
    assert expected.objection("it", "595.71.05-1") is None
    assert "not 595.71.05" in str(expected.objection("it", "595.99.02-1"))


def test_ubuntu_gets_modules_that_need_no_compiler_for_the_kernel_that_runs_too() -> None:
    found = installation(on("ubuntu 24.04", kernel="6.8.0-40-generic"))
    assert found.driver is not None
    assert not found.driver.dkms
    driver = found.driver.packages
    assert "linux-modules-nvidia-580-open-generic" in driver.packages
    assert driver.optional == ("linux-modules-nvidia-580-open-6.8.0-40-generic",)
    assert found.components == ("restricted",)


def test_with_the_archives_driver_nvidias_driver_packages_stay_away() -> None:
    found = installation(on("ubuntu 24.04"), cuda_repo_url="https://mirror.example/cuda")
    pin = found.preferences[rules.ARCHIVE_PIN]
    assert "nvidia-utils*" in pin
    assert "Pin: origin mirror.example\nPin-Priority: -1" in pin
    assert "nvidia-container" not in pin


@pytest.mark.parametrize(
    ("system", "kernel", "meta"),
    [
        ("debian 13", "6.12.48+deb13-amd64", "amd64"),
        ("debian 13", "6.12.48+deb13-cloud-amd64", "cloud-amd64"),
        ("debian 12", "6.1.0-40-amd64", "amd64"),
        ("debian 12", "6.12.38+deb12-arm64", "arm64"),
        ("debian 12", "6.8.12-15-pve", None),
        ("ubuntu 24.04", "6.8.0-40-generic", "generic"),
        ("ubuntu 24.04", "6.14.0-33-generic", "generic-hwe-24.04"),
        ("ubuntu 22.04", "6.8.0-87-generic", "generic-hwe-22.04"),
        ("ubuntu 24.04", "6.8.0-1015-aws", "aws"),
        ("ubuntu 24.04", "6.16.9-x64v3-xanmod1", None),
    ],
)
def test_the_kernels_meta_package(system: str, kernel: str, meta: str | None) -> None:
    distribution = tables.distribution(*system.split())
    assert distribution is not None
    assert kernel_meta(distribution, kernel) == meta


def test_a_driver_that_suffices_is_left_alone() -> None:
    found = installation(WITH_DRIVER)
    assert found.driver is None
    assert not any(tables.housekeeping().is_driver_package(name) for name in found.names)


def test_a_host_on_which_all_is_there_gets_nothing() -> None:
    there = replace(WITH_DRIVER, toolkits=(Toolkit("/usr/local/cuda-13.2", Version("13.2.86")),))
    assert installation(there).every_set == ()
    assert installation(there).repositories == ()
    assert installation(llama_cpp_backend="cpu") == Installation()


# Toolkit


def test_the_smallest_set_or_the_whole() -> None:
    assert packages(installation(), "toolkit")[0] == "cuda-nvcc-13-2"
    assert packages(installation(cuda_packages="full"), "toolkit") == ("cuda-toolkit-13-2",)


def test_the_patch_release_has_to_be_the_one_that_was_chosen_or_newer() -> None:
    found = installation()
    assert found.toolkit is not None
    (expected,) = found.toolkit.packages.expectations
    assert expected.package == "cuda-toolkit-13-2"
    assert expected.objection("it", "13.2.2-1") is None
    assert expected.objection("it", "13.2.3-1") is None
    assert "it has cuda-toolkit-13-2 13.2.1, not 13.2.2 or newer" in str(
        expected.objection("it", "13.2.1-1")
    )
    assert "it has no package" in str(expected.objection("it", None))


def test_a_patch_release_that_was_asked_for_is_that_one_or_none() -> None:
    found = installation(on("debian 12"), cuda_version="12.9.1")
    assert found.toolkit is not None
    (expected,) = found.toolkit.packages.expectations
    assert "`cuda_install_method` local" in str(expected.objection("it", "12.9.2-1"))


def test_a_patch_release_is_known_again_by_what_was_written_down() -> None:
    """nvcc tells its build number, and for most releases no table says which that is."""
    there = Toolkit("/usr/local/cuda-12.9", Version("12.9.86"))
    probe = on("ubuntu 24.04", toolkits=(there,))
    data = {"cuda_version": "12.9.2"}
    first = installation(probe, **data).toolkit
    assert first is not None
    assert first.mark == "/var/lib/llamastead/cuda-12.9.2"
    written = ManagedFile(hashlib.sha256(b"12.9.86\n").hexdigest(), 0o644, "root", "root")
    known = replace(probe, files={first.mark: written})
    assert installation(known, **data).toolkit is None
    # It was another one since, or another one is asked for.
    newer = replace(known, toolkits=(Toolkit("/usr/local/cuda-12.9", Version("12.9.90")),))
    assert installation(newer, **data).toolkit is not None
    assert installation(known, cuda_version="12.9.1").toolkit is not None


def test_the_local_installer_is_nvidias_own_with_its_check_sum() -> None:
    found = installation(on("ubuntu 24.04"), cuda_version="12.9.2", cuda_install_method="local")
    assert found.toolkit is not None
    local = found.toolkit.local
    assert local is not None
    assert local.url == (
        "https://developer.download.nvidia.com/compute/cuda/12.9.2/local_installers/"
        "cuda-repo-ubuntu2404-12-9-local_12.9.2-575.57.08-1_amd64.deb"
    )
    assert local.sha256 is not None
    assert local.package == "cuda-repo-ubuntu2404-12-9-local"
    assert local.folder == "/var/cuda-repo-ubuntu2404-12-9-local"
    assert found.repositories == ()
    assert 'origin ""' in found.preferences[rules.LOCAL_PIN]


def test_a_local_installer_without_a_check_sum_is_an_error() -> None:
    plan = make_plan(wanted(cuda_version="13.2.2", cuda_install_method="local"), WITH_CARD, SOURCE)
    (error,) = plan.errors
    assert error.code == "cuda-installer-sha256"
    assert "cuda_local_installer_sha256" in error.fix


# Repositories


@pytest.mark.parametrize(
    ("system", "name", "key"),
    [
        ("debian 13", "cuda-debian13-x86_64", "8793F200.pub"),
        ("debian 12", "cuda-debian12-x86_64", "3bf863cc.pub"),
        ("ubuntu 24.04", "cuda-ubuntu2404-x86_64", "3bf863cc.pub"),
    ],
)
def test_the_repository_of_this_very_distribution(system: str, name: str, key: str) -> None:
    (found,) = installation(on(system)).repositories
    assert found.sources_file == f"/etc/apt/sources.list.d/{name}.sources"
    assert found.key_url.endswith(f"/x86_64/{key}")
    assert len(found.fingerprint) == 40
    assert found.sources.splitlines()[1:] == [
        "Types: deb",
        f"URIs: {found.url}",
        "Suites: /",
        "Signed-By: /usr/share/keyrings/cuda-archive-keyring.gpg",
    ]


def test_a_mirror_that_signs_anew_is_trusted_by_its_own_fingerprint() -> None:
    found = installation(
        cuda_repo_url="https://mirror.example/cuda", cuda_key_fingerprint=FINGERPRINT
    )
    (repository,) = found.repositories
    assert repository.url == "https://mirror.example/cuda/debian13/x86_64/"
    assert repository.fingerprint == FINGERPRINT
    with pytest.raises(SettingsError, match="cuda_key_fingerprint"):
        installation(cuda_key_fingerprint="7fa2af80")


def test_the_same_repository_under_another_name_gives_way_and_others_only_if_asked() -> None:
    base = "https://developer.download.nvidia.com/compute/cuda/repos"
    same = AptSource(
        "/etc/apt/sources.list.d/cuda-debian13-x86_64.list", f"{base}/debian13/x86_64", "/"
    )
    other = AptSource("/etc/apt/sources.list.d/cuda.list", f"{base}/debian12/x86_64/", "/")
    probe = replace(WITH_CARD, apt_sources=(same, other))
    assert installation(probe).superseded == (same,)
    assert installation(probe, driver_remove_conflicts=True).superseded == (same, other)


def test_drivers_are_removed_only_if_asked_for_and_uninstallers_run_only_then() -> None:
    probe = replace(WITH_CARD, runfiles=("/usr/bin/nvidia-uninstall",))
    found = installation(probe)
    assert (found.uninstallers, found.limits.remove_drivers) == ((), False)
    found = installation(probe, driver_remove_conflicts=True)
    assert (found.uninstallers, found.limits.remove_drivers) == (probe.runfiles, True)


# Containers


def with_engines(probe: Probe = WITH_DRIVER, **engines: str) -> Probe:
    return replace(probe, engines={name: Version(text) for name, text in engines.items()})


def test_the_container_toolkit_comes_where_there_is_an_engine() -> None:
    assert installation(WITH_DRIVER).container is None
    found = installation(with_engines(docker="28.0.1"))
    assert packages(found, "container") == (
        "nvidia-container-toolkit=1.20.0-1",
        "nvidia-container-toolkit-base=1.20.0-1",
        "libnvidia-container-tools=1.20.0-1",
        "libnvidia-container1=1.20.0-1",
    )
    assert [each.name for each in found.repositories][-1] == "nvidia-container-toolkit"
    assert found.container is not None
    assert (found.container.docker, found.container.podman) == (True, False)


def test_it_is_off_where_it_is_off_and_inside_wsl_where_docker_brings_its_own() -> None:
    assert installation(with_engines(docker="28.0.1"), container_toolkit="off").container is None
    inside = with_engines(in_wsl(), docker="28.0.1")
    assert installation(inside).container is None
    assert installation(inside, container_toolkit="on").container is not None


def test_an_old_podman_gets_a_version_whose_descriptions_it_reads() -> None:
    found = installation(with_engines(podman="4.3.1"))
    assert "nvidia-container-toolkit=1.19.0-1" in packages(found, "container")
    newer = installation(with_engines(podman="5.4.2"))
    assert "nvidia-container-toolkit=1.20.0-1" in packages(newer, "container")


def test_a_podman_too_old_for_the_version_that_was_asked_for_is_said() -> None:
    probe = with_engines(podman="4.3.1")
    plan = make_plan(wanted(container_toolkit_version="1.20.0"), probe, SOURCE)
    (finding,) = [each for each in plan.findings if each.code == "podman-too-old"]
    assert "Podman 4.3.1 does not read" in finding.cause
    assert not [each for each in make_plan(wanted(), probe, SOURCE).findings if each == finding]


def test_one_that_is_there_stays_unless_a_version_was_asked_for() -> None:
    there = replace(
        with_engines(docker="28.0.1"),
        container_toolkit=Version("1.18.0"),
        docker_runtimes=("nvidia", "runc"),
    )
    found = installation(there)
    assert found.container is not None
    assert found.container.is_done
    asked = installation(there, container_toolkit_version="1.19.1")
    assert "libnvidia-container1=1.19.1-1" in packages(asked, "container")
    same = installation(there, container_toolkit_version="1.18.0")
    assert same.container is not None
    assert same.container.packages is None


# Whatever the host


SYSTEMS = [f"{each.os_id} {each.version_id}" for each in tables.distributions()]
data = st.fixed_dictionaries(
    {},
    optional={
        "driver_source": st.sampled_from(["auto", "nvidia", "distro", "none"]),
        "driver_version": st.sampled_from(["580", "595", "595.71.05", "615"]),
        "driver_modules": st.sampled_from(["open", "proprietary"]),
        "driver_flavour": st.sampled_from(["compute", "desktop"]),
        "cuda_version": st.sampled_from(["12.9", "12.9.2", "13.2", "13.2.1", "13.4"]),
        "cuda_packages": st.sampled_from(["minimal", "full"]),
        "cuda_install_method": st.sampled_from(["network", "local"]),
        "container_toolkit": st.sampled_from(["auto", "on", "off"]),
        "container_toolkit_version": st.sampled_from(["1.18.0", "1.20.0-1"]),
        "driver_remove_conflicts": st.booleans(),
    },
)
kernels = st.sampled_from(
    ["6.12.48+deb13-amd64", "6.8.0-40-generic", "6.1.0-40-cloud-amd64", "6.18.0-custom"]
)


@st.composite
def probes(draw: st.DrawFn) -> Probe:
    system = draw(st.sampled_from(SYSTEMS))
    if draw(st.booleans()):
        made = in_wsl(system, draw(st.sampled_from(["581.15", "576.80", "595.10"])))
    else:
        made = on(system, kernel=draw(kernels))
    device = draw(st.sampled_from([RTX_5090, RTX_4090, GTX_1080_TI]))
    bar = None if made.wsl else 1 << 36
    engines = draw(
        st.dictionaries(
            st.sampled_from(["docker", "podman"]),
            st.sampled_from([Version("4.3"), Version("28.1")]),
        )
    )
    return replace(made, gpus=(card(device, bar1_bytes=bar),), engines=engines)


@given(probes(), data)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_no_plan_ever_holds_a_forbidden_package(probe: Probe, chosen: dict[str, Any]) -> None:
    plan = make_plan(wanted(**chosen), probe, SOURCE)
    found = plan.installation
    for name in found.names:
        assert "{" not in name
        assert tables.forbidden(name, wsl=probe.wsl) is None, name
    if probe.wsl:
        assert found.driver is None
        assert found.limits.wsl
    assume(not plan.errors)
    for repository in found.repositories:
        assert repository.url.startswith("https://")
        assert repository.key_url.startswith(repository.url.split("/stable/")[0])
    uses_nvidia = any("nvidia" in each.name or "cuda" in each.name for each in found.repositories)
    local = found.toolkit is not None and found.toolkit.local is not None
    archive_only = all(each.title == "the archive" for each in found.sets)
    assert uses_nvidia or local or archive_only


def test_inside_wsl_nothing_that_any_plan_can_name_brings_a_linux_driver() -> None:
    """Every distribution, every toolkit, every set, with and without containers."""
    names = set()
    for distribution, toolkit, which in product(
        tables.distributions(), tables.toolkits(), tables.toolkit_package_sets()
    ):
        probe = in_wsl(
            f"{distribution.os_id} {distribution.version_id}",
            "620.10",
            engines={"docker": Version("28.0"), "podman": Version("5.4")},
        )
        for method in ("network", "local"):
            if which.set == "run":
                continue
            found = installation(
                probe,
                cuda_version=str(toolkit.version),
                cuda_packages=which.set,
                cuda_install_method=method,
                container_toolkit="on",
                driver_remove_conflicts=True,
            )
            assert found.driver is None
            names |= set(found.names)
    names |= {package.partition("=")[0] for package in tables.container_toolkit().packages}
    assert len(names) > 40
    assert [name for name in names if tables.forbidden(name, wsl=True)] == []
    assert [name for name in names if tables.housekeeping().is_driver_package(name)] == []


@given(st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}(-[0-9])?", fullmatch=True))
def test_any_version_is_judged(version: str) -> None:
    expected = Expectation("name", at_least=Version("13.2"))
    objected = expected.objection("it", version) is not None
    assert objected == (Version(apt.upstream(version)) < Version("13.2"))
