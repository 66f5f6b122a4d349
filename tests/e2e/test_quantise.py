"""Models that are made on the host: quantised from a GGUF, or converted from safetensors first."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Deployed, deploy, new_host
from tests.e2e.deploys import served
from tests.gguf_models import Dimensions, write, write_imatrix
from tests.lab import Lab, LabHost, python_packages
from tests.safetensors_model import repository

pytestmark = pytest.mark.lab

REQUIREMENTS = Path(__file__).parents[2] / "files" / "convert-requirements.txt"
REPO = "user/Tiny-GGUF"
WEIGHTS = "user/Tiny"
STATE = "/var/lib/llamastead"
MODELS = f"{STATE}/models"
PLAIN = Dimensions(
    "llama", layers=2, width=256, feed_forward=512, heads=8, head_size=32, quantization="F16"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantise")


@pytest.fixture(scope="module")
def published(lab: Lab, folder: Path) -> Lab:
    """The lab, with models on its Hub."""
    (plain,) = write(folder / "Tiny-F16.gguf", PLAIN)
    (quantised,) = write(folder / "Tiny-Q8_0.gguf", replace(PLAIN, quantization="Q8_0"))
    hub = lab.outside.hub
    hub.put(REPO, {plain.name: plain, quantised.name: quantised})
    hub.put("user/Quantised-GGUF", {quantised.name: quantised})
    # As the Hub has it: it tells the SHA-256 of large files only.
    hub.put(WEIGHTS, repository(), small=1000_000)
    strange = repository(architecture="NobodyKnowsForCausalLM")
    hub.put("user/Strange", strange, small=1000_000)
    without = {"no-config": {"config.json"}, "no-tokenizer": {"tokenizer.model"}}
    for name, gone in without.items():
        hub.put(f"user/{name}", {n: c for n, c in repository().items() if n not in gone})
    half = {name: content for name, content in repository().items() if "00002-of" not in name}
    hub.put("user/half", half)
    return lab


@pytest.fixture(scope="module")
def deployed(published: Lab, folder: Path) -> Deployed:
    """A host that serves what was quantised on it."""
    return deploy(
        published,
        new_host(published, "quantise"),
        folder,
        sudo=True,
        hf_endpoint=published.outside.hub_url,
        model=REPO,
        model_sha256=None,
        model_quantize="q4_k_m",
    )


def types(host: LabHost) -> str:
    """What the server that runs says of its file."""
    told = json.loads(host.run("curl -sf http://127.0.0.1:8080/props").stdout)
    return str(told["model_ftype"])


def record(host: LabHost, path: str) -> dict[str, Any]:
    """What the host knows of the model at a path."""
    for line in host.run(f"cat {MODELS}/records/*.json").stdout.splitlines():
        told: dict[str, Any] = json.loads(line)
        if path in told["files"]:
            return told
    raise AssertionError(path)


def left(host: LabHost) -> list[str]:
    """What lies in the folders for work."""
    found = f"find {STATE}/incoming {STATE}/uploads -mindepth 1 2>/dev/null"
    return host.run(found, check=False).stdout.split()


def test_a_gguf_of_the_hub_is_quantised_and_served(deployed: Deployed) -> None:
    host, said = deployed.host, deployed.first.said
    assert "make Tiny-Q4_K_M.gguf (about " in said
    assert "quantise to Q4_K_M" in said
    path = served(host)
    assert path.startswith(f"{MODELS}/made/")
    assert path.endswith("/Tiny-Q4_K_M.gguf")
    assert types(host).startswith("Q4_K")
    told = record(host, path)
    assert told["made"]["quantization"] == "Q4_K_M"
    assert told["made"]["llama_cpp"] == deployed.lab.outside.llama_cpp_commit
    assert list(told["made"]["sources"]) == ["Tiny-F16.gguf"]
    assert told["hub"]["commit"] == deployed.lab.outside.hub.read()[REPO].commit
    (sha256,) = told["files"].values()
    assert host.run(f"sha256sum <{path}").stdout.split()[0] == sha256
    assert host.run(f"ls {MODELS}/blobs").stdout.split() == [sha256]
    assert left(host) == []


def test_a_second_run_does_nothing_with_and_without_the_hub(deployed: Deployed) -> None:
    again = deployed.again()
    assert again.code == 0, again.said[-3000:]
    assert again.changed == []
    nowhere = deployed.again(hf_endpoint="http://127.0.0.1:1/hub")
    assert nowhere.code == 0, nowhere.said[-3000:]
    assert nowhere.changed == []


def test_another_quantisation_is_made_anew_and_the_one_before_stays(deployed: Deployed) -> None:
    before = served(deployed.host)
    run = deployed.again(model_quantize="Q8_0")
    assert run.code == 0, run.said[-3000:]
    assert served(deployed.host) != before
    assert types(deployed.host).startswith("Q8_0")
    assert deployed.again(model_quantize="Q8_0").changed == []
    back = deployed.again()
    assert back.code == 0, back.said[-3000:]
    assert "Make Tiny-Q4_K_M.gguf" not in back.said
    assert served(deployed.host) == before
    assert deployed.again().changed == []


def test_a_file_of_the_host_and_one_of_this_machine(deployed: Deployed, folder: Path) -> None:
    host, sources = deployed.host, {}
    host.run("mkdir -p /srv/own")
    (own,) = write(folder / "own f16.gguf", replace(PLAIN, width=512, head_size=64))
    content = base64.b64encode(own.read_bytes()).decode()
    host.run("base64 -d >'/srv/own/own f16.gguf'", stdin=content)
    for model in ("/srv/own/own f16.gguf", f"file:{own}"):
        run = deployed.again(model=model, model_quantize="Q5_0")
        assert run.code == 0, run.said[-3000:]
        assert served(host).endswith("/own-Q5_0.gguf")
        sources[model] = record(host, served(host))["made"]["sources"]
        assert left(host) == []
        assert deployed.again(model=model, model_quantize="Q5_0").changed == []
    assert len({*map(str, sources.values())}) == 1  # the same SHA-256, by whichever way it came
    assert host.run("ls /srv/own").stdout.strip() == "own f16.gguf"
    assert deployed.again().code == 0


def test_with_an_importance_matrix_what_takes_one_is_made(deployed: Deployed, folder: Path) -> None:
    matrix = write_imatrix(folder / "imatrix.gguf", PLAIN)
    data = {"model_quantize": "IQ2_XS", "model_imatrix": f"file:{matrix}"}
    run = deployed.again(**data)
    assert run.code == 0, run.said[-3000:]
    path = served(deployed.host)
    assert path.endswith("/Tiny-IQ2_XS.gguf")
    assert types(deployed.host).startswith("IQ2_XS")
    assert record(deployed.host, path)["made"]["imatrix"]
    assert left(deployed.host) == []
    assert deployed.again(**data).changed == []
    assert deployed.again().code == 0


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"model_quantize": "Q4_K_X"}, "makes no Q4_K_X; it makes Q4_K_S"),
        ({"model_quantize": "IQ2_XS"}, "takes an importance matrix"),
        ({"model": "user/Quantised-GGUF"}, "is quantised already (Q8_0)"),
        ({"model": f"{REPO}:Q8_0"}, "is quantised already (Q8_0)"),
        ({"model": f"{REPO}/Tiny-Q8_0.gguf"}, "is quantised already (Q8_0)"),
        ({"model": "user/no-config"}, "has weights, but no config.json"),
        ({"model": "user/no-tokenizer"}, "no tokenizer"),
        ({"model": "user/half"}, "lacks part 2 of its weights"),
        ({"model": "/srv"}, "/srv has no safetensors"),
        ({"model": "/srv/none"}, "there is no /srv/none on the host"),
        ({"model": "file:/none.gguf"}, "cannot be read on this machine"),
        ({"model_imatrix": f"{REPO}/imatrix.dat"}, f"{REPO} has no file imatrix.dat"),
        ({"model_imatrix": "/srv/none"}, "there is no file /srv/none"),
        ({"model_imatrix": "https://host/x"}, "model_imatrix_sha256: "),
        ({"model_quantize": None, "model_imatrix": "/x"}, "only for model_quantize"),
        ({"server_ctx_size": 10**9}, "server_ctx_size = "),
    ],
)
def test_what_is_wrong_is_one_line(deployed: Deployed, data: dict[str, Any], part: str) -> None:
    run = deployed.again("check.py", **data)
    assert run.code == 1
    assert len(run.errors) == 1, run.errors
    assert part in run.errors[0]
    assert "Traceback" not in run.said


def test_what_llama_quantize_does_not_take_is_said_in_its_words(deployed: Deployed) -> None:
    before = served(deployed.host)
    deployed.host.run("echo nonsense >/srv/imatrix.dat")
    run = deployed.again(model_imatrix="/srv/imatrix.dat")
    assert run.code == 1
    assert "llama-quantize: " in run.said
    assert "imatrix" in run.said
    assert served(deployed.host) == before
    assert deployed.again().code == 0
    assert left(deployed.host) == []  # what was given up is gone
    assert deployed.again().changed == []


# From safetensors


@pytest.fixture(scope="module")
def index(published: Lab) -> str:
    """A package index with what the conversion needs, for Debian 13's Python."""
    return python_packages.publish(published.outside, REQUIREMENTS, "3.13")


@pytest.mark.slow
def test_weights_of_the_hub_are_converted_quantised_and_served(
    deployed: Deployed, index: str
) -> None:
    """With Debian's own PyTorch, which brings some 100 packages along: that is what is slow."""
    host = deployed.host
    data = {"model": WEIGHTS, "model_quantize": "Q8_0", "model_convert_index_url": index}
    strange = deployed.again(**{**data, "model": "user/Strange"})
    assert strange.code == 1
    assert "Architecture 'NobodyKnowsForCausalLM' not supported!" in strange.said
    outside = deployed.lab.outside
    large = outside.hub.read()["user/Strange"].files["model-00001-of-00002.safetensors"]
    sent = [each.bytes for each in outside.requests("web") if large in each.target]
    assert sum(sent) < 1000  # a look at whether it can be had, no download
    run = deployed.again(**data)
    assert run.code == 0, run.said[-5000:]
    assert "convert, quantise to Q8_0" in run.said
    path = served(host)
    assert path.endswith("/Tiny-Q8_0.gguf")
    assert types(host).startswith("Q8_0")
    made = record(host, path)["made"]
    assert made["converted"]
    assert {"config.json", "tokenizer.model", "model-00001-of-00002.safetensors"} <= {
        *made["sources"]
    }
    assert "modeling_tiny.py" not in made["sources"]  # no code of the repository is even fetched
    assert left(host) == []
    assert deployed.again(**data).changed == []
    # A folder of the host, now that everything for it is there.
    host.run("mkdir -p /srv/tiny")
    for name, content in repository().items():
        host.run(f"base64 -d >/srv/tiny/{name}", stdin=base64.b64encode(content).decode())
    own = {**data, "model": "/srv/tiny", "model_quantize": "Q4_K_M"}
    folder = deployed.again(**own)
    assert folder.code == 0, folder.said[-5000:]
    assert served(host).endswith("/tiny-Q4_K_M.gguf")
    shared = ("config.json", "model-00002-of-00002.safetensors")
    again = record(host, served(host))["made"]["sources"]
    assert [again[name] for name in shared] == [made["sources"][name] for name in shared]
    assert deployed.again(**own).changed == []
    assert deployed.again().code == 0
