"""Whatever the host, no plan holds what cannot work, down to the last package and option."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from tasks.probe import Gpu, KernelModule, Probe, Toolkit
from tasks.rules import nvidia, tables
from tasks.rules.plan import Plan, as_json, make_plan, rows
from tasks.rules.tables import Distribution, ExactVersion

from . import hosts

CARDS = sorted({each.chip.name: each for each in tables.cards().values()}.values(), key=str)
DRIVERS = ["470.82.01", "535.261.03", "550.163.01", "570.133.07", "580.95.05", "595.71.05"]
NVCCS = ["11.8.89", "12.4.131", "12.9.86", "13.0.88", "13.2.51", "13.2.86"]


def probe_of(  # noqa: PLR0917
    system: Distribution,
    cards: list[tables.Card],
    wsl: bool,
    driver: str | None,
    kind: tables.Modules,
    nvcc: str | None,
    gcc: list[int],
    glibc: str | None,
    machine: str,
    secure_boot: bool,
) -> Probe:
    gpus = tuple(
        Gpu(f"0000:{slot:02x}:00.0", 0x10DE, card.device, 0x030000, None, None)
        for slot, card in enumerate(cards)
    )
    name = f"{system.os_id} {system.version_id}"
    probe = replace(
        hosts.on(name, hosts.WITH_COMPILER),
        arch=machine,
        gpus=gpus,
        glibc=Version(glibc) if glibc else system.glibc,
        compilers={
            f"g++-{major}" if n else "g++": Version(f"{major}.1") for n, major in enumerate(gcc)
        },
        toolkits=(Toolkit("/usr/local/cuda", ExactVersion(nvcc)),) if nvcc else (),
        secure_boot=secure_boot,
        disk_free_bytes={},
    )
    if wsl:
        return replace(
            probe,
            wsl=True,
            wsl_gpu=True,
            wsl_libcuda=driver is not None,
            windows_driver=ExactVersion(driver) if driver else None,
            kernel="6.6.87.2-microsoft-standard-WSL2",
            engines={"podman": Version("5.4.2")},
        )
    if driver is None:
        return probe
    module = KernelModule(ExactVersion(driver), kind)
    return replace(
        probe, driver_loaded=module, driver_on_disk=module, driver_library=module.version
    )


probes = st.builds(
    probe_of,
    st.sampled_from(tables.distributions()),
    st.lists(st.sampled_from(CARDS), max_size=3),
    st.booleans(),
    st.sampled_from([None, *DRIVERS]),
    st.sampled_from(["open", "proprietary"]),
    st.sampled_from([None, None, *NVCCS]),
    st.lists(st.integers(9, 17), min_size=0, max_size=3, unique=True),
    st.sampled_from([None, None, "2.31", "2.42"]),
    st.sampled_from(["x86_64", "aarch64"]),
    st.booleans(),
)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "cuda_version": st.sampled_from(["12.4", "12.9", "13.0", "13.2.1", "13.4"]),
        "cuda_packages": st.sampled_from(["minimal", "full"]),
        "cuda_install_method": st.sampled_from(["network", "local"]),
        "driver_version": st.sampled_from(["570", "580", "595", "615"]),
        "driver_source": st.sampled_from(["auto", "nvidia", "distro", "none"]),
        "driver_flavour": st.sampled_from(["compute", "desktop"]),
        "driver_remove_conflicts": st.booleans(),
        "container_toolkit": st.sampled_from(["auto", "on", "off"]),
        "llama_cpp_backend": st.sampled_from(["auto", "cpu", "cuda"]),
    },
)
MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plan(probe: Probe, wish: dict[str, Any]) -> Plan:
    return make_plan(hosts.settings(**wish), probe, hosts.SOURCE)


@given(probes, wishes)
@MANY
def test_no_plan_installs_a_forbidden_package(probe: Probe, wish: dict[str, Any]) -> None:
    made = plan(probe, wish)
    for name in (*made.missing_packages, *made.installation.names):
        assert tables.forbidden(name, wsl=probe.wsl) is None, name
    if probe.wsl:
        assert made.installation.driver is None


@given(probes, wishes)
@MANY
def test_no_plan_compiles_for_what_its_toolkit_does_not_know(
    probe: Probe, wish: dict[str, Any]
) -> None:
    made = plan(probe, wish)
    if made.errors or made.stack is None:
        return
    assert made.build is not None
    assert made.stack.toolkit.choice is not None
    toolkit = made.stack.toolkit.choice.toolkit
    options = made.build.options
    for architecture in options["CMAKE_CUDA_ARCHITECTURES"].split(";"):
        assert toolkit.supports_sm(architecture)
    cards = nvidia.identify(probe.gpus)[0]
    assert {card.chip.architecture for card in cards} == set(made.build.architectures)


@given(probes, wishes)
@MANY
def test_no_plan_takes_a_compiler_or_a_c_library_beyond_the_toolkits_limit(
    probe: Probe, wish: dict[str, Any]
) -> None:
    made = plan(probe, wish)
    if made.errors or made.stack is None:
        return
    assert made.build is not None
    assert made.stack.toolkit.choice is not None
    toolkit = made.stack.toolkit.choice.toolkit
    system = tables.distribution(probe.os_id, probe.os_version)
    assert system is not None
    named = made.build.options.get("CMAKE_CUDA_HOST_COMPILER")
    default = probe.compilers.get("g++", system.gcc).major
    assert toolkit.supports_gcc(int(named.rpartition("-")[2]) if named else default)
    if named:
        assert f"g++-{named.rpartition('-')[2]}" in made.build.packages
    assert probe.glibc is not None
    if toolkit.glibc_limit == "breaks" and not toolkit.supports_glibc(probe.glibc):
        # Only Ubuntu's own build, with its patched headers, and only where it is there already.
        assert made.stack.toolkit.choice.root is not None
        assert system.patched_cuda is not None


@given(probes, wishes)
@MANY
def test_every_plan_can_be_told_to_people_and_to_programs(
    probe: Probe, wish: dict[str, Any]
) -> None:
    made = plan(probe, wish)
    assert rows(made)
    json.dumps(as_json(made))
    for found in made.errors:
        assert found.cause
        assert found.fix


@given(probes, wishes)
@MANY
def test_a_server_counts_on_a_gpu_exactly_where_it_is_compiled_for_one(
    probe: Probe, wish: dict[str, Any]
) -> None:
    made = plan(probe, wish)
    assert made.build is not None
    assert made.main.server is not None
    on_gpu = made.stack is not None
    assert (made.build.backend == "cuda") is on_gpu
    assert made.main.server.serves[0].offloads is on_gpu
    assert (
        "ExecStartPre=/usr/local/lib/llamastead/gpu-gate" in made.main.server.unit.content
    ) is on_gpu
    assert ("--n-gpu-layers" in made.main.server.arguments) is on_gpu
