"""What is kept on a host, and what may go."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.probe import BLOBS, MODELS, RECORDS
from tasks.rules import model, model_record
from tasks.rules.hub_files import Candidate, HubFile, HubModel, Reference
from tasks.rules.model import Found, ModelPlan
from tasks.rules.model_record import Record, removal

from .hosts import BARE, settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def a_file(path: str, letter: str, size: int = 100) -> HubFile:
    url = f"https://hub/user/Model-GGUF/resolve/{COMMIT}/{path}"
    return HubFile(path, size, letter * 64, url)


SPLIT = HubModel(
    Reference("user/Model-GGUF", "Q4_K_M"),
    COMMIT,
    gated=False,
    candidate=Candidate(
        "Q4_K_M/m-Q4_K_M",
        "Q4_K_M",
        (
            a_file("Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "a"),
            a_file("Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", "b"),
        ),
    ),
    projector=a_file("mmproj-F16.gguf", "c", 10),
)
WANTED = settings(model="user/Model-GGUF:Q4_K_M", model_sha256=None)


def planned(probe: model.Probe = BARE) -> ModelPlan:
    made = model.plan(WANTED, probe, Found(hub=SPLIT))
    assert made is not None
    return made


def test_parts_keep_their_names_side_by_side_and_are_stored_by_their_sha256() -> None:
    made = planned()
    folder = f"{MODELS}/user/Model-GGUF/{COMMIT[:12]}"
    assert [file.path for file in made.files] == [
        f"{folder}/Q4_K_M/m-Q4_K_M-00001-of-00002.gguf",
        f"{folder}/Q4_K_M/m-Q4_K_M-00002-of-00002.gguf",
        f"{folder}/mmproj-F16.gguf",
    ]
    assert made.path == made.files[0].path
    assert made.files[0].blob == f"{BLOBS}/{'a' * 64}"
    assert made.files[0].target == f"../../../../blobs/{'a' * 64}"
    assert made.size == 210
    assert "3 files" in model.sentence(made)


def test_two_files_of_the_same_content_are_fetched_once() -> None:
    same = replace(SPLIT, projector=a_file("mmproj-F16.gguf", "a"))
    made = model.plan(WANTED, BARE, Found(hub=same))
    assert made is not None
    assert len(made.missing) == 2


@pytest.mark.parametrize(
    "path", ["../x.gguf", "a b/ü.gguf", "-rf.gguf", "$(x).gguf", ".hidden/m.gguf"]
)
def test_whatever_a_repository_calls_a_file_it_stays_in_the_store(path: str) -> None:
    odd = replace(SPLIT, candidate=Candidate("m", None, (a_file(path, "a"),)), projector=None)
    made = model.plan(WANTED, BARE, Found(hub=odd))
    assert made is not None
    folder = f"{MODELS}/user/Model-GGUF/{COMMIT[:12]}/"
    assert made.path.startswith(folder)
    assert ".." not in made.path
    assert set(made.path) <= set(
        "/._-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    )


def test_it_is_stored_when_files_names_and_record_are_there() -> None:
    made = planned()
    assert made.record is not None
    probe = replace(BARE, blobs={"a" * 64: 100, "b" * 64: 100, "c" * 64: 10})
    assert not planned(probe).stored
    probe = replace(probe, links={file.path: file.target for file in made.files})
    assert not planned(probe).stored
    probe = replace(probe, records={made.record_path: (5, made.record.as_json())})
    assert planned(probe).stored
    kept = model.pinned(WANTED, probe)
    assert kept is not None
    assert kept.hub == SPLIT
    assert model.pinned(WANTED, replace(probe, blobs={"a" * 64: 100})) is None
    other = settings(model="user/Model-GGUF:Q4_K_M", model_sha256=None, model_revision="v2")
    assert model.pinned(other, probe) is None


@given(st.text())
def test_a_damaged_record_is_none(text: str) -> None:
    assert Record.from_json(text) is None


def test_a_file_that_was_damaged_in_the_store_is_fetched_again() -> None:
    kept = planned()
    whole = replace(
        BARE,
        blobs={file.sha256 or "": file.size or 0 for file in kept.files},
        links={file.path: file.target for file in kept.files},
        records={kept.record_path: (1, kept.record.as_json() if kept.record else "")},
    )
    assert planned(whole).stored
    for file in kept.files:
        short = replace(whole, blobs={**whole.blobs, file.sha256 or "": 99})
        assert [each.sha256 for each in planned(short).missing] == [file.sha256]


def test_how_long_a_file_of_an_address_is_is_remembered() -> None:
    wanted = settings(model="https://host/m.gguf")
    first = model.plan(wanted, BARE, model.Found(reach=model.Reach(None, 100, None)))
    assert first is not None
    assert first.record is not None
    stored = replace(
        BARE,
        blobs={first.sha256 or "": 100},
        links={first.path: first.parts[0].target},
        records={first.record_path: (0, first.record.as_json())},
    )
    second = model.plan(wanted, stored)
    assert second is not None
    assert second.stored
    damaged = model.plan(wanted, replace(stored, blobs={first.sha256 or "": 60}))
    assert damaged is not None
    assert not damaged.stored
    assert damaged.missing


def test_an_address_is_recorded_without_what_signs_it() -> None:
    url = "https://me:password@host/m.gguf?Signature=secret"
    made = model.plan(settings(model=url), BARE)
    assert made is not None
    assert made.record is not None
    assert made.record.model == "https://host/m.gguf"
    assert "secret" not in made.record.as_json()


# What goes


def record(name: str, letter: str) -> Record:
    return Record(name, {f"{MODELS}/{name}/m.gguf": letter * 64})


def on_host(*records: Record, **more: object) -> model.Probe:
    return replace(
        BARE,
        blobs={letter * 64: 100 for letter in "abcd"},
        links={path: f"../blobs/{sha}" for each in records for path, sha in each.files.items()},
        records={
            f"{RECORDS}/{each.model}.json": (number, each.as_json())
            for number, each in enumerate(records, start=1)
        },
        **more,  # type: ignore[arg-type]
    )


A, B, C = record("a", "a"), record("b", "b"), record("c", "c")


def test_the_last_ones_before_it_stay() -> None:
    gone = removal({f"{RECORDS}/new.json": record("new", "d")}, on_host(A, B, C), 1)
    assert gone.models == ("b", "a")
    assert gone.blobs == ("b" * 64, "a" * 64)
    assert gone.links == (f"{MODELS}/b/m.gguf", f"{MODELS}/a/m.gguf")
    assert gone.bytes == 200


def test_what_never_served_goes_first() -> None:
    probe = on_host(A, B)
    path = f"{RECORDS}/b.json"
    probe = replace(probe, records={**probe.records, path: (0, B.as_json())})
    gone = removal({f"{RECORDS}/new.json": record("new", "d")}, probe, 1)
    assert gone.models == ("b",)


def test_all_may_stay() -> None:
    assert not removal({f"{RECORDS}/new.json": record("new", "d")}, on_host(A, B, C), "all")


def test_what_the_wanted_or_a_kept_model_shares_stays() -> None:
    shares = replace(A, files={**A.files, f"{MODELS}/a/mmproj.gguf": "c" * 64})
    gone = removal({f"{RECORDS}/c.json": C}, on_host(shares, C), 0)
    assert gone.blobs == ("a" * 64,)
    assert f"{MODELS}/a/mmproj.gguf" in gone.links


def test_a_link_of_somebodys_own_holds_its_file() -> None:
    probe = on_host(A, C)
    probe = replace(probe, links={**probe.links, f"{MODELS}/mine": f"blobs/{'a' * 64}"})
    assert removal({f"{RECORDS}/c.json": C}, probe, 0).blobs == ()


def test_what_the_servers_arguments_name_stays() -> None:
    probe = on_host(A, C)
    said = ["--lora", f"{MODELS}/a/m.gguf"]
    assert removal({f"{RECORDS}/c.json": C}, probe, 0, said).links == ()


@pytest.mark.parametrize("path", ["/etc/passwd", f"{MODELS}/../../../etc/passwd", "x"])
def test_a_record_that_names_something_else_removes_nothing_there(path: str) -> None:
    odd = Record("a", {path: "a" * 64})
    gone = removal({f"{RECORDS}/c.json": C}, on_host(odd, C), 0)
    assert gone.links == ()
    assert gone.blobs == ()


def test_downloads_that_were_given_up_go_and_the_wanted_one_stays() -> None:
    probe = on_host(C, partials={"e" * 64: 7, "c" * 64: 5})
    gone = removal({f"{RECORDS}/c.json": C}, probe, 1)
    assert gone.partials == ("e" * 64,)
    assert "given up" in model_record.sentence(gone)
