"""How llama-server is run: arguments, unit, sandbox."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tasks import probe as at
from tasks.probe import Probe, Release
from tasks.rules import nvidia, tables
from tasks.rules.findings import Finding, error, note
from tasks.rules.model import ModelPlan
from tasks.rules.nvidia import Stack
from tasks.settings import Settings

FILES = Path(__file__).parents[2] / "files"
WAIT_HEALTHY = f"{at.LIBRARY}/wait-healthy"
GPU_GATE = f"{at.LIBRARY}/gpu-gate"
GPU_READY = f"{at.LIBRARY}/gpu-ready"
GPU_UNIT = "llama-gpu.service"
GPU_UNIT_FILE = f"/etc/systemd/system/{GPU_UNIT}"
GPU_WAIT_SECONDS = 60
"""At boot the driver may come up later than the server."""
RESTART_PAUSE = f"{at.LIBRARY}/restart-pause"
CHAT_TEMPLATE = f"{at.CONFIG}/chat-template.jinja"
SYSTEMD_WITH_RESTART_STEPS = 254
UNIT_MARK = "# Written by llamastead"
"""How the first line of our unit begins."""


@dataclass(frozen=True)
class FilePlan:
    """A file of ours on the host, owned by root."""

    path: str
    content: str
    mode: int = 0o644

    @property
    def sha256(self) -> str:
        """Of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def is_there(self, probe: Probe) -> bool:
        """Whether the host has exactly this file."""
        there = probe.files.get(self.path)
        return there is not None and (there.sha256, there.mode, there.owner, there.group) == (
            self.sha256,
            self.mode,
            "root",
            "root",
        )


@dataclass(frozen=True)
class ServerPlan:
    """The service, as files and addresses."""

    unit: FilePlan
    helpers: tuple[FilePlan, ...]
    digest: str
    """Of everything that the process is started from but the binary itself."""
    arguments: tuple[str, ...]
    url: str
    """Where clients on the host find it."""
    needs_api_key: bool
    offloads: bool
    """Whether layers are to be on a GPU."""
    converged: bool
    """Whether the host runs exactly this already."""

    @property
    def files(self) -> tuple[FilePlan, ...]:
        """Unit and helpers."""
        return (self.unit, *self.helpers)


@dataclass(frozen=True)
class Gpus:
    """What the server is given of the host's GPUs."""

    wsl: bool
    count: int
    """As many it has to see before it starts."""

    @property
    def devices(self) -> tuple[str, ...]:
        """What the sandbox lets through."""
        return tables.devices(wsl=self.wsl)

    @property
    def environment(self) -> dict[str, str]:
        """What CUDA and the loader are told."""
        found = dict(tables.environment("cuda"))
        if self.wsl:
            # Windows's libcuda, whatever else is installed.
            found["LD_LIBRARY_PATH"] = tables.wsl().library_folder
        return found


def gpus(settings: Settings, probe: Probe, gpu: Stack | None) -> Gpus | None:
    """The GPUs that the server counts on; None where it serves from the CPU."""
    if gpu is None:
        return None
    visible = settings.server_environment.get("CUDA_VISIBLE_DEVICES")
    named = len(visible.split(",")) if visible else len(nvidia.identify(probe.gpus)[0])
    return Gpus(probe.wsl, settings.server_gpus or named)


OPTIONS = {
    "server_host": "--host",
    "server_port": "--port",
    "server_cors_origins": "--cors-origins",
    "server_ctx_size": "--ctx-size",
    "server_parallel": "--parallel",
    "server_batch_size": "--batch-size",
    "server_ubatch_size": "--ubatch-size",
    "server_n_predict": "--predict",
    "server_temperature": "--temp",
    "server_top_k": "--top-k",
    "server_top_p": "--top-p",
    "server_min_p": "--min-p",
    "server_repeat_last_n": "--repeat-last-n",
    "server_repeat_penalty": "--repeat-penalty",
    "server_presence_penalty": "--presence-penalty",
    "server_frequency_penalty": "--frequency-penalty",
    "server_seed": "--seed",
    # Before the template: without it llama.cpp takes only templates that it knows.
    "server_jinja": "--jinja",
    "server_chat_template": "--chat-template",
    "server_chat_template_file": "--chat-template-file",
    "server_chat_template_kwargs": "--chat-template-kwargs",
    "server_reasoning": "--reasoning",
    "server_reasoning_format": "--reasoning-format",
    "server_reasoning_effort": "--reasoning-effort",
    "server_reasoning_budget": "--reasoning-budget",
    "server_threads": "--threads",
    "server_threads_batch": "--threads-batch",
    "server_threads_http": "--threads-http",
    "server_gpu_layers": "--n-gpu-layers",
    "server_flash_attn": "--flash-attn",
    "server_load_mode": "--load-mode",
    "server_log_verbosity": "--verbosity",
    "server_cache_type_k": "--cache-type-k",
    "server_cache_type_v": "--cache-type-v",
    "server_metrics": "--metrics",
}
"""Settings that are an option of llama-server, in the order in which it is given them. The port is
always said: its default changed between versions."""


def _told(settings: Settings, on_gpu: bool) -> dict[str, object]:
    """Setting to what llama-server is told of it; True and False for one that takes no value."""
    told = {name: getattr(settings, name) for name in OPTIONS}
    told["server_ctx_size"] = settings.server_ctx_size * settings.server_parallel
    if settings.server_load_mode == "auto":
        del told["server_load_mode"]
    if not settings.server_metrics:
        del told["server_metrics"]
    if not on_gpu:
        del told["server_gpu_layers"]
    if settings.server_chat_template_file is not None:
        told["server_chat_template_file"] = CHAT_TEMPLATE
    kwargs = settings.server_chat_template_kwargs
    told["server_chat_template_kwargs"] = json.dumps(kwargs) if kwargs else None
    return {name: value for name, value in told.items() if value is not None}


def _words(option: str, value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (option if value else option.replace("--", "--no-", 1),)
    return (option, str(value))


def arguments(settings: Settings, model: ModelPlan, on_gpu: bool = False) -> tuple[str, ...]:
    """llama-server's arguments."""
    projector = ("--mmproj", model.projector.path) if model.projector else ()
    alias = settings.server_alias or model.name.removesuffix(".gguf")
    own = [
        word
        for name, value in _told(settings, on_gpu).items()
        for word in _words(OPTIONS[name], value)
    ]
    if settings.api_key_required:
        own += ["--api-key-file", "${CREDENTIALS_DIRECTORY}/api-key"]
    return (
        *("--model", model.path, *projector, "--alias", alias),
        *own,
        *settings.server_extra_args,
    )


def quote(argument: str, expand: bool = False) -> str:
    """One word of an ExecStart line, as systemd.service(5) reads it.

    With expand, `${NAME}` is left to systemd.
    """
    text = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if not expand:
        text = text.replace("$", "$$")
    return text if re.fullmatch(r"[\w./:=,+@${}%-]+", text) else f'"{text}"'


def quote_path(path: str) -> str:
    """A path in BindReadOnlyPaths, where a colon outside quotes separates source and target."""
    word = quote(path, expand=True)
    return f'"{word}"' if ":" in word and not word.startswith('"') else word


def base_url(settings: Settings) -> str:
    """Where clients on the host itself find the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(  # noqa: S104  # where the user binds
        settings.server_host, settings.server_host
    )
    return f"http://[{host}]" if ":" in host else f"http://{host}"


@cache
def _file(name: str) -> str:
    return (FILES / name).read_text()


def _render(name: str, values: Mapping[str, object]) -> str:
    environment = Environment(  # noqa: S701  # a unit file, not a page
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(_file(name)).render(values)


def _gpu_files(seen: Gpus) -> Iterator[FilePlan]:
    """What makes the driver ready, and what keeps the server from starting without it."""
    yield FilePlan(GPU_GATE, _file("gpu-gate.sh"), 0o755)
    if not seen.wsl:
        yield FilePlan(GPU_READY, _file("gpu-ready.sh"), 0o755)
        values = {"gpu_ready": GPU_READY, "count": seen.count, "seconds": GPU_WAIT_SECONDS}
        yield FilePlan(GPU_UNIT_FILE, _render("llama-gpu.service.j2", values))


def plan(
    settings: Settings,
    probe: Probe,
    model: ModelPlan,
    release: str | None,
    gpu: Stack | None = None,
    chat_template: str | None = None,
) -> ServerPlan:
    """The service for this host.

    release is the name of the one that it is to run, chat_template what server_chat_template_file
    holds.
    """
    url = f"{base_url(settings)}:{settings.server_port}"
    grows_by_itself = (probe.systemd_version or 0) >= SYSTEMD_WITH_RESTART_STEPS
    helpers = [FilePlan(WAIT_HEALTHY, _file("wait-healthy.sh"), 0o755)]
    if not grows_by_itself:
        helpers.append(FilePlan(RESTART_PAUSE, _file("restart-pause.sh"), 0o755))
    if chat_template is not None:
        helpers.append(FilePlan(CHAT_TEMPLATE, chat_template))
    seen = gpus(settings, probe, gpu)
    if seen is not None:
        helpers += _gpu_files(seen)
    words = arguments(settings, model, on_gpu=seen is not None)
    environment = {**(seen.environment if seen else {}), **settings.server_environment}
    values: dict[str, object] = {
        "user": at.SERVER_USER,
        "restart_pause": None if grows_by_itself else RESTART_PAUSE,
        "command": " ".join(
            [f"{at.CURRENT}/bin/llama-server"]
            + [quote(word, expand=word.startswith("${CREDENTIALS_")) for word in words]
        ),
        "wait_healthy": WAIT_HEALTHY,
        "health_url": f"{url}/health",
        "start_timeout": settings.server_start_timeout_seconds,
        "stop_timeout": settings.server_stop_timeout_seconds,
        "api_key": at.API_KEY if settings.api_key_required else None,
        "read_only_paths": [quote_path(file.path) for file in model.files] if model.on_host else [],
        "devices": seen.devices if seen else (),
        "gpu_gate": f"{GPU_GATE} {at.CURRENT}/bin/llama-server {seen.count}" if seen else None,
        "gpu_unit": GPU_UNIT if seen and not seen.wsl else None,
        "loopback": settings.is_loopback,
    }
    # The digest stands in the process's environment, so that what runs can be told from what
    # should run even after a deploy was killed between writing the unit and restarting it.
    told = tuple(
        quote(f"{name}={value}", expand=True) for name, value in sorted(environment.items())
    )
    bare = _render("llama-server.service.j2", {**values, "environment": told})
    hashes = [file.sha256 or "" for file in model.files]
    texts = [bare, *hashes, *(helper.content for helper in helpers)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    unit = _render(
        "llama-server.service.j2",
        {**values, "environment": (*told, f"LLAMASTEAD_DIGEST={digest}")},
    )
    files = (FilePlan(at.SERVER_UNIT_FILE, unit), *helpers)
    return ServerPlan(
        unit=files[0],
        helpers=files[1:],
        digest=digest,
        arguments=words,
        url=url,
        needs_api_key=settings.api_key_required,
        offloads=seen is not None and settings.server_gpu_layers != 0,
        converged=all(file.is_there(probe) for file in files)
        and is_running(probe, digest, release)
        and at.SERVER_USER in probe.users
        and (not settings.api_key_required or _api_key_is_safe(probe)),
    )


def is_running(probe: Probe, digest: str, release: str | None) -> bool:
    """Whether the service is up, enabled, and started from exactly this unit and release."""
    service = probe.server
    return (
        service is not None
        and release is not None
        and service.active == "active"
        and service.enabled == "enabled"
        and not service.need_daemon_reload
        and service.digest == digest
        and service.executable == f"{at.RELEASES}/{release}/bin/llama-server"
    )


def _api_key_is_safe(probe: Probe) -> bool:
    there = probe.files.get(at.API_KEY)
    return there is not None and there.mode & 0o077 == 0 and there.owner == "root"


def watched_files() -> tuple[str, ...]:
    """Files of ours that the probe has to look at."""
    return (
        *(at.SERVER_UNIT_FILE, WAIT_HEALTHY, RESTART_PAUSE, at.API_KEY),
        *(GPU_GATE, GPU_READY, GPU_UNIT_FILE, CHAT_TEMPLATE),
    )


def _of_others(probe: Probe) -> Iterator[Finding]:
    """What the user has put where our unit goes, or beside it."""
    if probe.unit_mark is not None and not probe.unit_mark.startswith(UNIT_MARK):
        yield error(
            "unit-not-ours",
            f"{at.SERVER_UNIT_FILE} is not from this software",
            "it would be overwritten",
            f"`systemctl disable --now {at.SERVER_UNIT}`, then `mv {at.SERVER_UNIT_FILE} "
            "/root/`; what you need of it belongs into a drop-in.",
            "ollama/ollama#13178",
        )
    if probe.server is not None and probe.server.enabled.startswith("masked"):
        yield error(
            "unit-masked",
            f"{at.SERVER_UNIT} is masked",
            "systemd would not start it",
            f"`systemctl unmask {at.SERVER_UNIT}`, unless there is a reason for it.",
        )
    if probe.drop_ins:
        yield note(
            "drop-ins",
            f"drop-ins of yours change the unit: {', '.join(probe.drop_ins)}",
            "they stay as they are, and what they change is not checked",
        )


def findings(settings: Settings, probe: Probe, release: Release | None) -> Iterator[Finding]:
    """What stands in the way of serving."""
    listener = probe.listener
    if listener is not None and not listener.is_ours:
        holder = f"{listener.command or 'another program'}" + (
            f" (process {listener.pid})" if listener.pid else ""
        )
        yield error(
            "port-taken",
            f"server_port: {settings.server_port} is already taken by {holder}",
            "llama-server could not listen there",
            "Stop that program or choose another server_port.",
        )
    if settings.server_port < (probe.unprivileged_port or 0):
        yield error(
            "port-privileged",
            f"server_port: {settings.server_port} is for root alone on this host",
            "llama-server runs without any rights and could not listen there",
            f"Choose a port from {probe.unprivileged_port} on; a reverse proxy can listen on "
            f"{settings.server_port} in front of it.",
        )
    yield from _of_others(probe)
    if release is not None:
        yield from unknown_to(release, settings)


def unknown_to(release: Release, settings: Settings) -> Iterator[Finding]:
    """What the settings ask of a release that its `llama-server --help` does not know."""
    help_of_it = f"`{at.RELEASES}/{release.name}/bin/llama-server --help`"
    asked = [
        (name, _words(OPTIONS[name], value)[0]) for name, value in _told(settings, True).items()
    ]
    asked += [
        ("server_extra_args", word.split("=", 1)[0])
        for word in settings.server_extra_args
        if word.startswith("--")
    ]
    for name, option in asked if release.server_options else ():
        if option not in release.server_options:
            yield error(
                "unknown-server-option",
                f"{name}: llama-server of release {release.name} knows no {option}",
                "it would not start",
                f"Take it out, or set llama_cpp_version to one that has it; {help_of_it} lists "
                "what this one has.",
            )
    template = settings.server_chat_template
    if template is not None and release.chat_templates and template not in release.chat_templates:
        near = difflib.get_close_matches(template, release.chat_templates, n=3)
        yield error(
            "unknown-chat-template",
            f"server_chat_template: release {release.name} has no template {template}"
            + (f"; did you mean {' or '.join(near)}?" if near else ""),
            "its name alone would be taken for a template, and every prompt would consist of it",
            f"{help_of_it} lists those it has; server_chat_template_file takes one of your own.",
        )
