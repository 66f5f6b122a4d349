"""What is installed of NVIDIA's, from where, and which key it takes to be trusted.

It all follows from what was chosen for the host. The one choice that is left is the container
toolkit's version, which has to suit the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined
from packaging.version import InvalidVersion, Version

from tasks import probe as at
from tasks.probe import AptSource, Probe
from tasks.rules import apt, tables
from tasks.rules.findings import Finding, error, warning
from tasks.rules.nvidia import Stack
from tasks.rules.tables import Distribution
from tasks.settings import Settings

SOURCES = "/etc/apt/sources.list.d"
PREFERENCES = "/etc/apt/preferences.d"
ARCHIVE_PIN = f"{PREFERENCES}/llamastead-driver-from-archive"
LOCAL_PIN = f"{PREFERENCES}/llamastead-cuda-local"
CUDA_KEYRING = "/usr/share/keyrings/cuda-archive-keyring.gpg"
"""Where NVIDIA's own package cuda-keyring has it: two places for one repository are an error."""
NVIDIA = "NVIDIA's repository"
SERVICES = (
    "nvidia-persistenced.service",
    "nvidia-suspend.service",
    "nvidia-hibernate.service",
    "nvidia-resume.service",
)
"""Enabled where the driver brings them: they keep the card awake, and its memory over a sleep."""

_TEMPLATE = Environment(
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701  # not HTML
).from_string((Path(__file__).parents[3] / "files" / "apt-repository.sources.j2").read_text())


@dataclass(frozen=True)
class AptRepository:
    """An apt repository of NVIDIA's, and the one key that may sign it."""

    name: str
    title: str
    url: str
    key_url: str
    fingerprint: str
    keyring: str
    """Where the key lies on the host."""

    @property
    def sources_file(self) -> str:
        """Where apt is told of it."""
        return f"{SOURCES}/{self.name}.sources"

    @property
    def sources(self) -> str:
        """What apt is told of it."""
        return _TEMPLATE.render(repository=self)


@dataclass(frozen=True)
class Expectation:
    """What the version of a package has to be, whatever the repository has today."""

    package: str
    exactly: str = ""
    """A version or the beginning of one: 595, 13.2.2."""
    at_least: Version | None = None
    advice: str = ""
    where: str = ""
    """Where it is from, if not from where the others are."""

    def objection(self, title: str, offered: str | None) -> str | None:
        """What speaks against the version on offer; None if nothing does."""
        title = self.where or title
        if offered is None:
            said = f"{title} has no package {self.package}"
        else:
            version = apt.upstream(offered)
            if self.exactly and not f"{version}.".startswith(f"{self.exactly}."):
                wanted = self.exactly
            elif self.at_least is not None and not _reaches(version, self.at_least):
                wanted = f"{self.at_least} or newer"
            else:
                return None
            said = f"{title} has {self.package} {version}, not {wanted}"
        return f"{said}. {self.advice}" if self.advice else said


def _reaches(version: str, least: Version) -> bool:
    try:
        return Version(version) >= least
    except InvalidVersion:
        return True  # a repository that counts otherwise is not second-guessed


@dataclass(frozen=True)
class PackageSet:
    """Packages that are installed together."""

    key: str
    what: str
    title: str
    """Where they are from, for people."""
    packages: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Installed where apt has them."""
    pins: tuple[str, ...] = ()
    """Installed before: packages that hold preferences for apt."""
    recommended: bool = False
    """Whether what they recommend comes along."""
    downgrades: bool = False
    """Whether an older version than the installed one was asked for, if it comes to that."""
    expectations: tuple[Expectation, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every package that is named, without its version."""
        listed = (*self.pins, *self.packages, *self.optional)
        return tuple(dict.fromkeys(name.partition("=")[0] for name in listed))


@dataclass(frozen=True)
class DriverInstallation:
    """A Linux driver to install."""

    branch: int
    packages: PackageSet
    kernel: str
    dkms: bool
    """Whether its modules are compiled here, or come compiled."""


@dataclass(frozen=True)
class LocalInstaller:
    """NVIDIA's .deb with a whole repository in it."""

    url: str
    sha256: str | None
    package: str
    folder: str
    """Where it puts its repository."""
    keyring_glob: str
    keep: bool


@dataclass(frozen=True)
class ToolkitInstallation:
    """A CUDA toolkit to install."""

    version: Version
    root: str
    packages: PackageSet
    mark: str | None = None
    """Where to write down that this is the patch release that was asked for."""
    local: LocalInstaller | None = None


@dataclass(frozen=True)
class ContainerInstallation:
    """The container toolkit: its packages, and what is to be configured."""

    packages: PackageSet | None
    """None if it is there and stays."""
    docker: bool
    """Whether Docker has to be told."""
    podman: bool
    """Whether the GPUs have to be described to Podman."""
    refreshed: bool
    """Whether units of its own keep that description up to date (1.18 and newer)."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.packages is None and not self.docker and not self.podman


@dataclass(frozen=True)
class Installation:
    """Everything of NVIDIA's that is put on a host, and what it takes."""

    driver: DriverInstallation | None = None
    toolkit: ToolkitInstallation | None = None
    container: ContainerInstallation | None = None
    repositories: tuple[AptRepository, ...] = ()
    preferences: Mapping[str, str] = field(default_factory=dict)
    """Files that tell apt what to prefer: path to text."""
    components: tuple[str, ...] = ()
    """Components of the distribution's own archive that are needed."""
    superseded: tuple[AptSource, ...] = ()
    """Sources whose place is taken, or that stand in the way and may be removed."""
    retired_keyrings: tuple[str, ...] = ()
    """Keyrings with NVIDIA's old key."""
    uninstallers: tuple[str, ...] = ()
    """Of `.run` installations: run before anything is installed."""
    limits: apt.Limits = field(default_factory=apt.Limits)

    @property
    def sets(self) -> tuple[PackageSet, ...]:
        """What apt installs from repositories, in this order."""
        driver, toolkit, container = self.driver, self.toolkit, self.container
        parts = (
            driver.packages if driver else None,
            toolkit.packages if toolkit and toolkit.local is None else None,
            container.packages if container else None,
        )
        return tuple(part for part in parts if part is not None)

    @property
    def every_set(self) -> tuple[PackageSet, ...]:
        """Those and what a local installer brings."""
        toolkit = self.toolkit
        return (*self.sets, toolkit.packages) if toolkit and toolkit.local else self.sets

    @property
    def names(self) -> tuple[str, ...]:
        """Every package that may be installed, from wherever."""
        return tuple(dict.fromkeys(name for each in self.every_set for name in each.names))


def plan_installation(settings: Settings, probe: Probe, stack: Stack | None) -> Installation:
    """What to install on a host, after what was chosen for it."""
    distribution = tables.distribution(probe.os_id, probe.os_version, wsl=probe.wsl)
    if stack is None or distribution is None or probe.arch not in tables.DEB_ARCHITECTURES:
        return Installation()
    driver = _driver(settings, probe, stack, distribution)
    toolkit = _toolkit(settings, probe, stack, distribution)
    container = _container(settings, probe, driver)
    repositories = []
    if _from_nvidia(stack, driver) or (toolkit and toolkit.local is None):
        repositories.append(cuda_repository(settings, probe, distribution))
    if container is not None and container.packages is not None:
        repositories.append(container_repository(settings, probe))
    removing = settings.driver_remove_conflicts and driver is not None
    return Installation(
        driver=driver,
        toolkit=toolkit,
        container=container,
        repositories=tuple(repositories),
        preferences=_preferences(settings, stack, driver, toolkit, repositories),
        components=_components(stack, distribution) if driver else (),
        superseded=tuple(_superseded(settings, probe, repositories)),
        retired_keyrings=probe.retired_keys,
        uninstallers=probe.runfiles if removing else (),
        limits=apt.Limits(probe.wsl, removing, _held_by_others(probe)),
    )


def _from_nvidia(stack: Stack, driver: DriverInstallation | None) -> bool:
    choice = stack.driver.choice
    return driver is not None and choice is not None and choice.source == "nvidia"


def _held_by_others(probe: Probe) -> frozenset[str]:
    """Held packages that are none of what this software holds itself."""
    ours = (*tables.container_toolkit().packages,)
    is_driver = tables.housekeeping().is_driver_package
    return frozenset(name for name in probe.held if name not in ours and not is_driver(name))


def findings(settings: Settings, probe: Probe, wanted: Installation) -> Iterator[Finding]:
    """What stands in the way of the installation, and what comes of the versions in it."""
    local = wanted.toolkit.local if wanted.toolkit else None
    if local is not None and local.sha256 is None:
        yield error(
            "cuda-installer-sha256",
            f"the SHA-256 of {local.url} is not known",
            "nothing would vouch for what is installed from it",
            "Set `cuda_local_installer_sha256` (of a file that you trust: `sha256sum FILE`), or "
            "`cuda_install_method` to network.",
            tables.local_installer().source,
        )
    podman, table = probe.engines.get("podman"), tables.container_toolkit()
    if wanted.container is None or podman is None:
        return
    needs = table.cdi.spec_0_7_engines["podman"]
    if podman < needs and _version_to_be(settings, probe) >= table.cdi.spec_0_7_since:
        yield warning(
            "podman-too-old",
            f"Podman {podman} does not read the descriptions of GPUs (CDI 0.7) that container "
            f"toolkit {_version_to_be(settings, probe)} writes; {needs} or newer does",
            "containers would not see the GPU",
            "Leave `container_toolkit_version` unset, or use a newer Podman.",
            table.cdi.source,
        )


def _version_to_be(settings: Settings, probe: Probe) -> Version:
    there = probe.container_toolkit
    if there is not None and settings.container_toolkit_version is None:
        return there
    return Version(apt.upstream(container_version(settings, probe)))


# Repositories


def cuda_repository(settings: Settings, probe: Probe, distribution: Distribution) -> AptRepository:
    """NVIDIA's repository of drivers and toolkits for a distribution."""
    record, machine = tables.repository(distribution), probe.arch or ""
    url = record.url(machine, settings.cuda_repo_url)
    key = tables.key(record.key)
    assert url is not None
    assert key.file is not None
    return AptRepository(
        # As NVIDIA's own cuda-keyring names its file: one repository, one name.
        name=f"cuda-{record.folder[machine].strip('/').replace('/', '-')}",  # type: ignore[index]
        title="NVIDIA's CUDA repository",
        url=url,
        key_url=url + key.file,
        fingerprint=settings.cuda_key_fingerprint or key.fingerprint,
        keyring=CUDA_KEYRING,
    )


def container_repository(settings: Settings, probe: Probe) -> AptRepository:
    """NVIDIA's repository of the container toolkit."""
    record = tables.container_toolkit()
    key = tables.key(record.key)
    base = settings.container_toolkit_repo_url
    return AptRepository(
        name="nvidia-container-toolkit",
        title="NVIDIA's container toolkit repository",
        url=record.url(probe.arch or "", base),
        key_url=f"{base.rstrip('/')}/{key.file}",
        fingerprint=settings.container_toolkit_key_fingerprint or key.fingerprint,
        keyring=record.keyring,
    )


def _superseded(
    settings: Settings, probe: Probe, repositories: list[AptRepository]
) -> Iterator[AptSource]:
    """Sources of the same repository under another name, which apt takes for a contradiction."""
    ours = {_plain(each.url): each.sources_file for each in repositories}
    stale = tables.container_toolkit().stale_sources
    container = any(each.name == "nvidia-container-toolkit" for each in repositories)
    for source in probe.apt_sources:
        if source.path in ours.values():
            continue
        same = _plain(source.uri) in ours
        old = container and source.path in stale
        in_the_way = settings.driver_remove_conflicts and "/compute/cuda/repos/" in source.uri
        if same or old or (in_the_way and repositories):
            yield source


def _plain(uri: str) -> str:
    return uri.rstrip("/").removeprefix("https://").removeprefix("http://")


def _preferences(
    settings: Settings,
    stack: Stack,
    driver: DriverInstallation | None,
    toolkit: ToolkitInstallation | None,
    repositories: list[AptRepository],
) -> dict[str, str]:
    pins = {}
    if any(each.keyring == CUDA_KEYRING for each in repositories):
        pins[tables.pin().path] = tables.pin().text.lstrip("\n")
        choice = stack.driver.choice
        if driver is not None and choice is not None and choice.source == "distro":
            # With any other pin NVIDIA's newer driver packages would win over the archive's.
            pins[ARCHIVE_PIN] = _never_from(urlsplit(settings.cuda_repo_url).hostname or "")
    if toolkit is not None and toolkit.local is not None:
        dash = str(toolkit.version).replace(".", "-")
        pins[LOCAL_PIN] = f'Package: *-{dash} *-{dash}-*\nPin: origin ""\nPin-Priority: 990\n'
    return pins


def _never_from(site: str) -> str:
    table = tables.housekeeping()
    return table.archive_pin.replace(table.archive_pin_origin, site)


def _components(stack: Stack, distribution: Distribution) -> tuple[str, ...]:
    choice = stack.driver.choice
    offer = tables.offer(choice.archive, distribution) if choice and choice.archive else None
    if choice is None or offer is None:
        return ()
    section = offer.sections.get(choice.branch)
    return (*offer.components, *((section,) if section else ()))


# The driver


def _driver(
    settings: Settings, probe: Probe, stack: Stack, distribution: Distribution
) -> DriverInstallation | None:
    choice = stack.driver.choice
    of_choice = choice.packages(distribution) if choice else None
    if choice is None or of_choice is None or probe.kernel is None:
        return None
    asked = settings.driver_version or ""
    exact = asked if "." in asked else str(choice.branch)
    meta = kernel_meta(distribution, probe.kernel)
    names = of_choice.names(choice.branch, meta or probe.kernel)
    pins = of_choice.pins(exact)
    headers: tuple[str, ...]
    if choice.prebuilt:
        # Meta packages bring the modules for the newest kernel; these are for the one that runs.
        running = of_choice.names(choice.branch, probe.kernel)
        headers, along = (), tuple(name for name in running if name.startswith("linux-"))
    else:
        headers, along = _headers(probe, meta)
    advice = "Set `driver_version` to another branch."
    if asked:
        advice = "Set `driver_version` to what there is, or leave it unset."
    return DriverInstallation(
        branch=choice.branch,
        kernel=probe.kernel,
        dkms=not choice.prebuilt,
        packages=PackageSet(
            key="driver",
            what=f"driver {exact}",
            title=NVIDIA if choice.source == "nvidia" else "the archive",
            packages=(*headers, *names),
            optional=(*along, *of_choice.optional(choice.branch)),
            pins=pins,
            recommended=choice.flavour == "desktop",
            downgrades=bool(asked),
            expectations=(
                *(Expectation(each, advice=_NO_HEADERS, where="the archive") for each in headers),
                *(Expectation(pin, advice=advice) for pin in pins),
                *(
                    Expectation(name, "" if name.startswith("linux-") else exact, advice=advice)
                    for name in names
                ),
            ),
        ),
    )


_NO_HEADERS = (
    "The driver's modules are compiled with the headers of the running kernel: reboot into the "
    "archive's newest kernel (`apt-get upgrade` before), then run this again."
)


def _headers(probe: Probe, meta: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What DKMS compiles with: the running kernel's headers, and what keeps them coming."""
    running = next((each for each in probe.kernels if each.release == probe.kernel), None)
    there = running is not None and running.headers
    return (
        () if there else (f"linux-headers-{probe.kernel}",),
        (f"linux-headers-{meta}",) if meta else (),
    )


def kernel_meta(distribution: Distribution, kernel: str) -> str | None:
    """Which meta package a kernel is from, without `linux-image-`: amd64, generic-hwe-24.04.

    None for a kernel that is not the distribution's.
    """
    if distribution.os_id == "debian":
        match = re.fullmatch(r"\d.*?-((?:cloud-|rt-)?(?:amd64|arm64))", kernel)
        return match[1] if match else None
    match = re.fullmatch(r"(\d+\.\d+\.\d+)-\d+-([a-z][a-z0-9-]*)", kernel)
    if match is None:
        return None
    version, flavour = match.groups()
    # The release's own kernel, or one that it got with later hardware in mind.
    is_first = version == str(distribution.kernels[0])
    return flavour if is_first or flavour != "generic" else f"generic-hwe-{distribution.version_id}"


# The toolkit


def _toolkit(
    settings: Settings, probe: Probe, stack: Stack, distribution: Distribution
) -> ToolkitInstallation | None:
    choice = stack.toolkit.choice
    if choice is None or choice.root is not None:
        return None
    if probe.arch not in tables.repository(distribution).folder:
        return None  # which the choice has an error for
    toolkit, release = choice.toolkit, choice.release
    local = None
    if settings.cuda_install_method == "local":
        local = _local_installer(settings, probe, stack, distribution)
    expectations: tuple[Expectation, ...] = ()
    if release is not None and local is None:
        exactly = len((settings.cuda_version or "").split(".")) == 3
        advice = (
            f"`cuda_install_method` local installs exactly {release.version}."
            if exactly
            else "Set `cuda_version` to another release."
        )
        expectations = (
            Expectation(
                f"cuda-toolkit-{toolkit.dash}",  # the one whose version is the release's
                str(release.version) if exactly else "",
                release.version,
                advice,
            ),
        )
    return ToolkitInstallation(
        version=toolkit.version,
        root=f"/usr/local/cuda-{toolkit.version}",
        mark=next(iter(toolkit_marks(settings)), None),
        packages=PackageSet(
            key="toolkit",
            what=str(choice),
            title=NVIDIA if local is None else "the installer",
            packages=tables.toolkit_packages(toolkit, settings.cuda_packages),
            downgrades=settings.cuda_version is not None,
            expectations=expectations,
        ),
        local=local,
    )


def toolkit_marks(settings: Settings) -> tuple[str, ...]:
    """What tells that a toolkit is of the patch release that was asked for, if one was."""
    asked = settings.cuda_version or ""
    return (f"{at.TOOLKIT_MARK}{asked}",) if asked.count(".") == 2 else ()


def _local_installer(
    settings: Settings, probe: Probe, stack: Stack, distribution: Distribution
) -> LocalInstaller | None:
    choice = stack.toolkit.choice
    assert choice is not None
    if choice.release is None:
        return None
    table, repository = tables.local_installer(), tables.repository(distribution)
    file = table.file(repository, choice.toolkit, choice.release, probe.arch or "")
    folder = table.folder.format(repository=repository.name, dash=choice.toolkit.dash)
    url = table.url.format(release=choice.release.version, file=file)
    return LocalInstaller(
        url=settings.cuda_local_installer_url or url,
        sha256=settings.cuda_local_installer_sha256 or table.sha256.get(file),
        package=folder.rpartition("/")[2],
        folder=folder,
        keyring_glob=table.keyring_glob,
        keep=settings.cuda_keep_installer,
    )


# The container toolkit


def _container(
    settings: Settings, probe: Probe, driver: DriverInstallation | None
) -> ContainerInstallation | None:
    wanted = settings.container_toolkit
    # Docker Desktop, which brings a toolkit of its own, cannot be told from an engine inside WSL.
    automatic = bool(probe.engines.keys() & {"docker", "podman"}) and not probe.wsl
    if wanted == "off" or (wanted == "auto" and not automatic):
        return None
    version = _version_to_be(settings, probe)
    stays = probe.container_toolkit == version
    usable = probe.driver_loaded is not None or probe.wsl_libcuda or driver is not None
    return ContainerInstallation(
        packages=None if stays else _container_packages(container_version(settings, probe)),
        docker="docker" in probe.engines and "nvidia" not in probe.docker_runtimes,
        podman="podman" in probe.engines and not probe.cdi_specs and usable,
        refreshed=version >= tables.container_toolkit().cdi.refresh_since,
    )


def _container_packages(version: str) -> PackageSet:
    names = tables.container_toolkit().packages
    advice = "Set `container_toolkit_version` to what there is."
    return PackageSet(
        key="container",
        what=f"container toolkit {apt.upstream(version)}",
        title=NVIDIA,
        packages=tuple(f"{name}={version}" for name in names),
        downgrades=True,  # the same names come from other repositories, in other versions
        expectations=tuple(Expectation(name, advice=advice) for name in names[:1]),
    )


def container_version(settings: Settings, probe: Probe) -> str:
    """The version asked for, else the newest whose descriptions of GPUs Podman reads.

    As apt writes it: 1.19.0-1.
    """
    table = tables.container_toolkit()
    asked = settings.container_toolkit_version
    if asked is not None:
        return asked if "-" in asked else f"{asked}-1"
    podman = probe.engines.get("podman")
    reads_all = podman is None or podman >= table.cdi.spec_0_7_engines["podman"]
    return next(
        each
        for each in table.versions
        if reads_all or Version(apt.upstream(each)) < table.cdi.spec_0_7_since
    )
