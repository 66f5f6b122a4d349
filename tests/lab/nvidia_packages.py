"""The packages of NVIDIA's repositories, by their real names and relations, as empty as can be.

What other software looks for is in them: nvcc and nvidia-smi that say their version, a library
with the right name, units, a kernel module that DKMS really builds. None of it computes anything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .deb import LINK, Package
from .elf import shared_library

KEYRING = "/usr/share/keyrings/cuda-archive-keyring.gpg"
LAST_PROPRIETARY = 610
"""Branches after it have the open kernel modules only."""

_LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_UNITS = "/usr/lib/systemd/system"


@dataclass(frozen=True)
class _Release:
    """Packages that belong together: they have one version, and depend on each other in it."""

    version: str
    relation: str = "="
    suffix: str = ""

    def package(
        self,
        name: str,
        together: Sequence[str] = (),
        *,
        also: Sequence[str] = (),
        version: str | None = None,
        architecture: str = "amd64",
        provides: Sequence[str] = (),
        files: Mapping[str, str | bytes] | None = None,
        scripts: Mapping[str, str] | None = None,
    ) -> Package:
        """One of them. together: others of the release; also: other packages."""
        needed = [f"{each}{self.suffix} ({self.relation} {self.version})" for each in together]
        return Package(
            f"{name}{self.suffix}",
            version or self.version,
            [*needed, *also],
            architecture=architecture,
            provides=provides,
            conflicts=provides,
            files=files or {},
            scripts=scripts or {},
        )


# Drivers


def driver(version: str) -> Iterator[Package]:
    """One driver release, as NVIDIA's repositories for Debian have it."""
    of = _Release(f"{version}-1")
    branch = version.partition(".")[0]
    library = f"{_LIBRARIES}/libcuda.so"
    yield of.package(
        "libcuda1",
        files={
            f"{library}.{version}": shared_library("libcuda.so.1"),
            f"{library}.1": f"{LINK}libcuda.so.{version}",
        },
        scripts={"postinst": "ldconfig"},
    )
    yield of.package("libnvidia-ml1")
    yield of.package("libnvidia-gl")
    yield of.package("nvidia-settings")
    yield of.package("firmware-nvidia-gsp", architecture="all")
    yield of.package("nvidia-modprobe", files={"/usr/bin/nvidia-modprobe": "#!/bin/sh\nexit 1\n"})
    yield of.package("nvidia-kernel-support", ["nvidia-modprobe"], files=_sleep_units())
    persistence = _unit("NVIDIA Persistence Daemon", "/bin/sleep infinity")
    yield of.package(
        "nvidia-persistenced", files={f"{_UNITS}/nvidia-persistenced.service": persistence}
    )
    yield Package(
        "nvidia-driver-cuda",
        of.version,
        [f"{each} (= {of.version})" for each in ("libcuda1", "libnvidia-ml1")]
        + [f"nvidia-kernel-support (= {of.version})"],
        conflicts=["nvidia-smi"],
        files={"/usr/bin/nvidia-smi": _NVIDIA_SMI},
    )
    yield of.package("nvidia-driver", ["libnvidia-gl", "nvidia-kernel-support"])
    desktop = ["nvidia-driver", "nvidia-driver-cuda", "nvidia-settings"]
    yield _dkms(of, "nvidia-kernel-open-dkms", version, "Dual MIT/GPL")
    yield of.package("nvidia-open", [*desktop, "nvidia-kernel-open-dkms"])
    if int(branch) <= LAST_PROPRIETARY:
        yield _dkms(of, "nvidia-kernel-dkms", version, "NVIDIA")
        yield of.package(f"cuda-drivers-{branch}", [*desktop, "nvidia-kernel-dkms"])
        yield of.package("cuda-drivers", [*desktop, "nvidia-kernel-dkms"])
    else:
        yield of.package("cuda-drivers", [*desktop, "nvidia-kernel-open-dkms"])
    for what in (branch, version):
        path = f"/etc/apt/preferences.d/nvidia-driver-pinning-{what}"
        yield of.package(
            f"nvidia-driver-pinning-{what}",
            architecture="all",
            provides=["nvidia-driver-pinning"],
            files={path: _pinning(what)},
        )


_NVIDIA_SMI = """\
#!/bin/sh
echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
exit 9
"""


def _pinning(version: str) -> str:
    names = "nvidia-* libnvidia-* libcuda1 firmware-nvidia-* cuda-drivers cuda-drivers-*"
    return f"Package: {names}\nPin: version {version}*\nPin-Priority: 1000\n"


def _dkms(of: _Release, name: str, version: str, license_: str) -> Package:
    """Kernel modules to be built by DKMS."""
    return of.package(
        name,
        also=["dkms"],
        architecture="all",
        provides=["nvidia-kernel-modules"],
        files=_module_source(version, license_),
        scripts={
            "postinst": f"/usr/lib/dkms/common.postinst nvidia {version} /usr/share/nvidia '' $2",
            "prerm": f"dkms remove -m nvidia -v {version} --all || true",
        },
    )


def _module_source(version: str, license_: str) -> dict[str, str]:
    """The source of a kernel module that can be built and loaded, and does nothing."""
    folder = f"/usr/src/nvidia-{version}"
    return {
        f"{folder}/dkms.conf": textwrap.dedent(f"""\
            PACKAGE_NAME="nvidia"
            PACKAGE_VERSION="{version}"
            BUILT_MODULE_NAME[0]="nvidia"
            DEST_MODULE_LOCATION[0]="/kernel/drivers/video"
            MAKE[0]="make -C ${{kernel_source_dir}} M=${{dkms_tree}}/nvidia/{version}/build modules"
            CLEAN="true"
            AUTOINSTALL="yes"
        """),
        f"{folder}/Makefile": "obj-m := nvidia.o\n",
        f"{folder}/nvidia.c": textwrap.dedent(f"""\
            // A stand-in for NVIDIA's module: it has its name and its version, and does nothing.
            #include <linux/module.h>
            static int __init nvidia_init(void) {{ return 0; }}
            static void __exit nvidia_exit(void) {{ }}
            module_init(nvidia_init);
            module_exit(nvidia_exit);
            MODULE_DESCRIPTION("stand-in");
            MODULE_LICENSE("{license_}");
            MODULE_VERSION("{version}");
        """),
    }


def _sleep_units() -> dict[str, str]:
    units = {}
    for what in ("suspend", "hibernate", "resume"):
        unit = _unit(f"NVIDIA system {what} actions", "/bin/true", kind="oneshot")
        sleep = f"systemd-{'suspend' if what == 'resume' else what}.service"
        units[f"{_UNITS}/nvidia-{what}.service"] = unit.replace("multi-user.target", sleep)
    return units


def _unit(description: str, command: str, kind: str = "simple") -> str:
    service = f"[Service]\nType={kind}\nExecStart={command}\n"
    install = "[Install]\nWantedBy=multi-user.target\n"
    return f"[Unit]\nDescription={description}\n\n{service}\n{install}"


# Toolkits


def toolkit(release: str, nvcc: str, *, with_driver: bool) -> Iterator[Package]:
    """A CUDA toolkit: `release` is 13.2.2; `nvcc` what nvcc calls itself, such as 13.2.86."""
    minor = ".".join(release.split(".")[:2])
    root = f"/usr/local/cuda-{minor}"
    dash = minor.replace(".", "-")
    of = _Release(f"{nvcc}-1", ">=", f"-{dash}")
    whole = f"{release}-1"
    nvvm = "libnvvm" if int(minor.partition(".")[0]) >= 13 else "cuda-nvvm"
    yield of.package(
        "cuda-toolkit", ["cuda-compiler", "cuda-libraries-dev", "cuda-tools"], version=whole
    )
    yield of.package("cuda-compiler", ["cuda-nvcc", "cuda-cuobjdump"])
    yield of.package("cuda-libraries-dev", ["libcublas-dev", "cuda-driver-dev", "cuda-cudart-dev"])
    yield of.package("cuda-tools")
    yield of.package(
        "cuda-nvcc",
        ["cuda-crt", nvvm],
        also=[f"cuda-toolkit-{dash}-config-common"],
        files={f"{root}/bin/nvcc": _nvcc(minor, nvcc)},
    )
    yield from _config(of, root)
    yield of.package("cuda-crt")
    yield of.package(nvvm)
    yield of.package("cuda-cuobjdump")
    yield of.package("cuda-cudart", files={f"{root}/lib64/libcudart.so": "no library\n"})
    yield of.package(
        "cuda-cudart-dev",
        ["cuda-cudart", "cuda-driver-dev", "cuda-cccl"],
        files={f"{root}/include/cuda_runtime.h": "// no header\n"},
    )
    yield of.package("cuda-driver-dev", files={f"{root}/lib64/stubs/libcuda.so": "no library\n"})
    yield of.package("cuda-cccl")
    yield of.package("libcublas")
    yield of.package("libcublas-dev", ["libcublas"])
    # What must never be pulled in, since it brings a driver along.
    yield of.package("cuda", also=[f"cuda-toolkit-{dash}", f"cuda-runtime-{dash}"], version=whole)
    yield of.package("cuda-runtime", also=["cuda-drivers"] if with_driver else [], version=whole)
    yield of.package("cuda-demo-suite", also=[f"cuda-runtime-{dash}"])
    yield of.package("cuda-compat")
    yield Package("cuda", whole, [f"cuda-{dash}"])
    yield Package("cuda-toolkit", whole, [f"cuda-toolkit-{dash}"])


def _config(of: _Release, root: str) -> Iterator[Package]:
    """Where a toolkit is found without its version: links, and what the loader is told."""
    minor = root.rpartition("-")[2]
    major = minor.partition(".")[0]
    links = ("cuda", f"cuda-{major}")
    priority = minor.replace(".", "")
    added = [
        f"update-alternatives --install /usr/local/{link} {link} {root} {priority}"
        for link in links
    ]
    removed = [f"update-alternatives --remove {link} {root}" for link in links]
    loader = {
        "cuda-toolkit-config-common": ("000_cuda", "cuda"),
        f"cuda-toolkit-{major}-config-common": (f"988_cuda-{major}", f"cuda-{major}"),
    }
    yield Package(
        f"cuda-toolkit{of.suffix}-config-common",
        of.version,
        list(loader),
        architecture="all",
        scripts={"postinst": "\n".join([*added, "ldconfig"]), "prerm": "\n".join(removed)},
    )
    for name, (file, link) in loader.items():
        folder = f"/usr/local/{link}/targets/x86_64-linux/lib\n"
        files = {f"/etc/ld.so.conf.d/{file}.conf": folder}
        yield Package(name, of.version, architecture="all", files=files)


def _nvcc(minor: str, version: str) -> str:
    return textwrap.dedent(f"""\
        #!/bin/sh
        echo "nvcc: NVIDIA (R) Cuda compiler driver"
        echo "Cuda compilation tools, release {minor}, V{version}"
    """)


# Around them


def keyring(repository: str, machine: str, uri: str, key: bytes, pin: str | None) -> Package:
    """`cuda-keyring`, which trusts the repository's key and names the repository."""
    sources = f"/etc/apt/sources.list.d/cuda-{repository}-{machine}.list"
    files: dict[str, str | bytes] = {KEYRING: key, sources: f"deb [signed-by={KEYRING}] {uri} /\n"}
    if pin is not None:
        files["/etc/apt/preferences.d/cuda-repository-pin-600"] = pin
    return Package("cuda-keyring", "1.1-1", architecture="all", files=files)


def container_toolkit(version: str) -> Iterator[Package]:
    """The four packages of the container toolkit; `version` is 1.20.0-1."""
    of = _Release(version)
    refresh = _unit(
        "Refresh NVIDIA CDI specification file", "/usr/bin/nvidia-ctk cdi generate", kind="oneshot"
    )
    watch = "[Path]\nPathChanged=/lib/modules\n\n[Install]\nWantedBy=multi-user.target\n"
    yield of.package("libnvidia-container1")
    yield of.package("libnvidia-container-tools", ["libnvidia-container1"])
    yield of.package(
        "nvidia-container-toolkit-base",
        files={
            "/usr/bin/nvidia-ctk": _nvidia_ctk(version.partition("-")[0]),
            f"{_UNITS}/nvidia-cdi-refresh.service": refresh,
            f"{_UNITS}/nvidia-cdi-refresh.path": watch,
        },
    )
    yield of.package(
        "nvidia-container-toolkit",
        ["nvidia-container-toolkit-base", "libnvidia-container-tools"],
        files={"/usr/bin/nvidia-container-runtime": "#!/bin/sh\nexit 1\n"},
    )


def _nvidia_ctk(version: str) -> str:
    """An nvidia-ctk that does of `runtime configure` and `cdi` what a test can look at."""
    runtime = '{"runtimes": {"nvidia": {"args": [], "path": "nvidia-container-runtime"}}}'
    return textwrap.dedent(f"""\
        #!/bin/sh
        case "$1 $2" in
            "--version ")
                echo "NVIDIA Container Toolkit CLI version {version}" ;;
            "runtime configure")
                mkdir -p /etc/docker && echo '{runtime}' >/etc/docker/daemon.json ;;
            "cdi generate")
                mkdir -p /var/run/cdi && echo 'cdiVersion: 0.5.0' >/var/run/cdi/nvidia.yaml ;;
            "cdi list")
                echo nvidia.com/gpu=all ;;
            *)
                echo "nvidia-ctk: $*" >&2
                exit 1 ;;
        esac
    """)
