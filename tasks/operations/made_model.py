"""Models made on the host: converted and quantised by llama.cpp's own tools, tried, stored."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks import probe as at
from tasks.operations import release, shell
from tasks.operations.job import Job, finished
from tasks.operations.model_file import hand_over, keep
from tasks.preflight import probe_host
from tasks.rules.build import BuildPlan, replan
from tasks.rules.making import HEADER_BYTES, UPLOADS, WORK, Ingredient, Making
from tasks.rules.model import ModelPlan
from tasks.settings import Settings
from tasks.upstream import split_credentials

_FILES = Path(__file__).parents[2] / "files"
_PREPARE = (_FILES / "prepare-converter.sh").read_text()
_QUANTISE = (_FILES / "quantise-model.sh").read_text()
LOCK = _FILES / "convert-requirements.txt"
LOCK_ON_HOST = f"{at.LIBRARY}/{LOCK.name}"
_CHECK_SECONDS = 1800
"""A model that is larger than the host's memory is read from the disk for each token."""


def _environment_name(making: Making) -> str:
    """Another one for another lock, and for another PyTorch."""
    assert making.environment is not None
    told = "\0".join([LOCK.read_text(), making.environment.torch])
    return f"venv-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


@operation()
def prepared(
    making: Making, build: BuildPlan, settings: Settings
) -> Generator[PyinfraCommand, None, None]:
    """The environment of a conversion, which knows the model's architecture."""
    assert making.environment is not None
    address, secrets = split_credentials(build.source.repo)
    name = _environment_name(making)
    yield from finished._inner(
        job=Job(
            name="prepare",
            key=f"{build.source.commit[:12]}-{name}-{making.architecture}",
            script=_PREPARE,
            variables={
                "COMMIT": build.source.commit,
                "LABEL": build.source.label,
                "BUILT": f"{release.WORK}/source",
                "WORK": WORK,
                "LOCK": LOCK_ON_HOST,
                "TORCH": making.environment.torch,
                "NAME": name,
                "SYSTEM": "" if making.environment.torch else "yes",
                "ARCHITECTURE": making.architecture or "",
            },
            # Addresses can hold a password.
            environment={
                **settings.proxy_environment,
                **secrets,
                "REPO": address,
                "INDEX": settings.model_convert_index_url or "",
            },
            user=at.WORKER_USER,
            writable=(WORK,),
            timeout_seconds=settings.model_quantize_timeout_seconds,
        )
    )


@operation()
def made(
    model: ModelPlan, build: BuildPlan, settings: Settings
) -> Generator[PyinfraCommand, None, None]:
    """Convert and quantise a model, show that it loads, and move it into the store.

    Its record says what it was made from.
    """
    making = model.making
    assert making is not None
    if build.release is None and state.is_executing:
        build = replan(build, settings, probe_host(settings))
    if not making.worked:
        yield from finished._inner(job=_job(making, build, settings))
    told = _told(making) if state.is_executing else _NOTHING
    if told is None:
        yield shell.failure(f"Error: {making.done} does not say what was made; run this again")
        return
    file = replace(model.parts[0], sha256=told["sha256"], size=told["bytes"])
    assert model.record is not None
    assert model.record.made is not None
    record = replace(
        model.record,
        files={file.path: told["sha256"]},
        told_sizes={told["sha256"]: told["bytes"]},
        made=replace(
            model.record.made,
            sources=told["sources"],
            converted=making.converts,
            imatrix=told["imatrix"],
            llama_cpp=build.source.commit,
        ),
    )
    yield shell.command(hand_over(file))
    yield shell.command(keep(model.record_path, record))
    yield shell.command(f"rm -rf {making.done} {UPLOADS}")


def _job(making: Making, build: BuildPlan, settings: Settings) -> Job:
    release_folder = f"{at.RELEASES}/{build.release_name or 'unknown'}"
    python = f"{WORK}/{_environment_name(making)}/bin/python" if making.converts else ""
    return Job(
        name="quantise",
        key=making.key,
        script=_QUANTISE,
        variables={
            "KEY": making.key,
            "INCOMING": at.INCOMING,
            "WORK": making.work,
            "RESULT": making.result,
            "SOURCES": "\n".join(map(_source, making.sources)),
            "QUANT": making.quantisation.name,
            "BIN": f"{release_folder}/bin",
            "IMATRIX": making.imatrix.place if making.imatrix else "",
            "PYTHON": python,
            "TOOL": f"{WORK}/llama.cpp-{build.source.commit}",
            "BASE_BYTES": str((making.base_size or 0) + HEADER_BYTES),
            "RESULT_BYTES": str((making.size or 0) + HEADER_BYTES),
            "DONE": making.done,
            "CHECK_SECONDS": str(_CHECK_SECONDS),
        },
        user=at.WORKER_USER,
        writable=(at.INCOMING,),
        timeout_seconds=settings.model_quantize_timeout_seconds,
    )


def _source(each: Ingredient) -> str:
    return "\t".join([each.sha256 or "-", each.place, each.name])


_NOTHING: dict[str, Any] = {"sha256": "unknown", "bytes": 0, "sources": {}, "imatrix": None}


def _told(making: Making) -> dict[str, Any] | None:
    """What the work says that it made. It comes from an unprivileged user's folder."""
    _, output = shell.run(host, f"head -c 1000000 {shlex.quote(making.done)}")
    try:
        told = json.loads(output.stdout)
        sources, imatrix = told["sources"], told["imatrix"]
        hashes = [told["sha256"], *sources.values(), *([imatrix] if imatrix else [])]
        whole = isinstance(told["bytes"], int) and isinstance(sources, Mapping)
        if not whole or not all(re.fullmatch(r"[0-9a-f]{64}", each) for each in hashes):
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(told)
