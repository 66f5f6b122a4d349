"""The types of the tables' rows.

Each row says where it is from (`source`) and how sure that is (`certainty`). A row that has a
field too many, too few or of the wrong type cannot be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from packaging.version import Version
from pydantic import ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass

from tasks.rules.findings import Severity

STRICT = ConfigDict(extra="forbid")


class ExactVersion(Version):
    """A version that prints as it was written: 580.65.06, not 580.65.6.

    Names of files and packages are made of it.
    """

    __slots__ = ("_text",)

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self._text = version

    def __str__(self) -> str:
        return self._text


def _version(value: object) -> Version:
    return value if isinstance(value, Version) else ExactVersion(str(value))


AVersion = Annotated[Version, PlainValidator(_version)]
Text = Annotated[str, Field(min_length=1)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9A-F]{40}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DeviceId = Annotated[str, Field(pattern=r"^[0-9a-f]{4}$")]

Certainty = Literal["A", "B", "C", "D", "U"]
"""A read from the artefact or measured, B vendor or maintainer, C several public scripts agree,
D one source or an inference, U unknown."""

Modules = Literal["open", "proprietary"]
Flavour = Literal["compute", "desktop"]
DriverSource = Literal["nvidia", "distro"]
Machine = Literal["x86_64", "aarch64"]

DEB_ARCHITECTURES: Mapping[str, str] = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Sourced:
    """Any row."""

    source: Text
    """A public document or thread, or `measured`."""
    certainty: Certainty


# Toolkits


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Release:
    """One patch release of a toolkit."""

    version: AVersion
    driver: AVersion | None = None
    """Driver that its installers carry."""
    nvcc: AVersion | None = None
    """What its nvcc calls itself, where known."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Toolkit(Sourced):
    """One minor release of CUDA."""

    version: AVersion
    gcc_min: int
    gcc_max: int
    clang_max: int
    glibc_max: AVersion
    glibc_limit: Literal["breaks", "tested"]
    """Whether a newer C library is known to break it, or has only not been tried."""
    sm: tuple[Text, ...]
    """Targets that it compiles for, such as 90, 90a, 120f."""
    driver_min: AVersion
    """Oldest driver that runs what it compiles for a card."""
    driver_full: AVersion
    """Driver from which on everything works, PTX too."""
    windows_driver_min: AVersion
    windows_driver_full: AVersion | None = None
    brings_driver: bool
    """Whether its local installers carry a Linux driver."""
    releases: tuple[Release, ...]
    """The oldest first; empty where none is known."""
    notes: tuple[Text, ...] = ()

    def __str__(self) -> str:
        return f"CUDA {self.version}"

    @property
    def dash(self) -> str:
        """As in package names: 13-2."""
        return str(self.version).replace(".", "-")

    @property
    def newest(self) -> Release | None:
        """The newest patch release that is known."""
        return self.releases[-1] if self.releases else None

    def supports_gcc(self, major: int) -> bool:
        """Whether nvcc takes this g++ as its host compiler."""
        return self.gcc_min <= major <= self.gcc_max

    def supports_glibc(self, glibc: Version) -> bool:
        """Whether its headers are known to compile with this C library."""
        return Version(f"{glibc.major}.{glibc.minor}") <= self.glibc_max

    def supports_sm(self, target: str) -> bool:
        """Whether it compiles for a target: 90, 120a, 120a-real, sm_86."""
        return target.removeprefix("sm_").split("-")[0] in self.sm

    def supports_driver(self, driver: Version, *, windows: bool = False) -> bool:
        """Whether this driver runs what it compiles for a card."""
        return driver >= (self.windows_driver_min if windows else self.driver_min)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ToolkitFault(Sourced):
    """What is wrong with some releases."""

    id: Text
    title: Text
    first: AVersion
    last: AVersion
    first_nvcc: AVersion
    last_nvcc: AVersion
    sm: tuple[Text, ...]
    """Targets that suffer; empty for all."""
    severity: Severity
    consequence: Text
    fixed_in: AVersion

    def affects(self, *, release: Version | None, nvcc: Version | None) -> bool:
        """Whether it is in this release. What nvcc says of itself counts more."""
        if nvcc is not None:
            return self.first_nvcc <= nvcc <= self.last_nvcc
        return release is not None and self.first <= release <= self.last

    def concerns(self, target: str) -> bool:
        """Whether code for a target suffers."""
        return not self.sm or target.removeprefix("sm_").split("-")[0] in self.sm


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Preference(Sourced):
    """A release that is taken before others that fit as well."""

    release: AVersion
    reason: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ToolkitPackages(Sourced):
    """A set of toolkit packages."""

    set: Literal["minimal", "full", "run"]
    install: tuple[Text, ...]
    purpose: Text
    download_bytes: int | None = None
    installed_bytes: int | None = None

    def names(self, toolkit: Toolkit) -> tuple[str, ...]:
        """The packages for one toolkit."""
        return tuple(name.format(dash=toolkit.dash) for name in self.install)


# GPUs


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Family(Sourced):
    """What chips of one generation have in common."""

    name: Text
    title: Text
    force_cublas: bool
    """Whether llama.cpp is faster with GGML_CUDA_FORCE_CUBLAS."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Chip(Sourced):
    """A GPU chip."""

    name: Text
    family: Text
    capability: AVersion
    architecture: Annotated[str, Field(pattern=r"^[0-9]{2,3}[af]?(-real)?$")]
    """What CMAKE_CUDA_ARCHITECTURES gets for this chip alone."""
    cuda_first: AVersion
    cuda_last: AVersion | None = None
    driver_first: int | None = None
    driver_last: int | None = None
    modules: Literal["open", "proprietary", "either"]

    @property
    def sm(self) -> str:
        """The target without suffix: 120."""
        return f"{self.capability.major}{self.capability.minor}"

    @property
    def target(self) -> str:
        """The target that the compiler is asked for: 120a."""
        return self.architecture.removesuffix("-real")

    def takes(self, modules: Modules) -> bool:
        """Whether the kernel modules of this kind drive it."""
        return self.modules in ("either", modules)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Card:
    """A product, as its PCI device id tells."""

    device: int
    name: Text
    chip: Chip
    family: Family
    listed: AVersion | None = None
    """Driver whose list of supported GPUs has it first."""
    memory_gib: int | None = None
    bandwidth_gb_per_second: int | None = None
    guessed: bool = False
    """The id is in no table: the chip is that of its neighbours."""

    def __str__(self) -> str:
        return f"{self.name} ({self.chip.name}, 10de:{self.device:04x})"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DeviceRange(Sourced):
    """Ids that no table knows, and what their neighbours suggest."""

    first: DeviceId
    last: DeviceId
    chip: Text


# Distributions


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Key(Sourced):
    """A key that signs an apt repository."""

    name: Text
    fingerprint: Fingerprint
    owner: Text
    file: Text | None = None
    """Its name beside the repository."""
    url: Text | None = None
    sha256: Sha256 | None = None
    sha1_self_signature: bool | None = None
    """None where that is not known."""
    retired: Text | None = None
    """Since when it signs nothing any more."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Pin(Sourced):
    """An apt preferences file."""

    path: Text
    text: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Repository(Sourced):
    """One of NVIDIA's apt repositories for CUDA and drivers."""

    name: Text
    folder: Mapping[Machine, Text]
    """Where it lies below the setting cuda_repo_url."""
    key: Text
    keyring: Text
    keyring_sha256: Mapping[Machine, Sha256] = Field(default_factory=dict)
    pin: Text | None = None
    """Name of NVIDIA's own pin file for it; None where NVIDIA uses none."""
    first_cuda: AVersion | None = None
    """Oldest toolkit in it, where known."""
    components: tuple[Text, ...] = ()
    """Components of the distribution's archive that its packages need."""
    wsl: bool = False

    def url(self, machine: str, base: str) -> str | None:
        """Address of the repository below a base address; None if it has nothing for a machine."""
        folders = {str(name): folder for name, folder in self.folder.items()}
        return f"{base.rstrip('/')}/{folders[machine]}" if machine in folders else None

    def has_toolkit(self, toolkit: Toolkit) -> bool:
        """Whether it is known, or at least not known not, to hold this toolkit."""
        return self.first_cuda is None or toolkit.version >= self.first_cuda


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LocalInstaller(Sourced):
    """Installers that carry a whole repository in one .deb."""

    with_driver: Text
    without_driver: Text
    url: Text
    md5_url: Text
    folder: Text
    keyring_glob: Text
    sha256: Mapping[str, Sha256]

    def file(self, repository: Repository, toolkit: Toolkit, release: Release, machine: str) -> str:
        """Name of the .deb for one release; guessed where the table has no check sum for it."""
        driver = None if repository.wsl or not toolkit.brings_driver else release.driver
        pattern = self.without_driver if driver is None else self.with_driver
        return pattern.format(
            repository=repository.name,
            dash=toolkit.dash,
            release=release.version,
            driver=driver,
            deb_arch=DEB_ARCHITECTURES[machine],
        )


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Distribution(Sourced):
    """A distribution that is supported."""

    name: Text
    title: Text
    os_id: Text
    version_id: Text
    codename: Text
    repository: Text
    """Name of NVIDIA's repository for it; inside WSL that for WSL."""
    wsl_repository: Text
    wsl: bool = False
    driver_sources: tuple[DriverSource, ...]
    """The best first; none inside WSL."""
    driver_branches: tuple[int, ...]
    """The best first."""
    kernels: tuple[AVersion, ...]
    gcc: AVersion
    """What gcc is by default."""
    gcc_available: tuple[int, ...]
    glibc: AVersion
    cmake: AVersion
    cmake_backports: AVersion | None = None
    sha1_keys: Literal["accepted", "refused", "refused-with-sqv"]
    archive_nvcc: AVersion
    """CUDA of the archive's nvidia-cuda-toolkit."""
    patched_cuda: AVersion | None = None
    """CUDA in the archive under NVIDIA's package names, its headers patched for this glibc."""
    headers: tuple[Text, ...]
    """Meta packages that keep the kernel's headers coming."""
    traps: tuple[Text, ...] = ()


# Drivers


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DriverBranch(Sourced):
    """A branch of the driver."""

    number: int
    kind: Literal["long-term", "production", "new-feature"]
    state: Literal["current", "superseded", "end-of-life", "newest"]
    end_of_life: Text | None = None
    """Year and month."""
    cuda: AVersion
    """Toolkit that it was made with."""
    modules: tuple[Modules, ...]
    automatic: bool
    """Whether it is chosen without being asked for."""
    latest: AVersion | None = None
    """Newest version that was seen."""

    def __str__(self) -> str:
        return f"driver {self.number}"

    @property
    def version(self) -> Version:
        """What is to be expected of an installation today."""
        return self.latest or Version(str(self.number))


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Offer(Sourced):
    """Which branches a source has for a distribution."""

    source_name: DriverSource
    distribution: Text
    branches: tuple[int, ...]
    missing: tuple[int, ...]
    """Known not to be there."""
    server: tuple[int, ...] = ()
    """Branches that are there with the suffix -server too."""
    sections: Mapping[int, Text] = Field(default_factory=dict)
    """Component of the archive that a branch is in."""
    without_modules: tuple[Modules, ...] = ()
    """Kinds of kernel modules that cannot be had there, or not with the other packages."""
    components: tuple[Text, ...] = ()
    """Components of the archive that have to be enabled."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DriverPackages(Sourced):
    """A set of driver packages."""

    source_name: DriverSource
    os: Text
    flavour: Flavour
    modules: Modules
    prebuilt: bool = False
    """Signed modules for the kernel of the distribution, instead of DKMS."""
    first: int = 0
    last: int = 9999
    pin: tuple[Text, ...] = ()
    """Installed before the others."""
    install: tuple[Text, ...]
    if_offered: tuple[Text, ...] = ()
    """Installed where apt has a candidate."""

    def names(self, branch: int | str, kernel: str = "generic") -> tuple[str, ...]:
        """What to install for a branch (580, 580-server) and a kernel's meta package."""
        return tuple(name.format(branch=branch, kernel=kernel) for name in self.install)

    def pins(self, version: int | str) -> tuple[str, ...]:
        """What to install first: it pins a branch (580) or one version (580.126.20)."""
        return tuple(name.format(version=version) for name in self.pin)

    def optional(self, branch: int | str) -> tuple[str, ...]:
        """What to install where apt has a candidate."""
        return tuple(name.format(branch=branch) for name in self.if_offered)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SecureBoot(Sourced):
    """Where DKMS keeps the key that it signs with."""

    os: Text
    key: Text
    private: Text
    create: Text
    """Makes the key, as a shell command."""
    packages: tuple[Text, ...]
    """What making and enrolling it takes."""
    prebuilt_signed: bool
    """Whether the distribution has modules that need no key of ours."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Housekeeping(Sourced):
    """What is held, kept apart and looked for."""

    unattended_upgrades: tuple[Text, ...]
    archive_pin_origin: Text
    archive_pin_priority: int
    driver_globs: tuple[Text, ...]
    runfile_uninstallers: tuple[Text, ...]

    def is_driver_package(self, name: str) -> bool:
        """Whether an installed package belongs to a Linux driver."""
        return any(fnmatchcase(name, glob) for glob in self.driver_globs)

    @property
    def archive_pin(self) -> str:
        """Preferences that keep NVIDIA's driver packages away from the archive's driver."""
        return (
            f"Package: {' '.join(self.driver_globs)}\n"
            f"Pin: origin {self.archive_pin_origin}\n"
            f"Pin-Priority: {self.archive_pin_priority}\n"
        )


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Conflict(Sourced):
    """A package that others must not stand beside."""

    package: Text
    others: tuple[Text, ...] = Field(alias="with")
    reason: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Symptom(Sourced):
    """A known fault, as its victim sees it."""

    id: Text
    symptom: Text
    fix: Text
    cause: str = ""
    pattern: Text | None = None
    """Expression for the line with which llama.cpp tells of it."""


# Packages that are never installed


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Forbidden(Sourced):
    """Names of packages that no plan holds."""

    pattern: Annotated[str, Field(pattern=r"^\^.*\$$")]
    where: Literal["everywhere", "wsl"]
    reason: Text

    def matches(self, package: str) -> bool:
        """Whether the name of a package is meant (`name=version` and `name:arch` too)."""
        return re.fullmatch(self.pattern, re.split("[=:]", package, maxsplit=1)[0]) is not None


# Container toolkit


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Cdi(Sourced):
    """How the container toolkit describes GPUs to engines."""

    output: Text
    refresh_units: tuple[Text, ...]
    refresh_since: AVersion
    environment_file: Text
    wsl_since: AVersion
    spec_0_7_since: AVersion
    spec_0_7_engines: Mapping[Literal["docker", "podman", "containerd"], AVersion]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Engines(Sourced):
    """Container engines of a distribution's archive."""

    distribution: Text
    docker: AVersion
    podman: AVersion


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ContainerToolkit(Sourced):
    """NVIDIA's container toolkit."""

    key: Text
    folder: Text
    """Where it lies below the setting container_toolkit_repo_url, by {deb_arch}."""
    suite: Text
    keyring: Text
    packages: tuple[Text, ...]
    versions: tuple[Text, ...]
    """As apt writes them, the newest first."""
    stale_sources: tuple[Text, ...]
    cdi: Cdi
    engines: tuple[Engines, ...] = Field(alias="engine")
    traps: tuple[Symptom, ...] = Field(alias="trap")

    def url(self, machine: str, base: str) -> str:
        """Address of the repository below a base address."""
        return f"{base.rstrip('/')}/{self.folder.format(deb_arch=DEB_ARCHITECTURES[machine])}"


# WSL


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WslSystemd(Sourced):
    """How systemd is switched on."""

    path: Text
    text: Text
    apply: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WslKeepalive(Sourced):
    """How the distribution is kept from being stopped."""

    path: Text
    text: Text
    fallback: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WslMemory(Sourced):
    """How much of the machine's memory WSL gets."""

    default_share: float
    path: Text
    key: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WslSkip(Sourced):
    """Steps of a driver's installation that make no sense there."""

    steps: tuple[Text, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Wsl(Sourced):
    """Windows Subsystem for Linux."""

    kernel_pattern: Text
    gpu_device: Text
    library_folder: Text
    libcuda: Text
    nvidia_smi: Text
    systemd: WslSystemd
    keepalive: WslKeepalive
    memory: WslMemory
    skip: WslSkip


# How llama.cpp is compiled and run

Backend = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class BuildOption(Sourced):
    """A CMake option."""

    name: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: Text
    backend: Literal["cpu", "cuda", "any"]
    needed: bool = False
    """Without it the result is another one than was meant."""
    when: Literal["cublas", "rpc"] | None = None
    unless: Literal["cublas", "rpc"] | None = None
    first_cuda: AVersion | None = None
    reason: str = ""

    def applies(self, backend: Backend, so: Collection[str], cuda: Version | None) -> bool:
        """Whether it is passed; so are the conditions that hold, cuda the toolkit's version."""
        return (
            self.backend in ("any", backend)
            and (self.when is None or self.when in so)
            and (self.unless is None or self.unless not in so)
            and (self.first_cuda is None or (cuda is not None and cuda >= self.first_cuda))
        )


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class FlashAttentionPairs(Sourced):
    """Pairs of KV cache types that flash attention is compiled for."""

    option: Text
    default: tuple[Text, ...]
    types: tuple[Text, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class GoneOption(Sourced):
    """An option that llama.cpp does not know any more."""

    name: Text
    instead: Text


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Library(Sourced):
    """Names of libraries that a release may need from the host."""

    pattern: Text
    backend: Literal["cpu", "cuda", "any"]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class BuildCost(Sourced):
    """What a build takes."""

    memory_per_job_bytes: int
    """What one compiler may need at its worst moment."""
    build_bytes: int
    """Source, object files and compiler cache."""
    release_bytes: int
    more_build_bytes: int = 0
    """For each architecture beyond the first."""
    more_release_bytes: int = 0

    def building(self, architectures: int) -> int:
        """Bytes for source and object files."""
        return self.build_bytes + max(0, architectures - 1) * self.more_build_bytes

    def release(self, architectures: int) -> int:
        """Bytes for the release."""
        return self.release_bytes + max(0, architectures - 1) * self.more_release_bytes


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Device(Sourced):
    """A device that the server's sandbox lets it use, as systemd's DeviceAllow names it."""

    name: Text
    where: Literal["bare", "wsl"]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Variable(Sourced):
    """An environment variable of the server."""

    name: Text
    value: Text
    backend: Backend
    reason: str = ""
