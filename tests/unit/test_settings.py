from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks import settings as module
from tasks.settings import LLAMA_CPP_COMMIT, Settings, SettingsError, load

SHA256 = "a" * 64


def faults(**data: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load(data)
    return "\n".join(caught.value.faults)


def test_defaults_are_valid_and_pinned() -> None:
    settings = load({})
    assert settings.llama_cpp_version == LLAMA_CPP_COMMIT
    assert settings.server_host == "127.0.0.1"
    assert not settings.api_key_required


@pytest.mark.parametrize("name", ["ssh_user", "_sudo", "my_own_data", "lab_name"])
def test_data_that_is_not_ours_is_left_alone(name: str) -> None:
    assert load({name: object()}) == load({})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("server_prt", "server_port"),
        ("sever_port", "server_port"),
        ("model_sha25", "model_sha256"),
        ("llama_cpp_verson", "llama_cpp_version"),
        ("proxy_htp", "proxy_http"),
        ("llamacpp_version", "llama_cpp_version"),
    ],
)
def test_a_misspelt_name_is_an_error_with_the_nearest_right_one(name: str, nearest: str) -> None:
    assert faults(**{name: 1}) == f"{name}: there is no such setting; did you mean {nearest}?"


def test_a_name_with_our_prefix_that_resembles_nothing_points_to_the_list() -> None:
    assert "docs/settings.md" in faults(rpc_zzzzzzzzzzzzzzzz=1)


def test_all_faults_are_told_at_once() -> None:
    told = faults(server_port=70000, server_parallel=0, server_prt=1).splitlines()
    assert len(told) == 3


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"server_port": 70000}, "server_port: input should be less than or equal to 65535"),
        ({"server_port": 0}, "server_port: "),
        ({"server_port": "8080"}, "server_port: input should be a valid integer"),
        ({"server_port": True}, "server_port: "),
        ({"server_parallel": 0}, "server_parallel: "),
        ({"server_ctx_size": 1}, "server_ctx_size: "),
        ({"server_flash_attn": "yes"}, "'on', 'off' or 'auto'"),
        ({"server_flash_attn": True}, "server_flash_attn: "),
        ({"server_host": "a b"}, "server_host: "),
        ({"server_host": "$(id)"}, "server_host: "),
        ({"server_ubatch_size": 4096}, "more than server_batch_size"),
        ({"server_extra_args": ["a\nb"]}, "cannot be printed"),
        ({"server_alias": 'a"b'}, "server_alias: "),
        ({"server_temperature": -0.1}, "server_temperature: input should be greater than or"),
        ({"server_temperature": float("nan")}, "server_temperature: "),
        ({"server_temperature": "0.7"}, "server_temperature: input should be a valid number"),
        ({"server_top_p": 1.1}, "server_top_p: "),
        ({"server_repeat_penalty": 0}, "server_repeat_penalty: "),
        ({"server_presence_penalty": 3}, "server_presence_penalty: "),
        ({"server_seed": 2**32}, "server_seed: "),
        ({"server_chat_template": "{{ messages }}"}, "server_chat_template: "),
        ({"server_chat_template_kwargs": {"a": {1}}}, "must be plain values"),
        ({"server_chat_template": "a", "server_chat_template_file": "b"}, "one of the two"),
        ({"server_reasoning_budget": -2}, "server_reasoning_budget: "),
        ({"model": "model.gguf"}, "absolute path"),
        ({"model": "ftp://host/model.gguf"}, "http(s) URL"),
        ({"model": "https://host"}, "http(s) URL"),
        ({"model": "https://host/m.gguf"}, "needs its SHA-256"),
        ({"model": "https://host/m.gguf", "model_sha256": "AB"}, "model_sha256: "),
        ({"model_sha256": "A" * 64}, "model_sha256: "),
        ({"llama_cpp_version": 12.1}, "quote it: --data 'llama_cpp_version=\"12.1\"'"),
        ({"llama_cpp_version": "--upload-pack=x"}, "must not start with '-'"),
        ({"llama_cpp_repo": "-x"}, "must not start with '-'"),
        ({"llama_cpp_version": ""}, "llama_cpp_version: "),
        ({"llama_cpp_targets": ["../x"]}, "no name of a llama.cpp program"),
        ({"llama_cpp_cmake_args": {"-DGGML_X": "1"}}, "without -D"),
        ({"llama_cpp_cmake_args": {"GGML_X": "1\n-DY=2"}}, "cannot be printed"),
        ({"model": "/srv/x.gguf\rExecStartPre=+/bin/sh"}, "absolute path"),
        ({"llama_cpp_jobs": 0}, "llama_cpp_jobs: "),
        ({"llama_cpp_ccache_size": "lots"}, "llama_cpp_ccache_size: "),
        ({"server_host": "0.0.0.0", "server_require_api_key": False}, "beyond loopback"),
        ({"proxy_http": "proxy:3128"}, "proxy_http: "),
        ({"report_format": "xml"}, "report_format: "),
    ],
)
def test_a_bad_value_is_one_clear_line(data: dict[str, Any], part: str) -> None:
    told = faults(**data)
    assert part in told
    assert "\n" not in told
    assert "pydantic" not in told


def test_a_proxy_that_is_refused_is_not_shown_since_it_may_hold_a_password() -> None:
    assert "secret" not in faults(proxy_https="user:secret@proxy")


@pytest.mark.parametrize("name", ["cuda_repo_url", "container_toolkit_repo_url"])
def test_a_password_that_everybody_could_read_in_apts_sources_is_refused(name: str) -> None:
    told = faults(**{name: "https://me:secret@mirror/repos"})
    assert f"{name}: must not hold a user or password" in told
    assert "secret" not in told
    assert "secret" not in faults(llama_cpp_repo="https://user:secret@host/ x.git")
    assert "secret" not in faults(proxy_https="https://user:secret@host x")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_on_loopback_no_api_key_is_asked_for(host: str) -> None:
    assert not load({"server_host": host}).api_key_required
    assert load({"server_host": host, "server_require_api_key": True}).api_key_required


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.0.2.7", "box.example", "128.0.0.1", "127.example"]
)
def test_beyond_loopback_an_api_key_is_asked_for(host: str) -> None:
    assert load({"server_host": host}).api_key_required


def test_the_server_is_always_a_target_and_none_is_built_twice() -> None:
    targets = load({"llama_cpp_targets": ["llama-bench", "llama-bench"]}).llama_cpp_targets
    assert targets == ("llama-server", "llama-bench")


def test_apt_goes_through_the_proxies_unless_it_has_one_of_its_own() -> None:
    proxies = {"proxy_http": "http://p:1", "proxy_https": "http://p:2"}
    assert load(proxies).apt_environment == {
        "http_proxy": "http://p:1",
        "https_proxy": "http://p:2",
    }
    assert load({**proxies, "proxy_apt": "http://cache:3142"}).apt_environment == {
        "http_proxy": "http://cache:3142",
        "https_proxy": "http://cache:3142",
    }
    assert load({**proxies, "proxy_apt": "DIRECT"}).apt_environment == {"no_proxy": "*"}


def test_every_setting_is_described_in_a_sentence() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.rstrip()[-1] in ".)", name


def test_every_setting_has_a_prefix_that_guards_it_against_slips() -> None:
    for name in Settings.model_fields:
        assert name == "model" or name.startswith(module.PREFIXES), name


def test_the_settings_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == module.markdown(), "run: ./run python -m tasks.settings"


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("cuda_version", ["12.9", "13.2.2"], ["12", "cuda-12.9", "12.9.2.1"]),
        ("driver_version", ["580", "580.126.20", "595.99"], ["58", "latest", "580-open"]),
        ("container_toolkit_version", ["1.19.1", "1.19.1-1"], ["1.19", "latest"]),
        (
            "cuda_repo_url",
            ["http://mirror/cuda", "file:///srv/cuda"],
            ["mirror/cuda", "http://a b"],
        ),
        ("llama_cpp_backend", ["auto", "cpu", "cuda"], ["vulkan", "gpu"]),
    ],
)
def test_what_is_asked_for_of_nvidia(name: str, right: list[str], wrong: list[str]) -> None:
    for value in right:
        assert getattr(load({name: value}), name) == value
    for value in wrong:
        with pytest.raises(SettingsError, match=name):
            load({name: value})


def test_an_installer_of_ones_own_says_which_release_it_is_and_what_is_in_it() -> None:
    mine = {"cuda_install_method": "local", "cuda_local_installer_url": "http://m/cuda-repo.deb"}
    with pytest.raises(SettingsError, match="cuda_version"):
        load(mine)
    with pytest.raises(SettingsError, match="cuda_local_installer_sha256"):
        load({**mine, "cuda_version": "12.9.2"})
    load({**mine, "cuda_version": "12.9.2", "cuda_local_installer_sha256": "a" * 64})
