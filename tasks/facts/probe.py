"""The probe: everything that matters about a host, in one round trip."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyinfra.api import FactBase, FactProcessError

from tasks import probe
from tasks.facts import nvidia
from tasks.facts.lines import Lines, number, version
from tasks.facts.told import assignments
from tasks.probe import (
    Folder,
    Gpu,
    Listener,
    ManagedFile,
    ModelPath,
    Probe,
    Release,
    Service,
    Toolkit,
)

_SCRIPT = "".join((Path(__file__).parent / name).read_text() for name in ("probe.sh", "nvidia.sh"))
_END = "printf 'end\\t1\\n'\n"


class HostProbe(FactBase[Probe]):
    """Reads the whole host with one shell script (probe.sh, nvidia.sh) into a Probe.

    A tool that is missing leaves its part of the Probe empty. The script exits 0 whatever it
    finds; an output that was cut short is a FactProcessError, which fails that host alone.
    """

    shell_executable = "sh"

    def command(
        self,
        ports: Iterable[int] = (),
        model_paths: Iterable[str] = (),
        files: Iterable[str] = (),
        packages: Iterable[str] = (),
    ) -> str:
        """The script, with what it is to look for in front."""
        wanted = {
            "ports": " ".join(map(str, ports)),
            "model_paths": "\n".join(model_paths),
            "files": " ".join(files),
            "packages": " ".join(packages),
            "lock": probe.LOCK,
            **nvidia.wanted(),
        }
        return assignments(wanted) + _SCRIPT + _END

    def process(self, output: list[str]) -> Probe:
        """Probe from the script's output."""
        return parse(output)


def parse(output: Iterable[str]) -> Probe:
    """Probe from lines of `key<TAB>value`.

    Raises FactProcessError if the last line is missing: half a probe would be taken for a host
    that has less than it has.
    """
    lines = Lines(output)
    if lines.text("end") is None:
        raise FactProcessError("the probe's output was cut short; run it again")
    kernel = lines.text("kernel")
    kib = lines.number("memory_kib")
    available_kib = lines.number("memory_available_kib")
    windows_gpus, windows_driver = nvidia.windows(lines)
    return Probe(
        uid=lines.number("uid"),
        hostname=lines.text("hostname"),
        arch=lines.text("arch"),
        kernel=kernel,
        os_id=lines.text("os.ID"),
        os_version=lines.text("os.VERSION_ID"),
        os_codename=lines.text("os.VERSION_CODENAME"),
        os_name=lines.text("os.PRETTY_NAME"),
        wsl="microsoft" in (kernel or "").lower(),
        virtualization=lines.text("virtualization"),
        systemd_running=lines.text("systemd_running") == "yes",
        systemd_version=lines.number("systemd_version"),
        cores=lines.number("cores"),
        memory_bytes=kib * 1024 if kib is not None else None,
        memory_available_bytes=available_kib * 1024 if available_kib is not None else None,
        cpu_model=lines.text("cpu_model"),
        cpu_target=lines.text("cpu_target"),
        disk_free_bytes={
            place: int(free) for place, free, _ in lines.words("disk", 3) if free.isdigit()
        },
        disk_mount={place: mount for place, _, mount in lines.words("disk", 3)},
        noexec=frozenset(lines.all("noexec")),
        folders={
            path: Folder(number(mode, 8) or 0, owner)
            for path, mode, owner in lines.words("folder", 3)
        },
        checkout=lines.text("checkout"),
        unprivileged_port=lines.number("unprivileged_port"),
        glibc=version(lines.text("glibc")),
        compilers=lines.versions("compiler"),
        tools=dict(lines.pairs("tool")),
        packages=dict(lines.pairs("package")),
        held=frozenset(lines.all("held")),
        dpkg_broken=tuple(lines.all("dpkg_broken")),
        gpus=(*(gpu for gpu in map(_gpu, lines.all("gpu")) if gpu is not None), *windows_gpus),
        toolkits=tuple(
            Toolkit(root, version, root not in lines.all("toolkit_without_cublas"))
            for root, version in lines.versions("toolkit").items()
        ),
        driver_loaded=nvidia.driver_loaded(lines),
        driver_on_disk=nvidia.driver_on_disk(lines),
        driver_library=nvidia.driver_library(lines),
        windows_driver=windows_driver,
        nvidia_smi=lines.text("nvidia_smi"),
        kernels=nvidia.kernels(lines),
        dkms=nvidia.dkms(lines),
        secure_boot=nvidia.secure_boot(lines),
        mok_keys=nvidia.mok_keys(lines),
        nouveau_loaded="loaded" in lines.all("nouveau"),
        nouveau_blacklisted="blacklisted" in lines.all("nouveau"),
        runfiles=tuple(lines.all("runfile")),
        apt_sources=nvidia.apt_sources(lines),
        apt_pins=nvidia.apt_pins(lines),
        retired_keys=tuple(lines.all("retired_key")),
        unattended_upgrades=lines.text("unattended") not in (None, "0"),
        unattended_blacklist=tuple(lines.all("unattended_blacklist")),
        engines=nvidia.engines(lines),
        container_toolkit=nvidia.container_toolkit(lines),
        cdi_specs=tuple(lines.all("cdi_spec")),
        docker_runtimes=nvidia.docker_runtimes(lines),
        wsl_gpu=lines.text("dxg") == "yes",
        wsl_libcuda=lines.text("wsl_libcuda") == "yes",
        wsl_systemd=_yes_or_no(lines.text("wsl_systemd")),
        releases=tuple(
            release for release in map(_release, lines.all("release")) if release is not None
        ),
        current=lines.text("current"),
        previous=lines.text("previous"),
        blobs={name: int(size) for name, size in lines.words("blob", 2) if size.isdigit()},
        partials={name: int(size) for name, size in lines.pairs("partial") if size.isdigit()},
        records={
            path: (int(time), text)
            for path, time, text in lines.words("record", 3)
            if time.isdigit()
        },
        links=_paths(lines, "link"),
        real_paths=_paths(lines, "real"),
        model_paths=_model_paths(lines),
        files={
            path: ManagedFile(sha256, number(mode, 8) or 0, owner, group)
            for path, sha256, mode, owner, group in lines.words("file", 5)
        },
        users=frozenset(lines.all("user")),
        services=_services(lines),
        jobs=dict(lines.pairs("job")),
        listeners={
            port: listener
            for port, listener in map(_listener, lines.words("listener", 3))
            if port is not None
        },
        locked_by=lines.text("locked_by"),
    )


def _paths(lines: Lines, key: str) -> dict[str, str]:
    return {path: to for path, _, to in (value.partition("\t") for value in lines.all(key))}


def _yes_or_no(text: str | None) -> bool | None:
    return {"true": True, "yes": True, "false": False, "no": False}.get(text or "")


def _gpu(value: str) -> Gpu | None:
    match = re.fullmatch(
        r"(\S+) (0x[0-9a-f]+) (0x[0-9a-f]+) (0x[0-9a-f]+) ([^|]*)\|([^|]*)\|([^|]*)\|(.*)", value
    )
    if match is None:
        return None
    address, vendor, device, class_code, driver, bar1, sub_vendor, sub_device = match.groups()
    return Gpu(
        address=address,
        vendor=int(vendor, 16),
        device=int(device, 16),
        class_code=int(class_code, 16),
        driver=driver or None,
        bar1_bytes=number(bar1),
        subsystem_vendor=number(sub_vendor, 16),
        subsystem_device=number(sub_device, 16),
    )


def _release(value: str) -> Release | None:
    try:
        told = json.loads(value)
        return Release(
            name=str(told["name"]),
            commit=str(told["commit"]),
            inputs=dict(told["inputs"]),
            server_options=frozenset(told.get("server_options", ())),
            chat_templates=frozenset(told.get("chat_templates", ())),
            built_seconds=told.get("built_seconds"),
        )
    except (ValueError, KeyError, TypeError):
        return None  # a release that nobody can describe is none


def _model_paths(lines: Lines) -> dict[str, ModelPath]:
    found = {path: ModelPath(exists=False) for path in lines.all("no_model_path")}
    for size, mode, magic, verified, path in lines.words("model_path", 5):
        found[path] = ModelPath(
            exists=True,
            size=number(size),
            world_readable=bool((number(mode, 8) or 0) & 0o004),
            magic=magic if magic != "-" else None,
            sha256=verified if verified != "-" else None,
        )
    return found


def _services(lines: Lines) -> dict[str, Service]:
    told: dict[str, dict[str, list[str]]] = {}
    for unit, key, value in lines.words("service", 3):
        told.setdefault(unit, {}).setdefault(key, []).append(value)
    return {unit: _service(properties) for unit, properties in told.items()}


def _service(told: Mapping[str, list[str]]) -> Service:
    def text(key: str) -> str | None:
        return told[key][0] if key in told else None

    anonymous_kib = number(text("anonymous_kib"))
    return Service(
        active=text("ActiveState") or "",
        sub=text("SubState") or "",
        enabled=text("UnitFileState") or "",
        main_pid=number(text("MainPID")) or 0,
        need_daemon_reload=text("NeedDaemonReload") == "yes",
        executable=text("executable"),
        digest=text("digest"),
        anonymous_bytes=anonymous_kib * 1024 if anonymous_kib is not None else None,
        mark=text("mark"),
        drop_ins=tuple(told.get("drop_in", ())),
        gate=tuple(told.get("gate", ())),
    )


def _listener(words: tuple[str, ...]) -> tuple[int | None, Listener]:
    port, kind, holder = words
    if kind == "ours":
        return number(port), Listener(None, None, holder)
    pid, _, command = holder.partition(" ")
    return number(port), Listener(number(pid), command or None)
