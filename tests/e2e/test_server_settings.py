"""What requests get that don't say it themselves, and how chats are put into words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Deployed, deploy, new_host
from tests.lab import Lab, LabHost

pytestmark = pytest.mark.lab

SAMPLING = {
    "temperature": 0.5,
    "top_k": 20,
    "top_p": 0.75,
    "min_p": 0.125,
    "repeat_last_n": 32,
    "repeat_penalty": 1.25,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "seed": 7,
}
"""Numbers that a float of 32 bits holds exactly."""
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "own.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def deployed(lab: Lab, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A host with every default of its own."""
    return deploy(
        lab,
        new_host(lab, "settings"),
        tmp_path_factory.mktemp("settings"),
        sudo=False,
        server_chat_template_file=str(template),
        server_reasoning="off",
        server_n_predict=99,
        **{f"server_{name}": value for name, value in SAMPLING.items()},
    )


def ask(host: LabHost, path: str, **body: object) -> Any:
    data = f"-d '{json.dumps(body)}'" if body else ""
    return json.loads(host.run(f"curl -sf http://127.0.0.1:8080{path} {data}").stdout)


def pid(host: LabHost) -> str:
    return host.run("systemctl show llama-server -p MainPID --value").stdout


def test_the_server_has_the_defaults_that_the_settings_name(deployed: Deployed) -> None:
    told = ask(deployed.host, "/props")
    params = told["default_generation_settings"]["params"]
    assert {name: params[name] for name in SAMPLING} == SAMPLING
    assert told["chat_template"] == TEMPLATE
    before = pid(deployed.host)
    again = deployed.again()
    assert again.code == 0, again.said[-3000:]
    assert again.changed == []
    assert pid(deployed.host) == before


def test_a_request_gets_them(deployed: Deployed) -> None:
    told = ask(deployed.host, "/completion", prompt="a", temperature=1.5, ignore_eos=True)
    assert told["generation_settings"]["temperature"] == 1.5
    assert told["generation_settings"]["top_k"] == 20
    assert told["tokens_predicted"] == 99
    same = [ask(deployed.host, "/completion", prompt="a", n_predict=8)["content"] for _ in "12"]
    assert same[0] == same[1]  # it has a seed


def test_a_chat_is_put_into_words_by_the_template(deployed: Deployed) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert ask(deployed.host, "/apply-template", messages=messages)["prompt"] == "<user>hello"


def test_another_default_or_template_restarts_it_once(deployed: Deployed, template: Path) -> None:
    before = pid(deployed.host)
    changed = deployed.again(server_top_k=30)
    assert changed.code == 0, changed.said[-3000:]
    assert pid(deployed.host) != before
    params = ask(deployed.host, "/props")["default_generation_settings"]["params"]
    assert params["top_k"] == 30
    assert deployed.again(server_top_k=30).changed == []
    template.write_text(TEMPLATE + "!")
    other = deployed.again(server_top_k=30)
    assert other.code == 0, other.said[-3000:]
    assert ask(deployed.host, "/props")["chat_template"] == TEMPLATE + "!"
    assert deployed.again(server_top_k=30).changed == []
    own = {"server_chat_template_file": None, "server_chat_template": "chatml"}
    assert deployed.again(**own).code == 0
    messages = [{"role": "user", "content": "hello"}]
    told = ask(deployed.host, "/apply-template", messages=messages)["prompt"]
    assert told.startswith("<|im_start|>user\nhello<|im_end|>")
    assert deployed.again(**own).changed == []


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"server_chat_template_file": "/none.jinja"}, "cannot be read on this machine"),
        (
            {"server_chat_template_file": None, "server_chat_template": "chatlm"},
            "has no template chatlm; did you mean chat",
        ),
        ({"server_extra_args": ["--top-kk", "1"]}, "knows no --top-kk"),
        ({"server_top_p": 2}, "setting server_top_p: "),
    ],
)
def test_what_is_wrong_is_one_line(deployed: Deployed, data: dict[str, Any], part: str) -> None:
    run = deployed.again("check.py", **data)
    assert run.code == 1
    assert len(run.errors) == 1, run.errors
    assert part in run.errors[0]


def test_what_a_new_version_does_not_know_is_told_once_it_is_compiled(deployed: Deployed) -> None:
    """The one that serves goes on with what it has."""
    before = pid(deployed.host)
    run = deployed.again(
        llama_cpp_version=deployed.lab.outside.next_commit,
        server_extra_args=["--top-kk", "1"],
    )
    assert run.code == 1
    assert "knows no --top-kk" in run.errors[0]
    assert pid(deployed.host) == before
    assert deployed.again().code == 0
    assert deployed.again().changed == []
