"""What a server's answers prove, and what they do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CPU = "CPU"


@dataclass(frozen=True)
class Answers:
    """What one running server answered. What it did not answer is None or empty."""

    health: int | None = None
    props: Mapping[str, Any] = field(default_factory=dict)
    answer: Mapping[str, Any] = field(default_factory=dict)
    """To what it is for: a completion, embeddings, or documents with their relevance."""
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

    unit: str
    purpose: str
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
    work: str
    """What it did when it was asked for what it is for."""
    memory_bytes: int | None
    exposure: float | None
    url: str

    def as_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def judge(
    unit: str, url: str, answers: Answers, on_gpu: bool = False, purpose: str = "generate"
) -> Verdict:
    """Judge what the server answered; on_gpu: the plan counts on a GPU.

    Router mode, an answer without tokens, and an answer from the CPU where a GPU was meant are no
    proof, though `/health` says 200 in all of them.
    """
    faults = []
    if answers.health != 200:
        faults.append(f"{url}/health says {answers.health or 'nothing'}, not 200")
    props, answer = answers.props, answers.answer
    if props.get("role") == "router":
        faults.append("llama-server runs in router mode: it was given no model of its own")
    timings = answer.get("timings")
    timings = timings if isinstance(timings, Mapping) else {}
    work = _WORK[purpose](answer)
    if work is None:
        said = answer.get("error") or "nothing"
        faults.append(f"{url} was asked to {purpose} and did not; it said {said}")
    settings = props.get("default_generation_settings")
    settings = settings if isinstance(settings, Mapping) else {}
    device, layers = _device(answers)
    if on_gpu and device == CPU:
        faults.append(
            f"{url} serves from the CPU, not from the GPU: {layers}. "
            f"`journalctl -u {unit} -b | grep -i cuda` says why"
        )
    release = re.search(r"/releases/([^/]+)/", answers.executable or "")
    return Verdict(
        unit=unit,
        purpose=purpose,
        faults=tuple(faults),
        release=release[1] if release else None,
        model=props.get("model_alias") or props.get("model_path"),
        device=device,
        layers=layers,
        context=settings.get("n_ctx"),
        slots=props.get("total_slots"),
        prompt_tokens_per_second=timings.get("prompt_per_second"),
        tokens_per_second=timings.get("predicted_per_second"),
        work=work or "",
        memory_bytes=answers.memory_bytes,
        exposure=answers.exposure,
        url=url,
    )


def _generated(answer: Mapping[str, Any]) -> str | None:
    timings = answer.get("timings")
    timings = timings if isinstance(timings, Mapping) else {}
    if not (timings.get("predicted_n") or answer.get("tokens_predicted")):
        return None
    generated, read = (
        f"{rate:,.1f}" if isinstance(rate, (int, float)) else "?"
        for rate in (timings.get("predicted_per_second"), timings.get("prompt_per_second"))
    )
    drafted, taken = timings.get("draft_n"), timings.get("draft_n_accepted")
    also = f", {taken or 0} of {drafted} drafted tokens taken" if drafted else ""
    return f"{generated} generated, {read} read{also}"


def _embedded(answer: Mapping[str, Any]) -> str | None:
    for numbers in _values(answer, "data", "embedding"):
        # llama-server answers zeros where there is nothing to normalise.
        if isinstance(numbers, list) and any(isinstance(x, float) and x for x in numbers):
            return f"{len(numbers)} numbers"
    return None


def _ranked(answer: Mapping[str, Any]) -> str | None:
    scores = _values(answer, "results", "relevance_score")
    if len(scores) < 2 or not all(isinstance(score, (int, float)) for score in scores):
        return None
    return f"{len(scores)} documents"


def _values(answer: Mapping[str, Any], rows: str, key: str) -> list[Any]:
    found = answer.get(rows)
    found = found if isinstance(found, list) else []
    return [row.get(key) for row in found if isinstance(row, Mapping)]


_WORK: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "generate": _generated,
    "embed": _embedded,
    "rerank": _ranked,
}
_MEASURES = {"generate": "tokens/s", "embed": "embedding", "rerank": "ranking"}


def _device(answers: Answers) -> tuple[str, str]:
    device = ", ".join(_devices(answers.log)) or "GPU"
    offloaded = [
        (int(m[1]), m[2])
        for line in answers.log
        if (m := re.search(r"offloaded (\d+)/(\d+) layers", line))
    ]
    if offloaded:
        if not any(count for count, _ in offloaded):
            return CPU, "all on the CPU"
        counts = ", ".join(f"{count} of {of_all}" for count, of_all in offloaded)
        return device, f"{counts} on the GPU"
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
    return [
        ("host", host),
        ("device", f"{verdict.device}, layers: {verdict.layers}"),
        ("model", verdict.model or "?"),
        ("slots", f"{verdict.slots or '?'} x {verdict.context or '?'} tokens"),
        (_MEASURES[verdict.purpose], verdict.work),
        ("release", verdict.release or "?"),
        ("unit", verdict.unit),
        ("sandbox", f"exposure {verdict.exposure} of 10" if verdict.exposure is not None else "?"),
        ("URL", verdict.url),
    ]
