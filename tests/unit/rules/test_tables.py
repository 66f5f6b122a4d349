"""The tables are complete, consistent with each other, and say where they are from."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from pydantic import TypeAdapter, ValidationError

from tasks.rules import tables
from tasks.rules.findings import Severity
from tasks.rules.tables import Card, Distribution, DriverPackages, Toolkit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(tables.__file__).parent
NAMES = ("container_toolkit", "distributions", "drivers", "forbidden", "gpus", "toolkits", "wsl")
FILES = [FOLDER / f"{name}.toml" for name in NAMES]


def named(row: Any) -> str:
    return str(row.name)


toolkits = pytest.mark.parametrize("toolkit", tables.toolkits(), ids=str)
distributions = pytest.mark.parametrize("distribution", tables.distributions(), ids=named)
chips = pytest.mark.parametrize("chip", tables.chips().values(), ids=named)
branches = pytest.mark.parametrize("branch", tables.driver_branches(), ids=str)


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table of every file that has a meaning of its own."""
    for path in FILES:
        content = tomllib.loads(path.read_text())
        for name, value in content.items():
            for row in value if isinstance(value, list) else [value]:
                if isinstance(row, dict):
                    yield f"{path.name}: {name}", row


def every_package() -> Iterator[tuple[str, str]]:
    """Every package that any plan can hold, and whether it is of the driver, cuda or container."""
    for toolkit in tables.toolkits():
        for which in tables.toolkit_package_sets():
            yield from (("cuda", name) for name in which.names(toolkit))
    for package_set in tables.driver_package_sets():
        for branch in tables.driver_branches():
            for name in names(package_set, branch.number):
                yield "driver", name
    yield from (("container", name) for name in tables.container_toolkit().packages)


def names(package_set: DriverPackages, branch: int) -> Iterator[str]:
    for label in (branch, f"{branch}-server"):
        yield from package_set.pins(label)
        yield from package_set.names(label, "generic-hwe-24.04")
        yield from package_set.optional(label)


# Every row


def test_every_row_has_a_source_and_a_certainty() -> None:
    lacking = [
        where
        for where, row in rows()
        if not row.get("source") or row.get("certainty") not in tuple("ABCDU")
    ]
    assert lacking == []


def test_sources_are_public() -> None:
    sources = {row["source"] for _, row in rows()}
    assert not [source for source in sources if re.search(r"\.\./|shared/|facts/|\.json\b", source)]


def test_a_misspelt_field_is_refused() -> None:
    row = tomllib.loads((FOLDER / "toolkits.toml").read_text())["toolkit"][0]
    with pytest.raises(ValidationError, match="gcc_maximum"):
        TypeAdapter(Toolkit).validate_python({**row, "gcc_maximum": 14})


@pytest.mark.parametrize(
    "ids",
    [
        [each.version for each in tables.toolkits()],
        [each.id for each in tables.toolkit_faults()],
        [each.release for each in tables.preferences()],
        [each.set for each in tables.toolkit_package_sets()],
        [each.number for each in tables.driver_branches()],
        [(each.os_id, each.version_id) for each in tables.distributions()],
        [each.name for each in tables.distributions()],
        [(each.source_name, each.distribution) for each in tables.offers()],
        [each.fingerprint for each in tables.keys().values()],
        [each.pattern for each in tables.forbidden_packages()],
        [row["name"] for where, row in rows() if where == "gpus.toml: chip"],
        [row["name"] for where, row in rows() if where == "gpus.toml: family"],
        [row["name"] for where, row in rows() if where == "distributions.toml: repository"],
        [row["name"] for where, row in rows() if where == "distributions.toml: key"],
    ],
    ids=repr,
)
def test_no_row_stands_twice(ids: list[object]) -> None:
    assert len(ids) == len(set(ids)) > 0


def test_everything_loads_once() -> None:
    assert tables.toolkits() is tables.toolkits()
    assert tables.cards() is tables.cards()
    assert tables.container_toolkit() is tables.container_toolkit()
    assert tables.wsl() is tables.wsl()


def test_the_rules_never_import_pyinfra() -> None:
    code = "import sys, tasks.rules.nvidia; sys.exit('pyinfra' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_versions_print_as_they_were_written() -> None:
    toolkit = tables.toolkit("13.0")
    assert toolkit is not None
    assert str(toolkit.driver_min) == "580.65.06"
    assert toolkit.driver_min == Version("580.65.6")


# Toolkits


def test_toolkits_and_branches_are_in_order() -> None:
    versions = [each.version for each in tables.toolkits()]
    assert versions == sorted(versions)
    numbers = [each.number for each in tables.driver_branches()]
    assert numbers == sorted(numbers)


@toolkits
def test_a_toolkits_releases_are_its_own_and_in_order(toolkit: Toolkit) -> None:
    versions = [each.version for each in toolkit.releases]
    assert versions == sorted(versions)
    for release in toolkit.releases:
        assert release.version.release[:2] == toolkit.version.release
        assert tables.toolkit(release.version) is toolkit
        assert (release.driver is not None) == toolkit.brings_driver
        assert release.driver is None or release.driver.major >= toolkit.driver_min.major
        assert release.nvcc is None or release.nvcc.release[:2] == toolkit.version.release


@toolkits
def test_a_toolkits_limits_make_sense(toolkit: Toolkit) -> None:
    assert toolkit.gcc_min < toolkit.gcc_max < 100
    assert Version("2.30") < toolkit.glibc_max < Version("3")
    assert toolkit.driver_min <= toolkit.driver_full
    assert all(re.fullmatch(r"[0-9]{2,3}[af]?", target) for target in toolkit.sm)
    assert all(re.sub("[af]$", "", target) in toolkit.sm for target in toolkit.sm)


@toolkits
def test_every_toolkit_has_a_driver_branch_that_runs_it(toolkit: Toolkit) -> None:
    able = [each for each in tables.driver_branches() if toolkit.supports_driver(each.version)]
    assert [each for each in able if each.automatic]


def test_limits_only_grow() -> None:
    for older, newer in zip(tables.toolkits(), tables.toolkits()[1:], strict=False):
        assert older.gcc_max <= newer.gcc_max
        assert older.glibc_max <= newer.glibc_max
        assert older.driver_min <= newer.driver_min
        assert older.driver_full < newer.driver_full


@pytest.mark.parametrize(
    ("version", "gcc", "glibc", "sm", "driver"),
    [
        ("12.4", 13, "2.40", "90a", "525.60.13"),
        ("12.8", 14, "2.40", "120a", "525.60.13"),
        ("12.9", 14, "2.40", "121a", "525.60.13"),
        ("13.0", 15, "2.41", "110", "580.65.06"),
        ("13.2", 15, "2.43", "120a", "580.65.06"),
        ("13.4", 16, "2.43", "107", "580.65.06"),
    ],
)
def test_what_is_known_of_toolkits(
    version: str, gcc: int, glibc: str, sm: str, driver: str
) -> None:
    toolkit = tables.toolkit(version)
    assert toolkit is not None
    assert toolkit.supports_gcc(gcc)
    assert not toolkit.supports_gcc(gcc + 1)
    assert toolkit.supports_glibc(Version(glibc))
    assert not toolkit.supports_glibc(Version(f"2.{int(glibc[2:]) + 1}"))
    assert toolkit.supports_sm(sm)
    assert toolkit.supports_sm(f"sm_{sm}")
    assert toolkit.supports_sm(f"{sm}-real")
    assert toolkit.supports_driver(Version(driver))
    assert not toolkit.supports_driver(Version("520.0"))


def test_a_toolkit_is_found_by_any_version_of_it() -> None:
    for version in ("13.2", "13.2.2", "13.2.78"):
        found = tables.toolkit(version)
        assert found is not None
        assert str(found.version) == "13.2"
    assert tables.toolkit("11.8") is None
    assert tables.toolkit("12.7") is None


@pytest.mark.parametrize(
    ("release", "nvcc", "faulty"),
    [
        ("13.2.0", None, True),
        ("13.2.1", None, True),
        ("13.2.2", None, False),
        ("13.1.2", None, False),
        (None, "13.2.51", True),
        (None, "13.2.78", True),
        (None, "13.2.86", False),
        (None, "13.4.92", False),
        ("13.2.2", "13.2.78", True),  # what nvcc says of itself counts
    ],
)
def test_gibberish_with_iq_quants_is_known_by_release_and_by_nvcc(
    release: str | None, nvcc: str | None, faulty: bool
) -> None:
    fault = next(each for each in tables.toolkit_faults() if each.id == "iq-quants-sm120")
    assert (
        fault.affects(
            release=Version(release) if release else None, nvcc=Version(nvcc) if nvcc else None
        )
        is faulty
    )
    assert fault.concerns("120a-real")
    assert not fault.concerns("90")


def test_preferred_releases_exist_and_have_no_serious_fault() -> None:
    known = {release.version for toolkit in tables.toolkits() for release in toolkit.releases}
    for preference in tables.preferences():
        assert preference.release in known
        for fault in tables.toolkit_faults():
            assert fault.severity is Severity.NOTE or not fault.affects(
                release=preference.release, nvcc=None
            )


def test_the_smallest_set_of_packages() -> None:
    toolkit = tables.toolkit("12.9")
    assert toolkit is not None
    assert tables.toolkit_packages(toolkit) == (
        "cuda-nvcc-12-9",
        "cuda-cudart-dev-12-9",
        "cuda-driver-dev-12-9",
        "cuda-cccl-12-9",
        "libcublas-dev-12-9",
    )
    assert tables.toolkit_packages(toolkit, "full") == ("cuda-toolkit-12-9",)


# GPUs


def test_every_known_pci_id_is_there() -> None:
    assert len(tables.cards()) == 629
    assert len(tables.chips()) == 42


@chips
def test_every_chip_has_a_toolkit(chip: tables.Chip) -> None:
    able = [each.version for each in tables.toolkits() if each.supports_sm(chip.target)]
    assert able
    assert able == [
        each.version
        for each in tables.toolkits()
        if chip.cuda_first <= each.version
        and (chip.cuda_last is None or each.version <= chip.cuda_last)
    ]
    assert chip.family in tables.families()
    assert chip.target.rstrip("af") == chip.sm


@chips
def test_every_chip_has_a_driver_that_runs_a_toolkit_for_it(chip: tables.Chip) -> None:
    assert [
        (branch.number, toolkit.version)
        for branch, toolkit in product(tables.driver_branches(), tables.toolkits())
        if branch.automatic
        and (chip.driver_first or 0) <= branch.number <= (chip.driver_last or 9999)
        and any(chip.takes(modules) for modules in branch.modules)
        and toolkit.supports_driver(branch.version)
        and toolkit.supports_sm(chip.target)
    ]


def test_every_chip_has_a_card_and_every_range_a_chip() -> None:
    assert {card.chip.name for card in tables.cards().values()} == set(tables.chips())
    for row in (row for where, row in rows() if where == "gpus.toml: range"):
        assert row["chip"] in tables.chips()
        assert int(row["first"], 16) <= int(row["last"], 16)


def test_memory_is_told_of_cards_that_exist() -> None:
    told = tomllib.loads((FOLDER / "gpus.toml").read_text())["memory"]
    ids = {int(name, 16) for name in told if name not in ("source", "certainty")}
    assert ids <= set(tables.cards())
    assert all(tables.cards()[each].bandwidth_gb_per_second for each in ids)


@pytest.mark.parametrize(
    ("device", "name", "capability", "architecture", "modules"),
    [
        (0x2B85, "GeForce RTX 5090", "12.0", "120a-real", "open"),
        (0x2C02, "GeForce RTX 5080", "12.0", "120a-real", "open"),
        (0x2BB1, "RTX PRO 6000 Blackwell Workstation Edition", "12.0", "120a-real", "open"),
        (0x2E12, "GB10", "12.1", "121a-real", "open"),
        (0x2901, "B200", "10.0", "100", "open"),
        (0x3182, "B300 SXM6 AC", "10.3", "103", "open"),
        (0x2335, "H200 SXM 141GB", "9.0", "90", "either"),
        (0x2330, "H100 SXM5 80GB", "9.0", "90", "either"),
        (0x2684, "GeForce RTX 4090", "8.9", "89", "either"),
        (0x2204, "GeForce RTX 3090", "8.6", "86", "either"),
        (0x20B0, "A100 SXM4 40GB", "8.0", "80", "either"),
        (0x1EB8, "Tesla T4", "7.5", "75", "either"),
        (0x1DB4, "Tesla V100 PCIe 16GB", "7.0", "70", "proprietary"),
        (0x1B06, "GeForce GTX 1080 Ti", "6.1", "61", "proprietary"),
    ],
)
def test_well_known_cards(
    device: int, name: str, capability: str, architecture: str, modules: str
) -> None:
    card = tables.gpu(device)
    assert card is not None
    assert not card.guessed
    assert card.name == name
    assert str(card.chip.capability) == capability
    assert card.chip.architecture == architecture
    assert card.chip.modules == modules


def test_speed_limits_of_well_known_cards() -> None:
    def memory(device: int) -> tuple[int | None, int | None]:
        card = tables.cards()[device]
        return card.memory_gib, card.bandwidth_gb_per_second

    assert memory(0x2B85) == (32, 1792)
    assert memory(0x2335) == (141, 4800)
    assert memory(0x2684) == (24, 1008)


@pytest.mark.parametrize(
    ("device", "chip"),
    [(0x2B86, "GB202"), (0x29FE, "GB100"), (0x2EFF, "GB20B"), (0x26FE, "AD102"), (0x1FFE, "TU102")],
)
def test_an_unknown_id_is_taken_for_its_neighbours(device: int, chip: str) -> None:
    assert device not in tables.cards()
    card = tables.gpu(device)
    assert card is not None
    assert card.guessed
    assert card.chip.name == chip


@pytest.mark.parametrize("device", [0x0FC6, 0x3F00, 0x0000, 0xFFFF])
def test_an_id_far_from_all_others_is_not_guessed(device: int) -> None:
    assert tables.gpu(device) is None


def test_only_hopper_is_known_to_be_faster_with_cublas() -> None:
    assert [each.name for each in tables.families().values() if each.force_cublas] == ["hopper"]


# Distributions and repositories


@distributions
def test_a_distribution_is_found_by_os_release(distribution: Distribution) -> None:
    found = tables.distribution(distribution.os_id, distribution.version_id)
    assert found == distribution
    assert not found.wsl
    assert tables.distribution("arch", "rolling") is None
    assert tables.distribution(None, None) is None


@distributions
def test_inside_wsl_there_is_another_repository_and_no_driver(distribution: Distribution) -> None:
    found = tables.distribution(distribution.os_id, distribution.version_id, wsl=True)
    assert found is not None
    assert found.wsl
    assert found.repository == distribution.wsl_repository
    assert found.driver_sources == ()
    assert tables.offer("nvidia", found) is None
    assert tables.offer("distro", found) is None
    assert tables.driver_packages("nvidia", found, 595, "open") is None


@pytest.mark.parametrize("wsl", [False, True])
@distributions
def test_a_distributions_repository_is_signed_with_a_key_that_it_accepts(
    distribution: Distribution, wsl: bool
) -> None:
    found = tables.distribution(distribution.os_id, distribution.version_id, wsl=wsl)
    assert found is not None
    repository = tables.repository(found)
    key = tables.key(repository.key)
    assert key.retired is None
    assert not (key.sha1_self_signature and found.sha1_keys == "refused")
    for machine, folder in repository.folder.items():
        assert re.fullmatch(rf"{repository.name}/[a-z0-9_]+/", folder)
        assert repository.url(machine, "http://mirror/x/") == f"http://mirror/x/{folder}"
    assert repository.url("mips", "http://mirror/x") is None


@distributions
def test_every_distribution_has_a_toolkit_that_compiles_there(distribution: Distribution) -> None:
    repository = tables.repository(distribution)
    assert [
        preference.release
        for preference in tables.preferences()
        for toolkit in [tables.toolkit(preference.release)]
        if toolkit is not None
        and repository.has_toolkit(toolkit)
        and toolkit.supports_glibc(distribution.glibc)
        and toolkit.supports_gcc(distribution.gcc.major)
        and toolkit.supports_sm("120a")
    ]
    assert distribution.gcc.major in distribution.gcc_available
    assert distribution.cmake >= Version("3.18"), "what llama.cpp asks for"


@distributions
def test_every_distribution_has_a_driver_of_each_preferred_branch(
    distribution: Distribution,
) -> None:
    assert distribution.driver_sources
    for number in distribution.driver_branches:
        branch = tables.driver_branch(number)
        assert branch is not None
        assert branch.automatic
        offers = [tables.offer(source, distribution) for source in distribution.driver_sources]
        assert any(offer is not None and number in offer.branches for offer in offers)


def test_a_keys_file_is_named_after_its_fingerprint() -> None:
    for key in tables.keys().values():
        if key.file is not None and key.file.endswith(".pub"):
            assert key.fingerprint.endswith(key.file.removesuffix(".pub").upper())


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("cuda", "EB693B3035CD5710E231E123A4B469963BF863CC"),
        ("cuda-debian13", "02182E60104FCDC26EAE1B8597A5D4CB8793F200"),
        ("cuda-ubuntu2604", "14BAFBC7562AD710CA04E69905FBB6DA60DF8A40"),
        ("container-toolkit", "C95B321B61E88C1809C4F759DDCAE044F796ECB0"),
    ],
)
def test_fingerprints(name: str, fingerprint: str) -> None:
    assert tables.key(name).fingerprint == fingerprint


def test_keyrings_of_the_same_name_differ() -> None:
    sums = [
        checksum
        for repository in tables.repositories().values()
        for checksum in repository.keyring_sha256.values()
    ]
    assert len(sums) == len(set(sums)) == 8


def test_the_pin_prefers_nvidias_packages() -> None:
    assert tables.pin().path == "/etc/apt/preferences.d/cuda-repository-pin-600"
    assert "Package: *\nPin: release l=NVIDIA CUDA\nPin-Priority: 600\n" in tables.pin().text


@pytest.mark.parametrize(
    ("repository", "release", "machine", "name"),
    [
        (
            "ubuntu2404",
            "12.9.2",
            "x86_64",
            "cuda-repo-ubuntu2404-12-9-local_12.9.2-575.57.08-1_amd64.deb",
        ),
        (
            "debian13",
            "13.3.0",
            "aarch64",
            "cuda-repo-debian13-13-3-local_13.3.0-610.43.02-1_arm64.deb",
        ),
        ("ubuntu2604", "13.4.2", "x86_64", "cuda-repo-ubuntu2604-13-4-local_13.4.2-1_amd64.deb"),
        ("wsl-ubuntu", "12.9.2", "x86_64", "cuda-repo-wsl-ubuntu-12-9-local_12.9.2-1_amd64.deb"),
    ],
)
def test_names_of_local_installers(repository: str, release: str, machine: str, name: str) -> None:
    toolkit = tables.toolkit(release)
    assert toolkit is not None
    wanted = next(each for each in toolkit.releases if str(each.version) == release)
    installer = tables.local_installer()
    assert installer.file(tables.repositories()[repository], toolkit, wanted, machine) == name


def test_every_known_check_sum_is_that_of_an_installer() -> None:
    installer = tables.local_installer()
    possible = {
        installer.file(repository, toolkit, release, machine)
        for repository in tables.repositories().values()
        for machine in repository.folder
        for toolkit in tables.toolkits()
        for release in toolkit.releases
    }
    assert set(installer.sha256) <= possible


# Drivers


@branches
def test_a_branch_is_of_its_number(branch: tables.DriverBranch) -> None:
    assert branch.version.major == branch.number
    assert branch.modules
    assert not (branch.automatic and branch.state in ("end-of-life", "superseded", "newest"))
    assert (branch.end_of_life is not None) or branch.state != "end-of-life"


def test_every_distribution_and_source_has_an_offer() -> None:
    for distribution, source in product(tables.distributions(), ("nvidia", "distro")):
        offer = tables.offer(source, distribution)  # type: ignore[arg-type]
        assert offer is not None
        assert not set(offer.branches) & set(offer.missing)
        assert set(offer.sections) <= set(offer.branches)
        assert set(offer.server) <= set(offer.branches)
        for number in (*offer.branches, *offer.missing):
            assert tables.driver_branch(number) is not None


@pytest.mark.parametrize("flavour", ["compute", "desktop"])
def test_every_offered_branch_has_packages(flavour: tables.Flavour) -> None:
    for offer in tables.offers():
        distribution = next(
            each for each in tables.distributions() if each.name == offer.distribution
        )
        for number in offer.branches:
            branch = tables.driver_branch(number)
            assert branch is not None
            for modules in branch.modules:
                found = tables.driver_packages(
                    offer.source_name, distribution, number, modules, flavour
                )
                assert found is not None, (offer.source_name, distribution.name, number, modules)
                assert "{" not in " ".join(names(found, number))


@branches
def test_no_packages_with_modules_that_a_branch_does_not_have(branch: tables.DriverBranch) -> None:
    for package_set in tables.driver_package_sets():
        if package_set.source_name == "nvidia" and package_set.modules not in branch.modules:
            assert not package_set.first <= branch.number <= package_set.last


def test_one_package_set_at_most_for_each_case() -> None:
    for first, second in product(tables.driver_package_sets(), repeat=2):
        if first is not second and all(
            getattr(first, name) == getattr(second, name)
            for name in ("source_name", "os", "flavour", "modules", "prebuilt")
        ):
            assert first.last < second.first or second.last < first.first


@pytest.mark.parametrize(
    ("source", "os", "branch", "modules", "prebuilt", "expected"),
    [
        ("nvidia", "debian 13", 595, "open", False, "nvidia-driver-cuda nvidia-kernel-open-dkms"),
        ("nvidia", "ubuntu 24.04", 595, "open", False, "libnvidia-compute nvidia-dkms-open"),
        (
            "nvidia",
            "ubuntu 24.04",
            580,
            "open",
            False,
            "libnvidia-compute-580 nvidia-dkms-580-open nvidia-utils-580",
        ),
        (
            "distro",
            "ubuntu 24.04",
            580,
            "open",
            True,
            (
                "linux-modules-nvidia-580-open-generic-hwe-24.04 nvidia-headless-no-dkms-580-open "
                "nvidia-utils-580 nvidia-compute-utils-580"
            ),
        ),
        (
            "distro",
            "ubuntu 22.04",
            580,
            "proprietary",
            False,
            "nvidia-headless-580 nvidia-utils-580 nvidia-compute-utils-580",
        ),
    ],
)
def test_driver_packages(
    source: tables.DriverSource,
    os: str,
    branch: int,
    modules: tables.Modules,
    prebuilt: bool,
    expected: str,
) -> None:
    distribution = tables.distribution(*os.split())
    assert distribution is not None
    found = tables.driver_packages(source, distribution, branch, modules, prebuilt=prebuilt)
    assert found is not None
    assert found.names(branch, "generic-hwe-24.04") == tuple(expected.split())
    assert found.pins(branch) == ((f"nvidia-driver-pinning-{branch}",) * (source == "nvidia"))


@distributions
def test_secure_boot_is_known_for_every_distribution(distribution: Distribution) -> None:
    assert tables.secure_boot(distribution).key.startswith("/var/lib/")


def test_removing_driver_packages_never_takes_the_container_toolkit_along() -> None:
    housekeeping = tables.housekeeping()
    for name in tables.container_toolkit().packages:
        assert not housekeeping.is_driver_package(name)
    for kind, name in every_package():
        assert housekeeping.is_driver_package(name) == (kind == "driver"), name


@pytest.mark.parametrize(
    "name",
    [
        # Names that both Debian's archive and NVIDIA's repository have, in versions of their own.
        "libcuda1", "libcudadebugger1", "libegl-nvidia0", "libgles-nvidia2", "libglx-nvidia0",
        "libnvcuvid1", "libnvidia-cfg1", "libnvidia-compute-580", "libnvidia-eglcore",
        "libnvidia-ml1", "libnvidia-ptxjitcompiler1", "libnvoptix1", "nvidia-alternative",
        "nvidia-egl-icd", "nvidia-legacy-check", "nvidia-vdpau-driver", "nvidia-vulkan-icd",
    ],
)  # fmt: skip
def test_every_part_of_a_driver_is_known_for_one(name: str) -> None:
    assert tables.housekeeping().is_driver_package(name)


def test_the_archives_driver_is_kept_apart_from_nvidias() -> None:
    pin = tables.housekeeping().archive_pin
    assert pin.startswith("Package: cuda-drivers* ")
    assert pin.endswith("\nPin: origin developer.download.nvidia.com\nPin-Priority: -1\n")


def test_unattended_upgrades_leave_every_driver_package_alone() -> None:
    patterns = [re.compile(each) for each in tables.housekeeping().unattended_upgrades]
    for kind, name in every_package():
        if kind == "driver" and name != "libcuda1":
            assert any(each.match(name) for each in patterns), name


# Packages that are never installed


@pytest.mark.parametrize("row", tables.forbidden_packages(), ids=lambda row: row.pattern)
def test_patterns_compile_and_are_anchored(row: tables.Forbidden) -> None:
    re.compile(row.pattern)
    assert row.pattern.startswith("^")
    assert row.pattern.endswith("$")


@pytest.mark.parametrize(
    "package",
    [
        "cuda",
        "cuda-13",
        "cuda-12-9",
        "cuda-runtime-13-2",
        "cuda-drivers",
        "cuda-drivers-580",
        "cuda=12.9.1-1",
        "nvidia-cuda-toolkit",
    ],
)
def test_never_installed_anywhere(package: str) -> None:
    assert tables.forbidden(package, wsl=False)
    assert tables.forbidden(package, wsl=True)


@pytest.mark.parametrize(
    "package",
    [
        "nvidia-open",
        "nvidia-open-580",
        "nvidia-driver-580",
        "nvidia-driver-cuda",
        "nvidia-dkms-580-open",
        "nvidia-utils-580",
        "nvidia-smi",
        "nvidia-kernel-open-dkms",
        "libnvidia-compute",
        "libnvidia-compute-580:amd64",
        "linux-modules-nvidia-580-open-generic",
        "libcuda1",
    ],
)
def test_never_installed_inside_wsl(package: str) -> None:
    assert tables.forbidden(package, wsl=True)
    assert not tables.forbidden(package, wsl=False)


def test_no_set_holds_a_forbidden_package() -> None:
    for kind, name in every_package():
        assert tables.forbidden(name, wsl=False) is None, name
        assert (tables.forbidden(name, wsl=True) is not None) == (kind == "driver"), name


# Containers and WSL


def test_container_toolkit() -> None:
    toolkit = tables.container_toolkit()
    assert tables.key(toolkit.key).file
    assert toolkit.url("aarch64", "http://mirror/x/") == "http://mirror/x/stable/deb/arm64/"
    assert len(toolkit.packages) == 4
    versions = [Version(each) for each in toolkit.versions]
    assert versions == sorted(versions, reverse=True)
    assert {each.distribution for each in toolkit.engines} == {
        each.name for each in tables.distributions()
    }
    assert toolkit.cdi.spec_0_7_engines["podman"] == Version("5.1.0")


def test_wsl() -> None:
    wsl = tables.wsl()
    assert re.search(wsl.kernel_pattern, "6.6.87.2-microsoft-standard-WSL2")
    assert wsl.libcuda.startswith(wsl.library_folder + "/")
    assert wsl.systemd.text == "[boot]\nsystemd=true\n"


def test_a_card_says_what_it_is() -> None:
    card: Card = tables.cards()[0x2B85]
    assert str(card) == "GeForce RTX 5090 (GB202, 10de:2b85)"
