"""Driver, toolkit, compiler and architectures: chosen and judged by one set of rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from tasks import probe as at
from tasks.rules import nvidia, tables
from tasks.rules.choice import validate
from tasks.rules.findings import Finding, Severity
from tasks.rules.nvidia import Driver, Host, Stack, Wish
from tasks.rules.tables import Card, Distribution, ExactVersion, Release, Toolkit

RTX_5090, RTX_4090, GTX_1080_TI, H200, GB10 = 0x2B85, 0x2684, 0x1B06, 0x2335, 0x2E12

CONSTRAINTS = {each.name for each in nvidia.TOOLKIT_CONSTRAINTS} | {
    each.name for each in nvidia.DRIVER_CONSTRAINTS
}
NOTHING = {"cuda-none", "driver-none"}
"""Says for every candidate which constraint speaks against it."""


def card(device: int) -> Card:
    found = tables.gpu(device)
    assert found is not None
    return found


def host(
    system: str = "ubuntu 24.04",
    *devices: int,
    driver: str | None = None,
    modules: tables.Modules = "open",
    wsl: bool = False,
    gcc: tuple[int, ...] | None = None,
    glibc: str | None = None,
    toolkit: str | None = None,
    secure_boot: bool = False,
    key_enrolled: bool = False,
    machine: str = "x86_64",
) -> Host:
    distribution = tables.distribution(*system.split(), wsl=wsl)
    assert distribution is not None
    compilers = gcc if gcc is not None else (distribution.gcc.major,)
    return Host(
        distribution,
        tuple(card(device) for device in devices or (RTX_5090,)),
        Version(glibc) if glibc else distribution.glibc,
        machine,
        compilers,
        compilers[0] if compilers else None,
        Driver(ExactVersion(driver), None if wsl else modules, windows=wsl) if driver else None,
        (at.Toolkit(f"/usr/local/cuda-{toolkit}", Version(toolkit)),) if toolkit else (),
        secure_boot,
        key_enrolled,
    )


def errors(stack: Stack) -> dict[str, Finding]:
    return {found.code: found for found in stack.findings if found.severity is Severity.ERROR}


def chosen(stack: Stack) -> tuple[str, str]:
    assert not errors(stack), errors(stack)
    assert stack.driver.choice is not None
    assert stack.toolkit.choice is not None
    return str(stack.driver.choice), str(stack.toolkit.choice)


# What an expert would do


@pytest.mark.parametrize(
    ("system", "device", "driver", "toolkit", "architecture"),
    [
        ("ubuntu 22.04", RTX_5090, "580 from the distribution's archive", "13.2.2", "120a-real"),
        ("ubuntu 24.04", RTX_5090, "580 from the distribution's archive", "13.2.2", "120a-real"),
        ("ubuntu 26.04", RTX_5090, "595 from the distribution's archive", "13.3.1", "120a-real"),
        ("debian 12", RTX_5090, "580 from NVIDIA's repository", "13.2.2", "120a-real"),
        ("debian 13", RTX_5090, "595 from NVIDIA's repository", "13.2.2", "120a-real"),
        ("ubuntu 24.04", H200, "580 from the distribution's archive", "13.2.2", "90"),
        ("ubuntu 24.04", RTX_4090, "580 from the distribution's archive", "13.2.2", "89"),
        ("ubuntu 24.04", GB10, "580 from the distribution's archive", "13.2.2", "121a-real"),
        ("ubuntu 24.04", GTX_1080_TI, "580 from the distribution's archive", "12.9.2", "61"),
        ("debian 12", GTX_1080_TI, "580 from NVIDIA's repository", "12.9.2", "61"),
    ],
)
def test_a_bare_host(
    system: str, device: int, driver: str, toolkit: str, architecture: str
) -> None:
    stack = nvidia.plan_stack(host(system, device))
    assert chosen(stack) == (f"driver {driver}", f"CUDA {toolkit}")
    assert stack.architectures == (architecture,)
    assert stack.compiler is not None
    assert stack.compiler.default
    assert stack.driver.choice is not None
    assert stack.driver.choice.modules == ("proprietary" if device == GTX_1080_TI else "open")


def test_who_asks_for_the_archives_driver_gets_the_one_that_it_has() -> None:
    stack = nvidia.plan_stack(host("debian 12", RTX_4090), Wish(driver_source="distro"))
    assert chosen(stack) == ("driver 535 from the distribution's archive", "CUDA 12.9.2")
    assert stack.driver.choice is not None
    assert stack.driver.choice.modules == "proprietary"


@pytest.mark.parametrize(
    ("system", "device", "why"),
    [
        ("debian 12", RTX_5090, "driver 535 does not know GeForce RTX 5090"),
        ("debian 13", RTX_5090, "driver 550 does not know GeForce RTX 5090"),
        ("debian 13", RTX_4090, "driver 550 is too old for CUDA 13.2"),
    ],
)
def test_the_archives_driver_does_not_serve_every_card(system: str, device: int, why: str) -> None:
    stack = nvidia.plan_stack(host(system, device), Wish(driver_source="distro"))
    found = errors(stack)["driver-none"]
    assert why in found.cause
    assert found.fix == "Leave `driver_source` unset."


@pytest.mark.parametrize(
    ("system", "windows", "toolkit"),
    [
        ("ubuntu 24.04", "581.15", "13.2.2"),
        ("ubuntu 24.04", "576.02", "12.9.2"),
        ("ubuntu 22.04", "572.16", "12.9.2"),
        ("debian 13", "591.44", "13.2.2"),
    ],
)
def test_under_wsl_the_windows_driver_decides(system: str, windows: str, toolkit: str) -> None:
    stack = nvidia.plan_stack(host(system, wsl=True, driver=windows))
    assert chosen(stack) == (f"driver {windows}", f"CUDA {toolkit}")


def test_under_wsl_without_a_windows_driver() -> None:
    stack = nvidia.plan_stack(host(wsl=True))
    assert stack.driver.choice is None
    assert "Install NVIDIA's driver in Windows" in errors(stack)["driver-none"].fix


def test_under_wsl_a_windows_driver_that_no_toolkit_runs_on() -> None:
    stack = nvidia.plan_stack(host("ubuntu 26.04", wsl=True, driver="576.02"))
    assert list(errors(stack)) == ["driver-cuda"]
    assert "576.02" in errors(stack)["driver-cuda"].cause
    assert "in Windows" in errors(stack)["driver-cuda"].fix


def test_there_is_no_wsl_repository_for_arm64() -> None:
    stack = nvidia.plan_stack(host(wsl=True, driver="581.15", machine="aarch64"))
    assert list(errors(stack)) == ["cuda-none"]
    assert "has nothing for aarch64" in errors(stack)["cuda-none"].cause


# Cards


def gpu(device: int, vendor: int = 0x10DE, class_code: int = 0x030000) -> at.Gpu:
    return at.Gpu("0000:01:00.0", vendor, device, class_code, None, None)


def test_cards_are_identified_among_other_devices() -> None:
    cards, findings = nvidia.identify(
        [
            gpu(RTX_5090),
            gpu(H200, class_code=0x030200),
            gpu(0x22E8, class_code=0x040300),  # the sound function of a card
            gpu(0x164E, vendor=0x1002),
        ]
    )
    assert [each.name for each in cards] == ["GeForce RTX 5090", "H200 SXM 141GB"]
    assert findings == ()


def test_an_unknown_card_is_taken_for_its_neighbours_and_said_so() -> None:
    cards, findings = nvidia.identify([gpu(0x2B86)])
    assert [each.chip.name for each in cards] == ["GB202"]
    assert [found.code for found in findings] == ["gpu-unknown"]
    assert findings[0].severity is Severity.WARNING


def test_a_card_newer_than_the_tables_is_an_error() -> None:
    cards, findings = nvidia.identify([gpu(0x3F00)])
    assert cards == ()
    assert [(found.code, found.severity) for found in findings] == [("gpu-unknown", Severity.ERROR)]


def test_a_card_older_than_maxwell_is_not_used() -> None:
    cards, findings = nvidia.identify([gpu(0x0FC6), gpu(RTX_5090)])
    assert len(cards) == 1
    assert [(found.code, found.severity) for found in findings] == [
        ("gpu-too-old", Severity.WARNING)
    ]


def test_one_architecture_for_each_distinct_kind_of_card() -> None:
    cards = [card(each) for each in (RTX_5090, RTX_4090, H200, 0x2C02, RTX_5090)]
    assert nvidia.cuda_architectures(cards) == ("89", "90", "120a-real")
    assert nvidia.cuda_architectures([]) == ()


def test_blackwell_is_never_compiled_for_as_plain_120() -> None:  # llama.cpp#18363
    for each in tables.cards().values():
        if each.family.name == "blackwell-consumer":
            assert nvidia.cuda_architectures([each]) == ("120a-real",)


def test_cublas_is_forced_where_it_is_faster_on_every_card() -> None:
    assert nvidia.force_cublas([card(H200), card(H200)])
    assert not nvidia.force_cublas([card(H200), card(RTX_4090)])
    assert not nvidia.force_cublas([card(RTX_5090)])
    assert not nvidia.force_cublas([])


# What users of comparable tools suffer from


def test_a_driver_that_works_is_left_alone() -> None:
    for driver in ("570.133.07", "580.65.06", "595.71.05", "610.43.02"):
        stack = nvidia.plan_stack(host(driver=driver))
        assert stack.driver.choice is not None
        assert stack.driver.choice.installed
        assert str(stack.driver.choice) == f"driver {driver}"
        assert not errors(stack)


def test_a_toolkit_that_works_is_left_alone() -> None:
    stack = nvidia.plan_stack(host(toolkit="13.0.88", driver="580.95.05"))
    assert stack.toolkit.choice is not None
    assert stack.toolkit.choice.root == "/usr/local/cuda-13.0.88"


def test_a_driver_too_old_for_every_fitting_toolkit_is_replaced() -> None:
    stack = nvidia.plan_stack(host("debian 13", H200, driver="550.163.01"))
    assert chosen(stack) == ("driver 595 from NVIDIA's repository", "CUDA 13.2.2")


def test_blackwell_with_proprietary_modules_no_devices_were_found() -> None:
    stack = nvidia.plan_stack(host(driver="580.95.05", modules="proprietary"))
    assert stack.driver.choice is not None
    assert not stack.driver.choice.installed
    assert stack.driver.choice.modules == "open"

    stuck = nvidia.plan_stack(
        host(driver="580.95.05", modules="proprietary"), Wish(driver_source="none")
    )
    assert "open kernel modules only" in errors(stuck)["driver-modules"].cause
    assert "No devices were found" in errors(stuck)["driver-modules"].consequence


def test_unsupported_gpu_architecture_by_a_toolkit_that_was_asked_for() -> None:
    stack = nvidia.plan_stack(host(), Wish(cuda_version=Version("12.6")))
    assert str(stack.toolkit.choice) == "CUDA 12.6.3", "the choice is the user's"
    assert "sm_120a is in CUDA from 12.8 on" in errors(stack)["cuda-gpu"].cause


def test_a_toolkit_that_no_longer_knows_the_card() -> None:
    stack = nvidia.plan_stack(host("ubuntu 24.04", GTX_1080_TI), Wish(cuda_version=Version("13.2")))
    assert "sm_61 is in CUDA up to 12.9" in errors(stack)["cuda-gpu"].cause


@pytest.mark.parametrize("version", ["13.2.0", "13.2.1"])
def test_gibberish_with_iq_quants(version: str) -> None:
    stack = nvidia.plan_stack(host(), Wish(cuda_version=Version(version)))
    assert "gibberish" in errors(stack)["cuda-fault"].consequence
    assert "llama.cpp#28581" in errors(stack)["cuda-fault"].source


def test_gibberish_with_iq_quants_from_a_toolkit_that_is_there() -> None:
    stack = nvidia.plan_stack(host(toolkit="13.2.78", driver="595.58.03"))
    assert chosen(stack)[1] == "CUDA 13.2.2"
    fixed = nvidia.plan_stack(host(toolkit="13.2.86", driver="595.58.03"))
    assert chosen(fixed)[1] == "CUDA 13.2.86 in /usr/local/cuda-13.2.86"


def test_another_family_does_not_suffer_from_the_fault() -> None:
    stack = nvidia.plan_stack(host("ubuntu 24.04", RTX_4090), Wish(cuda_version=Version("13.2.1")))
    assert not errors(stack)


@pytest.mark.parametrize(
    ("system", "version", "works"),
    [
        ("debian 13", "12.9", False),
        ("debian 13", "13.1", True),
        ("ubuntu 26.04", "13.1", False),
        ("ubuntu 26.04", "13.3", True),
        ("ubuntu 24.04", "12.9", True),
    ],
)
def test_the_c_library_is_too_new_for_the_toolkits_headers(
    system: str, version: str, works: bool
) -> None:
    stack = nvidia.plan_stack(host(system), Wish(cuda_version=Version(version)))
    assert ("cuda-glibc" in errors(stack)) is not works
    if not works:
        assert "glibc 2.4" in errors(stack)["cuda-glibc"].cause
        assert "GCC does not help" in errors(stack)["cuda-glibc"].consequence


def test_ubuntus_own_build_of_a_toolkit_may_be_patched_for_its_c_library() -> None:
    stack = nvidia.plan_stack(host("ubuntu 26.04", toolkit="13.1.115", driver="595.71.05"))
    assert chosen(stack)[1].startswith("CUDA 13.1.115 in ")
    assert [found.code for found in stack.toolkit.findings if found.severity is not Severity.NOTE]


def test_gcc_too_new_for_nvcc_gets_an_older_one() -> None:
    stack = nvidia.plan_stack(host("ubuntu 26.04", gcc=(16,)))
    assert not errors(stack)
    assert stack.compiler is not None
    assert (stack.compiler.major, stack.compiler.default) == (15, False)
    assert stack.compiler.package == "g++-15"
    assert not stack.compiler.installed

    there = nvidia.plan_stack(host("ubuntu 26.04", gcc=(16, 13, 14)))
    assert there.compiler is not None
    assert (there.compiler.major, there.compiler.installed) == (14, True)


def test_no_compiler_that_the_toolkit_takes() -> None:
    lonely = host(gcc=(17,))
    lonely = replace(lonely, distribution=replace(lonely.distribution, gcc_available=()))
    stack = nvidia.plan_stack(lonely)
    assert "takes GCC 6 to 15, but here there is 17" in errors(stack)["cuda-none"].cause
    asked = nvidia.plan_stack(lonely, Wish(cuda_version=Version("12.9")))
    assert "g++-14" in errors(asked)["cuda-gcc"].fix
    assert asked.compiler is None


def test_secure_boot_takes_signed_modules_where_there_are_some() -> None:
    stack = nvidia.plan_stack(host(secure_boot=True))
    assert stack.driver.choice is not None
    assert stack.driver.choice.prebuilt
    packages = stack.driver.choice.packages(host().distribution)
    assert packages is not None
    assert packages.names(580)[0] == "linux-modules-nvidia-580-open-generic"


def test_secure_boot_without_signed_modules_stops_with_the_steps() -> None:
    stack = nvidia.plan_stack(host("debian 13", secure_boot=True))
    found = errors(stack)["secure-boot"]
    for step in ("/var/lib/dkms/mok.pub", "mokutil --import", "reboot", "MokManager"):
        assert step in found.fix
    enrolled = host("debian 13", secure_boot=True, key_enrolled=True)
    assert not errors(nvidia.plan_stack(enrolled))


def test_cards_that_no_driver_serves_together() -> None:
    stack = nvidia.plan_stack(host("ubuntu 24.04", RTX_5090, GTX_1080_TI))
    found = errors(stack)["driver-none"]
    assert found.cause == (
        "no driver fits: GeForce GTX 1080 Ti works with the proprietary kernel modules only, not "
        "with the open ones; GeForce RTX 5090 works with the open kernel modules only, not with "
        "the proprietary ones; driver 595 no longer knows GeForce GTX 1080 Ti, whose last branch "
        "is 580 (likewise driver 615)"
    )
    assert "Take one of the cards out" in found.fix


def test_a_driver_that_the_source_does_not_have() -> None:
    stack = nvidia.plan_stack(host("debian 13"), Wish(driver_version=Version("580")))
    assert "has no driver 580" in errors(stack)["driver-offer"].cause


def test_a_driver_branch_without_proprietary_modules() -> None:
    wish = Wish(driver_version=Version("615"), driver_modules="proprietary")
    stack = nvidia.plan_stack(host("ubuntu 24.04", H200), wish)
    assert "no proprietary kernel modules any more" in errors(stack)["driver-branch-modules"].cause


def test_a_driver_without_security_fixes_is_warned_of() -> None:
    stack = nvidia.plan_stack(host(), Wish(driver_version=Version("610")))
    assert [found.code for found in stack.driver.findings if found.severity is Severity.WARNING]
    kept = nvidia.plan_stack(host("ubuntu 24.04", RTX_4090, driver="535.261.03"))
    assert "driver-end-of-life" in {found.code for found in kept.driver.findings}


@pytest.mark.parametrize(
    ("device", "driver", "cause"),
    [
        (RTX_5090, "550.163.01", "does not know GeForce RTX 5090, which needs 570 or newer"),
        (GTX_1080_TI, "595.71.05", "no longer knows GeForce GTX 1080 Ti, whose last branch is 580"),
    ],
)
def test_a_driver_that_does_not_know_the_card(device: int, driver: str, cause: str) -> None:
    stuck = host("ubuntu 24.04", device, driver=driver, modules=modules_for(device))
    stack = nvidia.plan_stack(stuck, Wish(driver_source="none"))
    assert cause in errors(stack)["driver-gpu"].cause
    replaced = nvidia.plan_stack(stuck)
    assert chosen(replaced)[0] == "driver 580 from the distribution's archive"


def modules_for(device: int) -> tables.Modules:
    return "open" if card(device).chip.takes("open") else "proprietary"


def test_a_driver_older_than_the_card_is_warned_of() -> None:
    stack = nvidia.plan_stack(host("ubuntu 24.04", 0x2B8C, driver="575.57.08"))
    assert not errors(stack)
    found = next(each for each in stack.driver.findings if each.code == "driver-listed")
    assert "580.76.05" in found.cause


def test_a_driver_of_which_the_source_has_no_packages() -> None:
    choice = nvidia.DriverChoice(615, ExactVersion("615.71.09"), "proprietary", "nvidia")
    found = validate(choice, nvidia.DriverNeeds(host("debian 13", H200)), nvidia.DRIVER_CONSTRAINTS)
    assert {each.code for each in found} == {"driver-branch-modules", "driver-packages"}


@pytest.mark.parametrize(
    ("system", "severity"),
    [("debian 13", Severity.ERROR), ("ubuntu 26.04", Severity.WARNING), ("ubuntu 24.04", None)],
)
def test_a_key_with_a_sha1_signature(system: str, severity: Severity | None) -> None:
    where = host(system, driver="595.71.05")
    where = replace(where, distribution=replace(where.distribution, repository="wsl-ubuntu"))
    (choice,) = nvidia.asked_for_toolkits(Version("13.3.1"))
    found = validate(choice, where, nvidia.TOOLKIT_CONSTRAINTS)
    assert [each.severity for each in found if each.code == "cuda-key"] == (
        [severity] if severity else []
    )


def test_no_driver_and_none_wanted() -> None:
    stack = nvidia.plan_stack(host(), Wish(driver_source="none"))
    assert list(errors(stack)) == ["driver-none"]


def test_versions_that_do_not_exist() -> None:
    toolkit = nvidia.plan_stack(host(), Wish(cuda_version=Version("12.7")))
    assert "12.8" in errors(toolkit)["cuda-version"].fix
    driver = nvidia.plan_stack(host(), Wish(driver_version=Version("600")))
    assert "595" in errors(driver)["driver-version"].fix


def test_a_toolkit_of_which_no_patch_release_is_known_is_warned_of() -> None:
    stack = nvidia.plan_stack(host(), Wish(cuda_version=Version("13.5")))
    assert not errors(stack)
    assert "cuda-release" in {found.code for found in stack.toolkit.findings}


def test_exactly_the_driver_version_that_was_asked_for() -> None:
    wish = Wish(driver_version=ExactVersion("580.126.20"), driver_source="nvidia")
    stack = nvidia.plan_stack(host(driver="580.95.05"), wish)
    assert stack.driver.choice is not None
    assert not stack.driver.choice.installed
    assert str(stack.driver.choice.version) == "580.126.20"
    same = nvidia.plan_stack(host(driver="580.126.20"), wish)
    assert same.driver.choice is not None
    assert same.driver.choice.installed


def test_a_host_as_it_was_probed() -> None:
    probe = at.Probe(
        arch="aarch64",
        os_id="debian",
        os_version="13",
        glibc=Version("2.41"),
        compilers={"g++": Version("14.2.0"), "g++-13": Version("13.3.0")},
        gpus=(gpu(RTX_5090),),
    )
    found = nvidia.host_of(probe)
    assert found is not None
    assert found.distribution.title == "Debian 13"
    assert found.machine == "aarch64"
    assert (found.gcc, found.default_gcc) == ((13, 14), 14)
    assert [each.name for each in found.cards] == ["GeForce RTX 5090"]
    assert nvidia.host_of(at.Probe(os_id="arch")) is None
    bare = nvidia.host_of(at.Probe(os_id="ubuntu", os_version="26.04", wsl=True))
    assert bare is not None
    assert (bare.gcc, bare.default_gcc, bare.glibc) == ((), 15, Version("2.43"))


# For every distribution, card, driver and compiler

CARDS = sorted({each.chip.name: each for each in tables.cards().values()}.values(), key=str)
DRIVERS = [
    "470.82.01", "525.60.13", "535.261.03", "550.163.01", "565.57.01", "570.133.07",
    "575.64.03", "580.65.06", "580.178.04", "590.48.01", "595.71.05", "610.57.04", "615.71.09",
]  # fmt: skip
NVCCS = ["11.8.89", "12.0.140", "12.4.131", "12.8.93", "13.0.88", "13.2.51", "13.2.86", "13.4.92"]


SYSTEMS = [
    system
    for each in tables.distributions()
    for wsl in (False, True)
    if (system := tables.distribution(each.os_id, each.version_id, wsl=wsl)) is not None
]
KINDS: list[tables.Modules | None] = [None, "open", "proprietary"]
CUDA_WISHES = [None, "12.4", "12.9", "12.9.1", "13.0", "13.2.1", "13.5"]
DRIVER_WISHES = [None, "550", "570", "580", "595", "610", "615", "620"]


def some_host(  # noqa: PLR0917
    system: Distribution,
    cards: list[Card],
    glibc: Version | None,
    machine: str,
    gcc: list[int],
    driver: str | None,
    modules: tables.Modules | None,
    nvcc: str | None,
    secure_boot: bool,
    key_enrolled: bool,
) -> Host:
    kinds = None if system.wsl else modules
    return Host(
        system,
        tuple(cards),
        glibc or system.glibc,
        machine,
        tuple(gcc),
        gcc[0] if gcc else None,
        Driver(ExactVersion(driver), kinds, windows=system.wsl) if driver else None,
        (at.Toolkit("/usr/local/cuda", Version(nvcc)),) if nvcc else (),
        secure_boot,
        key_enrolled,
    )


def version_or_none(text: str | None) -> Version | None:
    return Version(text) if text else None


hosts = st.builds(
    some_host,
    st.sampled_from(SYSTEMS),
    st.lists(st.sampled_from(CARDS), min_size=1, max_size=2),
    st.sampled_from([None, Version("2.31"), Version("2.42")]),
    st.sampled_from(["x86_64", "aarch64"]),
    st.lists(st.integers(9, 17), max_size=3, unique=True),
    st.sampled_from([None, *DRIVERS]),
    st.sampled_from(KINDS),
    st.sampled_from([None, *NVCCS]),
    st.booleans(),
    st.booleans(),
)
wishes = st.just(Wish()) | st.builds(
    Wish,
    st.sampled_from(CUDA_WISHES).map(version_or_none),
    st.sampled_from(DRIVER_WISHES).map(version_or_none),
    st.sampled_from(["auto", "nvidia", "distro", "none"]),
    st.sampled_from(KINDS),
    st.sampled_from(["compute", "desktop"]),
)


MOSTLY_WORKABLE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
"""For what holds of hosts on which something works, which half of all are."""


def fits(toolkit: Toolkit, release: Release | None, where: Host) -> bool:
    """The limits of a toolkit, said once more and in another way."""
    gcc = {*where.gcc, *where.distribution.gcc_available}
    too_new = where.glibc > toolkit.glibc_max and toolkit.glibc_limit == "breaks"
    miscompiles = str(release and release.version) in ("13.2.0", "13.2.1")
    return (
        all(each.chip.architecture.replace("-real", "") in toolkit.sm for each in where.cards)
        and not too_new
        and bool(gcc & set(range(toolkit.gcc_min, toolkit.gcc_max + 1)))
        and not (miscompiles and any(each.chip.sm in ("120", "121") for each in where.cards))
    )


def packages(stack: Stack, distribution: Distribution) -> Iterator[str]:
    if stack.toolkit.choice is not None and stack.toolkit.choice.root is None:
        for which in ("minimal", "full", "run"):
            yield from tables.toolkit_packages(stack.toolkit.choice.toolkit, which)
    if stack.driver.choice is not None:
        found = stack.driver.choice.packages(distribution)
        if found is not None:
            branch = stack.driver.choice.branch
            yield from (*found.pins(branch), *found.names(branch), *found.optional(branch))


@given(hosts, wishes)
@settings(max_examples=300, deadline=None)
def test_a_plan_satisfies_every_constraint_or_says_which_one_it_breaks(
    where: Host, wish: Wish
) -> None:
    stack = nvidia.plan_stack(where, wish)
    wrong = errors(stack)
    assert set(wrong) <= CONSTRAINTS | NOTHING
    assert all(found.cause and found.consequence and found.fix for found in wrong.values())
    if wrong:
        return
    driver, toolkit = stack.driver.choice, stack.toolkit.choice
    assert driver is not None
    assert toolkit is not None
    # The toolkit
    assert fits(toolkit.toolkit, toolkit.release, where) or toolkit.root is not None
    assert all(toolkit.toolkit.supports_sm(each) for each in stack.architectures)
    assert {each.chip.architecture for each in where.cards} == set(stack.architectures)
    assert stack.compiler is not None
    assert stack.compiler.major <= toolkit.toolkit.gcc_max
    least = toolkit.toolkit.windows_driver_min if where.distribution.wsl else None
    assert driver.version >= (least or toolkit.toolkit.driver_min)
    # The driver
    assert driver.source == "windows" or not where.distribution.wsl
    for each in where.cards:
        assert (each.chip.driver_first or 0) <= driver.branch
        assert driver.branch <= (each.chip.driver_last or 9999) + 9 * where.distribution.wsl
        if driver.modules is not None:
            assert each.chip.modules in ("either", driver.modules)
    if not driver.installed:
        assert driver.packages(where.distribution) is not None
        assert driver.prebuilt or where.key_enrolled or not where.secure_boot
        assert driver.modules == "open" or driver.branch < 615
        assert wish.driver_branch in (None, driver.branch)
        assert wish.driver_modules in (None, driver.modules)
        assert wish.driver_source in ("auto", driver.source)


@given(hosts, wishes)
@settings(max_examples=150, deadline=None)
def test_no_plan_ever_holds_a_forbidden_package(where: Host, wish: Wish) -> None:
    stack = nvidia.plan_stack(where, wish)
    for name in packages(stack, where.distribution):
        assert "{" not in name
        assert tables.forbidden(name, wsl=where.distribution.wsl) is None, name


@given(hosts)
@settings(MOSTLY_WORKABLE)
def test_what_is_left_to_the_software_fails_only_where_nothing_works(where: Host) -> None:
    assume(not where.distribution.wsl)
    if not errors(nvidia.plan_stack(where)):
        return
    distribution, repository = where.distribution, tables.repository(where.distribution)
    for branch, preference in product(tables.driver_branches(), tables.preferences()):
        toolkit = tables.toolkit(preference.release)
        assert toolkit is not None
        release = next(each for each in toolkit.releases if each.version == preference.release)
        for source, modules, prebuilt in product(
            distribution.driver_sources, branch.modules, (True, False)
        ):
            offer = tables.offer(source, distribution)
            assert offer is not None
            works = (
                branch.automatic
                and branch.number not in offer.missing
                and tables.driver_packages(
                    source, distribution, branch.number, modules, prebuilt=prebuilt
                )
                is not None
                and (prebuilt or where.key_enrolled or not where.secure_boot)
                and all(
                    each.chip.modules in ("either", modules)
                    and (each.chip.driver_first or 0)
                    <= branch.number
                    <= (each.chip.driver_last or 9999)
                    for each in where.cards
                )
                and branch.version >= toolkit.driver_min
                and fits(toolkit, release, where)
                and repository.has_toolkit(toolkit)
                and where.machine in repository.folder
            )
            assert not works, (str(branch), source, modules, str(preference.release))


@given(hosts, wishes)
@settings(MOSTLY_WORKABLE)
def test_once_installed_it_stays(where: Host, wish: Wish) -> None:
    stack = nvidia.plan_stack(where, wish)
    assume(not errors(stack))
    driver, toolkit = stack.driver.choice, stack.toolkit.choice
    assert driver is not None
    assert toolkit is not None
    nvcc = toolkit.nvcc or (toolkit.release and toolkit.release.nvcc) or toolkit.toolkit.version
    after = replace(
        where,
        driver=Driver(driver.version, driver.modules, windows=driver.source == "windows"),
        toolkits=(at.Toolkit(toolkit.root or "/usr/local/cuda-x", nvcc),),
    )
    again = nvidia.plan_stack(after, replace(wish, cuda_version=None))
    assert not errors(again)
    assert again.driver.choice is not None
    assert again.driver.choice.installed
    assert again.toolkit.choice is not None
    assert again.toolkit.choice.root is not None
    assert again.architectures == stack.architectures


@given(hosts)
@settings(MOSTLY_WORKABLE)
def test_asking_for_what_would_be_chosen_changes_nothing(where: Host) -> None:
    stack = nvidia.plan_stack(where)
    assume(not errors(stack))
    driver, toolkit = stack.driver.choice, stack.toolkit.choice
    assert driver is not None
    assert toolkit is not None
    used = Driver(driver.version, driver.modules, windows=driver.source == "windows")
    # The same constraints judge ...
    judged = validate(toolkit, replace(where, driver=used), nvidia.TOOLKIT_CONSTRAINTS)
    assert judged == stack.toolkit.findings
    # ... and the same choice comes of the wish.
    assume(toolkit.root is None and toolkit.release is not None)
    assert toolkit.release is not None
    wish = Wish(cuda_version=toolkit.release.version, driver_version=Version(str(driver.branch)))
    asked = nvidia.plan_stack(where, wish)
    assert not errors(asked)
    assert asked.toolkit.choice == toolkit
    assert asked.driver.choice == driver
