"""What users of comparable software suffer from: given that host, that finding.

Each test is named by the symptom. What keeps it from happening beyond the finding is tested where
that is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from packaging.version import Version

from tasks import probe as at
from tasks.probe import AptPin, AptSource, DkmsModule, Kernel, KernelModule, Probe, Service, Toolkit
from tasks.rules import tables
from tasks.rules.findings import Finding, Severity
from tasks.rules.nvidia import kernel
from tasks.rules.plan import Plan, make_plan, rows
from tasks.settings import SettingsError, load

from .hosts import (
    GTX_1080_TI,
    H200,
    RTX_5090,
    SHA256,
    SOURCE,
    URL,
    WITH_CARD,
    WITH_COMPILER,
    WITH_DRIVER,
    card,
    in_wsl,
    on,
    settings,
    with_driver,
)

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE


def plan(probe: Probe, **data: Any) -> Plan:
    return make_plan(settings(**data), probe, SOURCE)


def found(probe: Probe, **data: Any) -> Mapping[str, Finding]:
    return {each.code: each for each in plan(probe, **data).findings}


def errors(probe: Probe, **data: Any) -> set[str]:
    return {each.code for each in plan(probe, **data).errors}


# 2


def test_driver_library_version_mismatch_after_an_upgrade() -> None:
    upgraded = with_driver(WITH_CARD, driver_library=Version("595.71.5"))
    finding = found(upgraded)["driver-mismatch"]
    assert finding.severity is WARNING
    assert "the kernel runs driver 595.99.02, but its libraries are 595.71.5" in finding.cause
    assert "version mismatch" in finding.consequence
    assert finding.fix == "Reboot."
    assert "driver-mismatch" not in found(WITH_DRIVER)


def test_a_driver_that_was_upgraded_runs_after_a_reboot_only() -> None:
    newer = KernelModule(Version("595.104"), "open")
    assert "595.104 is installed" in (
        kernel.reboot_reason(replace(WITH_DRIVER, driver_on_disk=newer)) or ""
    )
    other = replace(WITH_DRIVER, driver_loaded=KernelModule(Version("595.99.2"), "proprietary"))
    assert "open ones are installed" in (kernel.reboot_reason(other) or "")
    assert kernel.reboot_reason(WITH_DRIVER) is None
    assert kernel.reboot_reason(WITH_CARD) is None


def test_unattended_upgrades_may_upgrade_the_driver_under_running_programs() -> None:
    probe = on("ubuntu 24.04", unattended_upgrades=True)
    assert found(probe)["unattended-driver"].severity is NOTE
    kept = replace(probe, unattended_blacklist=("nvidia-", "libnvidia-"))
    assert "unattended-driver" not in found(kept)
    packages = {**probe.packages, "nvidia-utils-580": "580.65.06-0ubuntu1"}
    held = replace(probe, packages=packages, held=frozenset({"nvidia-utils-580"}))
    assert "unattended-driver" not in found(with_driver(held))
    assert "unattended-driver" in found(replace(with_driver(held), held=frozenset()))


# 3


def kernels(*named: tuple[str, bool, bool]) -> tuple[Kernel, ...]:
    return tuple(Kernel(*each) for each in named)


RUNNING = WITH_CARD.kernel or ""
NEWER = "6.12.107+deb13-amd64"


def test_kernel_upgraded_headers_missing_no_module_after_the_next_boot() -> None:
    probe = replace(WITH_DRIVER, kernels=kernels((RUNNING, True, True), (NEWER, False, False)))
    finding = found(probe)["kernel-without-driver"]
    assert f"kernel {NEWER}" in finding.cause
    assert f"apt-get install linux-headers-{NEWER} && dkms autoinstall -k {NEWER}" in finding.fix
    good = replace(WITH_DRIVER, kernels=kernels((RUNNING, True, True), (NEWER, True, True)))
    assert "kernel-without-driver" not in found(good)
    older = replace(WITH_DRIVER, kernels=kernels((RUNNING, True, True), ("6.1.0-9", True, False)))
    assert "kernel-without-driver" not in found(older)


def test_headers_of_the_running_kernel_are_missing() -> None:
    probe = replace(WITH_CARD, kernels=kernels((RUNNING, False, False)))
    assert "installed before the driver" in found(probe)["headers-missing"].consequence
    assert "headers-missing" not in found(replace(probe, kernels=kernels((RUNNING, True, False))))
    # Modules that come compiled need none.
    ubuntu = on("ubuntu 24.04", kernels=kernels((f"{Version('6.8.0')}-1-generic", False, False)))
    assert "headers-missing" not in found(ubuntu)


def test_the_running_kernel_was_removed_by_an_upgrade() -> None:
    probe = replace(WITH_CARD, kernels=kernels((NEWER, True, False)))
    assert errors(probe) == {"kernel-gone"}
    assert found(probe)["kernel-gone"].fix.startswith("Reboot")
    assert errors(replace(WITH_DRIVER, kernels=probe.kernels)) == set()


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("6.8.0-9-generic", "6.8.0-31-generic"),
        ("6.1.0-44-amd64", "6.12.95+deb12-amd64"),
        ("6.8.0-110-generic", "7.0.0-14-generic"),
    ],
)
def test_kernels_are_sorted_by_number(older: str, newer: str) -> None:
    assert kernel.kernel_order(older) < kernel.kernel_order(newer)


# 4


def test_dkms_does_not_build_on_a_new_kernel() -> None:
    module = DkmsModule("nvidia", "595.99.02", (RUNNING,), (NEWER,))
    finding = found(replace(WITH_DRIVER, dkms=(module,)))["dkms-failed"]
    assert finding.severity is WARNING
    assert f"nvidia 595.99.02 for kernel {NEWER}" in finding.cause
    assert "/var/lib/dkms/nvidia/595.99.02/build/make.log" in finding.fix


def test_dkms_does_not_build_on_the_running_kernel() -> None:
    module = DkmsModule("nvidia", "595.99.02", (), (RUNNING,))
    assert errors(replace(WITH_CARD, dkms=(module,))) == {"dkms-failed"}
    # Another branch may build where this one did not.
    other = replace(module, version="590.48.01")
    assert errors(replace(WITH_CARD, dkms=(other,))) == set()
    # What kept it from building may be gone: dpkg has yet to finish its package.
    again = replace(WITH_CARD, dkms=(module,), dpkg_broken=("nvidia-kernel-open-dkms",))
    assert errors(again) == set()
    assert found(again)["dkms-failed"].severity is WARNING


# 5


@pytest.mark.parametrize("version", ["580.65.06", "590.48.01", "595.71.05", "610.43.02"])
def test_the_installer_breaks_a_driver_that_worked(version: str) -> None:
    stack = plan(with_driver(WITH_CARD, version)).stack
    assert stack is not None
    assert stack.driver.choice is not None
    assert stack.driver.choice.installed
    assert "it is there and stays" in stack.driver.reason


def test_a_driver_that_is_installed_and_not_loaded_is_told_from_one_that_runs() -> None:
    assert dict(rows(plan(WITH_DRIVER)))["driver"].endswith("it is there and stays")
    idle = replace(WITH_DRIVER, driver_loaded=None)
    assert dict(rows(plan(idle)))["driver"].endswith("(not loaded, which may take a reboot)")


# 6


def test_blackwell_with_proprietary_modules_no_devices_were_found() -> None:
    stuck = with_driver(on("ubuntu 24.04"), "580.95.05", "proprietary")
    assert errors(stuck, driver_source="none") == {"driver-modules"}
    assert (
        "No devices were found" in found(stuck, driver_source="none")["driver-modules"].consequence
    )
    stack = plan(stuck).stack
    assert stack is not None
    assert stack.driver.choice is not None
    assert (stack.driver.choice.modules, stack.driver.choice.installed) == ("open", False)


# 7


def test_no_devices_were_found_because_above_4g_decoding_is_off() -> None:
    finding = found(replace(WITH_CARD, gpus=(card(bar1_bytes=32 * 2**20),)))["gpu-window"]
    assert finding.severity is WARNING
    assert "Above 4G Decoding" in finding.fix
    assert "No devices were found" in finding.consequence


def test_resizable_bar_is_off() -> None:
    finding = found(replace(WITH_CARD, gpus=(card(bar1_bytes=256 * 2**20),)))["gpu-window"]
    assert finding.severity is NOTE
    assert "256 MiB" in finding.cause
    assert "gpu-window" not in found(WITH_CARD)
    assert "gpu-window" not in found(replace(WITH_CARD, gpus=(card(bar1_bytes=None),)))


# 8


MOK = "/var/lib/dkms/mok.pub"


def test_secure_boot_refuses_the_module_that_is_to_be_built() -> None:
    assert errors(replace(WITH_CARD, secure_boot=True)) == {"secure-boot"}
    assert "mokutil --import" in found(replace(WITH_CARD, secure_boot=True))["secure-boot"].fix
    pending = replace(WITH_CARD, secure_boot=True, mok_keys={MOK: "pending"})
    assert found(pending)["secure-boot"].fix.startswith("Reboot and confirm the key")
    enrolled = replace(WITH_CARD, secure_boot=True, mok_keys={MOK: "enrolled"})
    assert errors(enrolled) == set()


def test_secure_boot_takes_ubuntus_signed_modules() -> None:
    probe = on("ubuntu 24.04", secure_boot=True)
    assert errors(probe) == set()
    stack = plan(probe).stack
    assert stack is not None
    assert stack.driver.choice is not None
    assert stack.driver.choice.prebuilt


@pytest.mark.parametrize(
    ("signer", "mok", "fix"),
    [
        (None, {}, "mokutil --import"),
        ("DKMS module signing key", {MOK: "unknown"}, "mokutil --import"),
        ("DKMS module signing key", {MOK: "pending"}, "Reboot and confirm"),
    ],
)
def test_secure_boot_refuses_the_module_that_is_there(
    signer: str | None, mok: Any, fix: str
) -> None:
    module = KernelModule(Version("595.71.5"), "open", signer)
    probe = with_driver(WITH_CARD, driver_loaded=None, driver_on_disk=module)
    refused = replace(probe, secure_boot=True, mok_keys=mok)
    assert errors(refused) == {"secure-boot-module"}
    assert fix in found(refused)["secure-boot-module"].fix


def test_secure_boot_and_a_module_of_before_it_was_on() -> None:
    unsigned = KernelModule(Version("595.71.5"), "open")
    probe = with_driver(WITH_CARD, driver_loaded=None, driver_on_disk=unsigned)
    refused = replace(probe, secure_boot=True, dkms=(DkmsModule("nvidia", "595.71.5", (RUNNING,)),))
    assert "dkms build --force nvidia/595.71.5" in found(refused)["secure-boot-module"].fix


def test_secure_boot_and_a_module_that_is_trusted() -> None:
    for signer, mok in (
        ("Canonical Ltd. Kernel Module Signing", {}),
        ("DKMS module signing key", {MOK: "enrolled"}),
    ):
        module = KernelModule(Version("595.71.5"), "open", signer)
        probe = with_driver(WITH_CARD, driver_loaded=None, driver_on_disk=module)
        assert errors(replace(probe, secure_boot=True, mok_keys=mok)) == set()


def test_nouveau_holds_the_card() -> None:
    probe = replace(WITH_CARD, gpus=(card(driver="nouveau"),), nouveau_loaded=True)
    assert "after a reboot" in found(probe)["nouveau"].consequence
    module = KernelModule(Version("595.71.5"), "open")
    installed = replace(probe, driver_on_disk=module, driver_library=module.version)
    assert kernel.reboot_reason(installed) == "nouveau holds the card"


def test_the_card_was_handed_to_a_virtual_machine() -> None:
    assert "gpu-passthrough" in found(replace(WITH_CARD, gpus=(card(driver="vfio-pci"),)))


# 9


def test_compute_120_is_unsupported_by_this_nvcc() -> None:
    assert errors(on("ubuntu 24.04"), cuda_version="12.6") == {"cuda-gpu"}
    assert (
        "Unsupported gpu" in found(on("ubuntu 24.04"), cuda_version="12.6")["cuda-gpu"].consequence
    )
    old = replace(
        on("ubuntu 24.04"), toolkits=(Toolkit("/usr/local/cuda-12.4", Version("12.4.131")),)
    )
    stack = plan(old).stack
    assert stack is not None
    assert stack.toolkit.choice is not None
    assert stack.toolkit.choice.root is None, "the one that is there does not know the card"


def test_a_pascal_card_and_a_toolkit_that_no_longer_knows_it() -> None:
    probe = on("ubuntu 24.04", replace(WITH_CARD, gpus=(card(GTX_1080_TI),)))
    assert errors(probe) == set()
    assert errors(probe, cuda_version="13.0") == {"cuda-gpu"}


# 10


def test_120_against_120a_mxfp4_build_breaks() -> None:
    stack = plan(WITH_CARD).stack
    assert stack is not None
    assert stack.architectures == ("120a-real",)


# 11


@pytest.mark.parametrize("version", ["13.2.0", "13.2.1"])
def test_gibberish_with_iq_quants(version: str) -> None:
    assert errors(WITH_CARD, cuda_version=version) == {"cuda-fault"}
    (finding,) = plan(WITH_CARD, cuda_version=version).errors
    assert "gibberish" in finding.consequence
    assert finding.source.startswith("ggml-org/llama.cpp#28581")


# 12


@pytest.mark.parametrize(("system", "version"), [("debian 13", "12.9"), ("ubuntu 26.04", "13.1")])
def test_glibc_is_too_new_for_the_cuda_headers(system: str, version: str) -> None:
    assert "cuda-glibc" in errors(on(system), cuda_version=version)
    assert errors(on(system)) == set()


# 13


def test_gcc_is_too_new_for_nvcc() -> None:
    probe = on("ubuntu 26.04", compilers={"g++": Version("16.1.0")})
    stack = plan(probe).stack
    assert stack is not None
    assert stack.compiler is not None
    assert stack.compiler.package == "g++-15"
    assert errors(probe) == set()


# 14


def test_the_distributions_nvcc_shadows_the_toolkits() -> None:
    shadow = Toolkit("/usr", Version("12.0.140"))
    probe = replace(on("ubuntu 24.04"), toolkits=(shadow,))
    assert "12.0.140" in found(probe)["nvcc-shadow"].cause
    stack = plan(probe).stack
    assert stack is not None
    assert stack.toolkit.choice is not None
    assert stack.toolkit.choice.root is None


def test_a_toolkit_that_has_nvcc_and_not_what_llama_cpp_needs() -> None:
    half = Toolkit("/usr/local/cuda-13.2", Version("13.2.86"), has_cublas=False)
    probe = replace(WITH_DRIVER, toolkits=(half,))
    assert "no headers of cuBLAS" in found(probe)["toolkit-incomplete"].cause
    stack = plan(probe).stack
    assert stack is not None
    assert stack.toolkit.choice is not None
    assert stack.toolkit.choice.root is None
    packages = {**probe.packages, "libcublas-dev-13-2": "13.3.0.5-1"}
    whole = plan(replace(probe, packages=packages)).stack
    assert whole is not None
    assert whole.toolkit.choice is not None
    assert whole.toolkit.choice.root == "/usr/local/cuda-13.2"


# 15


NEVER = AptPin("/etc/apt/preferences.d/mine", "nvidia-* libnvidia-*", "origin x.nvidia.com", -1)


def test_apt_pin_keeps_nvidias_repository_away() -> None:
    assert errors(replace(WITH_CARD, apt_pins=(NEVER,))) == {"apt-pin"}
    assert (
        "/etc/apt/preferences.d/mine"
        in found(replace(WITH_CARD, apt_pins=(NEVER,)))["apt-pin"].cause
    )
    # It does not matter for the archive's driver, nor for one that is there.
    assert errors(on("ubuntu 24.04", apt_pins=(NEVER,))) == set()
    assert errors(replace(WITH_DRIVER, apt_pins=(NEVER,))) == set()
    # Others are for ranking, or our own.
    for pin in (replace(NEVER, priority=600), replace(NEVER, path="/x/llamastead-y")):
        assert errors(replace(WITH_CARD, apt_pins=(pin,))) == set()


def test_apt_pin_keeps_the_archives_driver_away() -> None:
    pin = replace(NEVER, pin="release o=Ubuntu")
    assert errors(on("ubuntu 24.04", apt_pins=(pin,))) == {"apt-pin"}


def test_conflicting_values_set_for_option_signed_by() -> None:
    one = AptSource("/etc/apt/sources.list.d/a.list", "https://x.nvidia.com/repos/", "/", "/k1")
    two = replace(one, path="/etc/apt/sources.list.d/b.list", uri="https://x.nvidia.com/repos")
    clash = replace(WITH_CARD, apt_sources=(one, replace(two, signed_by="/k2")))
    finding = found(clash)["apt-signed-by"]
    assert "a.list" in finding.cause
    assert "b.list" in finding.cause
    assert "apt-signed-by" not in found(replace(WITH_CARD, apt_sources=(one, two)))


def test_the_archives_nvidia_smi_and_nvidias_driver() -> None:
    probe = replace(WITH_CARD, packages={**WITH_CARD.packages, "nvidia-smi": "550.163.01-2"})
    assert errors(probe) == {"driver-conflict"}
    assert "apt-get purge nvidia-smi" in found(probe)["driver-conflict"].fix
    assert errors(probe, driver_remove_conflicts=True) == set()


def test_packages_of_another_driver() -> None:
    packages = {**WITH_CARD.packages, "nvidia-utils-570": "1", "libnvidia-compute-570": "1"}
    finding = found(on("ubuntu 24.04", packages=packages))["driver-leftovers"]
    assert "libnvidia-compute-570, nvidia-utils-570" in finding.cause
    assert "driver_remove_conflicts" in finding.fix
    container = {**WITH_CARD.packages, "nvidia-container-toolkit": "1.19.1-1"}
    assert "driver-leftovers" not in found(on("ubuntu 24.04", packages=container))


def test_a_run_installation_that_packages_would_overwrite() -> None:
    probe = replace(WITH_CARD, runfiles=("/usr/bin/nvidia-uninstall",))
    assert errors(probe) == {"runfile"}
    assert errors(probe, driver_remove_conflicts=True) == set()
    # A driver that was installed so and suffices stays.
    assert errors(with_driver(probe)) == set()


def test_the_key_that_nvidia_retired() -> None:
    probe = replace(WITH_CARD, retired_keys=("/etc/apt/trusted.gpg",))
    assert "/etc/apt/trusted.gpg" in found(probe)["apt-retired-key"].cause


# 16


@pytest.mark.parametrize("system", ["debian 12", "debian 13"])
@pytest.mark.parametrize("device", [RTX_5090, H200])
def test_debian_as_an_afterthought(system: str, device: int) -> None:
    made = plan(on(system, replace(WITH_CARD, gpus=(card(device),))))
    assert made.errors == ()
    assert made.stack is not None
    assert made.stack.driver.choice is not None
    packages = made.stack.driver.choice.packages(
        tables.distribution(*system.split())  # type: ignore[arg-type]
    )
    assert packages is not None
    assert packages.install == ("nvidia-driver-cuda", "nvidia-kernel-open-dkms")


# 17


def test_an_upgrade_overwrites_the_users_unit() -> None:
    there = Service("active", "running", "enabled", 42, False, None, None, mark="[Unit]")
    foreign = replace(WITH_COMPILER, services={at.SERVER_UNIT: there})
    assert errors(foreign) == {"unit-not-ours"}
    assert "mv " in found(foreign)["unit-not-ours"].fix


def test_drop_ins_are_the_users_and_stay() -> None:
    drop_in = f"{at.SERVER_UNIT_FILE}.d/mine.conf"
    unit = replace(FAILED, mark=f"{at.UNIT_MARK}; x", drop_ins=(drop_in,))
    mine = replace(WITH_COMPILER, services={at.SERVER_UNIT: unit})
    assert errors(mine) == set()
    assert found(mine)["drop-ins"].severity is NOTE
    made = plan(mine)
    assert made.main.server is not None
    assert not [file.path for file in made.main.server.files if ".service.d" in file.path]


# 19


@pytest.mark.parametrize("packages", ["minimal", "full"])
def test_on_wsl_cuda_pulls_a_linux_driver(packages: str) -> None:
    made = plan(in_wsl(), cuda_packages=packages)
    assert made.errors == ()
    assert made.stack is not None
    assert made.stack.driver.choice is not None
    assert made.stack.driver.choice.source == "windows"


def test_on_wsl_a_linux_driver_hides_the_one_of_windows() -> None:
    packages = {**WITH_COMPILER.packages, "libnvidia-compute-580": "1", "nvidia-utils-580": "1"}
    assert errors(in_wsl(packages=packages)) == {"wsl-linux-driver"}
    finding = found(in_wsl(packages=packages))["wsl-linux-driver"]
    assert "apt-get purge libnvidia-compute-580 nvidia-utils-580" in finding.fix
    container = {**WITH_COMPILER.packages, "nvidia-container-toolkit": "1.19.1-1"}
    assert errors(in_wsl(packages=container)) == set()


def test_on_wsl_there_is_no_talk_of_kernels_firmware_and_nouveau() -> None:
    probe = in_wsl(secure_boot=True, nouveau_loaded=True, kernels=kernels(("x", False, False)))
    assert {each.code for each in plan(probe).findings} == {"wsl-keepalive"}


def test_on_wsl_windows_has_no_nvidia_driver() -> None:
    assert found(in_wsl(windows=None))["wsl-no-driver"].severity is NOTE
    assert errors(in_wsl(windows=None), llama_cpp_backend="cuda") == {"no-gpu"}


def test_on_wsl_windows_driver_is_too_old() -> None:
    assert errors(in_wsl("ubuntu 26.04", "572.16")) == {"driver-cuda"}
    assert "in Windows" in found(in_wsl("ubuntu 26.04", "572.16"))["driver-cuda"].fix


def test_wsl_of_the_first_version() -> None:
    first = in_wsl(windows=None, kernel="4.4.0-19041-Microsoft", wsl_gpu=False)
    assert "wsl1" in errors(first)
    assert "--set-version" in found(first)["wsl1"].fix


# 26


def test_a_resumed_download_is_corrupt() -> None:
    with pytest.raises(SettingsError, match="model_sha256"):
        load({"model": URL})
    half = replace(WITH_COMPILER, partials={SHA256: 10**6})
    made = plan(half)
    assert made.main.model is not None
    assert not made.main.model.stored
    assert made.needs_download


# 27


def test_wsl_stops_the_server_seconds_after_the_last_window() -> None:
    finding = found(in_wsl())["wsl-keepalive"]
    assert ".wslconfig" in finding.fix
    assert "vmIdleTimeout=-1" in finding.fix
    assert "microsoft/WSL#8654" in finding.source


# 28


FAILED = Service("failed", "failed", "enabled", 0, False, None, None)


@pytest.mark.parametrize(
    ("line", "code", "fix"),
    [
        (
            "ggml_cuda_init: failed to initialize CUDA: initialization error",
            "gpu-cuinit-hmm",
            "uvm_disable_hmm=1",
        ),
        (
            "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
            "gpu-no-devices",
            "Resizable BAR",
        ),
        (
            "failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime",
            "gpu-driver-too-old",
            "newer driver",
        ),
        (
            "ggml_cuda_init: failed to initialize CUDA: system not yet initialized",
            "gpu-fabric-manager",
            "nvidia-fabricmanager",
        ),
    ],
)
def test_cuinit_fails(line: str, code: str, fix: str) -> None:
    unit = replace(FAILED, mark=at.UNIT_MARK, gate=(line,))
    probe = replace(WITH_DRIVER, services={at.SERVER_UNIT: unit})
    assert fix in found(probe)[code].fix
    assert found(probe)[code].severity is WARNING
    running = replace(probe, services={at.SERVER_UNIT: replace(unit, active="active")})
    assert code not in found(running)


# All of them


HOSTS = [
    with_driver(WITH_CARD, driver_library=Version("595.71.5")),
    replace(WITH_CARD, kernels=kernels((NEWER, True, False))),
    replace(WITH_CARD, secure_boot=True, runfiles=("/usr/bin/nvidia-uninstall",)),
    replace(WITH_CARD, apt_pins=(NEVER,), gpus=(card(bar1_bytes=1),)),
    in_wsl(packages={"nvidia-utils-580": "1"}),
    in_wsl(windows=None, kernel="4.4.0-19041-Microsoft", wsl_gpu=False),
]


@pytest.mark.parametrize("probe", HOSTS)
def test_every_fault_has_a_cause_a_consequence_and_a_fix(probe: Probe) -> None:
    for finding in plan(probe, llama_cpp_backend="cuda").findings:
        assert finding.cause
        assert finding.consequence
        if finding.severity is ERROR:
            assert finding.fix
            assert finding.fix.endswith((".", "`"))
