"""The plan: every decision about one host, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from tasks import probe as at
from tasks.probe import Probe
from tasks.rules import (
    build,
    fit,
    host,
    memory,
    model,
    model_record,
    nvidia,
    server,
    space,
    stack,
)
from tasks.rules.build import BuildPlan, Source
from tasks.rules.findings import Finding, Severity
from tasks.rules.fit import Fit
from tasks.rules.model import Found, ModelPlan, Reach
from tasks.rules.nvidia import Stack, installation
from tasks.rules.nvidia.installation import Installation
from tasks.rules.server import ServerPlan
from tasks.settings import Settings


@dataclass(frozen=True)
class Plan:
    """What will be done to one host, and what there is to say about it."""

    settings: Settings
    probe: Probe
    findings: tuple[Finding, ...]
    missing_packages: tuple[str, ...]
    stack: Stack | None
    """Driver, toolkit, compiler and architectures; None where no NVIDIA card is used."""
    installation: Installation
    """What is put on the host of NVIDIA's, and how."""
    build: BuildPlan | None
    """None where the version could not be resolved."""
    model: ModelPlan | None
    fit: Fit | None
    """Whether the model fits; None where it serves already, or too little is known."""
    server: ServerPlan | None
    """None where there is no model to serve."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings with which nothing is changed."""
        return tuple(found for found in self.findings if found.severity is Severity.ERROR)

    @property
    def needs_build(self) -> bool:
        """Whether llama.cpp has to be compiled."""
        return self.build is not None and self.build.release is None

    @property
    def needs_download(self) -> bool:
        """Whether the model has to be fetched."""
        return self.model is not None and any(file.url for file in self.model.missing)

    @property
    def is_current(self) -> bool:
        """Whether `current` points at the wanted release."""
        release = self.build.release if self.build else None
        return release is not None and release.name == self.probe.current


def make_plan(
    settings: Settings,
    probe: Probe,
    source: Source | None,
    reach: Reach | None = None,
    faults: tuple[Finding, ...] = (),
    found: Found | None = None,
) -> Plan:
    """Decide everything about a host.

    faults are findings from elsewhere, such as a version that could not be resolved; found is what
    was looked up of the model.
    """
    gpu = stack.plan(settings, probe)
    build_plan = build.plan(settings, probe, source, gpu) if source else None
    model_plan = model.plan(settings, probe, found)
    if model_plan is not None:
        model_plan = model_plan.with_reach(reach)
    release = build_plan.release if build_plan else None
    server_plan = (
        server.plan(
            settings,
            probe,
            model_plan,
            release.name if release else None,
            gpu,
            found.chat_template if found else None,
        )
        if model_plan
        else None
    )
    put = installation.plan_installation(settings, probe, gpu)
    findings = [*host.findings(probe), *faults, *stack.findings(settings, probe, gpu)]
    findings += installation.findings(settings, probe, put)
    if build_plan is not None:
        findings += build.findings(build_plan, settings, probe)
    findings += model.findings(settings, model_plan, probe, reach)
    judged = None
    if model_plan is not None and found is not None and not (server_plan and server_plan.converged):
        # What serves already has shown that it fits.
        judged = memory.judge(settings, probe, found.shape)
        if judged is not None:
            findings += fit.findings(judged, model_plan.name, found.alternatives)
    needs = [*stack.needs(settings, gpu), *model.needs(model_plan, probe)]
    needs += build.needs(build_plan) if build_plan else []
    findings += space.findings(needs, probe)
    findings += server.findings(settings, probe, release)
    order = [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    findings.sort(key=lambda found: order.index(found.severity))
    to_build = build_plan.packages if build_plan else build.PACKAGES
    wanted = to_build if release is None else RUNTIME_PACKAGES
    return Plan(
        settings=settings,
        probe=probe,
        findings=tuple(findings),
        missing_packages=tuple(name for name in wanted if name not in probe.packages),
        stack=gpu,
        installation=put,
        build=build_plan,
        model=model_plan,
        fit=judged,
        server=server_plan,
    )


RUNTIME_PACKAGES = ("ca-certificates", "curl")
"""What a host needs once llama.cpp is compiled."""


def watched_packages() -> tuple[str, ...]:
    """Packages that the probe has to look at, as patterns that dpkg knows."""
    return tuple(sorted({*build.PACKAGES, *RUNTIME_PACKAGES, *nvidia.watched_packages()}))


def rows(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (what, decision), for people."""
    probe, settings = plan.probe, plan.settings
    gib = 1024**3
    memory = f"{probe.memory_bytes / gib:.0f} GiB" if probe.memory_bytes else "unknown memory"
    table = [
        (
            "host",
            ", ".join(
                [
                    probe.os_name or "unknown system",
                    probe.arch or "unknown processor",
                    f"{probe.cores or '?'} cores",
                    memory,
                ]
            ),
        )
    ]
    if plan.missing_packages:
        table.append(("packages", "install " + " ".join(plan.missing_packages)))
    if plan.stack is not None:
        table += _stack_rows(plan.stack, plan.probe)
    if plan.installation.names:
        table.append(("NVIDIA", "install " + " ".join(plan.installation.names)))
    if plan.build is not None:
        source = plan.build.source
        what = f"{source.label} (commit {source.commit[:12]})"
        if plan.build.release is None:
            target = "CUDA" if plan.build.backend == "cuda" else "the CPU"
            text = f"compile {what} for {target}, {plan.build.jobs} jobs"
        elif plan.is_current:
            text = f"{what} is there: {plan.build.release.name}"
        else:
            text = f"switch to {plan.build.release.name}"
        table.append(("llama.cpp", text))
    if plan.model is not None:
        table.append(("model", model.sentence(plan.model)))
        if plan.fit is not None:
            table.append(("memory", fit.sentence(plan.fit)))
        if plan.model.removal:
            table.append(("clean up", model_record.sentence(plan.model.removal)))
    if plan.server is not None:
        doing = "runs" if plan.server.converged else "start"
        key = ", API key" if plan.server.needs_api_key else ""
        where = f"{settings.server_host}:{settings.server_port}"
        slots = f"{settings.server_parallel} x {settings.server_ctx_size} tokens"
        table.append(("server", f"{doing} llama-server at {where}, {slots}{key}"))
    return table


def _stack_rows(gpu: Stack, probe: Probe) -> list[tuple[str, str]]:
    driver, toolkit = gpu.driver, gpu.toolkit
    table = [("GPU", ", ".join(str(card) for card in nvidia.identify(probe.gpus)[0]))]
    modules = driver.choice.modules if driver.choice and not driver.choice.installed else None
    table.append(("driver", driver.reason + (f" ({modules} kernel modules)" if modules else "")))
    for_cards = ", ".join(gpu.architectures)
    table.append(("CUDA", f"{toolkit.reason} (compiles for {for_cards})"))
    if gpu.compiler is not None and not gpu.compiler.default:
        table.append(("compiler", f"{gpu.compiler.package}, since nvcc takes no newer one"))
    return table


def _stack_json(gpu: Stack) -> dict[str, object]:
    driver, toolkit = gpu.driver, gpu.toolkit
    choice, kit = driver.choice, toolkit.choice
    return {
        "driver": choice
        and {
            "branch": choice.branch,
            "version": str(choice.version),
            "modules": choice.modules,
            "source": choice.source,
            "prebuilt": choice.prebuilt,
            "install": not choice.installed,
        },
        "driver_reason": driver.reason,
        "toolkit": kit
        and {
            "version": str(kit.nvcc or (kit.release.version if kit.release else None)),
            "cuda": str(kit.toolkit.version),
            "root": kit.root,
            "install": kit.root is None,
        },
        "toolkit_reason": toolkit.reason,
        "host_compiler": gpu.compiler and gpu.compiler.package,
        "architectures": list(gpu.architectures),
    }


def as_json(plan: Plan) -> dict[str, object]:
    """The plan for a program: plain values only."""
    build_plan, model_plan, server_plan = plan.build, plan.model, plan.server
    return {
        "findings": [
            {
                "severity": found.severity.value,
                "code": found.code,
                "cause": found.cause,
                "consequence": found.consequence,
                "fix": found.fix,
                "source": found.source,
            }
            for found in plan.findings
        ],
        "install_packages": list(plan.missing_packages),
        "nvidia": plan.stack and _stack_json(plan.stack),
        "nvidia_packages": list(plan.installation.names),
        "llama_cpp": build_plan
        and {
            "commit": build_plan.source.commit,
            "version": build_plan.source.label,
            "release": build_plan.release_name,
            "compile": plan.needs_build,
            "backend": build_plan.backend,
            "jobs": build_plan.jobs,
            "options": dict(build_plan.options),
            "targets": list(build_plan.targets),
        },
        "model": model_plan
        and {
            "path": model_plan.path,
            "url": model_plan.url,
            "sha256": model_plan.sha256,
            "commit": model_plan.hub.commit if model_plan.hub else None,
            "files": [
                {"path": file.path, "sha256": file.sha256, "bytes": file.size}
                for file in model_plan.files
            ],
            "bytes": model_plan.size,
            "fetch": plan.needs_download,
        },
        "memory": plan.fit
        and {
            "verdict": plan.fit.verdict.value,
            "places": [
                {"name": share.place.name, "bytes": share.place.size, "needed": share.memory.total}
                for share in plan.fit.shares
            ],
            "changes": [dict(change.settings) for change in plan.fit.changes],
        },
        "server": server_plan
        and {
            "url": server_plan.url,
            "arguments": list(server_plan.arguments),
            "api_key": at.API_KEY if server_plan.needs_api_key else None,
            "converged": server_plan.converged and plan.is_current,
        },
    }
