"""Bad input: one clear line, exit 1, nothing changed, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import deploys
from tests.e2e.conftest import Deployed, new_host
from tests.e2e.snapshots import changes, snapshot
from tests.lab import Fault, Lab, LabHost

pytestmark = pytest.mark.lab


TAKEN = 9022


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    """A host that nothing was ever deployed to; something else listens there."""
    host = new_host(lab, "untouched")
    host.run(f"systemd-run --quiet python3 -m http.server --bind 127.0.0.1 {TAKEN}")
    return host


def refused(lab: Lab, host: LabHost, folder: Path, **data: Any) -> str:
    """Deploy, and expect one error line, exit 1, and nothing changed. The line."""
    before = snapshot(host)
    merged = {**deploys.access(lab, host), **deploys.wanted(lab), **data}
    merged = {key: value for key, value in merged.items() if value is not None}
    run = deploys.run(deploys.write_inventory(folder, {host.name: merged}))
    assert run.code == 1, run.said
    assert "Traceback" not in run.said
    assert "Starting operation" not in run.said.replace("Take the host's lock", "")
    assert len(run.errors) == 1, run.said
    assert changes(before, snapshot(host)) == []
    return run.errors[0]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"server_prot": 8080}, "did you mean server_port?"),
        ({"server_port": 70000}, "less than or equal to 65535"),
        ({"model_sha256": None}, "needs its SHA-256"),
        ({"llama_cpp_version": "f" * 40}, "has no commit ffff"),
        ({"llama_cpp_version": "no-such-tag"}, "has no tag or branch no-such-tag"),
        ({"model": "http://127.0.0.1:1/x.gguf", "proxy_http": None}, "Failed to connect"),
        ({"model": "/srv/none.gguf", "model_sha256": None}, "there is no file"),
        ({"model": "/etc/hostname", "model_sha256": None}, "is not a GGUF file"),
        ({"model": None, "model_sha256": None}, "no model is set"),
        ({"server_port": TAKEN}, "already taken by python3"),
        ({"server_port": 80}, "for root alone"),
        ({"server_host": "0.0.0.0", "server_require_api_key": False}, "beyond loopback"),
    ],
)
def test_a_bad_setting(
    lab: Lab, host: LabHost, tmp_path: Path, data: dict[str, Any], part: str
) -> None:
    assert part in refused(lab, host, tmp_path, **data)


def test_a_url_that_is_not_there(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    line = refused(lab, host, tmp_path, model=lab.outside.url("none.gguf"))
    assert "404" in line


def test_a_page_instead_of_a_model(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    url = lab.outside.put("page.gguf", "<!DOCTYPE html>")
    assert "begins with b'<!DO'" in refused(lab, host, tmp_path, model=url)


def test_a_model_larger_than_the_disk(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    host.run(
        "mkdir -p /var/lib/llamastead && "
        "mount -t tmpfs -o size=8m,mode=755 tmpfs /var/lib/llamastead"
    )
    try:
        line = refused(lab, host, tmp_path)
    finally:
        host.run("umount /var/lib/llamastead && rmdir /var/lib/llamastead")
    assert "/var/lib/llamastead has 0.0 GiB free" in line


def test_an_unsupported_system(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    host.run("printf 'ID=plan9\\nPRETTY_NAME=\"Plan 9\"\\n' >/run/os-release")
    host.run("mount --bind /run/os-release /usr/lib/os-release")
    try:
        assert "the host runs Plan 9" in refused(lab, host, tmp_path)
    finally:
        host.run("umount /usr/lib/os-release")


def test_a_host_without_systemd(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    host.run("mount -t tmpfs tmpfs /run/systemd")
    try:
        assert "systemd is not running" in refused(lab, host, tmp_path)
    finally:
        host.run("umount /run/systemd")


def test_not_root_and_no_sudo(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    line = refused(lab, host, tmp_path, ssh_user=host.admin_user)
    assert "not root on the host" in line


def test_sudo_without_the_password(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    line = refused(lab, host, tmp_path, ssh_user=host.admin_user, _sudo=True)
    assert "the host could not be looked at" in line


def test_sudo_with_a_wrong_password(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    line = refused(
        lab, host, tmp_path, ssh_user=host.admin_user, _sudo=True, _sudo_password="wrong"
    )
    assert "the host could not be looked at" in line


def test_check_changes_nothing_on_a_bare_host_and_exits_0(
    lab: Lab, host: LabHost, tmp_path: Path
) -> None:
    before = snapshot(host)
    data = {**deploys.access(lab, host), **deploys.wanted(lab)}
    inventory = deploys.write_inventory(tmp_path, {host.name: data})
    for arguments in ((), ("--dry",)):
        run = deploys.run(inventory, "check.py", arguments)
        assert run.code == 0, run.said
        assert "compile" in run.said
    dry = deploys.run(inventory, "deploy.py", ("--dry",))
    assert dry.code == 0, dry.said
    assert changes(before, snapshot(host)) == []


def test_check_exits_1_if_the_plan_has_errors(lab: Lab, host: LabHost, tmp_path: Path) -> None:
    data = {**deploys.access(lab, host), **deploys.wanted(lab), "server_port": TAKEN}
    run = deploys.run(deploys.write_inventory(tmp_path, {host.name: data}), "check.py")
    assert run.code == 1
    assert len(run.errors) == 1


def test_one_hosts_error_does_not_stop_the_others(
    debian_13: Deployed, host: LabHost, tmp_path: Path
) -> None:
    bad = {
        **deploys.access(debian_13.lab, host),
        **deploys.wanted(debian_13.lab),
        "server_port": TAKEN,
    }
    inventory = deploys.write_inventory(
        tmp_path, {debian_13.host.name: debian_13.data, host.name: bad}
    )
    run = deploys.run(inventory)
    assert run.code == 1
    assert len(run.errors) == 1
    assert run.changed == []
    assert f"host      {debian_13.host.name}" in run.said


# On a host that serves: what it serves is not touched.


def serves(deployed: Deployed) -> bool:
    url = f"http://{deployed.host.address}:8080/health"
    return deployed.host.run(f"curl -s {url}", check=False).stdout == '{"status":"ok"}'


def test_a_wrong_sha256_leaves_nothing_and_the_old_model_serves_on(debian_13: Deployed) -> None:
    run = debian_13.again(model_sha256="0" * 64)
    assert run.code == 1
    assert "has SHA-256" in run.said
    assert "Traceback" not in run.said
    assert not debian_13.host.run("find /var/lib/llamastead -name '*00000*'").stdout.strip()
    assert serves(debian_13)
    assert debian_13.again().changed == []


def test_a_stale_cmake_option_is_named_and_the_old_release_serves_on(debian_13: Deployed) -> None:
    run = debian_13.again(llama_cpp_cmake_args={"GGML_CUDA_KQUANTS_ITER": "2"})
    assert run.code == 1
    assert "CMake option GGML_CUDA_KQUANTS_ITER is not one that llama.cpp" in run.said
    assert serves(debian_13)
    assert debian_13.again().changed == []


def test_an_unknown_server_option_is_an_error_before_anything_is_changed(
    debian_13: Deployed,
) -> None:
    run = debian_13.again(server_extra_args=["--mlock"])
    assert run.code == 1
    assert "knows no --mlock" in run.said
    assert serves(debian_13)


def test_two_deploys_at_the_same_time(debian_13: Deployed) -> None:
    lab = debian_13.lab
    slow = lab.outside.put("slow.gguf", b"GGUF" + bytes(3_000_000))
    lab.outside.play(Fault(path="/slow.gguf", bytes_per_second=100_000))
    folder = debian_13.folder / "first"
    folder.mkdir(exist_ok=True)
    data = {**debian_13.data, "model": slow, "model_sha256": "1" * 64}
    inventory = deploys.write_inventory(folder, {debian_13.host.name: data})
    try:
        with deploys.running(inventory):
            debian_13.host.run(
                "n=0; until systemctl is-active -q llamastead-fetch; do n=$((n+1)); "
                "[ $n -lt 150 ]; sleep .2; done"
            )
            second = debian_13.again()
    finally:
        lab.outside.heal()
        debian_13.host.run(
            "systemctl stop llamastead-fetch; systemctl reset-failed llamastead-fetch; "
            "rm -f /var/lib/llamastead/incoming/*"
        )
    assert second.code == 1
    assert len(second.errors) == 1
    assert "another deploy is at work on this host" in second.errors[0]
    assert debian_13.again().changed == []
