"""A draft model and LoRA adapters, from wherever models come, beside the model on a host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Deployed, deploy, new_host
from tests.gguf_models import write_adapter
from tests.lab import Lab
from tests.lab.gguf_model import tiny_model

pytestmark = pytest.mark.lab

REPO = "user/Companions-GGUF"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "own.gguf")


@pytest.fixture(scope="module")
def deployed(lab: Lab, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A host whose model has a draft of the Hub, and adapters of the Hub and of this machine."""
    files = {"Draft-Q8_0.gguf": tiny_model(), "lora/hub.gguf": _another(adapter)}
    lab.outside.hub.put(REPO, files)
    return deploy(
        lab,
        new_host(lab, "companions"),
        tmp_path_factory.mktemp("companions"),
        sudo=True,
        hf_endpoint=lab.outside.hub_url,
        model_draft=f"{REPO}:Q8_0",
        model_lora=[f"{REPO}/lora/hub.gguf", {"model": f"file:{adapter}", "scale": 0.5}],
    )


def _another(adapter: Path) -> Path:
    return write_adapter(adapter.with_name("hub.gguf"), rank=8)


def ask(deployed: Deployed, path: str, **body: object) -> Any:
    data = f"-d '{json.dumps(body)}'" if body else ""
    return json.loads(deployed.host.run(f"curl -sf http://127.0.0.1:8080{path} {data}").stdout)


def completion(deployed: Deployed) -> Any:
    wanted = {"n_predict": 24, "temperature": 0, "cache_prompt": False, "n_probs": 5}
    return ask(deployed, "/completion", prompt="Hello", **wanted)


def likely(deployed: Deployed) -> float:
    """How likely the model finds what it says first."""
    found: float = completion(deployed)["completion_probabilities"][0]["logprob"]
    return found


def blobs(deployed: Deployed) -> int:
    return len(deployed.host.run("ls /var/lib/llamastead/models/blobs").stdout.split())


def test_adapters_are_applied_with_their_scales(deployed: Deployed) -> None:
    told = ask(deployed, "/lora-adapters")
    assert {Path(each["path"]).name: each["scale"] for each in told} == {
        "hub.gguf": 1.0,
        "own.gguf": 0.5,
    }


def test_the_draft_drafts(deployed: Deployed) -> None:
    timings = completion(deployed)["timings"]
    assert timings["draft_n"] > 0
    assert "drafted" in deployed.first.said


def test_the_same_bytes_are_stored_once_and_a_second_run_changes_nothing(
    deployed: Deployed,
) -> None:
    assert blobs(deployed) == 3  # the draft is the model once more
    assert deployed.again().changed == []


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"model_draft": f"{REPO}:Q4_0"}, "model_draft: "),
        ({"model_lora": [f"{REPO}/Draft-Q8_0.gguf"]}, "model_lora.0: "),
        ({"model_lora": ["/none.gguf"]}, "model_lora.0: there is no file /none.gguf on the host"),
        ({"model_lora": ["file:/none.gguf"]}, "model_lora.0: /none.gguf cannot be read on this"),
    ],
)
def test_what_is_wrong_with_one_of_them_is_one_line(
    deployed: Deployed, data: dict[str, Any], part: str
) -> None:
    run = deployed.again("check.py", **data)
    assert run.code == 1
    (said,) = run.errors
    assert part in said
    assert "Traceback" not in run.said


def test_without_them_it_thinks_otherwise_and_their_files_go(deployed: Deployed) -> None:
    before = likely(deployed)
    assert likely(deployed) == pytest.approx(before, abs=1e-3)
    run = deployed.again(model_lora=None, model_draft=None, model_keep=0)
    assert run.code == 0, run.said[-3000:]
    assert likely(deployed) != pytest.approx(before, abs=1e-2)
    assert blobs(deployed) == 1
    assert deployed.again(model_lora=None, model_draft=None, model_keep=0).changed == []
