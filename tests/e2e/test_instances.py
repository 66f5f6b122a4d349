"""Several llama-servers on one host: a text model, embeddings, a ranking; changed and removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Deployed, deploy, new_host
from tests.lab import Lab, LabHost

pytestmark = pytest.mark.lab

# All three serve the same file: the tiny model can do everything a little.
EMBED: dict[str, Any] = {
    "server_port": 8081,
    "server_purpose": "embed",
    "server_extra_args": ["--pooling", "mean"],
}
RERANK: dict[str, Any] = {"server_port": 8082, "server_purpose": "rerank", "server_parallel": 1}
BOTH = {"embed": EMBED, "rerank": RERANK}
UNITS = ("llama-server", "llama-server@embed", "llama-server@rerank")


@pytest.fixture(scope="module")
def deployed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A host with three servers."""
    host = new_host(lab, "instances")
    folder = tmp_path_factory.mktemp("instances")
    return deploy(lab, host, folder, sudo=True, server_host=host.address, server_instances=BOTH)


def pids(host: LabHost) -> list[str]:
    told = host.run(f"systemctl show {' '.join(UNITS)} -p MainPID --value").stdout.split()
    return [each for each in told if each != "0"]


def client(deployed: Deployed, port: int) -> openai.OpenAI:
    key = deployed.host.run("cat /etc/llamastead/api-key").stdout
    return openai.OpenAI(
        base_url=f"http://{deployed.host.address}:{port}/v1", api_key=key, max_retries=0, timeout=60
    )


def with_embed(**changes: Any) -> dict[str, Any]:
    return {**BOTH, "embed": {**EMBED, **changes}}


def test_each_is_proven_by_what_it_is_for(deployed: Deployed) -> None:
    said = deployed.first.said
    for part in ("tokens/s ", "embedding 256 numbers", "ranking   2 documents", "/v1/rerank"):
        assert part in said, part
    report = json.loads(deployed.host.run("cat /var/lib/llamastead/report.json").stdout)
    assert [server["unit"] for server in report["servers"]] == [f"{unit}.service" for unit in UNITS]
    assert len(deployed.host.run("ls /var/lib/llamastead/models/blobs").stdout.split()) == 1
    assert "llama-server@embed at" in said


def test_each_answers_to_those_who_have_the_key(deployed: Deployed) -> None:
    chat = client(deployed, 8080).chat.completions.create(
        model="any", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 4
    numbers = client(deployed, 8081).embeddings.create(model="any", input="Hello").data[0].embedding
    assert len(numbers) == 256
    with pytest.raises(openai.AuthenticationError):
        client(deployed, 8081).with_options(api_key="wrong").embeddings.create(model="x", input="x")


def test_a_second_run_changes_nothing_and_looks_once(deployed: Deployed) -> None:
    before = pids(deployed.host)
    again = deployed.again()
    assert again.code == 0, again.said[-3000:]
    assert again.changed == []
    assert len(again.commands) <= 8, again.commands
    assert pids(deployed.host) == before
    assert len(before) == 3


def test_a_setting_of_one_restarts_only_that_one(deployed: Deployed) -> None:
    main, embed, rerank = pids(deployed.host)
    changed = with_embed(server_parallel=2)
    run = deployed.again(server_instances=changed)
    assert run.code == 0, run.said[-3000:]
    now = pids(deployed.host)
    assert (now[0], now[2]) == (main, rerank)
    assert now[1] != embed
    assert deployed.again(server_instances=changed).changed == []


def test_one_that_was_stopped_is_started(deployed: Deployed) -> None:
    deployed.again()
    main, _, rerank = pids(deployed.host)
    deployed.host.run("systemctl disable --now --quiet llama-server@embed")
    assert deployed.again().code == 0
    now = pids(deployed.host)
    assert (now[0], now[2]) == (main, rerank)
    assert deployed.host.run("systemctl is-enabled llama-server@embed").stdout == "enabled\n"
    assert deployed.again().changed == []


def test_one_that_does_not_start_is_rolled_back_and_named(deployed: Deployed) -> None:
    main, _, rerank = pids(deployed.host)
    bad = with_embed(server_extra_args=["--pooling", "no such"])
    run = deployed.again(server_instances=bad)
    assert run.code == 1
    assert "llama-server@embed.service did not become healthy" in run.said
    assert "llama-server@embed.service: unit and release of before are back" in run.said
    now = pids(deployed.host)
    assert (now[0], now[2]) == (main, rerank)
    assert deployed.again().changed == []


def test_a_release_on_which_one_does_not_start_goes_back_for_all(deployed: Deployed) -> None:
    host = deployed.host
    before = host.run("readlink /opt/llama.cpp/current").stdout
    bad = with_embed(server_extra_args=["--pooling", "no such"])
    run = deployed.again(llama_cpp_version="master", server_instances=bad)
    assert run.code == 1
    assert "llama-server@embed.service and llama-server.service: unit and release" in run.said
    assert host.run("readlink /opt/llama.cpp/current").stdout == before
    programs = {host.run(f"readlink /proc/{pid}/exe").stdout for pid in pids(host)}
    assert programs == {f"/opt/llama.cpp/{before.strip()}/bin/llama-server\n"}
    assert len(pids(host)) == 3
    assert deployed.again().changed == []


def test_removing_one_removes_its_unit_and_nothing_else(deployed: Deployed) -> None:
    host = deployed.host
    main, embed, _ = pids(host)
    host.run("echo '# mine' >/etc/systemd/system/llama-server@mine.service")
    run = deployed.again(server_instances={"embed": EMBED})
    assert run.code == 0, run.said[-3000:]
    assert "remove llama-server@rerank.service" in run.said
    assert pids(host) == [main, embed]
    left = host.run("cd /etc/systemd/system && ls -d llama-server* */llama-server*").stdout.split()
    assert left == [
        "llama-server.service",
        "llama-server@embed.service",
        "llama-server@mine.service",
        "multi-user.target.wants/llama-server.service",
        "multi-user.target.wants/llama-server@embed.service",
    ]
    assert "rerank" not in host.run("ls /var/cache /var/lib/llamastead/previous").stdout
    assert host.run("systemctl list-units --failed --plain --no-legend").stdout == ""
    assert deployed.again(server_instances={"embed": EMBED}).changed == []
    # Under another name it takes over the port at once.
    renamed = {"vectors": EMBED}
    assert deployed.again(server_instances=renamed).code == 0
    assert deployed.again(server_instances=renamed).changed == []


ROUTED = {
    name: {key: own[key] for key in own if key != "server_port"} for name, own in BOTH.items()
}


def test_one_router_serves_all_models_on_one_port(deployed: Deployed) -> None:
    host = deployed.host
    data: dict[str, Any] = {"server_router": True, "server_instances": ROUTED}
    run = deployed.again(**data)
    assert run.code == 0, run.said[-5000:]
    for part in ("routing to tiny, embed, rerank", "embedding 256 numbers", '"model": "rerank"'):
        assert part in run.said, part
    units = "systemctl list-units --plain --no-legend 'llama-server*'"
    assert [line.split()[0] for line in host.run(units).stdout.splitlines()] == [
        "llama-server.service"
    ]
    report = json.loads(host.run("cat /var/lib/llamastead/report.json").stdout)
    assert [server["model"] for server in report["servers"]] == ["tiny", "embed", "rerank"]
    asked = client(deployed, 8080)
    assert sorted(model.id for model in asked.models.list()) == ["embed", "rerank", "tiny"]
    chat = asked.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 4
    assert len(asked.embeddings.create(model="embed", input="Hello").data[0].embedding) == 256
    with pytest.raises(openai.APIStatusError):
        asked.embeddings.create(model="none", input="Hello")
    with pytest.raises(openai.AuthenticationError):
        asked.with_options(api_key="wrong").models.list()
    again = deployed.again(**data)
    assert again.changed == []
    assert len(again.commands) <= 8, again.commands


def test_a_router_is_healthy_once_all_its_models_are_loaded(deployed: Deployed) -> None:
    script = (
        "systemctl restart llama-server && key=$(cat /etc/llamastead/api-key) && "
        f'curl -s -H "Authorization: Bearer $key" http://{deployed.host.address}:8080/models'
    )
    told = json.loads(deployed.host.run(script).stdout)
    assert [model["status"]["value"] for model in told["data"]] == ["loaded"] * 3


def test_a_router_with_a_model_that_does_not_load_goes_back(deployed: Deployed) -> None:
    bad = {**ROUTED, "embed": {**ROUTED["embed"], "server_extra_args": ["--pooling", "no such"]}}
    run = deployed.again(server_router=True, server_instances=bad)
    assert run.code == 1
    assert "llama-server.service: unit and release of before are back" in run.said
    assert deployed.again(server_router=True, server_instances=ROUTED).changed == []
    back = deployed.again()
    assert back.code == 0, back.said[-3000:]
    assert len(pids(deployed.host)) == 3
    assert deployed.again().changed == []
    # What it was to replace was stopped for it, and serves again.
    run = deployed.again(server_router=True, server_instances=bad)
    assert run.code == 1
    assert "llama-server@embed.service: serves again" in run.said
    assert len(pids(deployed.host)) == 3
    assert deployed.again().changed == []


@pytest.mark.parametrize(
    ("own", "part"),
    [
        ({"server_prot": 1}, "setting server_instances.embed.server_prot: there is no such"),
        ({"server_port": 8080}, "setting server_instances.embed.server_port: 8080 is the port of"),
        ({"server_ctx_size": 10**9}, "server_instances.embed: model: tiny.gguf needs"),
        ({"model": "/none.gguf", "model_sha256": None},
         "server_instances.embed: model: there is no file /none.gguf"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_is_one_line(
    deployed: Deployed, own: dict[str, Any], part: str
) -> None:
    run = deployed.again("check.py", server_instances=with_embed(**own))
    assert run.code == 1
    (said,) = run.errors
    assert part in said
    assert "Traceback" not in run.said


@pytest.fixture(scope="module", autouse=True)
def _tidy(deployed: Deployed) -> Iterator[None]:
    yield
    assert deployed.again(server_instances=None).code == 0
    assert deployed.again(server_instances=None).changed == []
