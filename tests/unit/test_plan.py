from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.probe import CACHE, PREFIX, STATE, Folder, Probe
from tasks.rules.findings import Severity, error, warning
from tasks.rules.model import Found, Reach
from tasks.rules.plan import Plan, as_json, make_plan, rows, watched_packages

from .hosts import BARE, SOURCE, WITH_CARD, WITH_COMPILER, WITH_DRIVER, settings, with_release


def reached(*told: Any) -> dict[str, Found]:
    """What is known once the host has asked for the model."""
    return {"": Found(reach=Reach(*told))}


def codes(plan: Plan) -> set[str]:
    return {found.code for found in plan.errors}


def test_a_fresh_host_gets_everything() -> None:
    plan = make_plan(settings(), BARE, SOURCE)
    assert plan.errors == ()
    assert plan.needs_build
    assert plan.needs_download
    assert "g++" in plan.missing_packages
    assert not plan.is_current


def test_what_is_installed_is_not_installed_again() -> None:
    assert make_plan(settings(), WITH_COMPILER, SOURCE).missing_packages == ()


def test_a_host_with_its_release_needs_no_compiler() -> None:
    built = replace(with_release(WITH_COMPILER, settings()), packages={}, compilers={})
    plan = make_plan(settings(), built, SOURCE)
    assert not plan.needs_build
    assert plan.is_current
    assert plan.missing_packages == ("ca-certificates", "curl", "libgomp1")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"uid": 1000}, "not-root"),
        ({"uid": None}, "not-root"),
        ({"os_id": "fedora", "os_version": "42"}, "unsupported-os"),
        ({"os_version": "11"}, "unsupported-os"),
        ({"os_id": None}, "unsupported-os"),
        ({"arch": "riscv64"}, "unsupported-architecture"),
        ({"arch": None}, "unsupported-architecture"),
        ({"systemd_running": False}, "no-systemd"),
        ({"systemd_running": False, "wsl": True, "wsl_gpu": True}, "no-systemd"),
        ({"locked_by": "me@box"}, "deploy-running"),
        ({"folders": {PREFIX: Folder(0o755, "me")}}, "folder-not-ours"),
        ({"folders": {PREFIX: Folder(0o775, "root")}}, "folder-not-ours"),
        ({"checkout": PREFIX}, "folder-not-ours"),
    ],
)
def test_a_host_that_cannot_work_is_told_why(change: dict[str, object], code: str) -> None:
    assert codes(make_plan(settings(), replace(BARE, **change), SOURCE)) == {code}  # type: ignore[arg-type]


def test_folders_of_ours_are_no_obstacle() -> None:
    probe = replace(BARE, folders=dict.fromkeys((PREFIX, STATE, CACHE), Folder(0o755, "root")))
    assert codes(make_plan(settings(), probe, SOURCE)) == set()


@pytest.mark.parametrize(
    ("os_id", "os_version"),
    [
        ("ubuntu", "22.04"),
        ("ubuntu", "24.04"),
        ("ubuntu", "26.04"),
        ("debian", "12"),
        ("debian", "13"),
    ],
)
@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_supported_systems_are_supported(os_id: str, os_version: str, arch: str) -> None:
    probe = replace(BARE, os_id=os_id, os_version=os_version, arch=arch)
    assert make_plan(settings(), probe, SOURCE).errors == ()


def test_all_errors_of_a_host_are_told_together() -> None:
    probe = replace(BARE, uid=1000, arch="riscv64", systemd_running=False)
    plan = make_plan(settings(), probe, SOURCE, found=reached("no route to host"))
    assert codes(plan) == {
        "not-root",
        "unsupported-architecture",
        "no-systemd",
        "model-unreachable",
    }


def test_an_empty_probe_is_a_plan_full_of_errors_not_a_traceback() -> None:
    plan = make_plan(settings(), Probe(), SOURCE)
    assert plan.errors
    assert rows(plan)
    json.dumps(as_json(plan))


def test_a_version_that_could_not_be_resolved_leaves_the_rest_to_be_judged() -> None:
    plan = make_plan(settings(), BARE, None, faults=(error("no-such-version", "no"),))
    assert codes(plan) == {"no-such-version"}
    assert plan.build is None
    assert not plan.needs_build


def test_errors_come_first() -> None:
    plan = make_plan(settings(), replace(BARE, uid=1), SOURCE, faults=(warning("w", "careful"),))
    assert [found.severity for found in plan.findings] == [Severity.ERROR, Severity.WARNING]


def test_every_error_says_what_is_wrong_and_what_to_do() -> None:
    probe = replace(
        BARE,
        uid=1,
        os_id="x",
        arch="y",
        systemd_running=False,
        locked_by="z",
        disk_free_bytes=dict.fromkeys(BARE.disk_free_bytes, 1),
    )
    plan = make_plan(settings(), probe, SOURCE, found=reached("refused", 10**9))
    assert len(plan.errors) >= 7
    for found in plan.errors:
        assert found.cause
        assert found.fix, found.code
        assert str(found).endswith((".", "`", "?"))


def test_the_plan_reads_as_sentences() -> None:
    text = "\n".join(
        f"{what}: {decision}"
        for what, decision in rows(
            make_plan(settings(), BARE, SOURCE, found=reached(None, 2_600_000, "47475546"))
        )
    )
    assert "host: Debian GNU/Linux 13 (trixie), x86_64, 8 cores, 32 GiB" in text
    assert "llama.cpp: compile b9999 (commit 0c1e57098bba) for the CPU, 8 jobs" in text
    assert "model: fetch model.gguf (2.6 MB)" in text
    assert "server: start llama-server at 127.0.0.1:8080, 4 x 4096 tokens" in text


def test_a_card_gets_a_driver_and_a_toolkit_each_with_its_reason() -> None:
    plan = make_plan(settings(), WITH_CARD, SOURCE)
    assert plan.errors == ()
    assert plan.stack is not None
    text = "\n".join(f"{what}: {decision}" for what, decision in rows(plan))
    assert "GPU: GeForce RTX 5090" in text
    assert "driver: driver 595 from NVIDIA's repository: the first choice fits (open" in text
    assert "CUDA: CUDA 13.2.2: the first choice fits (compiles for 120a-real)" in text
    told = json.loads(json.dumps(as_json(plan)))["nvidia"]
    assert told["driver"]["install"] is True
    assert told["toolkit"]["cuda"] == "13.2"
    assert told["architectures"] == ["120a-real"]


def test_a_driver_that_is_there_stays() -> None:
    plan = make_plan(settings(), WITH_DRIVER, SOURCE)
    assert plan.stack is not None
    assert plan.stack.driver.choice is not None
    assert plan.stack.driver.choice.installed


def test_without_a_card_nothing_of_nvidia_is_wanted() -> None:
    assert make_plan(settings(), BARE, SOURCE).stack is None
    assert make_plan(settings(llama_cpp_backend="cpu"), WITH_CARD, SOURCE).stack is None


@pytest.mark.parametrize(("wsl", "where"), [(False, "lspci"), (True, "in Windows")])
def test_cuda_without_a_card_says_what_to_do(wsl: bool, where: str) -> None:
    plan = make_plan(
        settings(llama_cpp_backend="cuda"), replace(BARE, wsl=wsl, wsl_gpu=wsl), SOURCE
    )
    (found,) = plan.errors
    assert found.code == "no-gpu"
    assert where in found.fix


def test_the_plan_for_programs_is_plain_json() -> None:
    told = json.loads(json.dumps(as_json(make_plan(settings(), BARE, SOURCE))))
    assert told["llama_cpp"]["compile"] is True
    assert told["instances"][0]["model"]["fetch"] is True
    assert told["findings"] == []


def test_the_probe_looks_at_every_package_that_a_plan_may_want() -> None:
    plan = make_plan(settings(), BARE, SOURCE)
    assert set(plan.missing_packages) <= set(watched_packages())


maybe_text = st.none() | st.text(max_size=8)
probes = st.builds(
    Probe,
    uid=st.none() | st.integers(0, 2),
    arch=st.sampled_from([None, "x86_64", "aarch64", "mips"]),
    kernel=maybe_text,
    os_id=st.sampled_from([None, "debian", "ubuntu", "arch"]),
    os_version=st.sampled_from([None, "12", "13", "24.04", ""]),
    os_name=maybe_text,
    systemd_running=st.booleans(),
    systemd_version=st.none() | st.integers(200, 300),
    cores=st.none() | st.integers(0, 512),
    memory_bytes=st.none() | st.integers(0, 2**50),
    disk_free_bytes=st.dictionaries(st.sampled_from([PREFIX, STATE, CACHE]), st.integers(0, 2**50)),
    wsl=st.booleans(),
)


@given(probes)
def test_whatever_the_host_there_is_a_plan(probe: Probe) -> None:
    plan = make_plan(settings(), probe, SOURCE)
    assert rows(plan)
    json.dumps(as_json(plan))
    assert plan.build is not None
    assert plan.build.jobs >= 1
