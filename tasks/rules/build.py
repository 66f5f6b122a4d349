"""How llama.cpp is compiled for a host: options, jobs, packages, and what the result depends on.

What is passed to CMake, and why, stands in tables/build.toml.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks import probe as at
from tasks.probe import Probe, Release
from tasks.rules import nvidia, stack, tables
from tasks.rules.findings import Finding, error, warning
from tasks.rules.nvidia import Stack
from tasks.rules.space import Need
from tasks.rules.tables import Backend, BuildCost, BuildOption
from tasks.settings import Settings, instances

GIB = 1024**3

PACKAGES = (
    "ca-certificates",
    "ccache",
    "cmake",
    "curl",
    "g++",
    "gcc",
    "git",
    "libssl-dev",
    "ninja-build",
)
"""Debian packages that compile llama.cpp for the CPU and fetch what is to be served."""

RPATH = "$ORIGIN/../lib;$ORIGIN"
"""Programs find their libraries beside themselves, wherever the release lies."""

RPC_PROGRAMS = ("ggml-rpc-server", "rpc-server")


@dataclass(frozen=True)
class Source:
    """A version of llama.cpp, resolved."""

    repo: str
    commit: str
    """40 hex digits."""
    label: str
    """How people call it: the tag, or the first digits of the commit."""
    build_number: int | None
    """N where a tag bN names the commit: a shallow fetch cannot count."""


@dataclass(frozen=True)
class BuildPlan:
    """What to compile, and how."""

    source: Source
    targets: tuple[str, ...]
    options: Mapping[str, str]
    backend: Backend
    toolkit_root: str | None
    """Where the CUDA toolkit is, or will be once it is installed."""
    architectures: tuple[str, ...]
    """GPUs that it is compiled for, as CMAKE_CUDA_ARCHITECTURES names them."""
    jobs: int
    packages: tuple[str, ...]
    allowed_libraries: tuple[str, ...]
    needed_options: frozenset[str]
    """Options that the source must declare; of the others those that it does are passed."""
    inputs: Mapping[str, Any]
    """Everything that the binary depends on. A value of None is not known before the compiler
    is installed."""
    release: Release | None
    """A release on the host that was made from these inputs."""

    @property
    def build_id(self) -> str | None:
        """Hash over the inputs; None while one of them is unknown."""
        if any(value is None for value in self.inputs.values()):
            return None
        text = json.dumps(self.inputs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def release_name(self) -> str | None:
        """Name of the folder under /opt/llama.cpp/releases."""
        if self.release is not None:
            return self.release.name
        return f"{self.source.label}-{self.build_id}" if self.build_id else None

    @property
    def cost(self) -> BuildCost:
        """What the build takes of the host."""
        return tables.build_cost(self.backend)


def label(version: str, commit: str, tags: tuple[str, ...] = ()) -> str:
    """What a release is called: the tag that was asked for or that names the commit."""
    named = version if version in tags else next(iter(sorted(tags)), commit[:9])
    return re.sub(r"[^A-Za-z0-9._-]", "_", named)


def build_number(tags: tuple[str, ...]) -> int | None:
    """N of a tag bN."""
    numbers = [int(tag[1:]) for tag in tags if re.fullmatch(r"b\d+", tag)]
    return max(numbers, default=None)


def jobs(settings: Settings, probe: Probe, backend: Backend = "cpu") -> int:
    """Compilers at a time: bounded by cores and memory."""
    if settings.llama_cpp_jobs is not None:
        return settings.llama_cpp_jobs
    by_memory = (probe.memory_bytes or 0) // tables.build_cost(backend).memory_per_job_bytes
    return max(1, min(probe.cores or 1, by_memory))


def toolkit_root(gpu: Stack | None) -> str | None:
    """Where the CUDA toolkit is, or where NVIDIA's packages will put it."""
    choice = gpu.toolkit.choice if gpu else None
    if choice is None:
        return None
    return choice.root or f"/usr/local/cuda-{choice.toolkit.version}"


def options(settings: Settings, probe: Probe, gpu: Stack | None = None) -> dict[str, str]:
    """CMake options: ours, then the user's over them; an empty value leaves an option out."""
    merged = {each.name: each.value for each in _ours(settings, probe, gpu)}
    merged |= {
        "CMAKE_INSTALL_RPATH": RPATH,
        "GGML_NATIVE": "ON" if settings.llama_cpp_native else "OFF",
        **(_cuda_options(settings, gpu) if gpu else {}),
        **settings.llama_cpp_cmake_args,
    }
    return {name: value for name, value in sorted(merged.items()) if value != ""}


def _ours(settings: Settings, probe: Probe, gpu: Stack | None) -> tuple[BuildOption, ...]:
    backend: Backend = "cuda" if gpu else "cpu"
    cuda = gpu.toolkit.choice.toolkit.version if gpu and gpu.toolkit.choice else None
    conditions = _conditions(settings, probe)
    return tuple(each for each in tables.build_options() if each.applies(backend, conditions, cuda))


def _conditions(settings: Settings, probe: Probe) -> frozenset[str]:
    holds = {
        "rpc": any(target in RPC_PROGRAMS for target in settings.llama_cpp_targets),
        "cublas": nvidia.force_cublas(nvidia.identify(probe.gpus)[0]),
    }
    return frozenset(name for name, so in holds.items() if so)


def _cuda_options(settings: Settings, gpu: Stack) -> dict[str, str]:
    """What follows from the host's cards, toolkit and compiler."""
    root, compiler = toolkit_root(gpu), gpu.compiler
    found = {"CMAKE_CUDA_ARCHITECTURES": ";".join(gpu.architectures)}
    if root is not None:
        # By its absolute path: the distribution's own nvcc comes first in PATH.
        found["CMAKE_CUDA_COMPILER"] = f"{root}/bin/nvcc"
        if root != "/usr":
            # Of several toolkits with the same soname the loader would take any.
            found["CMAKE_INSTALL_RPATH"] = f"{RPATH};{root}/lib64"
    if compiler is not None and not compiler.default:
        found["CMAKE_CUDA_HOST_COMPILER"] = f"/usr/bin/g++-{compiler.major}"
    pairs, wanted = tables.fa_quants(), cache_pair(settings)
    if wanted not in pairs.default and set(wanted.split("-")) <= set(pairs.types):
        found[pairs.option] = ";".join((*pairs.default, wanted))
    return found


def cache_pair(settings: Settings) -> str:
    """Types of the KV cache, as llama.cpp's build names a pair of them."""
    return f"{settings.server_cache_type_k or 'f16'}-{settings.server_cache_type_v or 'f16'}"


def targets(settings: Settings) -> tuple[str, ...]:
    """Programs to build: what is asked for, and what other settings need."""
    quantises = any(own.model_quantize is not None for own in instances(settings).values())
    made = ("llama-quantize",) if quantises else ()
    return tuple(dict.fromkeys((*settings.llama_cpp_targets, *made)))


def inputs(
    settings: Settings, probe: Probe, source: Source, gpu: Stack | None = None
) -> dict[str, Any]:
    """Everything that the binary depends on."""
    compiler = probe.compilers.get("g++")
    found: dict[str, Any] = {
        "commit": source.commit,
        "targets": sorted(targets(settings)),
        "options": options(settings, probe, gpu),
        "compiler": f"g++ {compiler}" if compiler else None,
        "glibc": str(probe.glibc),
        "cpu": probe.cpu_target if settings.llama_cpp_native else probe.arch,
        "os": f"{probe.os_id} {probe.os_version}",
    }
    if gpu is not None:
        found["toolkit"] = _toolkit_input(gpu)
        if gpu.compiler is not None and not gpu.compiler.default:
            there = probe.compilers.get(f"g++-{gpu.compiler.major}")
            found["cuda_host_compiler"] = f"g++ {there}" if there else None
    return found


def _toolkit_input(gpu: Stack) -> str | None:
    choice = gpu.toolkit.choice
    return f"nvcc {choice.nvcc}" if choice and choice.root and choice.nvcc else None


def matches(release: Release, wanted: Mapping[str, Any]) -> bool:
    """Whether a release was made from these inputs; one that is not known yet matches any."""
    return release.inputs.keys() == wanted.keys() and all(
        value is None or release.inputs[name] == value for name, value in wanted.items()
    )


def plan(settings: Settings, probe: Probe, source: Source, gpu: Stack | None = None) -> BuildPlan:
    """What to compile for this host; for its GPUs if there is something planned for them."""
    backend: Backend = "cuda" if gpu else "cpu"
    wanted = inputs(settings, probe, source, gpu)
    # The running release first: of two that fit, the one in use stays.
    releases = sorted(probe.releases, key=lambda release: release.name != probe.current)
    # Without its toolkit a release finds no libraries, whatever it was made with.
    usable = releases if gpu is None or wanted["toolkit"] is not None else []
    compiler = (gpu.compiler.package,) if gpu and gpu.compiler else ()
    needed = {each.name for each in _ours(settings, probe, gpu) if each.needed}
    return BuildPlan(
        source=source,
        targets=targets(settings),
        options=wanted["options"],
        backend=backend,
        toolkit_root=toolkit_root(gpu),
        architectures=gpu.architectures if gpu else (),
        jobs=jobs(settings, probe, backend),
        packages=tuple(dict.fromkeys((*PACKAGES, *compiler))),
        allowed_libraries=tables.allowed_libraries(backend),
        needed_options=frozenset(
            name
            for name in (*needed, *settings.llama_cpp_cmake_args)
            if name in wanted["options"] and not name.startswith("CMAKE_")
        ),
        inputs=wanted,
        release=next((release for release in usable if matches(release, wanted)), None),
    )


def replan(build: BuildPlan, settings: Settings, probe: Probe) -> BuildPlan:
    """The same build once compiler and toolkit are installed and their versions known."""
    fresh = plan(settings, probe, build.source, stack.plan(settings, probe))
    return replace(fresh, packages=build.packages)


def findings(build: BuildPlan, settings: Settings, probe: Probe) -> Iterator[Finding]:
    """What stands in the way of the build."""
    for gone in tables.gone_options():
        if settings.llama_cpp_cmake_args.get(gone.name, "") != "":
            yield warning(
                "option-gone",
                f"llama_cpp_cmake_args: today's llama.cpp has no {gone.name}",
                "the build stops where the source does not declare it",
                f"Use {gone.instead}.",
                gone.source,
            )
    if build.backend == "cuda":
        yield from _cache_pair_findings(settings)
    yield from _noexec_findings(build, probe)
    if build.release is not None:
        return
    memory = probe.memory_bytes
    if memory is not None and memory < build.cost.memory_per_job_bytes:
        compiler = "nvcc" if build.backend == "cuda" else "C++ compiler"
        least = build.cost.memory_per_job_bytes // GIB
        yield warning(
            "little-memory",
            f"{memory / GIB:.1f} GiB of memory",
            f"one {compiler} may need {least} GiB, the build can be killed for want of memory",
            "Add swap for the build, or build elsewhere.",
        )


def _noexec_findings(build: BuildPlan, probe: Probe) -> Iterator[Finding]:
    run_from = {at.PREFIX: "llama-server"}
    if build.release is None:
        run_from[at.CACHE] = "what the build tries out"
    for place, what in run_from.items():
        if place in probe.noexec:
            mount = probe.disk_mount.get(place, place)
            yield error(
                "mounted-noexec",
                f"{mount} is mounted noexec: no program runs from {place}",
                f"{what} could not be started",
                f"`mount -o remount,exec {mount}`, and the same in /etc/fstab; or mount another "
                f"disk at {place}.",
            )


def _cache_pair_findings(settings: Settings) -> Iterator[Finding]:
    known = tables.fa_quants()
    strange = [each for each in cache_pair(settings).split("-") if each not in known.types]
    if strange:
        yield warning(
            "cache-type",
            f"flash attention on CUDA does not know {' and '.join(dict.fromkeys(strange))} for "
            "the KV cache",
            "attention is computed without it, slower and with more memory",
            f"Set `server_cache_type_k` and `server_cache_type_v` to one of "
            f"{', '.join(known.types)}.",
            known.source,
        )


def needs(build: BuildPlan) -> Iterator[Need]:
    """Disk space that the build takes."""
    if build.release is None:
        count = len(build.architectures)
        yield Need(at.CACHE, build.cost.building(count), "source and object files")
        yield Need(at.PREFIX, build.cost.release(count), "the release")
