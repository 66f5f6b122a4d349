"""The examples that users start from say what is meant."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tasks.probe import Probe
from tasks.rules.plan import Plan, make_plan
from tasks.settings import load

from .hosts import SHA256, SOURCE, URL, WITH_COMPILER, in_wsl, on

FOLDER = Path(__file__).parents[2] / "inventories"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "lab")


def data(name: str) -> dict[str, Any]:
    hosts = runpy.run_path(str(FOLDER / f"{name}.py"))[name]
    ((host, found),) = hosts
    assert host == "@local"
    return dict(found)


def plan(name: str, probe: Probe) -> Plan:
    settings = load({**data(name), "model": URL, "model_sha256": SHA256})
    return make_plan(settings, probe, SOURCE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_holds_settings_that_exist(name: str) -> None:
    load(data(name))


def test_the_workstation_compiles_with_cuda_12_9_for_blackwell() -> None:
    made = plan("workstation", on("ubuntu 24.04"))
    assert made.errors == ()
    assert made.stack is not None
    assert str(made.stack.toolkit.choice) == "CUDA 12.9.2"
    assert made.build is not None
    assert made.build.options["CMAKE_CUDA_ARCHITECTURES"] == "120a-real"
    assert "GGML_CUDA_FORCE_CUBLAS" not in made.build.options
    assert made.main.server is not None
    words = " ".join(made.main.server.arguments)
    assert "--port 8004" in words
    assert "--ctx-size 65536 --parallel 1" in words
    assert "--threads 1 --threads-batch 1 --threads-http 4" in words
    assert "--n-gpu-layers all --flash-attn on" in words
    assert "--load-mode mlock" in words
    assert "--no-warmup" in words
    assert made.main.server.needs_api_key


def test_every_setting_of_the_workstation_is_explained() -> None:
    text = (FOLDER / "workstation.py").read_text().splitlines()
    settings = [number for number, line in enumerate(text) if line.startswith(" " * 12 + '"server')]
    assert len(settings) > 10
    for number in settings:
        block = [line.strip() for line in text[number - 2 : number]]
        assert any(line.startswith(("#", '"server')) for line in block), text[number]


def test_without_a_card_the_workstation_is_an_error() -> None:
    assert [found.code for found in plan("workstation", on("ubuntu 24.04", WITH_COMPILER)).errors]


@pytest.mark.parametrize("system", ["ubuntu 22.04", "ubuntu 24.04", "debian 12", "debian 13"])
def test_inside_wsl_the_toolkit_alone_is_installed(system: str) -> None:
    made = plan("wsl", in_wsl(system))
    assert made.errors == ()
    assert made.stack is not None
    assert made.stack.driver.choice is not None
    assert made.stack.driver.choice.source == "windows"
    assert [found.code for found in plan("wsl", in_wsl(system, windows=None)).errors] == ["no-gpu"]
