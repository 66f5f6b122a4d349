from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.probe import ModelPath, Probe
from tasks.rules import model
from tasks.rules.model import GGUF_MAGIC, Found, Reach

from .hosts import BARE, GIB, SHA256, URL, settings

PATH = "/srv/models/own.gguf"
THERE = ModelPath(exists=True, size=5, world_readable=True, magic=GGUF_MAGIC)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/a/model.gguf", "model.gguf"),
        ("https://h/a/model.GGUF?download=true", "model.gguf"),
        ("https://h/a/Model-Q4_K_M.gguf#x", "Model-Q4_K_M.gguf"),
        ("https://h/resolve", "resolve.gguf"),
        ("https://h/a/..%2f..%2fetc%2fpasswd", "passwd.gguf"),
        ("https://h/a/$(reboot).gguf", "__reboot_.gguf"),
        ("https://h/a/;rm -rf.gguf", "_rm_-rf.gguf"),
        ("https://h/a/.gguf", "model.gguf"),
        ("https://h/a/%00.gguf", "_.gguf"),
        ("https://h/a/", "model.gguf"),
    ],
)
def test_a_url_gives_a_harmless_file_name(url: str, name: str) -> None:
    assert model.file_name(url) == name


@given(st.text())
def test_whatever_the_url_the_file_name_is_harmless(tail: str) -> None:
    name = model.file_name("https://host/" + tail)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.gguf", name)
    assert len(name) < 200


def test_without_a_model_there_is_nothing_to_serve() -> None:
    assert model.plan(settings().model_copy(update={"model": None}), BARE) is None
    assert [
        found.code
        for found in model.findings(settings().model_copy(update={"model": None}), None, BARE)
    ] == ["no-model"]


def test_a_url_is_kept_once_by_its_sha256_under_a_name_that_people_read() -> None:
    plan = model.plan(settings(), BARE)
    assert plan is not None
    assert plan.path == f"/var/lib/llamastead/models/{SHA256[:12]}/model.gguf"
    assert plan.parts[0].blob == f"/var/lib/llamastead/models/blobs/{SHA256}"
    assert not plan.stored


def records_of(probe: Probe) -> dict[str, tuple[int, str]]:
    plan = model.plan(settings(), probe)
    assert plan is not None
    assert plan.record is not None
    return {plan.record_path: (1, plan.record.as_json())}


def test_a_model_is_there_when_blob_and_name_are() -> None:
    path = f"/var/lib/llamastead/models/{SHA256[:12]}/model.gguf"
    only_blob = replace(BARE, blobs={SHA256: 5})
    both = replace(only_blob, links={path: f"../blobs/{SHA256}"})
    recorded = replace(both, records=records_of(both))
    astray = replace(only_blob, links={path: "../blobs/other"})

    def state(probe: Probe) -> tuple[bool, bool]:
        plan = model.plan(settings(), probe)
        assert plan is not None
        return not plan.missing, plan.stored

    assert state(BARE) == (False, False)
    assert state(only_blob) == (True, False)
    assert state(astray) == (True, False)
    assert state(both) == (True, False)
    assert state(recorded) == (True, True)


def codes(probe: Probe, reach: Reach | None = None, **data: object) -> list[str]:
    plan = model.plan(settings(**data), probe, Found(reach=reach))
    assert plan is not None
    told = model.findings(settings(**data), plan, probe, reach)
    return [found.code for found in told]


def test_a_model_that_can_be_had_and_fits_the_disk_is_fine() -> None:
    assert codes(BARE, Reach(None, 5 * GIB, GGUF_MAGIC)) == []


def test_an_address_that_does_not_answer_is_an_error_before_anything_is_changed() -> None:
    assert codes(BARE, Reach("Could not resolve host: h")) == ["model-unreachable"]


def test_a_page_about_a_model_is_not_a_model() -> None:
    reach = Reach(None, 900, b"<!DO".hex())
    plan = model.plan(settings(), BARE)
    (found,) = model.findings(settings(), plan, BARE, reach)
    assert found.code == "model-not-gguf"
    assert "<!DO" in str(found)
    assert URL in str(found)


def test_a_host_that_could_not_ask_is_given_the_benefit_of_the_doubt() -> None:
    assert codes(BARE, Reach(None)) == []


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (THERE, []),
        (None, ["model-missing"]),
        (ModelPath(exists=False), ["model-missing"]),
        (replace(THERE, magic="3c21444f"), ["model-not-gguf"]),
        (replace(THERE, magic=None), ["model-not-gguf"]),
        (replace(THERE, magic=""), ["model-not-gguf"]),
        (replace(THERE, world_readable=False), ["model-unreadable"]),
    ],
)
def test_a_file_on_the_host_is_looked_at(there: ModelPath | None, expected: list[str]) -> None:
    probe = replace(BARE, model_paths={PATH: there} if there else {})
    assert codes(probe, model=PATH, model_sha256=None) == expected


def test_a_file_on_the_host_is_served_where_it_is() -> None:
    probe = replace(BARE, model_paths={PATH: THERE})
    plan = model.plan(settings(model=PATH, model_sha256=None), probe)
    assert plan is not None
    assert (plan.path, plan.url, plan.stored) == (PATH, None, True)


def test_a_file_on_the_host_is_verified_once_if_a_sha256_is_given() -> None:
    wanted = settings(model=PATH)

    def stored(sha256: str | None) -> bool:
        probe = replace(BARE, model_paths={PATH: replace(THERE, sha256=sha256)})
        plan = model.plan(wanted, probe)
        assert plan is not None
        return plan.stored

    assert not stored(None)
    assert not stored("b" * 64)
    assert stored(SHA256)
