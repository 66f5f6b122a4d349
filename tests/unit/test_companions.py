"""What is loaded with a model: LoRA adapters, and a draft model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks import model_lookup
from tasks.rules import server
from tasks.rules.architecture import Shape, shape_of
from tasks.rules.findings import Finding
from tasks.rules.gguf import Bytes, read_header
from tasks.rules.model import Found, Reach
from tasks.rules.plan import Plan, as_json, make_plan, rows
from tasks.settings import Settings, SettingsError, instances, load, parts
from tests.gguf_models import Dimensions, write, write_adapter

from .hosts import BARE, GIB, SHA256, SOURCE, WITH_COMPILER, WITH_DRIVER, settings, with_release

DRAFT: dict[str, Any] = {
    "model_draft": "https://models.example/draft.gguf",
    "model_draft_sha256": "d" * 64,
}
LORA: dict[str, Any] = {
    "model_lora": [
        {"model": "https://models.example/plain.gguf", "sha256": "1" * 64},
        {"model": "https://models.example/half.gguf", "sha256": "2" * 64, "scale": 0.5},
    ]
}


def plan(wanted: Settings, found: dict[str, Found] | None = None, **changes: Any) -> Plan:
    return make_plan(wanted, replace(BARE, **changes), SOURCE, found=found)


# Settings


def faults(**data: Any) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        settings(**data)
    return caught.value.faults


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"model_draft": "http://h/d.gguf"}, "model_draft_sha256: a model from a URL needs"),
        ({**DRAFT, "model_draft": "u/r:Q4_0"}, "model_draft_sha256: the Hub tells the SHA-256"),
        ({"model_draft": "x"}, "model_draft: must be user/repo"),
        ({"model_lora": ["x"]}, "model_lora.0: must be user/repo"),
        ({"model_lora": [{"model": "/a.gguf", "scale": "1"}]}, "model_lora.0.scale: input should"),
        ({"model_lora": [{"model": "/a.gguf", "scal": 1}]}, "model_lora.0.scal: extra inputs"),
        ({"model_lora": ["/a.gguf", {"sha256": SHA256}]}, "model_lora.1.model: field required"),
        ({"model_lora": [{"model": "/a", "scale": float("nan")}]}, "model_lora.0.scale: "),
    ],
)
def test_a_fault_names_its_setting(data: dict[str, Any], said: str) -> None:
    (fault,) = faults(**data)
    assert fault.startswith(said)


def test_an_adapter_may_be_just_its_source() -> None:
    (lora,) = settings(model_lora=["/srv/a.gguf"]).model_lora
    assert (lora.model, lora.scale) == ("/srv/a.gguf", 1)


def test_an_instance_with_another_model_has_none_of_the_hosts_companions() -> None:
    own = {"model": "/other.gguf", "server_port": 8081}
    further = {"other": own, "same": {"server_port": 8082}}
    made = instances(settings(**DRAFT, **LORA, server_instances=further))
    assert list(parts(made["other"])) == [""]
    assert list(parts(made["same"])) == ["", "model_draft", "model_lora.0", "model_lora.1"]


# The plan


def test_they_are_fetched_kept_and_passed_as_arguments() -> None:
    made = plan(settings(**DRAFT, **LORA))
    assert made.errors == ()
    main, draft, plain, half = made.models
    words = " ".join(made.servers[0].arguments)
    assert f"--model {main.path} " in words
    assert f"--model-draft {draft.path} --spec-type draft-simple --lora {plain.path} " in words
    assert f"--lora-scaled {half.path}:0.5" in words
    assert made.needs_download
    assert [each.split()[1] for what, each in rows(made) if what == "model"] == [
        "model.gguf", "draft.gguf", "plain.gguf", "half.gguf",
    ]  # fmt: skip
    told = json.loads(json.dumps(as_json(made)))["instances"][0]["model"]
    assert len(told["files"]) == 4
    assert len({each.record_path for each in made.models}) == 4
    records = {each.record_path: (5, each.record.as_json()) for each in made.models if each.record}
    kept = plan(settings(**DRAFT, **LORA, model_keep=0), records=records)
    assert not kept.removal
    assert len(plan(settings(model_keep=0), records=records).removal.records) == 3


def test_how_is_drafted_can_be_said_otherwise() -> None:
    wanted = settings(**DRAFT, server_extra_args=["--spec-type", "draft-mtp"])
    assert " ".join(plan(wanted).servers[0].arguments).count("--spec-type") == 1


def test_another_scale_or_draft_is_another_server() -> None:
    digests = [
        plan(settings(**data)).servers[0].digest
        for data in ({}, DRAFT, LORA, {**DRAFT, "model_draft_sha256": "c" * 64})
    ]
    assert len(set(digests)) == 4


def test_the_draft_goes_where_the_model_goes() -> None:
    made = make_plan(settings(**DRAFT, server_gpu_layers=20), WITH_DRIVER, SOURCE)
    assert "--n-gpu-layers-draft 20" in " ".join(made.servers[0].arguments)
    assert "--n-gpu-layers-draft" not in plan(settings(**DRAFT)).servers[0].arguments


def test_in_a_router_they_stand_in_the_preset_file() -> None:
    made = plan(settings(**DRAFT, **LORA, server_router=True))
    (file,) = [file for file in made.servers[0].own if file.path == server.PRESET]
    _, draft, plain, half = made.models
    for line in (
        f"model-draft = {draft.path}", f"lora = {plain.path}", f"lora-scaled = {half.path}:0.5",
    ):  # fmt: skip
        assert line in file.content.splitlines()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DRAFT, "model_draft: llama-server of release"),
        ({"model_lora": ["/a.gguf"]}, "knows no --lora"),
        ({"model_lora": [{"model": "/a.gguf", "scale": 2}]}, "knows no --lora-scaled"),
    ],
)
def test_a_llama_cpp_that_does_not_know_them_is_an_error(data: dict[str, Any], said: str) -> None:
    old = with_release(WITH_COMPILER, settings())
    found = [str(each) for each in make_plan(settings(**data), old, SOURCE).errors]
    assert [each for each in found if said in each]


def found_by_code(made: Plan) -> dict[str, Finding]:
    return {each.code: each for each in made.findings}


def test_a_finding_says_which_of_them_is_meant() -> None:
    missing = plan(settings(model_draft="/none.gguf"))
    assert found_by_code(missing)["model-missing"].cause == (
        "model_draft: there is no file /none.gguf on the host"
    )
    further = {"e": {"server_port": 8081, "model_lora": ["/none.gguf"]}}
    (found,) = plan(settings(server_instances=further)).errors
    assert found.cause.startswith("server_instances.e: model_lora.0: there is no file /none.gguf")
    unreached = {"/model_draft": Found(reach=Reach("refused"))}
    assert found_by_code(plan(settings(**DRAFT), unreached))["model-unreachable"].cause.startswith(
        "model_draft: the host cannot get"
    )


def test_a_path_that_would_be_taken_for_two_is_an_error() -> None:
    assert "lora-path" in found_by_code(plan(settings(model_lora=["/srv/a:b.gguf"])))


# Memory


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    """13 GiB of weights."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    dims = Dimensions(
        "llama", layers=64, width=4096, feed_forward=11008, heads=32, heads_kv=32, head_size=128
    )
    write(path, dims, data=False)
    return shape_of(read_header(Bytes(path.read_bytes())))


SMALL = {"server_ctx_size": 512, "server_parallel": 1}


def test_a_draft_is_counted_beside_its_model(shape: Shape) -> None:
    wanted = settings(**DRAFT, **SMALL)
    known = {"": Found(shape=shape), "/model_draft": Found(shape=shape)}
    made = plan(wanted, known, memory_bytes=24 * GIB)
    (found,) = made.errors
    assert found.cause.startswith("model_draft: draft.gguf needs")
    roomy = plan(wanted, known, memory_bytes=48 * GIB)
    assert roomy.errors == ()
    assert len([what for what, _ in rows(roomy) if what == "memory"]) == 2


def test_adapters_weigh_what_their_files_do(shape: Shape) -> None:
    known = {"": Found(shape=shape), "/model_lora.0": Found(reach=Reach(None, GIB, "47475546"))}
    lora = {"model_lora": LORA["model_lora"][:1]}
    with_it, without = (plan(settings(**data, **SMALL), known).main.fit for data in (lora, {}))
    assert with_it is not None
    assert without is not None
    more = with_it.total.weights - without.total.weights
    assert abs(more - GIB) < 1000


# The lookup


def test_an_adapter_is_known_by_its_header_and_has_no_shape(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora.gguf")
    found, said = model_lookup.resolve(load({"model": f"file:{adapter}"}), BARE, adapter=True)
    assert said == ()
    assert found.shape is None
    assert [each.path for each in found.originals] == [str(adapter)]


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    dims = Dimensions("llama", layers=1, width=64, feed_forward=64, heads=2, vocabulary=300)
    (path,) = write(tmp_path / "m.gguf", dims)
    _, (found,) = model_lookup.resolve(load({"model": f"file:{path}"}), BARE, adapter=True)
    assert found.code == "not-an-adapter"
