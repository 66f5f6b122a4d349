from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import probe as at
from tasks.probe import MODELS, PREFIX, Listener, ManagedFile, Probe, Service
from tasks.rules import model, server, stack
from tasks.rules.server import FilePlan, ServerPlan
from tasks.settings import Settings

from .hosts import (
    BARE,
    RTX_4090,
    WITH_COMPILER,
    WITH_DRIVER,
    card,
    in_wsl,
    settings,
    with_release,
)


def plan(
    wanted: Settings | None = None, probe: Probe = BARE, release: str | None = None
) -> ServerPlan:
    wanted = wanted or settings()
    model_plan = model.plan(wanted, probe)
    assert model_plan is not None
    return server.plan(wanted, probe, model_plan, release)


def arguments(**data: object) -> str:
    return " ".join(plan(settings(**data)).arguments)


def test_the_port_is_always_said_since_its_default_changed() -> None:
    assert "--port 8080" in arguments()


def test_the_context_is_for_each_slot() -> None:
    assert "--ctx-size 65536 --parallel 16" in arguments(server_parallel=16, server_ctx_size=4096)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"server_threads": 3}, "--threads 3"),
        ({"server_threads_batch": 5}, "--threads-batch 5"),
        ({"server_threads_http": 4}, "--threads-http 4"),
        ({"server_flash_attn": "on"}, "--flash-attn on"),
        ({}, "--verbosity 4"),
        ({"server_log_verbosity": 3}, "--verbosity 3"),
        ({"server_load_mode": "mlock"}, "--load-mode mlock"),
        ({"server_alias": "tiny"}, "--alias tiny"),
        ({"server_cache_type_k": "q8_0"}, "--cache-type-k q8_0"),
        ({"server_n_predict": -1}, "--predict -1"),
        ({"server_batch_size": 1024}, "--batch-size 1024"),
        ({"server_ubatch_size": 256}, "--ubatch-size 256"),
        ({"server_temperature": 0}, "--temp 0"),
        ({"server_top_k": 20, "server_top_p": 0.8}, "--top-k 20 --top-p 0.8"),
        ({"server_min_p": 0.05}, "--min-p 0.05"),
        (
            {"server_repeat_last_n": 64, "server_repeat_penalty": 1.1},
            "--repeat-last-n 64 --repeat-penalty 1.1",
        ),
        ({"server_presence_penalty": 1.5}, "--presence-penalty 1.5"),
        ({"server_frequency_penalty": -0.5}, "--frequency-penalty -0.5"),
        ({"server_seed": 7}, "--seed 7"),
        ({"server_jinja": True, "server_chat_template": "x"}, "--jinja --chat-template x"),
        ({"server_jinja": False}, "--no-jinja"),
        (
            {"server_chat_template_file": "~/own.jinja"},
            f"--chat-template-file {server.chat_template_of('')}",
        ),
        ({"server_chat_template_kwargs": {"a": [1]}}, '--chat-template-kwargs {"a": [1]}'),
        ({"server_reasoning": "off"}, "--reasoning off"),
        ({"server_reasoning_format": "none"}, "--reasoning-format none"),
        ({"server_reasoning_effort": "low"}, "--reasoning-effort low"),
        ({"server_reasoning_budget": 0}, "--reasoning-budget 0"),
        ({"server_extra_args": ["--jinja", "--seed", "1"]}, "--jinja --seed 1"),
    ],
)
def test_a_setting_reaches_the_server(data: dict[str, object], text: str) -> None:
    assert text in arguments(**data)


UNSET = [name for name in server.OPTIONS if Settings.model_fields[name].default in (None, {})]


@pytest.mark.parametrize("option", ["--load-mode", *(server.OPTIONS[name] for name in UNSET)])
def test_what_is_unset_is_left_to_llama_cpp(option: str) -> None:
    assert option not in plan().arguments


def test_a_model_is_called_by_its_file_name_unless_it_is_given_another() -> None:
    assert "--alias model" in arguments()


def test_no_web_page_from_elsewhere_may_ask_the_server() -> None:
    assert "--cors-origins localhost" in arguments()
    assert "--cors-origins" not in plan(settings(server_cors_origins=None)).arguments


def test_flags_that_are_gone_are_never_passed() -> None:
    everything = arguments(server_load_mode="mlock", server_flash_attn="on")
    assert not re.search(r"--(no-)?mmap|--mlock|--flash-attn$", everything)


def test_metrics_can_be_switched_off() -> None:
    assert "--metrics" in plan().arguments
    assert "--metrics" not in plan(settings(server_metrics=False)).arguments


def test_the_api_key_comes_from_systemds_credentials_and_never_stands_in_the_unit() -> None:
    unit = plan(settings(server_host="0.0.0.0")).unit.content
    assert f"LoadCredential=api-key:{at.API_KEY}" in unit
    assert "--api-key-file ${CREDENTIALS_DIRECTORY}/api-key" in unit
    assert "LoadCredential" not in plan().unit.content


def test_on_loopback_the_kernel_keeps_everybody_else_out() -> None:
    assert "IPAddressDeny=any" in plan().unit.content
    assert "IPAddressDeny" not in plan(settings(server_host="0.0.0.0")).unit.content


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:8080"),
        ("192.0.2.7", "http://192.0.2.7:8080"),
    ],
)
def test_the_host_itself_finds_the_server_at(host: str, url: str) -> None:
    assert plan(settings(server_host=host)).url == url


def test_the_pause_between_restarts_grows_with_every_systemd() -> None:
    new, old = plan(), plan(probe=replace(BARE, systemd_version=252))
    assert "RestartSteps=" in new.unit.content
    assert "RestartSteps=" not in old.unit.content
    assert "ExecStartPre=+/usr/local/lib/llamastead/restart-pause %n" in old.unit.content
    assert [file.path for file in old.helpers] == [server.WAIT_HEALTHY, server.RESTART_PAUSE]


SANDBOX = [
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "PrivateUsers=yes",
    "MemoryDenyWriteExecute=yes",
    "SystemCallFilter=@system-service",
    "ProtectProc=invisible",
    "PrivateDevices=yes",
]


@pytest.mark.parametrize("directive", SANDBOX)
def test_the_unit_is_sandboxed(directive: str) -> None:
    assert directive in plan().unit.content.splitlines()


def test_a_model_in_a_home_is_shown_to_the_server_and_nothing_else_of_it() -> None:
    wanted = settings(model="/home/me/my model:1%.gguf", model_sha256=None)
    unit = plan(wanted).unit.content
    assert 'BindReadOnlyPaths="/home/me/my model:1%%.gguf"' in unit
    assert '--model "/home/me/my model:1%%.gguf"' in unit


def directives(unit: str, *names: str) -> list[str]:
    return [line for line in unit.splitlines() if line.startswith(names)]


@pytest.mark.parametrize(
    ("path", "real", "shown"),
    [
        ("/srv/m.gguf", {}, ["ProtectHome=yes"]),
        ("/srv/m.gguf", {"/srv/m.gguf": "/data/m.gguf"}, ["ProtectHome=yes"]),
        ("/tmp/m.gguf", {}, ["ProtectHome=yes", "BindReadOnlyPaths=/tmp/m.gguf"]),
        (
            "/srv/m.gguf",
            {"/srv/m.gguf": "/home/me/m.gguf"},
            ["ProtectHome=tmpfs", "BindReadOnlyPaths=/home/me/m.gguf"],
        ),
        (  # as the Hub's own tools keep what they fetch
            "/root/.cache/snapshots/m.gguf",
            {"/root/.cache/snapshots/m.gguf": "/root/.cache/blobs/1"},
            ["ProtectHome=tmpfs", "BindReadOnlyPaths=/root/.cache/snapshots/m.gguf"],
        ),
    ],
)
def test_the_server_sees_its_model_wherever_links_lead(
    path: str, real: dict[str, str], shown: list[str]
) -> None:
    wanted = settings(model=path, model_sha256=None)
    unit = plan(wanted, replace(BARE, real_paths=real)).unit.content
    assert directives(unit, "ProtectHome", "BindReadOnlyPaths") == shown


def test_the_server_sees_its_own_folders_wherever_links_lead() -> None:
    real = {MODELS: "/home/me/models", PREFIX: "/data/llama.cpp"}
    unit = plan(probe=replace(BARE, real_paths=real)).unit.content
    assert directives(unit, "ProtectHome", "BindReadOnlyPaths") == [
        "ProtectHome=tmpfs",
        "BindReadOnlyPaths=/home/me/models",
    ]


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("a b", '"a b"'),
        ('say "x"', '"say \\"x\\""'),
        ("100%", "100%%"),
        ("$HOME", "$$HOME"),
        ("back\\slash", '"back\\\\slash"'),
        (";", '";"'),
        ("{}", "{}"),
    ],
)
def test_a_word_is_quoted_as_systemd_reads_it(word: str, quoted: str) -> None:
    assert server.quote(word) == quoted


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_a_quoted_word_stays_one_word(word: str) -> None:
    quoted = server.quote(word)
    back = shlex.split(quoted)[0] if quoted.startswith('"') else quoted.replace("\\\\", "\\")
    assert back.replace("%%", "%").replace("$$", "$") == word


def running(wanted: Settings, probe: Probe) -> Probe:
    """The host after a deploy."""
    release = probe.current
    there = plan(wanted, probe, release)
    files = {file.path: ManagedFile(file.sha256, file.mode, "root", "root") for file in there.files}
    if wanted.api_key_required:
        files[at.API_KEY] = ManagedFile("0" * 64, 0o600, "root", "root")
    service = Service(
        active="active",
        sub="running",
        enabled="enabled",
        main_pid=42,
        need_daemon_reload=False,
        executable=f"{at.RELEASES}/{release}/bin/llama-server",
        digest=there.digest,
    )
    services = {at.SERVER_UNIT: service}
    return replace(probe, files=files, services=services, users=frozenset({"llama", "llamastead"}))


BUILT = with_release(WITH_COMPILER, settings())


def test_what_runs_from_exactly_this_is_left_alone() -> None:
    for data in ({}, {"server_host": "0.0.0.0"}):
        wanted = settings(**data)
        assert plan(wanted, running(wanted, BUILT), BUILT.current).converged


@pytest.mark.parametrize(
    "change",
    [
        {"active": "failed"},
        {"active": "activating"},
        {"enabled": "disabled"},
        {"need_daemon_reload": True},
        {"executable": "/opt/llama.cpp/releases/older/bin/llama-server"},
        {"executable": None},
        {"digest": "of another unit"},
        {"digest": None},
    ],
)
def test_a_service_that_differs_is_not_converged(change: dict[str, object]) -> None:
    probe = running(settings(), BUILT)
    service = replace(probe.services[at.SERVER_UNIT], **change)  # type: ignore[arg-type]
    other = replace(probe, services={at.SERVER_UNIT: service})
    assert not plan(probe=other, release=BUILT.current).converged


@pytest.mark.parametrize(
    "data",
    [{"server_port": 9000}, {"server_parallel": 2}, {"model_sha256": "b" * 64}],
)
def test_another_setting_is_another_digest(data: dict[str, object]) -> None:
    assert plan(settings(**data)).digest != plan().digest
    probe = running(settings(), BUILT)
    assert not plan(settings(**data), probe, BUILT.current).converged


def test_a_file_that_somebody_changed_is_not_converged() -> None:
    probe = running(settings(), BUILT)
    for change in ({"sha256": "0" * 64}, {"mode": 0o666}, {"owner": "me"}):
        file = replace(probe.files[at.SERVER_UNIT_FILE], **change)  # type: ignore[arg-type]
        other = replace(probe, files={**probe.files, at.SERVER_UNIT_FILE: file})
        assert not plan(probe=other, release=BUILT.current).converged


def test_an_api_key_that_others_can_read_is_not_converged() -> None:
    wanted = settings(server_host="0.0.0.0")
    probe = running(wanted, BUILT)
    loose = replace(probe.files[at.API_KEY], mode=0o644)
    other = replace(probe, files={**probe.files, at.API_KEY: loose})
    assert not plan(wanted, other, BUILT.current).converged


def codes(probe: Probe, **data: object) -> list[str]:
    release = probe.releases[0] if probe.releases else None
    wanted = settings(**data)
    found = [*server.findings(wanted, probe)]
    found += server.unknown_to(release, wanted) if release else ()
    return [each.code for each in found]


def test_a_port_that_something_else_holds_is_an_error_that_names_it() -> None:
    probe = replace(BARE, listeners={8080: Listener(77, "nginx")})
    (found,) = server.findings(settings(), probe)
    assert found.code == "port-taken"
    assert "8080 is already taken by nginx (process 77)" in str(found)


def test_our_own_port_is_no_error() -> None:
    assert codes(replace(BARE, listeners={8080: Listener(None, None, at.SERVER_UNIT)})) == []
    assert codes(BARE) == []


def test_an_option_that_this_llama_server_does_not_know_is_an_error() -> None:
    assert codes(BUILT, server_extra_args=["--mlock"]) == ["unknown-server-option"]
    assert codes(BUILT, server_extra_args=["--port=1"]) == []
    assert codes(BARE, server_extra_args=["--mlock"]) == []


def told(release: dict[str, object], **data: object) -> str:
    wanted = settings(**data)
    probe = with_release(WITH_COMPILER, wanted, **release)
    return "\n".join(map(str, server.unknown_to(probe.releases[0], wanted)))


def test_a_setting_that_this_release_lacks_is_named_with_its_option_and_the_release() -> None:
    known = frozenset(server.OPTIONS.values()) - {"--reasoning-effort", "--cors-origins"}
    text = told({"server_options": known, "name": "b1-x"}, server_reasoning_effort="low")
    assert "server_reasoning_effort: llama-server of release b1-x knows no --reasoning-eff" in text
    assert "server_cors_origins: " in text
    assert told({"server_options": known}, server_cors_origins=None) == ""
    assert told({"server_options": frozenset()}) == ""


def test_a_name_that_is_no_template_is_an_error_since_it_would_be_taken_for_one() -> None:
    templates = {"chat_templates": frozenset({"chatml", "llama3"})}
    assert "did you mean chatml?" in told(templates, server_chat_template="chatlm")
    assert told(templates, server_chat_template="chatml") == ""
    assert told({}, server_chat_template="chatlm") == ""


def test_a_chat_template_of_ones_own_is_a_file_and_part_of_what_is_served() -> None:
    wanted = settings(server_chat_template_file="/own.jinja")
    model_plan = model.plan(wanted, BARE)
    assert model_plan is not None
    one = server.plan(wanted, BARE, model_plan, None, chat_template="{{ one }}")
    other = server.plan(wanted, BARE, model_plan, None, chat_template="{{ other }}")
    assert [file.content for file in one.own if file.path == server.chat_template_of("")] == [
        "{{ one }}"
    ]
    assert one.digest != other.digest
    assert server.chat_template_of("") in server.watched_files()


def test_a_files_sha256_is_of_its_content() -> None:
    assert FilePlan("/x", "").sha256.startswith("e3b0c44298fc1c14")


def test_our_unit_is_known_by_its_first_line() -> None:
    assert plan().unit.content.startswith(at.UNIT_MARK)


# On the GPU


def gpu_plan(probe: Probe = WITH_DRIVER, **data: object) -> ServerPlan:
    wanted = settings(**data)
    model_plan = model.plan(wanted, probe)
    assert model_plan is not None
    return server.plan(wanted, probe, model_plan, None, stack.plan(wanted, probe))


def test_the_sandbox_lets_the_gpus_devices_through_and_no_others() -> None:
    lines = gpu_plan().unit.content.splitlines()
    assert "DevicePolicy=closed" in lines
    assert "PrivateDevices=yes" not in lines, "hides the GPU, and llama-server says nothing"
    allowed = [line for line in lines if line.startswith("DeviceAllow=")]
    for device in ("char-nvidia", "char-nvidiactl", "char-nvidia-uvm", "char-nvidia-frontend"):
        assert f"DeviceAllow={device} rw" in allowed
    assert all("nvidia" in line for line in allowed)
    assert "SupplementaryGroups=video" in lines


def test_inside_wsl_it_is_windows_device_and_library() -> None:
    made = gpu_plan(in_wsl())
    lines = made.unit.content.splitlines()
    assert [line for line in lines if line.startswith("DeviceAllow=")] == [
        "DeviceAllow=/dev/dxg rw"
    ]
    assert "Environment=LD_LIBRARY_PATH=/usr/lib/wsl/lib" in lines
    assert server.GPU_UNIT not in made.unit.content
    assert [file.path for file in made.helpers] == [server.WAIT_HEALTHY, server.GPU_GATE]


@pytest.mark.parametrize("directive", [each for each in SANDBOX if "Devices" not in each])
def test_on_the_gpu_the_unit_is_as_sandboxed(directive: str) -> None:
    assert directive in gpu_plan().unit.content.splitlines()


def test_the_server_does_not_start_without_its_gpus() -> None:
    gate = f"ExecStartPre={server.GPU_GATE} {at.CURRENT}/bin/llama-server"
    unit = gpu_plan().unit.content
    assert f"{gate} 1\n" in unit
    assert unit.index(gate) < unit.index("ExecStart=/")
    two = replace(WITH_DRIVER, gpus=(card(), card(RTX_4090)))
    assert f"{gate} 2\n" in gpu_plan(two).unit.content
    assert f"{gate} 1\n" in gpu_plan(two, server_gpus=1).unit.content
    one = {"CUDA_VISIBLE_DEVICES": "0"}
    assert f"{gate} 1\n" in gpu_plan(two, server_environment=one).unit.content
    assert server.GPU_GATE not in plan().unit.content


def test_the_drivers_devices_are_made_before_the_sandbox_closes() -> None:
    made = gpu_plan()
    assert f"Wants=network-online.target {server.GPU_UNIT}\n" in made.unit.content
    assert f"After=network-online.target {server.GPU_UNIT}\n" in made.unit.content
    (unit,) = [file for file in made.helpers if file.path == server.GPU_UNIT_FILE]
    assert f"ExecStart={server.GPU_READY} 1 60\n" in unit.content
    assert {server.GPU_GATE, server.GPU_READY, server.GPU_UNIT_FILE} <= set(server.watched_files())


@pytest.mark.parametrize("layers", ["all", "auto", 20])
def test_layers_go_to_the_gpu_where_there_is_one(layers: object) -> None:
    assert f"--n-gpu-layers {layers}" in " ".join(gpu_plan(server_gpu_layers=layers).arguments)
    assert gpu_plan(server_gpu_layers=layers).serves[0].offloads
    assert "--n-gpu-layers" not in arguments(server_gpu_layers=layers)
    assert not plan().serves[0].offloads


def test_no_layer_on_the_gpu_is_what_was_asked_for() -> None:
    assert not gpu_plan(server_gpu_layers=0).serves[0].offloads


def test_the_servers_environment() -> None:
    mine = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "X": "a $b %c"}
    lines = gpu_plan(server_environment=mine).unit.content.splitlines()
    assert "Environment=CUDA_CACHE_PATH=/var/cache/llama-server/cuda" in lines
    assert "Environment=CUDA_DEVICE_ORDER=PCI_BUS_ID" in lines
    assert 'Environment="X=a $b %%c"' in lines
    assert gpu_plan(server_environment=mine).digest != gpu_plan().digest


# The gate itself


def gate(tmp_path: Path, listed: str, wanted: int = 1) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "llama-server"
    program.write_text(
        f"#!/bin/sh\n[ \"$1\" = --list-devices ] || exit 9\ncat <<'E'\n{listed}\nE\n"
    )
    program.chmod(0o755)
    script = Path(server.FILES / "gpu-gate.sh")
    return subprocess.run(
        ["sh", str(script), str(program), str(wanted)],
        capture_output=True, text=True, check=False, env={"CACHE_DIRECTORY": str(tmp_path)},
    )  # fmt: skip


SEEN = """ggml_cuda_init: found 1 CUDA devices:
  Device 0: NVIDIA H200, compute capability 9.0, VMM: yes
Available devices:
  CUDA0: NVIDIA H200 (143156 MiB, 142651 MiB free)"""
UNSEEN = """ggml_cuda_init: failed to initialize CUDA: unknown error
Available devices:
  (none)"""


def test_the_gate_opens_when_the_gpu_is_there(tmp_path: Path) -> None:
    assert gate(tmp_path, SEEN).returncode == 0
    assert "CUDA0" in (tmp_path / "gate.log").read_text()


@pytest.mark.parametrize(
    ("listed", "wanted", "slower"),
    [(UNSEEN, 1, "from the CPU"), (SEEN, 2, "with fewer"), ("", 1, "from the CPU")],
)
def test_the_gate_stays_shut_and_says_why(
    tmp_path: Path, listed: str, wanted: int, slower: str
) -> None:
    done = gate(tmp_path, listed, wanted)
    assert done.returncode == 1
    assert f"of {wanted} GPUs and would serve {slower}" in done.stderr
    assert listed in done.stderr
    assert (tmp_path / "gate.log").read_text().strip() == listed.strip()


def test_a_port_that_only_root_may_take_is_an_error() -> None:
    probe = replace(BARE, unprivileged_port=1024)
    assert codes(probe, server_port=80) == ["port-privileged"]
    assert codes(probe, server_port=1024) == []
    assert codes(replace(BARE, unprivileged_port=80), server_port=80) == []


@pytest.mark.parametrize("state", ["masked", "masked-runtime"])
def test_a_masked_unit_is_an_error(state: str) -> None:
    unit = Service("inactive", "dead", state, 0, False, None, None)
    assert codes(replace(BARE, services={at.SERVER_UNIT: unit})) == ["unit-masked"]
