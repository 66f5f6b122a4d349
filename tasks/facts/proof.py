"""What the running server says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyinfra.api import FactBase

from tasks import probe as at
from tasks.facts.told import assignments
from tasks.rules.outside import json_object
from tasks.rules.proof import Answers

_SCRIPT = (Path(__file__).parent / "proof.sh").read_text()
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
DOCUMENTS = ("A dog sleeps in the sun.", "Interest rates went up by a quarter of a point.")
QUESTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "generate": ("/completion", {"prompt": PROMPT, "n_predict": 32, "cache_prompt": False}),
    "embed": ("/v1/embeddings", {"input": PROMPT}),
    "rerank": ("/v1/rerank", {"query": "What does the dog do?", "documents": DOCUMENTS}),
}
"""Where a server is asked for what it is for, and with which words."""


class ServerProof(FactBase[Answers]):
    """Asks on the host itself for health, properties and work, and reads the start's log."""

    shell_executable = "sh"

    def command(
        self,
        unit: str,
        url: str,
        with_key: bool,
        purpose: str = "generate",
        model: str | None = None,
    ) -> str:
        """The script, with the address in front. The API key is read on the host.

        A router is told which model is meant.
        """
        question, request = QUESTIONS[purpose]
        if model is not None:
            request = {**request, "model": model}
        wanted = {
            "url": url,
            "key_file": at.API_KEY if with_key else "",
            "unit": unit,
            "props": f"/props?model={quote(model, safe='')}" if model else "/props",
            "question": question,
            "request": json.dumps(request),
        }
        return assignments(wanted) + _SCRIPT

    def process(self, output: list[str]) -> Answers:
        """Answers from the script's output."""
        return parse(output)


def parse(output: list[str]) -> Answers:
    """Answers from lines of `key<TAB>value`. What is not JSON where it should be is left out."""
    pairs = [line.split("\t", 1) for line in output if "\t" in line]
    told = {key: value for key, value in pairs if key != "log"}
    memory = [int(value) for key, value in pairs if key == "memory_kib" and value.isdigit()]
    health = told.get("health", "")
    exposure = told.get("exposure", "")
    handles = told.get("gpu_handles", "")
    on_gpus = [int(value) for key, value in pairs if key == "gpu_memory_mib" and value.isdigit()]
    return Answers(
        health=int(health) if health.isdigit() else None,
        props=json_object(told.get("props", "")) or {},
        answer=json_object(told.get("answer", "")) or {},
        executable=told.get("executable") or None,
        memory_bytes=sum(memory) * 1024 if memory else None,
        exposure=float(exposure) if re.fullmatch(r"\d+\.\d+", exposure) else None,
        gpu_handles=int(handles) if handles.isdigit() else None,
        gpu_memory_bytes=sum(on_gpus) * 1024**2 if on_gpus else None,
        log=tuple(value for key, value in pairs if key == "log"),
    )
