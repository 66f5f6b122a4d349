from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.probe import CACHE, PREFIX, STATE, SYSTEM, Probe
from tasks.rules.model import GGUF_MAGIC, Found, Reach
from tasks.rules.plan import make_plan
from tasks.rules.space import Need, findings

from .hosts import BARE, GIB, SHA256, SOURCE, WITH_COMPILER, settings, with_release


def free(**changes: int) -> Probe:
    places = {"prefix": PREFIX, "state": STATE, "cache": CACHE}
    changed = {places[name]: size for name, size in changes.items()}
    return replace(BARE, disk_free_bytes={**BARE.disk_free_bytes, **changed})


def codes(probe: Probe, size: int = GIB) -> list[str]:
    found = Found(reach=Reach(None, size, GGUF_MAGIC))
    plan = make_plan(settings(), probe, SOURCE, found={"": found})
    return [found.code for found in plan.errors]


def test_a_roomy_host_is_fine() -> None:
    assert codes(BARE) == []


@pytest.mark.parametrize("place", ["cache", "prefix"])
def test_no_space_for_the_build_is_an_error(place: str) -> None:
    assert codes(free(**{place: 1000})) == ["no-space"]


def test_a_model_larger_than_the_disk_is_an_error_before_the_download() -> None:
    assert codes(BARE, 50 * GIB) == ["no-space"]


def test_what_an_earlier_download_left_counts_as_fetched() -> None:
    assert codes(replace(BARE, partials={SHA256: 10 * GIB}), 50 * GIB) == []


def test_what_shares_a_disk_has_to_fit_there_together() -> None:
    needs = [Need(PREFIX, 30 * GIB, "a"), Need(STATE, 30 * GIB, "b"), Need(CACHE, GIB, "c")]
    (found,) = findings(needs, BARE)
    assert "/ has 50.0 GiB free, but 60.5 GiB are needed (a 30.0 GiB, b 30.0 GiB" in str(found)
    apart = replace(BARE, disk_mount={})
    assert list(findings(needs, apart)) == []


@pytest.mark.parametrize(
    ("place", "mount", "fix"),
    [
        (STATE, "/", f"`du -xh -d 2 / | sort -h | tail`), or mount a larger disk at {STATE}."),
        (SYSTEM, "/", "`du -xh -d 2 / | sort -h | tail`), or give it a larger disk."),
        (SYSTEM, "/usr", "`du -xh -d 2 /usr | sort -h | tail`), or give it a larger disk."),
        (
            CACHE,
            "/var",
            f"`du -xh -d 2 /var | sort -h | tail`), or mount a larger disk at {CACHE}.",
        ),
        (CACHE, CACHE, f"`du -xh -d 2 {CACHE} | sort -h | tail`), or mount a larger disk at"),
    ],
)
def test_where_space_can_be_found_is_said(place: str, mount: str, fix: str) -> None:
    probe = replace(BARE, disk_free_bytes={place: 1}, disk_mount={place: mount})
    (found,) = findings([Need(place, GIB, "a")], probe)
    assert f"Free space there ({fix}" in str(found)


def test_a_converged_host_may_be_full() -> None:
    built = with_release(WITH_COMPILER, settings())
    full = replace(
        built, blobs={SHA256: GIB}, disk_free_bytes=dict.fromkeys(BARE.disk_free_bytes, 1)
    )
    assert codes(full) == []


def test_unknown_space_is_no_error() -> None:
    assert codes(replace(BARE, disk_free_bytes={}), 10**15) == []
