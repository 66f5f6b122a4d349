"""From a bare host to a server that serves, and what a second run does."""

from __future__ import annotations

import itertools
import json
import re
import time

import openai
import pytest

from tests.e2e.conftest import Deployed

pytestmark = pytest.mark.lab

UNIT = "/etc/systemd/system/llama-server.service"


@pytest.fixture(params=["debian_13", "debian_12"])
def deployed(request: pytest.FixtureRequest) -> Deployed:
    fixture: Deployed = request.getfixturevalue(request.param)
    return fixture


def pid(deployed: Deployed) -> str:
    return deployed.host.run("systemctl show llama-server -p MainPID --value").stdout.strip()


def test_the_run_ends_with_the_proof(deployed: Deployed) -> None:
    said = deployed.first.said
    for part in (
        r"device +CPU, layers: all on the CPU",
        r"tokens/s +[\d,.]+ generated, [\d,.]+ read",
        r"slots +4 x 512 tokens",
        rf"URL +http://{re.escape(deployed.data.get('server_host', '127.0.0.1'))}:8080",
        r"try it +curl http://",
    ):
        assert re.search(part, said), part
    report = json.loads(deployed.host.run("cat /var/lib/llamastead/report.json").stdout)
    (server,) = report["servers"]
    assert server["tokens_per_second"] > 0
    assert server["faults"] == []


def test_progress_was_shown_at_least_every_ten_seconds(deployed: Deployed) -> None:
    shown = [
        int(s)
        for s in re.findall(r"\[\d+/\d+\] .* \((\d+) s\)$", deployed.first.said, re.MULTILINE)
    ]
    assert all(later - earlier <= 10 for earlier, later in itertools.pairwise(shown))


def test_a_second_run_changes_nothing_and_sends_few_commands(deployed: Deployed) -> None:
    before = pid(deployed)
    again = deployed.again()
    assert again.code == 0, again.said
    assert again.changed == []
    assert len(again.commands) <= 8, again.commands
    assert pid(deployed) == before
    assert "tokens/s" in again.said


def test_the_release_says_what_it_was_made_of(deployed: Deployed) -> None:
    release = json.loads(deployed.host.run("cat /opt/llama.cpp/current/release.json").stdout)
    assert release["commit"] == deployed.lab.outside.llama_cpp_commit
    assert release["compiler"].startswith("g++ 1")
    assert release["inputs"]["options"]["GGML_NATIVE"] == "ON"
    assert release["built_seconds"] >= 0
    assert "--api-key-file" in release["server_options"]
    name = deployed.host.run("basename $(readlink /opt/llama.cpp/current)").stdout.strip()
    assert release["name"] == name


def test_the_release_finds_its_own_libraries_and_belongs_to_root(deployed: Deployed) -> None:
    told = deployed.host.run(
        "cd /opt/llama.cpp/current/ && env -i ldd bin/llama-server && "
        "find . ! -user root -o -perm /022 ! -type l"
    ).stdout
    assert "not found" not in told
    assert re.search(r"libllama\.so\S* => /opt/llama\.cpp/releases/", told)
    assert "\n./" not in told


def test_the_sandbox_is_tight(deployed: Deployed) -> None:
    told = deployed.host.run("systemd-analyze security llama-server --no-pager").stdout
    score = float(re.findall(r"exposure level for .*: ([\d.]+)", told)[0])
    limit = 1.2 if "server_host" not in deployed.data else 1.4  # addresses beyond loopback
    assert score <= limit, told


def test_the_server_runs_as_nobody_special(deployed: Deployed) -> None:
    user = deployed.host.run(f"ps -o user= -p {pid(deployed)}").stdout.strip()
    assert user == "llama"
    shell = deployed.host.run("getent passwd llama llamastead | cut -d: -f6,7").stdout.split()
    assert shell == ["/nonexistent:/usr/sbin/nologin"] * 2


def test_start_returns_when_the_server_is_healthy(deployed: Deployed) -> None:
    url = f"http://{deployed.data.get('server_host', '127.0.0.1')}:8080/health"
    told = deployed.host.run(
        f"systemctl restart llama-server && curl -s -o /dev/null -w '%{{http_code}}' {url}"
    )
    assert told.stdout == "200"


def test_no_failed_unit_and_no_job_is_left(deployed: Deployed) -> None:
    failed = deployed.host.run("systemctl list-units --failed --plain --no-legend").stdout
    assert "llama" not in failed
    assert deployed.host.run("systemctl list-units 'llamastead-*' --all --no-legend").stdout == ""


# The API, with a client that nobody here wrote


@pytest.fixture
def client(debian_13: Deployed) -> openai.OpenAI:
    key = debian_13.host.run("cat /etc/llamastead/api-key").stdout
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    return openai.OpenAI(
        base_url=f"http://{debian_13.host.address}:8080/v1", api_key=key, max_retries=0, timeout=60
    )


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_a_chat_is_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, stream=True
        )
    )
    assert len(chunks) >= 8
    assert chunks[-1].choices == [] or chunks[-1].choices[0].finish_reason == "length"


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert "tiny" in model.id


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_key_is_seen_nowhere_but_in_its_file(debian_13: Deployed) -> None:
    host = debian_13.host
    key = host.run("cat /etc/llamastead/api-key").stdout
    assert host.run("stat -c '%a %U' /etc/llamastead/api-key").stdout.strip() == "600 root"
    assert key not in host.run("ps axeww; journalctl --no-pager; cat " + UNIT).stdout
    assert key not in debian_13.first.said + debian_13.first.out
    assert key not in debian_13.again().said
    assert not host.run(f"grep -rl {key} /var/lib /var/log /run/llamastead", check=False).stdout


def test_a_stop_is_bounded_whatever_clients_do(client: openai.OpenAI, debian_13: Deployed) -> None:
    stream = client.completions.create(
        model="any", prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    began = time.monotonic()
    debian_13.host.run("systemctl stop llama-server; systemctl start llama-server")
    assert time.monotonic() - began < 45
    stream.close()


# What changes, and what does not


def test_a_setting_restarts_the_server_once(debian_13: Deployed) -> None:
    before = pid(debian_13)
    changed = debian_13.again(server_parallel=2)
    assert changed.code == 0, changed.said
    after = pid(debian_13)
    assert after != before
    assert "2 x 512 tokens" in changed.said
    assert debian_13.again(server_parallel=2).changed == []
    assert pid(debian_13) == after
    assert debian_13.again().code == 0


def test_a_users_drop_in_is_left_alone(debian_13: Deployed) -> None:
    folder = f"{UNIT}.d"
    debian_13.host.run(
        f"mkdir -p {folder} && printf '[Service]\\nNice=3\\n' >{folder}/mine.conf && "
        "systemctl daemon-reload && systemctl restart llama-server"
    )
    try:
        assert debian_13.again().changed == []
        assert debian_13.again(server_parallel=3).code == 0
        assert "Nice=3" in debian_13.host.run(f"cat {folder}/mine.conf").stdout
        assert debian_13.host.run(f"ps -o ni= -p {pid(debian_13)}").stdout.strip() == "3"
    finally:
        debian_13.host.run(f"rm -r {folder}; systemctl daemon-reload")
        debian_13.again()


def test_what_somebody_changed_in_the_unit_is_put_right(debian_13: Deployed) -> None:
    debian_13.host.run(f"sed -i s/ProtectHome=yes/ProtectHome=no/ {UNIT}")
    assert debian_13.again().code == 0
    assert "ProtectHome=yes" in debian_13.host.run(f"cat {UNIT}").stdout
    assert debian_13.again().changed == []


def test_a_stopped_server_is_started_and_a_disabled_one_enabled(debian_13: Deployed) -> None:
    debian_13.host.run("systemctl disable --now --quiet llama-server")
    assert debian_13.again().code == 0
    told = debian_13.host.run("systemctl is-active llama-server; systemctl is-enabled llama-server")
    assert told.stdout.split() == ["active", "enabled"]


def test_an_unhealthy_change_is_rolled_back_and_the_old_server_serves_on(
    debian_13: Deployed,
) -> None:
    bad = debian_13.again(server_extra_args=["--seed", "no number"])
    assert bad.code == 1
    assert "did not become healthy" in bad.said
    assert "are back and serving" in bad.said
    assert "Traceback" not in bad.said
    url = f"http://{debian_13.host.address}:8080/health"
    assert debian_13.host.run(f"curl -s {url}").stdout == '{"status":"ok"}'
    assert debian_13.again().code == 0
    assert debian_13.again().changed == []


def test_an_upgrade_leaves_the_old_release_beside_the_new(debian_13: Deployed) -> None:
    host, newer = debian_13.host, debian_13.lab.outside.repository.resolve("master")
    old = host.run("readlink /opt/llama.cpp/current").stdout
    upgraded = debian_13.again(llama_cpp_version="master")
    assert upgraded.code == 0, upgraded.said[-3000:]
    new = json.loads(host.run("cat /opt/llama.cpp/current/release.json").stdout)
    assert new["commit"] == newer
    assert host.run("readlink /opt/llama.cpp/previous").stdout == old
    back = debian_13.again()
    assert back.code == 0, back.said
    assert host.run("readlink /opt/llama.cpp/current").stdout == old
    assert not [name for name in back.changed if "Compile" in name]


def test_the_server_comes_back_after_a_reboot(debian_13: Deployed) -> None:
    debian_13.host.reboot()
    debian_13.host.run(
        "n=0; until systemctl is-active -q llama-server; do n=$((n+1)); [ $n -lt 100 ]; sleep .2;"
        " done"
    )
    assert debian_13.again().changed == []
