"""How llama-server is run: arguments, unit, sandbox."""

from __future__ import annotations

import difflib
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tasks import probe as at
from tasks.probe import Probe, Release, Service
from tasks.rules import nvidia, tables
from tasks.rules.findings import Finding, error, note
from tasks.rules.model import ModelPlan
from tasks.rules.nvidia import Stack
from tasks.settings import Settings

FILES = Path(__file__).parents[2] / "files"
PRESET = f"{at.CONFIG}/models.ini"
"""The preset file of a router."""
WAIT_HEALTHY = f"{at.LIBRARY}/wait-healthy"
GPU_GATE = f"{at.LIBRARY}/gpu-gate"
GPU_READY = f"{at.LIBRARY}/gpu-ready"
GPU_UNIT = "llama-gpu.service"
GPU_UNIT_FILE = f"/etc/systemd/system/{GPU_UNIT}"
GPU_WAIT_SECONDS = 60
"""At boot the driver may come up later than the server."""
RESTART_PAUSE = f"{at.LIBRARY}/restart-pause"
SYSTEMD_WITH_RESTART_STEPS = 254


def unit_of(name: str) -> str:
    """The unit of an instance; the main one has no name."""
    return f"llama-server@{name}.service" if name else at.SERVER_UNIT


def chat_template_of(name: str) -> str:
    """Where the chat template of an instance lies, if it has one of its own."""
    return f"{at.CONFIG}/chat-template{'@' if name else ''}{name}.jinja"


def files_of(unit: str) -> tuple[str, ...]:
    """Every file that may be there for a unit alone."""
    name = unit.removesuffix(".service").partition("@")[2]
    return (f"{at.UNITS}/{unit}", chat_template_of(name), *([] if name else [PRESET]))


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
class Served:
    """A model that a server answers for."""

    model: str | None
    """What a request has to call it; None where there is one only."""
    purpose: str
    offloads: bool
    """Whether layers are to be on a GPU."""


@dataclass(frozen=True)
class ServerPlan:
    """A llama-server as a service: files and addresses."""

    unit: FilePlan
    own: tuple[FilePlan, ...]
    """Files beside the unit that no other server has."""
    helpers: tuple[FilePlan, ...]
    digest: str
    """Of everything that the process is started from but the binary itself."""
    arguments: tuple[str, ...]
    url: str
    """Where clients on the host find it."""
    needs_api_key: bool
    serves: tuple[Served, ...]
    converged: bool
    """Whether the host runs exactly this already."""

    @property
    def name(self) -> str:
        """Of the unit."""
        return posixpath.basename(self.unit.path)

    @property
    def files(self) -> tuple[FilePlan, ...]:
        """All of them."""
        return (self.unit, *self.own, *self.helpers)


@dataclass(frozen=True)
class Among:
    """Which of the host's llama-servers one is."""

    name: str = ""
    """Empty for the main one."""
    awaited: int = 0
    """GPUs that all of them together count on."""


@dataclass(frozen=True)
class Gpus:
    """What the server is given of the host's GPUs."""

    wsl: bool
    count: int
    """As many it has to see before it starts."""
    numbers: tuple[int, ...] | None = None
    """Those that it may use, in the order of the bus; None for all."""

    @property
    def awaited(self) -> int:
        """As many the host has to have before it starts."""
        return max(self.count, *(number + 1 for number in self.numbers or (0,)))

    @property
    def devices(self) -> tuple[str, ...]:
        """What the sandbox lets through."""
        return tables.devices(wsl=self.wsl)

    def environment(self, cache: str) -> dict[str, str]:
        """What CUDA and the loader are told; cache is a folder for what is compiled at starts."""
        found = {name: text.format(cache=cache) for name, text in tables.environment("cuda")}
        if self.numbers is not None:
            found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.numbers))
        if self.wsl:
            # Windows's libcuda, whatever else is installed.
            found["LD_LIBRARY_PATH"] = tables.wsl().library_folder
        return found


def gpus(settings: Settings, probe: Probe, gpu: Stack | None) -> Gpus | None:
    """The GPUs that the server counts on; None where it serves from the CPU."""
    if gpu is None:
        return None
    visible = settings.server_environment.get("CUDA_VISIBLE_DEVICES")
    numbers = settings.server_gpu_devices
    if numbers is not None:
        named = len(numbers)
    elif visible:
        named = len(visible.split(","))
    else:
        named = len(nvidia.identify(probe.gpus)[0])
    return Gpus(probe.wsl, settings.server_gpus or named, numbers)


PURPOSES = {"generate": (), "embed": ("--embedding",), "rerank": ("--reranking",)}
"""What llama-server is told of what it is for."""


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


OF_A_ROUTER = frozenset(
    {
        "server_host",
        "server_port",
        "server_cors_origins",
        "server_threads_http",
        "server_log_verbosity",
        "server_metrics",
    }
)
"""Those that a router is given itself."""


def _told(settings: Settings, on_gpu: bool, name: str = "") -> dict[str, object]:
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
        told["server_chat_template_file"] = chat_template_of(name)
    kwargs = settings.server_chat_template_kwargs
    told["server_chat_template_kwargs"] = json.dumps(kwargs) if kwargs else None
    return {name: value for name, value in told.items() if value is not None}


def _words(option: str, value: object) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (option if value else option.replace("--", "--no-", 1),)
    return (option, str(value))


def arguments(
    settings: Settings, model: ModelPlan, on_gpu: bool = False, name: str = ""
) -> tuple[str, ...]:
    """llama-server's arguments."""
    projector = ("--mmproj", model.projector.path) if model.projector else ()
    alias = settings.server_alias or model.name.removesuffix(".gguf")
    own = [
        word
        for setting, value in _told(settings, on_gpu, name).items()
        for word in _words(OPTIONS[setting], value)
    ]
    return (
        *("--model", model.path, *projector, "--alias", alias),
        *own,
        *_beside(settings, model, on_gpu),
        *_key_words(settings),
        *PURPOSES[settings.server_purpose],
        *settings.server_extra_args,
    )


def _beside(settings: Settings, model: ModelPlan, on_gpu: bool) -> tuple[str, ...]:
    """What is loaded with a model, as arguments."""
    words: list[str] = []
    if model.draft is not None:
        words += ["--model-draft", model.draft.path]
        if "--spec-type" not in settings.server_extra_args:
            # A draft model alone is loaded and not asked (seen: v0.5.0-dev).
            words += ["--spec-type", "draft-simple"]
        words += ["--n-gpu-layers-draft", str(settings.server_gpu_layers)] if on_gpu else []
    plain = [each.path for each, scale in model.adapters if scale == 1]
    scaled = [f"{each.path}:{scale:g}" for each, scale in model.adapters if scale != 1]
    words += ["--lora", ",".join(plain)] if plain else []
    words += ["--lora-scaled", ",".join(scaled)] if scaled else []
    return tuple(words)


def _key_words(settings: Settings) -> tuple[str, ...]:
    key = ("--api-key-file", "${CREDENTIALS_DIRECTORY}/api-key")
    return key if settings.api_key_required else ()


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


def _gpu_files(seen: Gpus, awaited: int) -> Iterator[FilePlan]:
    """What makes the driver ready, and what keeps the server from starting without it."""
    yield FilePlan(GPU_GATE, _file("gpu-gate.sh"), 0o755)
    if not seen.wsl:
        yield FilePlan(GPU_READY, _file("gpu-ready.sh"), 0o755)
        values = {"gpu_ready": GPU_READY, "count": awaited, "seconds": GPU_WAIT_SECONDS}
        yield FilePlan(GPU_UNIT_FILE, _render("llama-gpu.service.j2", values))


def _is_in_a_home(path: str) -> bool:
    return path.startswith(("/home/", "/root/", "/run/user/"))


def _shown_paths(probe: Probe, models: Iterable[ModelPlan]) -> tuple[str, ...]:
    """What the server reads of places that its sandbox would hide.

    Among it where a link leads that the user put in our place, such as to a larger disk.
    """
    named = [file.path for model in models if model.on_host for file in model.files]
    shown = []
    for path in (*named, at.MODELS, at.PREFIX):
        leads_to = probe.real_paths.get(path, path)
        shown += [each for each in (path, leads_to) if _is_hidden(each)][:1]
    return tuple(dict.fromkeys(shown))


def _is_hidden(path: str) -> bool:
    return _is_in_a_home(path) or path.startswith(("/tmp/", "/var/tmp/"))  # noqa: S108


def plan(
    settings: Settings,
    probe: Probe,
    model: ModelPlan,
    release: str | None,
    gpu: Stack | None = None,
    chat_template: str | None = None,
    among: Among = Among(),
) -> ServerPlan:
    """The service for a model.

    release is the name of the one that it is to run, chat_template what server_chat_template_file
    holds.
    """
    seen = gpus(settings, probe, gpu)
    job = _Job(
        words=arguments(settings, model, seen is not None, among.name),
        models=(model,),
        own=_template_file(among.name, chat_template),
        serves=(_served(settings, seen),),
    )
    return _service(settings, probe, release, seen, among, job)


def router(
    settings: Settings,
    probe: Probe,
    instances: Sequence[Routed],
    release: str | None,
    gpu: Stack | None = None,
) -> ServerPlan:
    """The service that serves all models at one address, each asked for by its name."""
    seen = gpus(settings, probe, gpu)
    preset = FilePlan(PRESET, preset_text(instances, seen is not None))
    templates = [_template_file(each.name, each.chat_template) for each in instances]
    # 0, for no limit, is less than what is to be loaded at the start (seen: v0.5.0-dev).
    words = ["--models-preset", PRESET, "--models-max", str(len(instances))]
    job = _Job(
        words=(*words, *_router_words(settings)),
        models=tuple(each.model for each in instances),
        own=(preset, *chain.from_iterable(templates)),
        serves=tuple(_served(each.settings, seen, each.called) for each in instances),
    )
    return _service(settings, probe, release, seen, Among(), job)


@dataclass(frozen=True)
class Routed:
    """A model that a router serves."""

    name: str
    settings: Settings
    model: ModelPlan
    chat_template: str | None = None

    @property
    def called(self) -> str:
        """What clients call it: its section in the preset file."""
        name = self.settings.server_alias or self.name
        return name or self.model.name.removesuffix(".gguf")


def _router_words(settings: Settings) -> tuple[str, ...]:
    told = {name: value for name, value in _told(settings, False).items() if name in OF_A_ROUTER}
    words = [word for name, value in told.items() for word in _words(OPTIONS[name], value)]
    return (*words, *_key_words(settings))


def preset_text(instances: Sequence[Routed], on_gpu: bool) -> str:
    """The preset file of a router: arguments as an INI file, a section for each model."""
    lines = ["version = 1"]
    for each in instances:
        lines += ["", f"[{each.called}]"]
        lines += [f"{key} = {value}" for key, value in _preset(each, on_gpu).items()]
    return "\n".join(lines) + "\n"


def _preset(routed: Routed, on_gpu: bool) -> dict[str, str]:
    told = _told(routed.settings, on_gpu, routed.name)
    words = [
        *("--model", routed.model.path),
        *(("--mmproj", routed.model.projector.path) if routed.model.projector else ()),
        *(
            word
            for name, value in told.items()
            if name not in OF_A_ROUTER
            for word in _words(OPTIONS[name], value)
        ),
        *_beside(routed.settings, routed.model, on_gpu),
        *PURPOSES[routed.settings.server_purpose],
        *routed.settings.server_extra_args,
    ]
    # So that it is healthy only when everything is loaded.
    return {**_pairs(words), "load-on-startup": "true"}


def _pairs(words: Iterable[str]) -> dict[str, str]:
    """Arguments as options with their values; one that takes none is true."""
    pairs: dict[str, str] = {}
    option = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            option, equals, value = word.lstrip("-").partition("=")
            pairs[option] = value if equals else "true"
        elif option:
            pairs[option] = word
    return pairs


def _template_file(name: str, text: str | None) -> tuple[FilePlan, ...]:
    return () if text is None else (FilePlan(chat_template_of(name), text),)


def _served(settings: Settings, seen: Gpus | None, called: str | None = None) -> Served:
    offloads = seen is not None and settings.server_gpu_layers != 0
    return Served(called, settings.server_purpose, offloads)


@dataclass(frozen=True)
class _Job:
    """What a process is started for."""

    words: tuple[str, ...]
    models: tuple[ModelPlan, ...]
    own: tuple[FilePlan, ...]
    serves: tuple[Served, ...]


def _service(
    settings: Settings,
    probe: Probe,
    release: str | None,
    seen: Gpus | None,
    among: Among,
    job: _Job,
) -> ServerPlan:
    name, unit = among.name, unit_of(among.name)
    url = f"{base_url(settings)}:{settings.server_port}"
    grows_by_itself = (probe.systemd_version or 0) >= SYSTEMD_WITH_RESTART_STEPS
    helpers = [FilePlan(WAIT_HEALTHY, _file("wait-healthy.sh"), 0o755)]
    if not grows_by_itself:
        helpers.append(FilePlan(RESTART_PAUSE, _file("restart-pause.sh"), 0o755))
    if seen is not None:
        helpers += _gpu_files(seen, max(among.awaited, seen.awaited))
    cache = unit.removesuffix(".service")
    ours = seen.environment(f"/var/cache/{cache}") if seen else {}
    environment = {**ours, **settings.server_environment}
    models = [each for model in job.models for each in model.everything]
    named = sum(served.model is not None for served in job.serves)
    shown = _shown_paths(probe, models)
    values: dict[str, object] = {
        "unit": unit,
        "name": name,
        "cache": cache,
        "user": at.SERVER_USER,
        "restart_pause": None if grows_by_itself else RESTART_PAUSE,
        "command": " ".join(
            [f"{at.CURRENT}/bin/llama-server"]
            + [quote(word, expand=word.startswith("${CREDENTIALS_")) for word in job.words]
        ),
        "wait_healthy": WAIT_HEALTHY,
        "health_url": f"{url} {named}" if named else url,
        "start_timeout": settings.server_start_timeout_seconds,
        "stop_timeout": settings.server_stop_timeout_seconds,
        "api_key": at.API_KEY if settings.api_key_required else None,
        "protect_home": "tmpfs" if any(map(_is_in_a_home, shown)) else "yes",
        "read_only_paths": [quote_path(path) for path in shown],
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
    hashes = [each for model in models for each in model.identity]
    texts = [bare, *hashes, *(file.content for file in (*job.own, *helpers))]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    written = _render(
        "llama-server.service.j2",
        {**values, "environment": (*told, f"LLAMASTEAD_DIGEST={digest}")},
    )
    files = (FilePlan(f"{at.UNITS}/{unit}", written), *job.own, *helpers)
    return ServerPlan(
        unit=files[0],
        own=job.own,
        helpers=tuple(helpers),
        digest=digest,
        arguments=job.words,
        url=url,
        needs_api_key=settings.api_key_required,
        serves=job.serves,
        converged=all(file.is_there(probe) for file in files)
        and is_running(probe, unit, digest, release)
        and at.SERVER_USER in probe.users
        and (not settings.api_key_required or _api_key_is_safe(probe)),
    )


def is_running(probe: Probe, unit: str, digest: str, release: str | None) -> bool:
    """Whether the service is up, enabled, and started from exactly this unit and release."""
    service = probe.services.get(unit)
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
    """Files of ours that the probe has to look at, as patterns."""
    return (
        *(at.SERVER_UNIT_FILE, f"{at.UNITS}/{unit_of('?*')}", at.API_KEY),
        *(PRESET, chat_template_of(""), chat_template_of("?*")),
        *(WAIT_HEALTHY, RESTART_PAUSE, GPU_GATE, GPU_READY, GPU_UNIT_FILE),
    )


def _no_such_gpu(numbers: Iterable[int], probe: Probe) -> Iterator[Finding]:
    cards = [str(card) for card in nvidia.identify(probe.gpus)[0]]
    there = ", ".join(f"{number} ({card})" for number, card in enumerate(cards))
    for number in numbers:
        if number >= len(cards):
            yield error(
                "no-such-gpu",
                f"server_gpu_devices: there is no card {number}",
                "llama-server would not find it",
                f"The host has {there}.",
            )


def _of_others(unit: str, service: Service) -> Iterator[Finding]:
    """What the user has put where a unit of ours goes, or beside it."""
    if service.mark is not None and not service.is_ours:
        yield error(
            "unit-not-ours",
            f"{at.UNITS}/{unit} is not from this software",
            "it would be overwritten",
            f"`systemctl disable --now {unit}`, then `mv {at.UNITS}/{unit} /root/`; what you need "
            "of it belongs into a drop-in.",
            "ollama/ollama#13178",
        )
    if service.enabled.startswith("masked"):
        yield error(
            "unit-masked",
            f"{unit} is masked",
            "systemd would not start it",
            f"`systemctl unmask {unit}`, unless there is a reason for it.",
        )
    if service.drop_ins:
        yield note(
            "drop-ins",
            f"drop-ins of yours change the unit: {', '.join(service.drop_ins)}",
            "they stay as they are, and what they change is not checked",
        )


def leftovers(probe: Probe, wanted: Iterable[str]) -> tuple[str, ...]:
    """Units of ours that the settings no longer ask for."""
    return tuple(
        sorted(
            unit
            for unit, service in probe.services.items()
            if unit not in wanted and service.is_ours
        )
    )


def findings(
    settings: Settings,
    probe: Probe,
    gpu: Stack | None = None,
    name: str = "",
    gone: Iterable[str] = (),
) -> Iterator[Finding]:
    """What stands in the way of serving; gone are the units that are removed before."""
    unit = unit_of(name)
    listener = probe.listeners.get(settings.server_port)
    if listener is not None and listener.unit not in (None, unit, *gone):
        yield error(
            "port-of-another",
            f"server_port: {settings.server_port} is held by {listener.unit} until that is "
            "restarted with another",
            "llama-server could not listen there",
            f"`systemctl stop {listener.unit}`, then deploy again.",
        )
    for lora in settings.model_lora:
        if lora.model.startswith("/") and re.search("[,:]", lora.model):
            yield error(
                "lora-path",
                f"model_lora: {lora.model} has a comma or a colon in it",
                "llama-server would take it for two files, or for a scale",
                "Give the file another name.",
            )
    if gpu is not None and settings.server_gpu_devices is not None:
        yield from _no_such_gpu(settings.server_gpu_devices, probe)
    if listener is not None and listener.unit is None:
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
    if unit in probe.services:
        yield from _of_others(unit, probe.services[unit])


def router_findings(instances: Sequence[Routed], release: Release | None) -> Iterator[Finding]:
    """What cannot stand in a router's preset file, whose format has no quotes."""
    options = release.server_options if release else None
    if release is not None and options and "--models-preset" not in options:
        yield error(
            "unknown-server-option",
            f"server_router: llama-server of release {release.name} knows no --models-preset",
            "it would not start",
            "Set llama_cpp_version to one that has it, or leave out server_router.",
        )
    names = [each.called for each in instances]
    for each in instances:
        told = {"the model's name": each.called, **_preset(each, True)}
        strange = [
            f"{key} {value!r}"
            for key, value in told.items()
            if re.search(r"[;#\n\r]", value) or value != value.strip() or not value
        ]
        if re.search(r"[][:*]", each.called):
            strange.append(f"the model's name {each.called!r}")
        if names.count(each.called) > 1:
            strange.append(f"the model's name {each.called!r} twice")
        for what in dict.fromkeys(strange):
            yield error(
                "router-preset",
                f"server_router: {what} cannot stand in a preset file",
                "the router would read it as something else",
                "Names are set by server_alias; `;`, `#` and white space at an end cannot be "
                "written, in names also no `:`, `*` or brackets.",
            ).within(each.name)


def unknown_to(release: Release, settings: Settings) -> Iterator[Finding]:
    """What the settings ask of a release that its `llama-server --help` does not know."""
    help_of_it = f"`{at.RELEASES}/{release.name}/bin/llama-server --help`"
    asked = [
        (name, _words(OPTIONS[name], value)[0]) for name, value in _told(settings, True).items()
    ]
    asked += [("server_purpose", word) for word in PURPOSES[settings.server_purpose]]
    drafts = ("--model-draft", "--spec-type") if settings.model_draft else ()
    asked += [("model_draft", option) for option in drafts]
    scales = [each.scale for each in settings.model_lora]
    asked += [("model_lora", "--lora")] if 1 in scales else []
    asked += [("model_lora", "--lora-scaled")] if [scale for scale in scales if scale != 1] else []
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
