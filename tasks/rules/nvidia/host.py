"""What a host dictates to the NVIDIA stack, what the user wants of it, and which cards it has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from tasks import probe as at
from tasks.rules import tables
from tasks.rules.findings import Finding, error, warning
from tasks.rules.tables import Card, Chip, Distribution, ExactVersion, Flavour, Modules
from tasks.settings import Settings

NVIDIA = 0x10DE
DISPLAY_CLASSES = (0x0300, 0x0302)
"""VGA controllers and 3D controllers; the same cards have sound and USB functions too."""


OTHER_PACKAGES = (
    "cuda-*",
    "dkms",
    "g++-[0-9]*",
    "libcublas*",
    "libnccl*",
    "libnvidia-*",
    "linux-headers-[0-9]*",
    "mokutil",
    "nvidia-*",
    "unattended-upgrades",
)
"""Names and patterns of packages that matter beside the driver's own."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver that is on the host already; under WSL that of Windows."""

    version: Version
    modules: Modules | None = None
    """Which kernel modules are loaded, where that is known."""
    windows: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """What a host dictates to everything that is chosen for it."""

    distribution: Distribution
    cards: tuple[Card, ...]
    glibc: Version
    machine: str = "x86_64"
    """As uname says."""
    gcc: tuple[int, ...] = ()
    """Major versions of g++ that are installed."""
    default_gcc: int | None = None
    """What plain `g++` is, or will be once it is installed."""
    driver: Driver | None = None
    toolkits: tuple[at.Toolkit, ...] = ()
    """CUDA toolkits that are installed."""
    secure_boot: bool = False
    key_enrolled: bool = False
    """Whether the firmware trusts the key that DKMS signs with."""
    key_pending: bool = False
    """Whether it will ask at the next boot if it is to."""
    releases: tuple[tuple[str, Version], ...] = ()
    """Which patch release is where, as far as that was written down when it was installed."""

    @property
    def chips(self) -> tuple[Chip, ...]:
        """The distinct chips."""
        return tuple({card.chip.name: card.chip for card in self.cards}.values())

    @property
    def gcc_choices(self) -> tuple[int, ...]:
        """Major versions of g++ that are there or can be installed."""
        return tuple(sorted({*self.gcc, *self.distribution.gcc_available}))


def watched_packages() -> tuple[str, ...]:
    """Packages that have to do with NVIDIA, as patterns that dpkg knows."""
    headers = {name for each in tables.distributions() for name in each.headers}
    return (
        *tables.housekeeping().driver_globs,
        *tables.container_toolkit().packages,
        *sorted(headers),
        *OTHER_PACKAGES,
    )


def present_driver_of(probe: at.Probe) -> Driver | None:
    """The driver that the host has, whole: a kernel module and the libraries to it."""
    if probe.wsl:
        there = probe.windows_driver
        return Driver(there, windows=True) if there is not None and probe.wsl_libcuda else None
    # What the next boot loads counts, not what an upgrade has left running until then.
    module = probe.driver_on_disk or probe.driver_loaded
    if module is None or probe.driver_library is None:
        return None
    return Driver(module.version, module.modules)


def is_complete(toolkit: at.Toolkit, probe: at.Probe) -> bool:
    """Whether a toolkit on the host has what llama.cpp is compiled with."""
    version = toolkit.nvcc_version
    package = f"libcublas-dev-{version.major}-{version.minor}"
    return toolkit.has_cublas or package in probe.packages


def _marked_releases(probe: at.Probe) -> Iterator[tuple[str, Version]]:
    for path, file in probe.files.items():
        if not path.startswith(at.TOOLKIT_MARK):
            continue
        release = Version(path.removeprefix(at.TOOLKIT_MARK))
        for there in probe.toolkits:
            text = f"{there.nvcc_version}\n".encode()
            if hashlib.sha256(text).hexdigest() == file.sha256:
                yield there.root, release


def host_of(probe: at.Probe) -> Host | None:
    """A host as it was probed; None where its distribution is not supported."""
    distribution = tables.distribution(probe.os_id, probe.os_version, wsl=probe.wsl)
    if distribution is None:
        return None
    cards, _ = identify(probe.gpus)
    default = probe.compilers.get("g++", distribution.gcc)
    key = tables.secure_boot(distribution).key
    return Host(
        distribution,
        cards,
        probe.glibc or distribution.glibc,
        probe.arch or "x86_64",
        tuple(sorted({version.major for version in probe.compilers.values()})),
        default.major,
        present_driver_of(probe),
        tuple(each for each in probe.toolkits if is_complete(each, probe)),
        secure_boot=bool(probe.secure_boot) and not probe.wsl,
        key_enrolled=probe.mok_keys.get(key) == "enrolled",
        key_pending=probe.mok_keys.get(key) == "pending",
        releases=tuple(_marked_releases(probe)),
    )


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for."""

    cuda_version: Version | None = None
    """12.9 or 12.9.2."""
    driver_version: Version | None = None
    """A branch (580) or exactly one version (580.126.20)."""
    driver_source: Literal["auto", "nvidia", "distro", "none"] = "auto"
    driver_modules: Modules | None = None
    flavour: Flavour = "compute"

    @property
    def driver_branch(self) -> int | None:
        """The branch that was asked for."""
        return self.driver_version.major if self.driver_version else None

    def means(self, driver: Version) -> bool:
        """Whether a driver is of the version that was asked for."""
        wanted = self.driver_version
        return wanted is None or driver.release[: len(wanted.release)] == wanted.release


def wish_of(settings: Settings) -> Wish:
    """What the settings ask for."""
    return Wish(
        cuda_version=ExactVersion(settings.cuda_version) if settings.cuda_version else None,
        driver_version=ExactVersion(settings.driver_version) if settings.driver_version else None,
        driver_source=settings.driver_source,
        driver_modules=settings.driver_modules,
        flavour=settings.driver_flavour,
    )


def identify(gpus: Iterable[at.Gpu]) -> tuple[tuple[Card, ...], tuple[Finding, ...]]:
    """NVIDIA's cards among the display devices, and what is unknown about them."""
    cards, findings = [], []
    for gpu in gpus:
        if gpu.vendor != NVIDIA or gpu.class_code >> 8 not in DISPLAY_CLASSES:
            continue
        card = tables.gpu(gpu.device)
        if card is None:
            findings.append(_unknown_gpu(gpu))
            continue
        cards.append(card)
        if card.guessed:
            findings.append(
                warning(
                    "gpu-unknown",
                    f"the NVIDIA device 10de:{gpu.device:04x} at {gpu.address} is in no table",
                    f"it is taken for a {card.family.title} ({card.chip.capability}), as its "
                    "neighbours are",
                    "Compare with `nvidia-smi --query-gpu=name,compute_cap --format=csv`.",
                )
            )
    return tuple(cards), tuple(findings)


def _unknown_gpu(gpu: at.Gpu) -> Finding:
    if gpu.device < min(tables.cards()):
        return warning(
            "gpu-too-old",
            f"the NVIDIA device 10de:{gpu.device:04x} at {gpu.address} is older than Maxwell",
            "no CUDA toolkit that compiles llama.cpp knows it; it is not used",
        )
    return error(
        "gpu-unknown",
        f"the NVIDIA device 10de:{gpu.device:04x} at {gpu.address} is in no table",
        "what it needs is not known; it may be newer than this software",
        "Use a newer version of this software, or set `llama_cpp_backend` to cpu.",
    )


def cuda_architectures(cards: Iterable[Card]) -> tuple[str, ...]:
    """What CMAKE_CUDA_ARCHITECTURES gets: one entry for each distinct kind of card."""
    chips = {card.chip.architecture: card.chip for card in cards}
    return tuple(sorted(chips, key=lambda name: chips[name].capability))


def force_cublas(cards: Sequence[Card]) -> bool:
    """Whether GGML_CUDA_FORCE_CUBLAS is faster on every one of these cards."""
    return bool(cards) and all(card.family.force_cublas for card in cards)
