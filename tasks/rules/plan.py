"""The plan: every decision about one host, with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from tasks import probe as at
from tasks.probe import Probe, Release
from tasks.rules import (
    build,
    fit,
    host,
    making,
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
from tasks.rules.fit import Fit, Verdict
from tasks.rules.model import Found, ModelPlan
from tasks.rules.model_record import Removal
from tasks.rules.nvidia import Stack, installation
from tasks.rules.nvidia.installation import Installation
from tasks.rules.server import ServerPlan
from tasks.settings import DRAFT_PART, LORA_PART, MAIN_PART, Settings
from tasks.settings import instances as instances_of
from tasks.settings import parts as parts_of


@dataclass(frozen=True)
class Instance:
    """One model that is to be served, and what was decided about it."""

    name: str
    """Empty for the main one."""
    settings: Settings
    model: ModelPlan | None
    """None where there is none, or where it could not be looked up."""
    fit: Fit | None
    """Whether the model fits; None where it serves already, or too little is known."""
    draft_fit: Fit | None
    """The same of what drafts for it."""
    server: ServerPlan | None
    """None where there is no model to serve."""


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
    instances: tuple[Instance, ...]
    """The main one first."""
    leftovers: tuple[str, ...]
    """Units of servers that are no longer asked for."""
    removal: Removal
    """Models that may go once everything serves."""

    @property
    def main(self) -> Instance:
        """What the host's own settings describe."""
        return self.instances[0]

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        """Everything that has to be on the host."""
        return _models(self.instances)

    @property
    def servers(self) -> tuple[ServerPlan, ...]:
        """The services, the main one first."""
        found = (each.server for each in self.instances if each.server)
        return tuple(dict.fromkeys(found))

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
        """Whether a model has to be fetched."""
        return any(file.url for file in model.missing(self.models))

    @property
    def serves(self) -> bool:
        """Whether everything serves as it should already."""
        served = all(each.converged for each in self.servers)
        return self.is_current and served and not self.leftovers

    @property
    def is_current(self) -> bool:
        """Whether `current` points at the wanted release."""
        release = self.build.release if self.build else None
        return release is not None and release.name == self.probe.current


def make_plan(
    settings: Settings,
    probe: Probe,
    source: Source | None,
    faults: tuple[Finding, ...] = (),
    found: Mapping[str, Found] | None = None,
) -> Plan:
    """Decide everything about a host.

    faults are findings from elsewhere, such as a version that could not be resolved; found is what
    was looked up of the models, by the names of the instances that serve them.
    """
    gpu = stack.plan(settings, probe)
    build_plan = build.plan(settings, probe, source, gpu) if source else None
    release = build_plan.release if build_plan else None
    put = installation.plan_installation(settings, probe, gpu)
    findings = [*host.findings(probe), *faults, *stack.findings(settings, probe, gpu)]
    findings += installation.findings(settings, probe, put)
    if build_plan is not None:
        findings += build.findings(build_plan, settings, probe)
    instances = _instances(settings, probe, release.name if release else None, gpu, found or {})
    models = _models(instances)
    names = [""] if settings.server_router else [each.name for each in instances]
    gone = server.leftovers(probe, [server.unit_of(name) for name in names])
    for each in instances:
        findings += _of_instance(each, probe, release, gpu, found or {}, gone)
    if settings.server_router:
        findings += server.router_findings(_routed(instances, found or {}), release)
    needs = [*stack.needs(settings, gpu), *model.needs(models, probe)]
    needs += build.needs(build_plan) if build_plan else []
    findings += space.findings(needs, probe)
    order = [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    findings.sort(key=lambda found: order.index(found.severity))
    to_build = build_plan.packages if build_plan else build.PACKAGES
    work = [each.making for each in models if each.making and each.to_make]
    wanted = [*(to_build if release is None else RUNTIME_PACKAGES)]
    wanted += [name for each in work for name in making.packages(each)]
    return Plan(
        settings=settings,
        probe=probe,
        findings=tuple(findings),
        missing_packages=tuple(
            name for name in dict.fromkeys(wanted) if name not in probe.packages
        ),
        stack=gpu,
        installation=put,
        build=build_plan,
        instances=instances,
        leftovers=gone,
        removal=model_record.removal(
            {each.record_path: each.record for each in models if each.record},
            probe,
            settings.model_keep,
            [word for each in instances for word in each.settings.server_extra_args],
            [name for each in work for name in each.partials],
        ),
    )


def _models(instances: Iterable[Instance]) -> tuple[ModelPlan, ...]:
    return tuple(each for one in instances if one.model for each in one.model.everything)


def found_key(instance: str, part: str) -> str:
    """Under which name it is found what was looked up of a part of an instance."""
    return f"{instance}/{part}" if part else instance


def _model(
    name: str, settings: Settings, probe: Probe, found: Mapping[str, Found]
) -> ModelPlan | None:
    """The model of an instance, with what is loaded beside it."""

    def planned(part: str, own: Settings) -> ModelPlan | None:
        return model.plan(own, probe, found.get(found_key(name, part), Found()))

    made = {part: planned(part, own) for part, own in parts_of(settings).items()}
    main, draft = made[MAIN_PART], made.get(DRAFT_PART)
    if main is None:
        return None
    loras = (made[f"{LORA_PART}.{number}"] for number in range(len(settings.model_lora)))
    scaled = zip(loras, settings.model_lora, strict=True)
    adapters = tuple((each, lora.scale) for each, lora in scaled if each)
    return replace(main, draft=draft, adapters=adapters)


def _instances(
    settings: Settings,
    probe: Probe,
    release: str | None,
    gpu: Stack | None,
    found: Mapping[str, Found],
) -> tuple[Instance, ...]:
    """Each model with its server, and whether they fit beside each other."""
    made = []
    wanted = instances_of(settings)
    counted = [server.gpus(own, probe, gpu) for own in wanted.values()]
    awaited = max((seen.awaited for seen in counted if seen), default=0)
    for name, own in wanted.items():
        looked = found.get(name, Found())
        model_plan = _model(name, own, probe, found)
        server_plan = None
        if model_plan is not None and not settings.server_router:
            among = server.Among(name, awaited)
            server_plan = server.plan(
                own, probe, model_plan, release, gpu, looked.chat_template, among
            )
        made.append(Instance(name, own, model_plan, None, None, server_plan))
    if settings.server_router and all(each.model for each in made):
        one = server.router(settings, probe, _routed(made, found), release, gpu)
        made = [replace(each, server=one) for each in made]
    return _fitted(made, probe, found)


def _routed(instances: Iterable[Instance], found: Mapping[str, Found]) -> tuple[server.Routed, ...]:
    return tuple(
        server.Routed(
            each.name, each.settings, each.model, found.get(each.name, Found()).chat_template
        )
        for each in instances
        if each.model
    )


def _fitted(made: list[Instance], probe: Probe, found: Mapping[str, Found]) -> tuple[Instance, ...]:
    """With what the models need of the host's memory, one beside the other.

    What serves already has shown that it fits; the others have to find room beside it.
    """
    there: list[memory.Neighbour] = []
    judged: dict[str, tuple[Fit | None, Fit | None]] = {}
    for each in sorted(made, key=lambda each: not (each.server and each.server.converged)):
        if each.server is None or each.model is None:
            continue
        main, draft = _fits_of(each, each.model, probe, found, there)
        if not each.server.converged:
            judged[each.name] = (main, draft)
        if main is not None and main.verdict is Verdict.FITS:
            there.append((each.settings, main))
            there += [(each.settings, draft.inner)] if draft else []
    none = (None, None)
    return tuple(
        replace(each, fit=judged.get(each.name, none)[0], draft_fit=judged.get(each.name, none)[1])
        for each in made
    )


def _fits_of(
    instance: Instance,
    wanted: ModelPlan,
    probe: Probe,
    found: Mapping[str, Found],
    there: list[memory.Neighbour],
) -> tuple[Fit | None, Fit | None]:
    """How a model stands, and what drafts for it, which is part of the same process."""
    own = instance.settings
    size = sum(adapter.size or 0 for adapter, _ in wanted.adapters)
    shape = model.shape_of(wanted, found.get(instance.name, Found()))
    main = memory.judge(own, probe, shape and shape.with_adapters(size), there)
    draft = parts_of(own).get(DRAFT_PART)
    if main is None or draft is None:
        return main, None
    looked = found.get(found_key(instance.name, DRAFT_PART), Found())
    return main, memory.judge(draft, probe, looked.shape, [*there, (own, main.inner)])


def _of_instance(
    instance: Instance,
    probe: Probe,
    release: Release | None,
    gpu: Stack | None,
    found: Mapping[str, Found],
    gone: tuple[str, ...],
) -> Iterator[Finding]:
    """What there is to say about a model and its server."""
    own, name = instance.settings, instance.name
    said: list[Finding] = []
    for part, each in parts_of(own).items():
        looked = found.get(found_key(name, part), Found())
        planned = model.plan(each, probe, looked)
        about = [*model.findings(each, planned, probe, looked.reach)]
        judged = {MAIN_PART: instance.fit, DRAFT_PART: instance.draft_fit}.get(part)
        if judged is not None and planned is not None:
            about += fit.findings(judged, planned.name, looked.alternatives)
        said += (problem.about(part) for problem in about)
    if not (name and own.server_router):
        said += server.findings(own, probe, gpu, name, gone)
    if release is not None:
        said += server.unknown_to(release, own)
    yield from (each.within(name) for each in said)


RUNTIME_PACKAGES = ("ca-certificates", "curl", "libgomp1")
"""What a host needs once llama.cpp is compiled: libgomp1 goes with the compilers otherwise."""


def watched_packages() -> tuple[str, ...]:
    """Packages that the probe has to look at, as patterns that dpkg knows."""
    ours = {*build.PACKAGES, *RUNTIME_PACKAGES, *making.watched_packages()}
    return tuple(sorted({*ours, *nvidia.watched_packages()}))


def rows(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (what, decision), for people."""
    probe = plan.probe
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
    for instance in plan.instances:
        table += _instance_rows(instance)
    if plan.leftovers:
        table.append(("servers", f"remove {', '.join(plan.leftovers)}"))
    if plan.removal:
        table.append(("clean up", model_record.sentence(plan.removal)))
    return table


def _instance_rows(instance: Instance) -> list[tuple[str, str]]:
    settings = instance.settings
    table: list[tuple[str, str]] = []
    unit = (instance.server.name if instance.server else "").removesuffix(".service")
    if instance.model is not None:
        table += [("model", model.sentence(each)) for each in instance.model.everything]
    judged = (instance.fit, instance.draft_fit)
    table += [("memory", fit.sentence(each)) for each in judged if each]
    if instance.server is not None and not (instance.name and settings.server_router):
        doing = "runs" if instance.server.converged else "start"
        key = ", API key" if instance.server.needs_api_key else ""
        where = f"{settings.server_host}:{settings.server_port}"
        called = [served.model for served in instance.server.serves if served.model]
        names = f", routing to {', '.join(called)}" if called else ""
        slots = f"{settings.server_parallel} x {settings.server_ctx_size} tokens"
        table.append(("server", f"{doing} {unit} at {where}, {slots}{key}{names}"))
    return table


def _stack_rows(gpu: Stack, probe: Probe) -> list[tuple[str, str]]:
    driver, toolkit = gpu.driver, gpu.toolkit
    table = [("GPU", ", ".join(str(card) for card in nvidia.identify(probe.gpus)[0]))]
    remark = ""
    if driver.choice is not None and not driver.choice.installed:
        remark = f" ({driver.choice.modules} kernel modules)"
    elif driver.choice is not None and driver.choice.source == "present":
        remark = "" if probe.driver_loaded else " (not loaded, which may take a reboot)"
    table.append(("driver", driver.reason + remark))
    remark = f" (compiles for {', '.join(gpu.architectures)})" if toolkit.choice else ""
    table.append(("CUDA", toolkit.reason + remark))
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
    build_plan = plan.build
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
        "remove_units": list(plan.leftovers),
        "instances": [_instance_json(each, plan) for each in plan.instances],
    }


def _instance_json(instance: Instance, plan: Plan) -> dict[str, object]:
    wanted, judged, service = instance.model, instance.fit, instance.server
    return {
        "name": instance.name,
        "model": wanted
        and {
            "path": wanted.path,
            "url": wanted.url,
            "sha256": wanted.sha256,
            "commit": wanted.hub.commit if wanted.hub else None,
            "files": [
                {"path": file.path, "sha256": file.sha256, "bytes": file.size}
                for each in wanted.everything
                for file in each.files
            ],
            "bytes": wanted.size,
            "fetch": any(file.url for file in model.missing(wanted.everything)),
            "quantise": wanted.making
            and {
                "to": wanted.making.quantisation.name,
                "convert": wanted.making.converts,
                "work": wanted.to_make,
            },
        },
        "memory": judged
        and {
            "verdict": judged.verdict.value,
            "places": [
                {"name": share.place.name, "bytes": share.place.size, "needed": share.memory.total}
                for share in judged.shares
            ],
            "changes": [dict(change.settings) for change in judged.changes],
        },
        "server": service
        and {
            "unit": service.name,
            "url": service.url,
            "arguments": list(service.arguments),
            "api_key": at.API_KEY if service.needs_api_key else None,
            "converged": service.converged and plan.is_current,
        },
    }
