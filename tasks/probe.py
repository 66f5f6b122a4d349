"""What is there: everything that matters about a host, as the probe read it.

Everything is optional by nature: what a strange or half-empty host does not tell is None (or
empty), and the rules say what that means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.version import Version

PREFIX = "/opt/llama.cpp"
RELEASES = f"{PREFIX}/releases"
CURRENT = f"{PREFIX}/current"
PREVIOUS = f"{PREFIX}/previous"
CONFIG = "/etc/llamastead"
API_KEY = f"{CONFIG}/api-key"
STATE = "/var/lib/llamastead"
MODELS = f"{STATE}/models"
BLOBS = f"{MODELS}/blobs"
RECORDS = f"{MODELS}/records"
INCOMING = f"{STATE}/incoming"
REPORT = f"{STATE}/report.json"
CACHE = "/var/cache/llamastead"
LOGS = "/var/log/llamastead"
SYSTEM = "/usr"
"""Where packages are installed to."""
LIBRARY = "/usr/local/lib/llamastead"
APT_PENDING = f"{STATE}/apt.pending"
"""What apt-get was told last, until it has done it."""
DRIVER_MARK = f"{STATE}/driver-is-ours"
"""There if this software installed the driver, and so looks after it."""
TOOLKIT_MARK = f"{STATE}/cuda-"
"""With a patch release behind it, a file that holds the version of nvcc that came with it: nvcc
itself does not tell the release."""
LOCK = "/run/llamastead.lock"
UNITS = "/etc/systemd/system"
SERVER_UNIT = "llama-server.service"
SERVER_UNIT_FILE = f"{UNITS}/{SERVER_UNIT}"
UNIT_MARK = "# Written by llamastead"
"""How the first line of a unit of ours begins."""
SERVER_USER = "llama"
WORKER_USER = "llamastead"
"""Compiles and downloads; owns nothing that is served."""


@dataclass(frozen=True)
class Gpu:
    """A display device on the PCI bus, seen before any driver exists."""

    address: str
    """As in sysfs, e.g. 0000:01:00.0."""
    vendor: int
    device: int
    class_code: int
    driver: str | None
    """Kernel driver bound to it: nvidia, nouveau, vfio-pci, ..."""
    bar1_bytes: int | None
    """Size of the largest memory window; small means that Resizable BAR is off."""
    subsystem_vendor: int | None = None
    subsystem_device: int | None = None


@dataclass(frozen=True)
class KernelModule:
    """NVIDIA's kernel module, as the kernel runs it or as it lies on the disk."""

    version: Version
    """Prints as the driver writes it: 580.65.06."""
    modules: Literal["open", "proprietary"] | None = None
    signer: str | None = None
    """Whose key signed the file; None if nobody's, or for one that runs."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that is installed."""

    release: str
    """As uname says it."""
    headers: bool
    """Whether modules can be built for it."""
    nvidia: bool
    """Whether it has a module of NVIDIA's driver."""


@dataclass(frozen=True)
class DkmsModule:
    """A version of a driver that DKMS knows."""

    name: str
    version: str
    kernels: tuple[str, ...] = ()
    """Kernels that it was built for."""
    failed: tuple[str, ...] = ()
    """Kernels that it could not be built for."""

    @property
    def log(self) -> str:
        """Of the last build, if that ended with an error."""
        return f"/var/lib/dkms/{self.name}/{self.version}/build/make.log"


@dataclass(frozen=True)
class AptSource:
    """A line of an apt source file that has to do with NVIDIA."""

    path: str
    uri: str
    suite: str
    signed_by: str | None = None


@dataclass(frozen=True)
class AptPin:
    """A stanza of an apt preferences file that has to do with NVIDIA."""

    path: str
    package: str
    pin: str
    priority: int


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that is already on the host."""

    root: str
    nvcc_version: Version
    """As nvcc says it, with the build number: 13.2.78."""
    has_cublas: bool = True
    """Whether the headers of cuBLAS are in it, which llama.cpp is compiled with."""


@dataclass(frozen=True)
class Listener:
    """Who holds a TCP port that a server wants."""

    pid: int | None
    command: str | None
    unit: str | None = None
    """One of llama-server's units, if it is that."""


@dataclass(frozen=True)
class ManagedFile:
    """A file of ours as it is on the host."""

    sha256: str
    mode: int
    owner: str
    group: str


@dataclass(frozen=True)
class Folder:
    """A folder of ours as it is on the host, or one of somebody else's in its place."""

    mode: int
    owner: str


@dataclass(frozen=True)
class Service:
    """The state of one systemd unit."""

    active: str
    """active, inactive, failed, activating, ..."""
    sub: str
    enabled: str
    """enabled, disabled, or empty where there is no such unit."""
    main_pid: int
    need_daemon_reload: bool
    executable: str | None
    """What the main process really runs."""
    digest: str | None
    """LLAMASTEAD_DIGEST in the environment of the main process: the unit it was started from."""
    anonymous_bytes: int | None = None
    """Memory that goes with its processes: not what they map of files."""
    mark: str | None = None
    """First line of the unit's file."""
    drop_ins: tuple[str, ...] = ()
    """What the user put beside the unit's file."""
    gate: tuple[str, ...] = ()
    """What its gate saw of the GPUs at its last start."""

    @property
    def is_ours(self) -> bool:
        """Whether this software wrote its unit."""
        return (self.mark or "").startswith(UNIT_MARK)


@dataclass(frozen=True)
class Release:
    """A compiled llama.cpp under /opt/llama.cpp/releases."""

    name: str
    commit: str
    inputs: Mapping[str, Any]
    """Everything that the binary depends on; see rules/build.py."""
    server_options: frozenset[str]
    """What its `llama-server --help` knows; empty if unknown."""
    chat_templates: frozenset[str] = frozenset()
    """Those it has of its own; empty if unknown."""
    built_seconds: float | None = None


@dataclass(frozen=True)
class Probe:
    """Everything that one round trip tells about a host."""

    # Who and where
    uid: int | None = None
    hostname: str | None = None
    arch: str | None = None
    """As uname says: x86_64, aarch64."""
    kernel: str | None = None
    os_id: str | None = None
    """ID of os-release: ubuntu, debian."""
    os_version: str | None = None
    """VERSION_ID of os-release."""
    os_codename: str | None = None
    os_name: str | None = None
    """PRETTY_NAME of os-release."""
    wsl: bool = False
    virtualization: str | None = None
    systemd_running: bool = False
    systemd_version: int | None = None

    # What it can bear
    cores: int | None = None
    memory_bytes: int | None = None
    memory_available_bytes: int | None = None
    cpu_model: str | None = None
    cpu_target: str | None = None
    """SHA-256 over what g++ means by -march=native here; None as long as there is no g++."""
    disk_free_bytes: Mapping[str, int] = field(default_factory=dict)
    """Free bytes for each of PREFIX, STATE, CACHE and SYSTEM, or for where it will be."""
    disk_mount: Mapping[str, str] = field(default_factory=dict)
    """Mount point that each of them is on: what shares one shares its space."""
    noexec: frozenset[str] = frozenset()
    """Those of them that are mounted so that no program runs from there."""

    folders: Mapping[str, Folder] = field(default_factory=dict)
    """Those that we would put things in, as far as they are there."""
    checkout: str | None = None
    """A git checkout where our releases go."""
    unprivileged_port: int | None = None
    """Lowest port that a process without rights may listen on."""

    # What is installed
    glibc: Version | None = None
    compilers: Mapping[str, Version] = field(default_factory=dict)
    """g++, g++-13, ...: version, for each that is there together with its C compiler."""
    tools: Mapping[str, str] = field(default_factory=dict)
    """cmake, git, curl, ...: the first line of what `--version` says."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed Debian packages that matter here: name to version."""
    held: frozenset[str] = frozenset()
    """Those of them that apt is told to leave as they are."""
    dpkg_broken: tuple[str, ...] = ()
    """Packages that dpkg left half-installed."""

    # GPUs
    gpus: tuple[Gpu, ...] = ()
    """Inside WSL those that Windows's driver tells, since there is no PCI bus."""
    toolkits: tuple[Toolkit, ...] = ()

    # NVIDIA's driver
    driver_loaded: KernelModule | None = None
    """What the kernel runs."""
    driver_on_disk: KernelModule | None = None
    """What the running kernel would load."""
    driver_library: Version | None = None
    """Version of libcuda.so.1, and so of everything in user space."""
    windows_driver: Version | None = None
    """Inside WSL: what Windows's nvidia-smi says."""
    nvidia_smi: str | None = None
    """Where nvidia-smi is."""
    kernels: tuple[Kernel, ...] = ()
    dkms: tuple[DkmsModule, ...] = ()
    """NVIDIA's modules only."""
    secure_boot: bool | None = None
    """Whether the kernel takes signed modules only; None where there is no UEFI."""
    mok_keys: Mapping[str, Literal["enrolled", "pending", "unknown"]] = field(default_factory=dict)
    """Certificates that DKMS signs with: path to what the firmware thinks of them."""
    nouveau_loaded: bool = False
    nouveau_blacklisted: bool = False
    runfiles: tuple[str, ...] = ()
    """Uninstallers that `.run` installations left behind."""

    # apt
    apt_sources: tuple[AptSource, ...] = ()
    apt_pins: tuple[AptPin, ...] = ()
    retired_keys: tuple[str, ...] = ()
    """Keyrings that hold NVIDIA's retired key."""
    unattended_upgrades: bool = False
    """Whether packages are upgraded without being asked for."""
    unattended_blacklist: tuple[str, ...] = ()

    # Containers
    engines: Mapping[str, Version] = field(default_factory=dict)
    """docker, podman, containerd."""
    container_toolkit: Version | None = None
    """What nvidia-ctk says of itself."""
    cdi_specs: tuple[str, ...] = ()
    docker_runtimes: tuple[str, ...] = ()
    """Runtimes in /etc/docker/daemon.json."""

    # WSL
    wsl_gpu: bool = False
    """Whether /dev/dxg is there: Windows shares its GPUs."""
    wsl_libcuda: bool = False
    """Whether Windows's driver has put its libcuda there."""
    wsl_systemd: bool | None = None
    """What /etc/wsl.conf says of systemd; None if nothing."""

    # What this software put there
    releases: tuple[Release, ...] = ()
    current: str | None = None
    """Name of the release that `current` points at."""
    previous: str | None = None
    blobs: Mapping[str, int] = field(default_factory=dict)
    """Stored model files: SHA-256 to bytes."""
    partials: Mapping[str, int] = field(default_factory=dict)
    """What earlier downloads left behind: SHA-256 of the whole to bytes that are there."""
    records: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """What is kept of the models that were served: path to time and content."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Symbolic links under models/: path to target."""
    model_paths: Mapping[str, ModelPath] = field(default_factory=dict)
    """Files that the user named by their paths on the host."""
    real_paths: Mapping[str, str] = field(default_factory=dict)
    """Where PREFIX, MODELS and those files lead, if they go through symbolic links."""
    files: Mapping[str, ManagedFile] = field(default_factory=dict)
    users: frozenset[str] = frozenset()
    services: Mapping[str, Service] = field(default_factory=dict)
    """llama-server's units, by name: ours, and others that are called so."""
    jobs: Mapping[str, str] = field(default_factory=dict)
    """Transient units of ours that are there: name to state."""
    listeners: Mapping[int, Listener] = field(default_factory=dict)
    """Who holds the ports that were asked about."""
    locked_by: str | None = None
    """Who else is deploying to this host right now."""


@dataclass(frozen=True)
class ModelPath:
    """The model file that the user named by its path on the host."""

    exists: bool
    size: int | None = None
    world_readable: bool = False
    magic: str | None = None
    """First four bytes, as hex."""
    sha256: str | None = None
    """As verified at an earlier run, if neither size nor time changed since."""
