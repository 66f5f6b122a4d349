"""Hosts with a past: what is there stays whose it is, and what stands in the way is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import deploys
from tests.e2e.conftest import Deployed, deploy, new_host
from tests.e2e.watcher import Watcher, kept
from tests.lab import Lab

pytestmark = pytest.mark.lab

PASSWORD = "s3cret-of-nothing"
DROP_IN = "/etc/systemd/system/llama-server.service.d"


@pytest.fixture(scope="module")
def strange(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Root's umask is 077, /opt is a link to another disk, and our users' names are taken."""
    host = new_host(lab, "strange")
    host.run(
        "for kind in common-session common-session-noninteractive; do "
        "echo 'session optional pam_umask.so umask=0077' >>/etc/pam.d/$kind; done; "
        "useradd --create-home --shell /bin/bash llama; groupadd llamastead; "
        "mkdir /data; mv /opt /data/opt; ln -s /data/opt /opt"
    )
    assert host.ssh("umask").stdout == "0077\n"
    with Watcher(host, PASSWORD, user=host.admin_user) as watcher:
        made = deploy(
            lab,
            host,
            tmp_path_factory.mktemp("strange"),
            sudo=False,
            arguments=("-v", "--debug"),
            proxy_http=with_password(lab.outside.proxy_url),
            proxy_https=with_password(lab.outside.proxy_url),
            llama_cpp_repo=with_password(lab.outside.git_url),
        )
    assert watcher.looks > 100
    assert watcher.seen == {}
    return made


def with_password(url: str) -> str:
    return url.replace("://", f"://me:{PASSWORD}@")


def serves(deployed: Deployed) -> bool:
    said = deployed.host.run("curl -s http://127.0.0.1:8080/health", check=False).stdout
    return said == '{"status":"ok"}'


def test_it_serves_and_a_second_run_changes_nothing(strange: Deployed) -> None:
    assert serves(strange)
    assert strange.again().changed == []


def test_no_password_is_seen_or_kept(strange: Deployed) -> None:
    """Not by its processes either: see above."""
    assert PASSWORD not in strange.first.said + strange.first.out
    assert kept(strange.host, PASSWORD) == ""


def test_a_person_keeps_shell_and_home(strange: Deployed) -> None:
    told = strange.host.run("getent passwd llama llamastead; ls -d /nonexistent", check=False)
    assert ":/home/llama:/bin/bash\n" in told.stdout
    assert ":/nonexistent:/usr/sbin/nologin\n" in told.stdout
    assert "cannot access '/nonexistent'" in told.stderr  # it is the home of `nobody`, too


def test_the_release_that_serves_is_remembered_behind_a_link(strange: Deployed) -> None:
    assert strange.again(server_parallel=2).code == 0
    kept = strange.host.run("cat /var/lib/llamastead/previous/llama-server.service.release").stdout
    assert strange.host.run(f"ls -d /opt/llama.cpp/releases/{kept}/release.json").stdout
    failed = strange.again(server_extra_args=["--device", "nosuchdevice"])
    assert failed.code == 1
    assert "are back and serving" in failed.said
    assert serves(strange)
    assert strange.again().code == 0


def test_what_keeps_systemd_from_starting_it_is_said(strange: Deployed) -> None:
    strange.host.run(
        f"mkdir {DROP_IN} && printf '[Unit]\\nRequires=broken.service\\nAfter=broken.service\\n' "
        f">{DROP_IN}/mine.conf && printf '[Service]\\nType=oneshot\\nExecStart=/bin/false\\n' "
        ">/etc/systemd/system/broken.service"
    )
    try:
        run = strange.again(server_parallel=3)
    finally:
        strange.host.run(f"rm -r {DROP_IN}; systemctl daemon-reload")
    assert run.code == 1
    assert "Dependency failed for llama-server.service" in run.said
    assert strange.again().code == 0
    assert strange.again().changed == []


def test_a_masked_unit_is_an_error_of_the_plan(strange: Deployed) -> None:
    unit = "/etc/systemd/system/llama-server.service"
    strange.host.run(f"systemctl stop llama-server; mv {unit} /root/")
    strange.host.run("systemctl mask llama-server")
    try:
        run = strange.again()
    finally:
        strange.host.run("systemctl unmask llama-server")
    assert len(run.errors) == 1
    assert "llama-server.service is masked" in run.errors[0]
    assert strange.again().code == 0


def test_a_release_without_its_program_is_compiled_again(strange: Deployed) -> None:
    strange.host.run("rm /opt/llama.cpp/current/bin/llama-server")
    run = strange.again()
    assert run.code == 0, run.said[-3000:]
    assert serves(strange)
    assert strange.again().changed == []


@pytest.mark.parametrize(
    ("prepare", "undo", "part"),
    [
        ("git init -q /opt/llama.cpp", "rm -r /opt/llama.cpp/.git", "is a git checkout"),
        (
            "chown admin /opt/llama.cpp/releases",
            "chown root /opt/llama.cpp/releases",
            "/opt/llama.cpp/releases is there and belongs to admin",
        ),
        ("chmod 777 /etc/llamastead", "chmod 755 /etc/llamastead", "(mode 777)"),
    ],
)
def test_root_does_not_work_among_somebody_elses_files(
    strange: Deployed, prepare: str, undo: str, part: str
) -> None:
    strange.host.run(f"mkdir -p /etc/llamastead; {prepare}")
    try:
        run = strange.again(server_parallel=2)
    finally:
        strange.host.run(undo)
    assert run.code == 1
    assert len(run.errors) == 1, run.said[-3000:]
    assert part in run.errors[0]


@pytest.mark.parametrize(
    "plant", ["ln -s /etc/shadow", "ln /var/lib/llamastead/incoming/mine", "mkdir"]
)
def test_root_does_not_follow_what_the_worker_puts_in_its_folder(
    strange: Deployed, tmp_path: Path, plant: str
) -> None:
    sha256 = "5" * 64
    part = f"/var/lib/llamastead/incoming/{sha256}.part"
    before = strange.host.run("stat -c '%a %U %G' /etc/shadow").stdout
    strange.host.run(
        f"cd /var/lib/llamastead/incoming && touch mine && {plant} {part}", user="llamastead"
    )
    code = tmp_path / "code.py"
    code.write_text(
        "from pyinfra.operations import server\n"
        "from tasks.operations.model_file import hand_over\n"
        "from tasks.rules.model import ModelFile\n"
        "path = '/var/lib/llamastead/models/x/x.gguf'\n"
        f"server.shell(hand_over(ModelFile(path, {sha256!r}, None)))\n"
    )
    inventory = deploys.write_inventory(tmp_path, {strange.host.name: strange.data})
    run = deploys.run(inventory, str(code))
    assert run.code == 1
    assert "was not a file of its own" in run.said
    assert strange.host.run("stat -c '%a %U %G' /etc/shadow").stdout == before
    assert not strange.host.run(
        f"ls /var/lib/llamastead/models/blobs | grep {sha256}", check=False
    ).stdout


def test_a_model_in_somebodys_home_is_served(strange: Deployed) -> None:
    host, path = strange.host, "/home/llama/private/m.gguf"
    host.run(
        f"mkdir -m 700 /home/llama/private; ln -s {path} /srv/m.gguf; "
        f"cp $(find /var/lib/llamastead/models -name tiny.gguf) {path}; chmod 644 {path}"
    )
    for name in (path, "/srv/m.gguf"):
        run = strange.again(model=name)
        assert run.code == 0, run.said[-3000:]
        assert strange.again(model=name).changed == []
    pid = host.run("systemctl show llama-server -p MainPID --value").stdout.strip()
    homes = f"/proc/{pid}/root/home"
    assert host.run(f"find {homes} -type f -printf '/home/%P\\n'").stdout == f"{path}\n"
    assert strange.again().code == 0


def test_a_model_store_may_be_a_link_to_another_disk(strange: Deployed) -> None:
    host, store = strange.host, "/var/lib/llamastead/models"
    host.run(f"mv {store} /home/store && ln -s /home/store {store}")
    moved = strange.again()
    assert moved.code == 0, moved.said[-3000:]
    assert not [name for name in moved.changed if "Fetch" in name]
    assert strange.again().changed == []
    # And from nothing.
    host.run("rm -r /home/store/*")
    again = strange.again()
    assert again.code == 0, again.said[-3000:]
    assert strange.again().changed == []
