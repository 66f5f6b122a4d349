"""Models of the Hub: looked up, fetched, served, kept, let go; and a token that nobody sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import deploys
from tests.e2e.conftest import Deployed, deploy, new_host
from tests.e2e.deploys import served
from tests.e2e.watcher import Watcher, kept
from tests.gguf_models import Dimensions, write
from tests.lab import Fault, Lab, LabHost
from tests.lab.gguf_model import tiny_model

pytestmark = pytest.mark.lab

REPO = "user/Tiny-GGUF"
GATED = "user/Gated-GGUF"
TOKEN = "hf_" + "nObOdYsEeStHiS" * 2
MODELS = "/var/lib/llamastead/models"
SMALL = Dimensions("llama", layers=2, width=256, feed_forward=512, heads=8, head_size=32)


@pytest.fixture(scope="module")
def published(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The lab, with models on its Hub."""
    folder = tmp_path_factory.mktemp("gguf")
    files: dict[str, Path | bytes] = {"README.md": b"# Tiny\n", "Tiny-Q8_0.gguf": tiny_model()}
    for quant in ("F16", "Q4_0"):
        (made,) = write(folder / f"Tiny-{quant}.gguf", replace(SMALL, quantization=quant))
        files[made.name] = made
    split = write(folder / "Tiny-Q5_0.gguf", replace(SMALL, quantization="Q5_0"), parts=3)
    files |= {f"Q5_0/{part.name}": part for part in split}
    lab.outside.hub.put(REPO, files)
    lab.outside.hub.put(GATED, {"Gated-Q8_0.gguf": tiny_model()}, gated=True, token=TOKEN)
    lab.outside.hub.put("user/Weights", {"model.safetensors": b"x"})
    return lab


@pytest.fixture(scope="module")
def deployed(published: Lab, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A host that serves a model of the Hub."""
    return deploy(
        published,
        new_host(published, "models"),
        tmp_path_factory.mktemp("models"),
        sudo=True,
        hf_endpoint=published.outside.hub_url,
        model=f"{REPO}:Q8_0",
        model_sha256=None,
    )


@pytest.fixture(autouse=True)
def _healed(lab: Lab) -> Iterator[None]:
    yield
    lab.outside.heal()


def blobs(host: LabHost) -> int:
    return len(host.run(f"ls {MODELS}/blobs").stdout.split())


def check(deployed: Deployed, **data: Any) -> deploys.Run:
    return deployed.again("check.py", **data)


def test_a_quantisation_is_served_from_its_commit(deployed: Deployed) -> None:
    assert "fetch Tiny-Q8_0.gguf of user/Tiny-GGUF at commit" in deployed.first.said
    path = served(deployed.host)
    assert path.startswith(f"{MODELS}/{REPO}/")
    assert path.endswith("/Tiny-Q8_0.gguf")
    assert deployed.again().changed == []


def test_a_host_that_has_the_model_needs_no_hub(deployed: Deployed) -> None:
    deployed.lab.outside.play(Fault("/hub/*", status=503))
    run = deployed.again()
    assert run.code == 0
    assert run.changed == []
    assert "Q8_0 of commit" in run.said
    deployed.lab.outside.heal()
    nowhere = deployed.again(hf_endpoint="http://127.0.0.1:1/hub")
    assert nowhere.code == 0
    assert nowhere.changed == []
    # Another one cannot be had then, and says so before anything is changed.
    other = deployed.again(hf_endpoint="http://127.0.0.1:1/hub", model=f"{REPO}:Q4_0")
    assert other.code == 1
    assert "cannot be asked" in other.errors[0]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"model": f"{REPO}:Q6_K"}, "has no Q6_K. It has"),
        ({"model": f"{REPO}/none.gguf"}, "has no file none.gguf"),
        ({"model": "user/Weights"}, "no GGUF model, only safetensors"),
        ({"model": "user/Nothing"}, "there is no repository user/Nothing, or it is private"),
        ({"model": "user/Nothing", "hf_token": TOKEN}, "does not accept it, or user/Nothing"),
        ({"model_revision": "v9"}, "has no branch, tag or commit v9"),
        ({"model": GATED}, "is gated, and no hf_token is set"),
        ({"model": GATED, "hf_token": "hf_wrong"}, "the account of hf_token may not read"),
        ({"model_mmproj": "mmproj.gguf"}, "has no file mmproj.gguf. It has no projector"),
        ({"server_ctx_size": 10**9, "server_parallel": 1}, "server_ctx_size = "),
        ({"model": f"{REPO}:F16", "server_ctx_size": 10**9}, "needs"),
        ({"hf_token": 'a"b'}, "setting hf_token: must be one word"),
        ({"model": "file:/none.gguf"}, "cannot be read on this machine"),
    ],
)
def test_what_is_wrong_is_one_line(deployed: Deployed, data: dict[str, Any], part: str) -> None:
    run = check(deployed, **data)
    assert run.code == 1
    assert len(run.errors) == 1, run.errors
    assert part in run.errors[0]
    assert "Traceback" not in run.said
    assert TOKEN not in run.said


def test_the_best_that_fits_is_chosen_and_the_others_are_named(deployed: Deployed) -> None:
    run = check(deployed, model=REPO)
    assert run.code == 0, run.said
    assert "Q8_0 of user/Tiny-GGUF is taken (next: Q5_0, Q4_0" in run.said


def test_a_file_and_a_split_model_and_back_again(deployed: Deployed) -> None:
    host = deployed.host
    one = deployed.again(model=f"{REPO}/Tiny-Q4_0.gguf")
    assert one.code == 0, one.said[-3000:]
    assert served(host).endswith("/Tiny-Q4_0.gguf")
    assert blobs(host) == 2  # the one before stays
    split = deployed.again(model=f"{REPO}:Q5_0")
    assert split.code == 0, split.said[-3000:]
    assert served(host).endswith("/Q5_0/Tiny-Q5_0-00001-of-00003.gguf")
    listed = host.run(f"ls {MODELS}/{REPO}/*/Q5_0").stdout.split()
    assert listed == [f"Tiny-Q5_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert blobs(host) == 4  # three parts, and the one before; the first one went
    assert "remove user/Tiny-GGUF:Q8_0 once it serves" in split.said
    assert deployed.again(model=f"{REPO}:Q5_0").changed == []
    back = deployed.again()
    assert back.code == 0, back.said[-3000:]
    assert deployed.again().changed == []


def test_a_model_that_does_not_load_leaves_the_one_before_serving(deployed: Deployed) -> None:
    broken = tiny_model().read_bytes()[:-4000]
    deployed.lab.outside.hub.put("user/Broken-GGUF", {"Broken-Q8_0.gguf": broken})
    before = served(deployed.host)
    run = deployed.again(model="user/Broken-GGUF:Q8_0")
    assert run.code == 1
    assert served(deployed.host) == before
    kept = blobs(deployed.host)
    assert deployed.again().code == 0
    assert blobs(deployed.host) == kept - 1  # what never served is nothing to go back to
    assert deployed.again().changed == []


def test_a_model_of_this_machine_is_copied(deployed: Deployed, tmp_path: Path) -> None:
    (made,) = write(tmp_path / "own.gguf", SMALL)
    run = deployed.again(model=f"file:{made}")
    assert run.code == 0, run.said[-3000:]
    assert "copy own.gguf" in run.said
    assert served(deployed.host).endswith("/own.gguf")
    assert deployed.again(model=f"file:{made}").changed == []
    assert deployed.again().code == 0


def test_nothing_is_kept_if_nothing_is_to_be_kept(deployed: Deployed) -> None:
    run = deployed.again(model_keep=0)
    assert run.code == 0, run.said[-3000:]
    assert blobs(deployed.host) == 1
    assert deployed.again(model_keep=0).changed == []


# A token


def test_a_token_is_seen_by_nobody(deployed: Deployed) -> None:
    host, outside = deployed.host, deployed.lab.outside
    data = {
        **{name: value for name, value in deployed.data.items() if value is not None},
        "model": GATED,
        "hf_token": TOKEN,
        "model_keep": 0,
    }
    deployed.again(model=f"{REPO}:Q4_0", model_keep=0)  # so that it has to be fetched
    outside.play(Fault("/cdn/*", bytes_per_second=400_000))
    inventory = deploys.write_inventory(deployed.folder, {host.name: data})
    with Watcher(host, TOKEN) as watcher:
        run = deploys.run(inventory, arguments=("-v", "--debug"))
    assert run.code == 0, run.said[-3000:]
    assert "Gated-Q8_0.gguf" in served(host)
    assert watcher.looks > 50
    assert watcher.seen == {}
    assert TOKEN not in run.said + run.out
    assert kept(host, TOKEN) == ""
    asked = outside.requests("web")
    assert not [each for each in asked if each.token and each.target.startswith("/cdn/")]
    assert not [each for each in asked if TOKEN in each.target]
    again = deploys.run(inventory)
    assert again.changed == []
    assert deployed.again().code == 0


def test_the_plan_for_programs_tells_the_files_and_the_memory(deployed: Deployed) -> None:
    run = check(deployed, report_format="json", model=f"{REPO}:Q5_0")
    told = json.loads(run.out.splitlines()[0])
    (main,) = told["instances"]
    assert len(main["model"]["files"]) == 3
    assert main["memory"]["verdict"] == "fits"
