"""What a server's answers prove, and what they do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CPU = "CPU"


@dataclass(frozen=True)
class Answers:
    """What one running server answered. What it did not answer is None or empty."""

    health: int | None = None
    props: Mapping[str, Any] = field(default_factory=dict)
    completion: Mapping[str, Any] = field(default_factory=dict)
    executable: str | None = None
    memory_bytes: int | None = None
    exposure: float | None = None
    """By `systemd-analyze security`: 0 is a perfect sandbox, 10 none."""
    gpu_handles: int | None = None
    """Files of the GPU's driver that the server has open."""
    gpu_memory_bytes: int | None = None
    """Memory of the server on GPUs, as nvidia-smi says."""
    log: tuple[str, ...] = ()
    """Lines of this start's log about devices, layers and buffers."""


@dataclass(frozen=True)
class Verdict:
    """The proof that a host serves, or why it is none."""

    faults: tuple[str, ...]
    release: str | None
    model: str | None
    device: str
    layers: str
    """On the GPU of all, as the log says; or that all are on the CPU."""
    context: int | None
    """Tokens of each slot."""
    slots: int | None
    prompt_tokens_per_second: float | None
    tokens_per_second: float | None
    memory_bytes: int | None
    exposure: float | None
    url: str

    def as_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def judge(url: str, answers: Answers, on_gpu: bool = False) -> Verdict:
    """Judge what the server answered; on_gpu: the plan counts on a GPU.

    Router mode, an answer without tokens, and an answer from the CPU where a GPU was meant are no
    proof, though `/health` says 200 in all of them.
    """
    faults = []
    if answers.health != 200:
        faults.append(f"{url}/health says {answers.health or 'nothing'}, not 200")
    props, completion = answers.props, answers.completion
    if props.get("role") == "router":
        faults.append("llama-server runs in router mode: it was given no model of its own")
    timings = completion.get("timings")
    timings = timings if isinstance(timings, Mapping) else {}
    generated = timings.get("predicted_n") or completion.get("tokens_predicted") or 0
    if not generated:
        said = completion.get("error") or "nothing"
        faults.append(f"{url}/completion generated no token; it said {said}")
    settings = props.get("default_generation_settings")
    settings = settings if isinstance(settings, Mapping) else {}
    device, layers = _device(answers)
    if on_gpu and device == CPU:
        faults.append(
            f"{url} serves from the CPU, not from the GPU: {layers}. "
            "`journalctl -u llama-server -b | grep -i cuda` says why"
        )
    release = re.search(r"/releases/([^/]+)/", answers.executable or "")
    return Verdict(
        faults=tuple(faults),
        release=release[1] if release else None,
        model=props.get("model_alias") or props.get("model_path"),
        device=device,
        layers=layers,
        context=settings.get("n_ctx"),
        slots=props.get("total_slots"),
        prompt_tokens_per_second=timings.get("prompt_per_second"),
        tokens_per_second=timings.get("predicted_per_second"),
        memory_bytes=answers.memory_bytes,
        exposure=answers.exposure,
        url=url,
    )


def _device(answers: Answers) -> tuple[str, str]:
    device = ", ".join(_devices(answers.log)) or "GPU"
    offloaded = [
        m for line in answers.log if (m := re.search(r"offloaded (\d+)/(\d+) layers", line))
    ]
    if offloaded:
        on_gpu, of_all = int(offloaded[0][1]), offloaded[0][2]
        return (device, f"{on_gpu} of {of_all} on the GPU") if on_gpu else (CPU, "all on the CPU")
    if answers.gpu_memory_bytes:
        held = answers.gpu_memory_bytes / 1024**2
        return device, f"not in the log any more; {held:,.0f} MiB on the GPU"
    if answers.gpu_handles and not answers.log:
        return device, "not in the log any more; the GPU is in use"
    return CPU, "all on the CPU"


def _devices(log: tuple[str, ...]) -> list[str]:
    """Names of the cards, as the model's loader says which it uses, or the backend which it found.

    What the backend says alone stands at the start of older logs and in none of newer ones.
    """
    for pattern in (r"using device \S+ \((.+?)\) \(", r"Device \d+: ([^,]+),"):
        if names := [match[1] for line in log if (match := re.search(pattern, line))]:
            return names
    return []


def table(host: str, verdict: Verdict) -> list[tuple[str, str]]:
    """The proof as (what, value), for people."""

    def rate(value: float | None) -> str:
        return f"{value:,.1f}" if value is not None else "?"

    generated, read = map(rate, (verdict.tokens_per_second, verdict.prompt_tokens_per_second))

    return [
        ("host", host),
        ("device", f"{verdict.device}, layers: {verdict.layers}"),
        ("model", verdict.model or "?"),
        ("slots", f"{verdict.slots or '?'} x {verdict.context or '?'} tokens"),
        (
            "tokens/s",
            f"{generated} generated, {read} read",
        ),
        ("release", verdict.release or "?"),
        ("sandbox", f"exposure {verdict.exposure} of 10" if verdict.exposure is not None else "?"),
        ("URL", verdict.url),
    ]
