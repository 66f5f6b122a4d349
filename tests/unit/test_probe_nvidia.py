"""What the probe tells of NVIDIA's driver, apt, containers and WSL."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from tasks.facts.probe import HostProbe, parse
from tasks.probe import AptPin, AptSource, DkmsModule, Gpu, Kernel, KernelModule, Probe
from tasks.rules import stack, tables
from tasks.settings import load

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  "
    "(dvs-builder@U22-I3-H04-01-5)  Sun Jul 27 06:54:38 UTC 2025"
)
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024"
)


def told(*lines: str) -> Probe:
    return parse([*lines, "end\t1"])


@pytest.mark.parametrize(
    ("lines", "version", "kind"),
    [
        ((OPEN, "580.65.06"), "580.65.06", "open"),
        ((PROPRIETARY,), "535.183.01", "proprietary"),
        (("580.65.06",), "580.65.06", None),
    ],
)
def test_the_driver_that_runs(lines: tuple[str, ...], version: str, kind: str | None) -> None:
    module = told(*(f"driver_loaded\t{line}" for line in lines)).driver_loaded
    assert module is not None
    assert str(module.version) == version
    assert module.modules == kind


def test_no_driver_runs() -> None:
    assert told().driver_loaded is None
    assert told("driver_loaded\tNVRM version: unheard of").driver_loaded is None


def test_the_driver_that_the_kernel_would_load() -> None:
    probe = told(
        "driver_on_disk.license\tDual MIT/GPL",
        "driver_on_disk.version\t595.71.05",
        "driver_on_disk.signer\tDKMS module signing key",
    )
    assert probe.driver_on_disk == KernelModule(
        Version("595.71.05"), "open", "DKMS module signing key"
    )
    other = told("driver_on_disk.license\tNVIDIA", "driver_on_disk.version\t580.65.06")
    assert other.driver_on_disk is not None
    assert other.driver_on_disk.modules == "proprietary"


@pytest.mark.parametrize(
    ("name", "version"), [("580.65.06", "580.65.06"), ("535.183.01", "535.183.01"), ("1", None)]
)
def test_the_drivers_libraries(name: str, version: str | None) -> None:
    found = told(f"driver_library\t{name}").driver_library
    assert (found and str(found)) == version


def test_secure_boot_is_on_off_or_unheard_of() -> None:
    assert told("secure_boot\t1").secure_boot is True
    assert told("secure_boot\t0").secure_boot is False
    assert told().secure_boot is None


def test_what_the_firmware_thinks_of_dkmss_key() -> None:
    probe = told(
        "mok_key\t/a /a is already enrolled ",
        "mok_key\t/b /b is not enrolled ",
        "mok_key\t/c /c is already in the enrollment request ",
        "mok_key\t/d ",
    )
    assert probe.mok_keys == {"/a": "enrolled", "/b": "unknown", "/c": "pending", "/d": "unknown"}


def test_engines_and_the_container_toolkit() -> None:
    probe = told(
        "engine\tdocker Docker version 28.2.2, build e6534b4",
        "engine\tpodman podman version 5.4.2",
        "engine\tcontainerd containerd github.com/containerd/containerd v1.7.24 88bf19b",
        "container_toolkit\tNVIDIA Container Toolkit CLI version 1.19.1",
        'docker_config\t{"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}',
    )
    assert {name: str(version) for name, version in probe.engines.items()} == {
        "docker": "28.2.2",
        "podman": "5.4.2",
        "containerd": "1.7.24",
    }
    assert str(probe.container_toolkit) == "1.19.1"
    assert probe.docker_runtimes == ("nvidia",)
    assert told("docker_config\t{half").docker_runtimes == ()
    assert told('docker_config\t["x"]').docker_runtimes == ()


def test_windows_tells_its_cards_and_driver() -> None:
    probe = told(
        "kernel\t6.6.87.2-microsoft-standard-WSL2",
        "dxg\tyes",
        "wsl_libcuda\tyes",
        "wsl_gpu\t00000000:01:00.0, 0x2B8510DE, 32607, 581.15",
        "wsl_systemd\ttrue",
    )
    assert probe.gpus == (Gpu("00000000:01:00.0", 0x10DE, 0x2B85, 0x030000, None, None),)
    assert str(probe.windows_driver) == "581.15"
    assert probe.wsl_gpu
    assert probe.wsl_systemd is True
    assert told("wsl_gpu\tNVIDIA-SMI has failed").windows_driver is None


# The script itself, on a machine that is pretended in a folder


PRETENDED = (
    "/etc/apt", "/etc/cdi", "/etc/docker", "/etc/modprobe.d", "/etc/systemd", "/etc/wsl.conf",
    "/lib/modules", "/lib/modprobe.d", "/proc/cmdline", "/proc/driver",
    "/proc/sys/kernel/osrelease", "/run/modprobe.d", "/sys/firmware", "/sys/module",
    "/usr/bin/nvidia-uninstall", "/usr/local/cuda", "/usr/share/keyrings",
    "/var/cache/llama-server", "/var/lib/dkms", "/var/lib/shim-signed", "/var/run/cdi",
)  # fmt: skip


def probed(root: Path, files: dict[str, str | bytes]) -> Probe:
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    command = HostProbe().command()
    for path in PRETENDED:
        command = command.replace(path, f"{root}{path}")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return parse(line.replace(str(root), "") for line in done.stdout.splitlines())


def test_a_toolkit_is_found_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    local = tmp_path / "usr/local"
    program = local / "cuda-13.2/bin/nvcc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.2, V13.2.86'\n")
    program.chmod(0o755)
    for link in ("cuda", "cuda-13"):
        (local / link).symlink_to("cuda-13.2")
    found = [each for each in probed(tmp_path, {}).toolkits if "cuda" in each.root]
    assert [(each.root, str(each.nvcc_version)) for each in found] == [
        ("/usr/local/cuda-13.2", "13.2.86")
    ]


@pytest.mark.parametrize("name", ["nvidia", "nvidia-current", "nvidia-current-open"])
def test_the_driver_on_disk_by_whatever_name_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:  # Debian's own packages rename the modules
    program = tmp_path / "programs" / "modinfo"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1" = {name} ] || exit 1\n'
        "printf 'license:        NVIDIA\\nversion:        535.309.01\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    found = probed(tmp_path, {}).driver_on_disk
    assert found == KernelModule(Version("535.309.01"), "proprietary")


def test_kernels_with_and_without_headers_and_driver(tmp_path: Path) -> None:
    (tmp_path / "lib/modules/6.8.0-3/build").mkdir(parents=True)
    probe = probed(
        tmp_path,
        {
            "/lib/modules/6.8.0-1/modules.builtin": "",
            "/lib/modules/6.8.0-1/build/Makefile": "",
            "/lib/modules/6.8.0-1/modules.dep": "updates/dkms/nvidia.ko.zst: x\n",
            "/lib/modules/6.8.0-2/modules.builtin": "",
            "/lib/modules/6.8.0-2/modules.dep": "kernel/drivers/video/fbdev/nvidia/nvidiafb.ko:\n"
            "kernel/drivers/platform/x86/nvidia-wmi-ec-backlight.ko:\n",
            "/lib/modules/6.8.0-3/build/Makefile": "headers without their kernel",
        },
    )
    assert probe.kernels == (
        Kernel("6.8.0-1", headers=True, nvidia=True),
        Kernel("6.8.0-2", headers=False, nvidia=False),
    )


def test_what_dkms_built_and_what_it_could_not(tmp_path: Path) -> None:
    log = (
        "DKMS (dkms-3.0.11) make.log for nvidia/595.71.05 for kernel 7.0.0-2 (x86_64)\nFri\nerror\n"
    )
    probe = probed(
        tmp_path,
        {
            "/var/lib/dkms/nvidia/595.71.05/6.8.0-1/x86_64/module/nvidia.ko": "",
            "/var/lib/dkms/nvidia/595.71.05/build/make.log": log,
            "/var/lib/dkms/zfs/2.3/6.8.0-1/x86_64/module/zfs.ko": "",
        },
    )
    assert probe.dkms == (DkmsModule("nvidia", "595.71.05", ("6.8.0-1",), ("7.0.0-2",)),)
    assert probe.dkms[0].log == "/var/lib/dkms/nvidia/595.71.05/build/make.log"


@pytest.mark.parametrize(("byte", "shim", "on"), [(1, None, True), (0, None, False), (1, 1, False)])
def test_secure_boot_as_the_firmware_says_it(
    tmp_path: Path, byte: int, shim: int | None, on: bool
) -> None:
    folder = "/sys/firmware/efi/efivars"
    files: dict[str, str | bytes] = {
        f"{folder}/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": bytes([6, 0, 0, 0, byte])
    }
    if shim is not None:
        name = f"{folder}/MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23"
        files[name] = bytes([6, 0, 0, 0, shim])
    assert probed(tmp_path, files).secure_boot is on


def test_nouveau_and_who_forbids_it(tmp_path: Path) -> None:
    assert not probed(tmp_path, {}).nouveau_blacklisted
    (tmp_path / "sys/module/nouveau").mkdir(parents=True)
    probe = probed(tmp_path, {"/etc/modprobe.d/x.conf": "# \nblacklist nouveau\n"})
    assert probe.nouveau_loaded
    assert probe.nouveau_blacklisted


def test_nouveau_forbidden_on_the_kernels_command_line(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"/proc/cmdline": "quiet modprobe.blacklist=a,nouveau ro\n"}
    assert probed(tmp_path, files).nouveau_blacklisted


def test_apts_sources_pins_and_the_retired_key(tmp_path: Path) -> None:
    retired = bytes.fromhex(tables.key("cuda-retired").fingerprint[-16:])
    probe = probed(
        tmp_path,
        {
            "/etc/apt/sources.list.d/cuda.list": "# deb http://nvidia/old /\n"
            "deb [signed-by=/usr/share/keyrings/k.gpg arch=amd64] https://x.nvidia.com/repos /\n"
            "deb https://y.nvidia.com/repos noble main\n",
            "/etc/apt/sources.list.d/cuda.sources": "Types: deb\nURIs: https://z.nvidia.com/r/\n"
            "Suites: /\nSigned-By:\n -----BEGIN PGP\n\nTypes: deb\nEnabled: no\n"
            "URIs: https://off.nvidia.com\nSuites: /\n",
            "/etc/apt/sources.list.d/debian.sources": "Types: deb\nURIs: http://d\nSuites: x\n",
            "/etc/apt/preferences.d/cuda-repository-pin-600": "Package: *\n"
            "Pin: release l=NVIDIA CUDA\nPin-Priority: 600\n",
            "/usr/share/keyrings/old.gpg": b"\x99\x01\0" + retired + b"\n",
            "/usr/share/keyrings/new.gpg": b"\x99\x01\0 something else",
        },
    )
    folder = "/etc/apt/sources.list.d"
    assert probe.apt_sources == (
        AptSource(
            f"{folder}/cuda.list", "https://x.nvidia.com/repos", "/", "/usr/share/keyrings/k.gpg"
        ),
        AptSource(f"{folder}/cuda.list", "https://y.nvidia.com/repos", "noble"),
        AptSource(f"{folder}/cuda.sources", "https://z.nvidia.com/r/", "/"),
    )
    assert probe.apt_pins == (
        AptPin("/etc/apt/preferences.d/cuda-repository-pin-600", "*", "release l=NVIDIA CUDA", 600),
    )
    assert probe.retired_keys == ("/usr/share/keyrings/old.gpg",)


def test_leftovers_specs_drop_ins_and_the_gates_last_words(tmp_path: Path) -> None:
    probe = probed(
        tmp_path,
        {
            "/proc/driver/nvidia/version": OPEN,
            "/usr/bin/nvidia-uninstall": "",
            "/etc/cdi/nvidia.yaml": "",
            "/etc/docker/daemon.json": '{"runtimes":\n {"nvidia": {}}}',
            "/etc/systemd/system/llama-server.service": "# Written by hand\n",
            "/etc/systemd/system/llama-server.service.d/mine.conf": "",
            "/var/cache/llama-server/gate.log": "ggml_cuda_init: failed to initialize CUDA: x\nz\n",
        },
    )
    assert probe.driver_loaded is not None
    assert probe.runfiles == ("/usr/bin/nvidia-uninstall",)
    assert probe.cdi_specs == ("/etc/cdi/nvidia.yaml",)
    assert probe.docker_runtimes == ("nvidia",)
    service = probe.services["llama-server.service"]
    assert service.drop_ins == ("/etc/systemd/system/llama-server.service.d/mine.conf",)
    assert service.mark == "# Written by hand"
    assert not service.is_ours
    assert service.gate == ("ggml_cuda_init: failed to initialize CUDA: x",)


def test_a_host_whose_driver_and_toolkit_do_keeps_both() -> None:
    """As read on a host with an H100."""
    text = (Path(__file__).parent / "probes" / "ubuntu-24.04-h100.txt").read_text()
    probe = parse(text.splitlines())
    found = stack.plan(load({}), probe)
    assert found is not None
    assert found.driver.choice is not None
    assert found.driver.choice.installed
    assert found.toolkit.choice is not None
    assert found.toolkit.choice.root == "/usr/local/cuda-13.0"
    assert found.architectures == ("90",)


def test_wsl_conf(tmp_path: Path) -> None:
    kernel = {"/proc/sys/kernel/osrelease": "6.6.87.2-microsoft-standard-WSL2\n"}
    on = "[automount]\nsystemd=false\n[boot]\nsystemd = true\n[user]\nsystemd=false\n"
    assert probed(tmp_path, {**kernel, "/etc/wsl.conf": on}).wsl_systemd is True
    assert probed(tmp_path, {**kernel, "/etc/wsl.conf": "[user]\nx=1\n"}).wsl_systemd is None


def test_packages_and_those_that_are_held() -> None:
    probe = told("held\tnvidia-utils-580", "package\tnvidia-utils-580 580.65.06-0ubuntu1")
    assert probe.held == {"nvidia-utils-580"}
    assert probe.packages == {"nvidia-utils-580": "580.65.06-0ubuntu1"}
