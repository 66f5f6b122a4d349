"""What is done with which hosts: the page docs/compatibility.md, out of the rules themselves.

It is printed by `python -m tasks.compatibility`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from packaging.version import Version

from tasks.probe import Gpu, KernelModule, Probe, Toolkit
from tasks.rules import stack, tables
from tasks.rules.findings import Finding, Severity
from tasks.rules.nvidia import Stack
from tasks.rules.nvidia.host import NVIDIA
from tasks.rules.tables import Distribution, ExactVersion
from tasks.settings import Settings, load

CARDS = {
    "RTX 5090": 0x2B85,
    "RTX 4090": 0x2684,
    "RTX 3090": 0x2204,
    "T4": 0x1EB8,
    "GTX 1080 Ti": 0x1B06,
    "A100 PCIe 80GB": 0x20B5,
    "H200": 0x2335,
    "B200": 0x2901,
    "RTX PRO 6000": 0x2BB1,
    "GB10": 0x2E12,
}
COMMONPLACE = ("cuda-driver", "cuda-fault", "wsl-keepalive")
"""Notes on so many hosts that they would hide the others."""

VGA = 0x030000
WINDOW_BYTES = 64 * 1024**3


@dataclass(frozen=True)
class Case:
    """A host, and what is asked for."""

    title: str
    probe: Probe
    settings: Settings

    @property
    def stack(self) -> Stack | None:
        """What is chosen for it."""
        return stack.plan(self.settings, self.probe)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What there is to say about it."""
        return tuple(stack.findings(self.settings, self.probe, self.stack))


def host(system: Distribution, *cards: str, machine: str = "x86_64") -> Probe:
    """A fresh host with these cards."""
    return Probe(
        uid=0,
        arch=machine,
        os_id=system.os_id,
        os_version=system.version_id,
        os_name=system.title,
        systemd_running=True,
        glibc=system.glibc,
        compilers={"g++": system.gcc},
        gpus=tuple(
            Gpu(f"0000:{number:02x}:00.0", NVIDIA, CARDS[card], VGA, None, WINDOW_BYTES)
            for number, card in enumerate(cards, 1)
        ),
    )


def with_driver(probe: Probe, version: str, kind: tables.Modules = "open") -> Probe:
    """The same with a driver that runs."""
    module = KernelModule(ExactVersion(version), kind)
    return replace(
        probe, driver_loaded=module, driver_on_disk=module, driver_library=module.version
    )


def in_wsl(probe: Probe, windows: str | None) -> Probe:
    """The same inside WSL, with this driver in Windows."""
    return replace(
        probe,
        wsl=True,
        wsl_gpu=True,
        kernel="6.6.87.2-microsoft-standard-WSL2",
        wsl_libcuda=windows is not None,
        windows_driver=ExactVersion(windows) if windows else None,
        gpus=tuple(replace(gpu, bar1_bytes=None) for gpu in probe.gpus) if windows else (),
    )


def fresh() -> Iterator[Case]:
    """Every distribution with every card."""
    for system in tables.distributions():
        for card in CARDS:
            machine = "aarch64" if card == "GB10" else "x86_64"
            yield _case(f"{system.title}, {card}", host(system, card, machine=machine))


def several() -> Iterator[Case]:
    """Hosts with more than one kind of card, and without any."""
    for system in tables.distributions():
        yield _case(f"{system.title}, RTX 5090 and RTX 4090", host(system, "RTX 5090", "RTX 4090"))
    ubuntu = _system("ubuntu 24.04")
    both = host(ubuntu, "RTX 5090", "GTX 1080 Ti")
    yield _case(f"{ubuntu.title}, RTX 5090 and GTX 1080 Ti", both)
    yield _case(f"{ubuntu.title}, 8 x H200", host(ubuntu, *["H200"] * 8))
    yield _case(f"{ubuntu.title}, no card", host(ubuntu))
    yield _case(
        f"{ubuntu.title}, no card, `llama_cpp_backend` cuda", host(ubuntu), llama_cpp_backend="cuda"
    )


def present() -> Iterator[Case]:
    """Hosts that have a driver already."""
    ubuntu, debian = _system("ubuntu 24.04"), _system("debian 13")
    drivers: tuple[tuple[str, str, tables.Modules], ...] = (
        ("RTX 5090", "570.133.07", "open"),
        ("RTX 5090", "580.95.05", "proprietary"),
        ("RTX 5090", "610.57.04", "open"),
        ("RTX 4090", "535.261.03", "proprietary"),
        ("RTX 4090", "550.163.01", "proprietary"),
        ("H200", "470.82.01", "proprietary"),
        ("GTX 1080 Ti", "580.95.05", "proprietary"),
        ("GTX 1080 Ti", "595.71.05", "proprietary"),
    )
    for system in (ubuntu, debian):
        for card, version, kind in drivers:
            yield _case(
                f"{system.title}, {card}, driver {version} ({kind})",
                with_driver(host(system, card), version, kind),
            )
    yield _case(
        "Debian 13, RTX 5090, driver 550.163.01, `driver_source` none",
        with_driver(host(debian, "RTX 5090"), "550.163.01"),
        driver_source="none",
    )


def compilers() -> Iterator[Case]:
    """Compilers and toolkits that are there, or asked for."""
    ubuntu, newest, debian = (_system(x) for x in ("ubuntu 24.04", "ubuntu 26.04", "debian 13"))
    for system, gcc in ((ubuntu, "14.2.0"), (newest, "16.1.0"), (debian, "15.2.0")):
        probe = replace(host(system, "RTX 5090"), compilers={"g++": Version(gcc)})
        yield _case(f"{system.title}, RTX 5090, g++ {gcc}", probe)
    toolkits = (("12.0.140", "/usr"), ("12.9.86", None), ("13.2.51", None), ("13.2.86", None))
    for nvcc, root in toolkits:
        where = root or f"/usr/local/cuda-{'.'.join(nvcc.split('.')[:2])}"
        probe = replace(host(ubuntu, "RTX 5090"), toolkits=(Toolkit(where, ExactVersion(nvcc)),))
        yield _case(f"{ubuntu.title}, RTX 5090, nvcc {nvcc} in {where}", probe)
    for system in tables.distributions():
        for cuda in ("12.6", "12.9", "13.2.1", "13.4"):
            yield _case(
                f"{system.title}, RTX 5090, `cuda_version` {cuda}",
                host(system, "RTX 5090"),
                cuda_version=cuda,
            )


def secure_boot() -> Iterator[Case]:
    """Hosts whose kernel takes signed modules only."""
    for system in tables.distributions():
        probe = replace(host(system, "RTX 5090"), secure_boot=True)
        yield _case(f"{system.title}, RTX 5090, Secure Boot", probe)
        key = tables.secure_boot(system).key
        yield _case(
            f"{system.title}, RTX 5090, Secure Boot, DKMS's key enrolled, `driver_source` nvidia",
            replace(probe, mok_keys={key: "enrolled"}),
            driver_source="nvidia",
        )


def windows() -> Iterator[Case]:
    """Distributions inside WSL."""
    for system in tables.distributions():
        for driver in ("581.15", "576.02", None):
            says = f"Windows driver {driver}" if driver else "no driver in Windows"
            yield _case(
                f"{system.title} in WSL, RTX 5090, {says}",
                in_wsl(host(system, "RTX 5090"), driver),
            )


SECTIONS = {
    "Fresh hosts": fresh,
    "Several cards, or none": several,
    "A driver is there": present,
    "Compilers and toolkits": compilers,
    "Secure Boot": secure_boot,
    "WSL": windows,
}


def cases() -> Iterator[Case]:
    """Every host of the page."""
    for section in SECTIONS.values():
        yield from section()


def _system(name: str) -> Distribution:
    found = tables.distribution(*name.split())
    if found is None:
        raise ValueError(f"there is no {name} in the tables")
    return found


def _case(title: str, probe: Probe, **data: object) -> Case:
    return Case(title, probe, load(data))


def row(case: Case) -> tuple[str, str, str, str, str]:
    """Host, driver, toolkit, what is compiled for, and what there is to say."""
    chosen, findings = case.stack, case.findings
    errors = [each for each in findings if each.severity is Severity.ERROR]
    if errors:
        return (case.title, "", "", "", " ".join(f"**Error**: {_plain(each)}" for each in errors))
    said = " ".join(
        f"{each.severity.value.capitalize()}: {each.cause}."
        for each in findings
        if each.code not in COMMONPLACE
    )
    if chosen is None or chosen.driver.choice is None or chosen.toolkit.choice is None:
        return (case.title, "none", "none", "CPU", said)
    driver, toolkit = chosen.driver.choice, chosen.toolkit.choice
    modules = f", {driver.modules}" if driver.modules and not driver.installed else ""
    prebuilt = ", signed" if driver.prebuilt else ""
    stays = " stays" if driver.installed else ""
    compiler = chosen.compiler
    older = f", {compiler.package}" if compiler and not compiler.default else ""
    return (
        case.title,
        f"{str(driver).removeprefix('driver ')}{modules}{prebuilt}{stays}",
        f"{str(toolkit).removeprefix('CUDA ')}{older}",
        ", ".join(chosen.architectures),
        said,
    )


def _plain(finding: Finding) -> str:
    return f"{finding.cause}. {finding.fix}".strip()


def _table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| host | driver | CUDA | compiled for | |"
    yield "|---|---|---|---|---|"
    for cells in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def markdown() -> str:
    """The page docs/compatibility.md."""
    lines = [
        "# Compatibility",
        "",
        "What is chosen for which host. This page is generated from the rules by",
        "`./run python -m tasks.compatibility`; `check.py` says the same for a host of yours.",
    ]
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}", "", *_table(row(case) for case in section())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
