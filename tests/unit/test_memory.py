"""The memory of a host, and what is said where a model does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tasks import model_lookup
from tasks.probe import SERVER_UNIT, UNIT_MARK, Service
from tasks.rules import memory
from tasks.rules.architecture import Shape, shape_of
from tasks.rules.gguf import Bytes, read_header
from tasks.rules.model import Found
from tasks.rules.plan import make_plan, rows
from tasks.settings import Settings
from tests.gguf_models import Dimensions, write

from .hosts import BARE, GIB, SOURCE, WITH_CARD, settings

MIB = 1024**2


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(path, Dimensions("llama", layers=32, width=4096, feed_forward=11008), data=False)
    return shape_of(read_header(Bytes(path.read_bytes())))


def known(shape: Shape, *alternatives: str) -> dict[str, Found]:
    return {"": Found(shape=shape, alternatives=alternatives)}


def host_size(used_gib: float, ours_gib: float = 0) -> float:
    """GiB that a server may use of 32."""
    service = Service("active", "running", "enabled", 1, need_daemon_reload=False, executable=None,
                      digest=None, anonymous_bytes=int(ours_gib * GIB), mark=UNIT_MARK)  # fmt: skip
    probe = replace(
        BARE, memory_available_bytes=int((32 - used_gib) * GIB), services={SERVER_UNIT: service}
    )
    found = memory.places(settings(), probe)
    assert found is not None
    return found[1].size / GIB


@pytest.mark.parametrize(
    ("used", "ours", "size"), [(0.5, 0, 32), (1, 0, 32), (9, 0, 24), (9, 8, 32), (9, 5, 29)]
)
def test_what_others_hold_is_not_ours_and_what_we_hold_is(
    used: float, ours: float, size: float
) -> None:
    assert host_size(used, ours) == size


def test_a_card_counts_where_it_is_used() -> None:
    for backend, count in (("auto", 1), ("cpu", 0)):
        found = memory.places(settings(llama_cpp_backend=backend), WITH_CARD)
        assert found is not None
        assert len(found[0]) == count
    assert memory.places(settings(), replace(BARE, memory_bytes=None)) is None


def test_a_model_that_fits_is_said_to_and_one_that_does_not_is_an_error(shape: Shape) -> None:
    plan = make_plan(settings(), BARE, SOURCE, found=known(shape))
    assert plan.errors == ()
    assert "of 32.0 GiB on this host" in dict(rows(plan))["memory"]
    small = replace(BARE, memory_bytes=4 * GIB)
    plan = make_plan(settings(), small, SOURCE, found=known(shape, "Q4_0"))
    (found,) = plan.errors
    assert found.code == "model-too-large"
    assert "model with Q4_0" in found.fix
    plan = make_plan(settings(server_ctx_size=2**20), BARE, SOURCE, found=known(shape))
    (found,) = plan.errors
    assert "server_ctx_size = " in found.fix


def test_a_file_of_this_machine_is_read_through_once(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    write(path, Dimensions("llama", layers=1, width=64, feed_forward=64, heads=2, vocabulary=300))
    wanted = upload(path)
    found, faults = model_lookup.resolve(wanted, BARE)
    assert faults == ()
    assert found.shape is not None
    (original,) = found.originals
    assert original.path == str(path)
    assert original.size == path.stat().st_size
    made = make_plan(wanted, BARE, SOURCE, found={"": found})
    assert made.errors == ()
    assert not made.needs_download
    assert "copy own.gguf" in dict(rows(made))["model"]


@pytest.mark.parametrize(
    ("content", "code"), [(None, "model-missing"), (b"<html>" * 9, "model-not-gguf")]
)
def test_a_file_of_this_machine_that_is_no_model(
    tmp_path: Path, content: bytes | None, code: str
) -> None:
    path = tmp_path / "own.gguf"
    if content is not None:
        path.write_bytes(content)
    wanted = upload(path)
    found, faults = model_lookup.resolve(wanted, BARE)
    assert [fault.code for fault in faults] == [code]
    assert make_plan(wanted, BARE, SOURCE, faults=faults, found={"": found}).main.model is None


def upload(path: Path) -> Settings:
    return settings(model=f"file:{path}", model_sha256=None)
