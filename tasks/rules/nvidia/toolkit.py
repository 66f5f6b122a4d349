"""Which CUDA toolkit, and which compiler with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from packaging.version import Version

from tasks.rules import tables
from tasks.rules.choice import Constraint, Decision, against_each, choose, errors_of, validate
from tasks.rules.findings import Finding, error, note, warning
from tasks.rules.nvidia.host import Host
from tasks.rules.tables import Release, Toolkit


@dataclass(frozen=True, slots=True)
class ToolkitChoice:
    """A toolkit that could be used."""

    toolkit: Toolkit
    release: Release | None
    """None where the patch release is not known."""
    nvcc: Version | None = None
    root: str | None = None
    """Where it is, if it is on the host already."""

    def __str__(self) -> str:
        if self.root is not None:
            return f"CUDA {self.nvcc} in {self.root}"
        return self.short

    @property
    def short(self) -> str:
        """Without where it is."""
        return f"CUDA {self.release.version if self.release else self.toolkit.version}"


def _knows_the_gpu(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    for chip in host.chips:
        if choice.toolkit.supports_sm(chip.target):
            continue
        card = next(card for card in host.cards if card.chip == chip)
        gone = chip.cuda_last is not None and choice.toolkit.version > chip.cuda_last
        limit = f"up to {chip.cuda_last}" if gone else f"from {chip.cuda_first} on"
        yield error(
            "cuda-gpu",
            f"{choice.toolkit} does not compile for {card.name}: "
            f"sm_{chip.target} is in CUDA {limit}",
            "nvcc stops with `Unsupported gpu architecture`",
            f"Set `cuda_version` to {chip.cuda_last if gone else chip.cuda_first}"
            f"{'' if gone else ' or newer'}, or leave it unset.",
            choice.toolkit.source,
        )


def _takes_the_compiler(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    toolkit = choice.toolkit
    if any(toolkit.supports_gcc(major) for major in host.gcc_choices):
        return
    have = ", ".join(str(major) for major in host.gcc_choices) or "none"
    yield error(
        "cuda-gcc",
        f"{toolkit} takes GCC {toolkit.gcc_min} to {toolkit.gcc_max}, but here there is {have}",
        "nvcc stops with `unsupported GNU version`",
        f"Install g++-{toolkit.gcc_max}, or leave `cuda_version` unset.",
        toolkit.source,
    )


def _takes_the_c_library(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    toolkit, patched = choice.toolkit, host.distribution.patched_cuda
    if toolkit.supports_glibc(host.glibc):
        return
    cause = f"glibc {host.glibc} is newer than what {toolkit} compiles with ({toolkit.glibc_max})"
    if toolkit.glibc_limit == "tested":
        yield warning(
            "cuda-glibc",
            f"{toolkit} was tried with glibc up to {toolkit.glibc_max}; here it is {host.glibc}",
            "its headers may not compile",
            source=toolkit.source,
        )
    elif choice.root and patched and patched.release[:2] == toolkit.version.release:
        yield warning(
            "cuda-glibc",
            cause,
            f"only the build of {host.distribution.title}'s own archive is patched for it",
            source=host.distribution.source,
        )
    else:
        yield error(
            "cuda-glibc",
            cause,
            "its headers do not compile (`exception specification is incompatible`); an older "
            "GCC does not help",
            "Leave `cuda_version` unset, or build on an older distribution.",
            toolkit.source,
        )


def _runs_on_the_driver(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    toolkit, driver = choice.toolkit, host.driver
    if driver is None:
        return
    windows = driver.windows
    least = toolkit.windows_driver_min if windows else toolkit.driver_min
    full = toolkit.windows_driver_full if windows else toolkit.driver_full
    whose = "the Windows driver" if windows else "the driver"
    if not toolkit.supports_driver(driver.version, windows=windows):
        yield error(
            "cuda-driver",
            f"{whose} is {driver.version}, but {toolkit} needs {least} or newer",
            "the server would find no GPU",
            "Install a newer driver in Windows."
            if windows
            else "Leave `driver_source` at auto, or set `cuda_version` to an older toolkit.",
            toolkit.source,
        )
    elif full is not None and driver.version < full:
        yield note(
            "cuda-driver",
            f"{whose} is {driver.version}, older than the {full} that {toolkit} was made with",
            "code compiled for the card itself runs all the same",
            source=toolkit.source,
        )


def _is_to_be_had(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    if choice.root is not None:
        return
    repository = tables.repository(host.distribution)
    if host.machine not in repository.folder:
        yield error(
            "cuda-repository",
            f"NVIDIA's repository {repository.name} has nothing for {host.machine}",
            "the toolkit cannot be installed",
            "Install it yourself, or use another machine.",
            repository.source,
        )
    elif not repository.has_toolkit(choice.toolkit):
        yield error(
            "cuda-repository",
            f"NVIDIA's repository {repository.name} begins with CUDA {repository.first_cuda}",
            f"{choice.toolkit} cannot be installed from it",
            f"Set `cuda_version` to {repository.first_cuda} or newer, or leave it unset.",
            repository.source,
        )


def _key_is_accepted(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    if choice.root is not None:
        return
    repository, apt = tables.repository(host.distribution), host.distribution.sha1_keys
    key = tables.key(repository.key)
    if not key.sha1_self_signature or apt == "accepted":
        return
    finding = error if apt == "refused" else warning
    yield finding(
        "cuda-key",
        f"NVIDIA's repository {repository.name} is signed with a key that itself is signed with "
        f"SHA-1 ({key.fingerprint})",
        "apt refuses it" if apt == "refused" else "apt refuses it where sqv is installed",
        source=key.source,
    )


def _release_is_known(choice: ToolkitChoice, _host: Host) -> Iterator[Finding]:
    if choice.root is None and choice.release is None:
        yield warning(
            "cuda-release",
            f"no patch release of {choice.toolkit} is known",
            "whatever the repository holds is installed, unseen",
            source=choice.toolkit.source,
        )


def _compiles_right(choice: ToolkitChoice, host: Host) -> Iterator[Finding]:
    release = choice.release.version if choice.release else None
    nvcc = choice.nvcc or (choice.release.nvcc if choice.release else None)
    for fault in tables.toolkit_faults():
        if not fault.affects(release=release, nvcc=nvcc):
            continue
        if any(fault.concerns(chip.target) for chip in host.chips):
            fixed = tables.toolkit(fault.fixed_in)
            better = fixed and all(fixed.supports_sm(chip.target) for chip in host.chips)
            newer = f"CUDA {fault.fixed_in} or newer, or " if better else ""
            yield Finding(
                fault.severity,
                "cuda-fault",
                fault.title,
                fault.consequence,
                f"Use {newer}one older than {fault.first}.",
                fault.source,
            )


TOOLKIT_CONSTRAINTS: tuple[Constraint[ToolkitChoice, Host], ...] = (
    Constraint("cuda-gpu", _knows_the_gpu),
    Constraint("cuda-glibc", _takes_the_c_library),
    Constraint("cuda-gcc", _takes_the_compiler),
    Constraint("cuda-driver", _runs_on_the_driver),
    Constraint("cuda-fault", _compiles_right),
    Constraint("cuda-repository", _is_to_be_had),
    Constraint("cuda-key", _key_is_accepted),
    Constraint("cuda-release", _release_is_known),
)


def installed_toolkits(host: Host) -> Iterator[ToolkitChoice]:
    """Toolkits that are on the host already, the newest first."""
    for present in sorted(host.toolkits, key=lambda each: each.nvcc_version, reverse=True):
        toolkit = tables.toolkit(present.nvcc_version)
        if toolkit is not None:
            marked = dict(host.releases).get(present.root)
            release = next(
                (
                    each
                    for each in toolkit.releases
                    if each.nvcc == present.nvcc_version or each.version == marked
                ),
                None,
            )
            yield ToolkitChoice(toolkit, release, present.nvcc_version, present.root)


def preferred_toolkits() -> Iterator[ToolkitChoice]:
    """Toolkits in the order in which they are tried."""
    for preference in tables.preferences():
        yield from asked_for_toolkits(preference.release)


def asked_for_toolkits(version: Version) -> Iterator[ToolkitChoice]:
    """The toolkits that a version means: 12.9.2, or 12.9 with its newest patch release first."""
    toolkit = tables.toolkit(version)
    if toolkit is None:
        return
    exact = len(version.release) > 2
    releases = [each for each in toolkit.releases if not exact or each.version == version]
    for release in reversed(releases):
        yield ToolkitChoice(toolkit, release)
    if not releases:
        yield ToolkitChoice(toolkit, None)


def fitting_toolkits(host: Host) -> tuple[ToolkitChoice, ...]:
    """Those of the preferred toolkits that nothing speaks against, the best first."""
    return tuple(
        choice
        for choice in preferred_toolkits()
        if not errors_of(validate(choice, host, TOOLKIT_CONSTRAINTS))
    )


def choose_toolkit(host: Host, wanted: Version | None = None) -> Decision[ToolkitChoice]:
    """The toolkit to compile with: the one asked for, else one that is there, else the best."""
    present = list(installed_toolkits(host))
    if wanted is not None:
        same = [each for each in present if _is_meant(each, wanted)]
        candidates = [*same, *asked_for_toolkits(wanted)]
        return _as_asked(candidates, host, wanted)
    for each in present:
        findings = validate(each, host, TOOLKIT_CONSTRAINTS)
        if not errors_of(findings):
            return Decision(each, f"{each}: it is there and fits", findings)
    return choose([*present, *preferred_toolkits()], host, TOOLKIT_CONSTRAINTS, _no_toolkit)


def _is_meant(choice: ToolkitChoice, wanted: Version) -> bool:
    if len(wanted.release) <= 2:
        return choice.toolkit.version.release == wanted.release[:2]
    return choice.release is not None and choice.release.version == wanted


def _as_asked(
    candidates: Sequence[ToolkitChoice], host: Host, wanted: Version
) -> Decision[ToolkitChoice]:
    """The choice is the user's: the best of what was meant, with all that speaks against it."""
    if not candidates:
        known = ", ".join(str(each.version) for each in tables.toolkits())
        unknown = error(
            "cuda-version", f"there is no CUDA {wanted}", fix=f"`cuda_version` is one of {known}."
        )
        return Decision(None, "no such toolkit", (unknown,))
    decision = choose(candidates, host, TOOLKIT_CONSTRAINTS, _no_toolkit)
    if decision.choice is not None:
        return replace(decision, reason=f"{decision.choice}: asked for")
    first = candidates[0]
    return Decision(first, f"{first}: asked for", validate(first, host, TOOLKIT_CONSTRAINTS))


def _no_toolkit(judged: Sequence[tuple[ToolkitChoice, tuple[Finding, ...]]]) -> Finding:
    return error(
        "cuda-none",
        f"no CUDA toolkit fits: {against_each(judged)}",
        "llama.cpp cannot be compiled for the GPU here",
        "Use another distribution, or set `llama_cpp_backend` to cpu.",
    )


@dataclass(frozen=True, slots=True)
class HostCompiler:
    """The g++ that nvcc calls."""

    major: int
    default: bool
    """It is what plain `g++` is: CMAKE_CUDA_HOST_COMPILER can stay unset."""
    installed: bool

    @property
    def package(self) -> str:
        """The package that brings it."""
        return "g++" if self.default else f"g++-{self.major}"


def host_compiler(toolkit: Toolkit, host: Host) -> HostCompiler | None:
    """The default g++ if it fits, else the newest installed one, else the newest to be had."""
    if host.default_gcc is not None and toolkit.supports_gcc(host.default_gcc):
        return HostCompiler(host.default_gcc, default=True, installed=True)
    for majors, installed in ((host.gcc, True), (host.gcc_choices, False)):
        fitting = [major for major in majors if toolkit.supports_gcc(major)]
        if fitting:
            return HostCompiler(max(fitting), default=False, installed=installed)
    return None
