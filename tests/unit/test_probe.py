from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from pyinfra.api import FactProcessError

from tasks.facts.probe import HostProbe, parse
from tasks.probe import Gpu, Listener, ManagedFile, ModelPath, Probe

RECORDED = sorted((Path(__file__).parent / "probes").glob("*.txt"))


def told(*lines: str) -> Probe:
    return parse([*lines, "end\t1"])


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_host_is_read(path: Path) -> None:
    probe = parse(path.read_text().splitlines())
    assert probe.arch == "x86_64"
    assert probe.os_id in {"debian", "ubuntu"}
    assert probe.glibc is not None
    assert probe.glibc >= Version("2.35")
    assert probe.memory_bytes
    assert probe.memory_bytes > 2**30
    assert probe.disk_free_bytes["/opt/llama.cpp"] > 2**20


def test_an_output_that_was_cut_short_is_refused() -> None:
    with pytest.raises(FactProcessError, match="cut short"):
        parse(["uid\t0"])


def test_a_host_that_says_nothing_is_an_empty_probe() -> None:
    assert told() == Probe()


def test_who_and_where() -> None:
    probe = told(
        "uid\t1000", "arch\taarch64", "kernel\t6.8.0-31-generic", "os.ID\tubuntu",
        "os.VERSION_ID\t24.04", "systemd_running\tyes", "systemd_version\t255",
    )  # fmt: skip
    assert (probe.uid, probe.arch, probe.os_id, probe.os_version) == (
        1000,
        "aarch64",
        "ubuntu",
        "24.04",
    )
    assert probe.systemd_running
    assert probe.systemd_version == 255


@pytest.mark.parametrize(
    ("kernel", "wsl"),
    [
        ("6.6.87.2-microsoft-standard-WSL2", True),
        ("4.4.0-19041-Microsoft", True),
        ("6.12.48+deb13-amd64", False),
    ],
)
def test_wsl_is_known_by_its_kernel(kernel: str, wsl: bool) -> None:
    assert told(f"kernel\t{kernel}").wsl is wsl


def test_a_graphics_card_is_seen_before_any_driver_is() -> None:
    probe = told("gpu\t0000:01:00.0 0x10de 0x2b85 0x030000 nouveau|34359738368|0x1043|0x89e3")
    assert probe.gpus == (
        Gpu("0000:01:00.0", 0x10DE, 0x2B85, 0x030000, "nouveau", 2**35, 0x1043, 0x89E3),
    )
    bare = told("gpu\t0000:01:00.0 0x10de 0x2b85 0x030000 |||")
    assert bare.gpus == (Gpu("0000:01:00.0", 0x10DE, 0x2B85, 0x030000, None, None),)


def test_compilers_and_toolkits_have_versions() -> None:
    probe = told(
        "compiler\tg++ 14.2.0", "compiler\tg++-13 13.3.0", "compiler\tg++-12 ", "compiler\tbroken",
        "toolkit\t/usr/local/cuda-12.9 12.9.86", "toolkit\t/usr/local/cuda-13.0 ",
    )  # fmt: skip
    assert probe.compilers == {"g++": Version("14.2.0"), "g++-13": Version("13.3.0")}
    assert [str(toolkit.nvcc_version) for toolkit in probe.toolkits] == ["12.9.86"]


def test_releases_blobs_and_links_are_ours() -> None:
    probe = told(
        'release\t{"name": "b1-abc", "commit": "c", "inputs": {"os": "debian 13"}}',
        "release\t{half",
        'release\t{"name": "no inputs"}',
        "release\t[]",
        "current\tb1-abc",
        "blob\tabcdef 12",
        "blob\tabcdef.part x",
        "link\t/var/lib/llamastead/models/a/my model.gguf\t../blobs/abcdef",
        f"partial\t{'a' * 64} 7",
        'record\t/r/1.json 12 {"a": 1}',
    )
    assert [release.name for release in probe.releases] == ["b1-abc"]
    assert probe.current == "b1-abc"
    assert probe.blobs == {"abcdef": 12}
    assert probe.links == {"/var/lib/llamastead/models/a/my model.gguf": "../blobs/abcdef"}
    assert probe.partials == {"a" * 64: 7}
    assert probe.records == {"/r/1.json": (12, '{"a": 1}')}


def test_a_file_of_ours_has_content_mode_and_owner() -> None:
    probe = told("file\t/etc/llamastead/api-key abc 600 root root")
    assert probe.files == {"/etc/llamastead/api-key": ManagedFile("abc", 0o600, "root", "root")}


def test_the_services_and_what_they_run_from() -> None:
    unit = "llama-server.service"
    probe = told(
        f"service\t{unit} mark # Written by llamastead; changes here are overwritten.",
        f"service\t{unit} ActiveState active", f"service\t{unit} SubState running",
        f"service\t{unit} UnitFileState enabled", f"service\t{unit} MainPID 42",
        f"service\t{unit} NeedDaemonReload no", f"service\t{unit} digest abc",
        f"service\t{unit} executable /opt/llama.cpp/releases/x/bin/llama-server",
        "service\tllama-server@embed.service ActiveState inactive",
        "service\tllama-server@embed.service UnitFileState ",
    )  # fmt: skip
    service = probe.services[unit]
    assert service.main_pid == 42
    assert service.digest == "abc"
    assert service.is_ours
    assert not service.need_daemon_reload
    other = probe.services["llama-server@embed.service"]
    assert (other.active, other.enabled, other.is_ours) == ("inactive", "", False)
    assert told().services == {}


@pytest.mark.parametrize(
    ("value", "listener"),
    [
        ("ours llama-server.service", Listener(None, None, "llama-server.service")),
        ("other 7 nginx", Listener(7, "nginx")),
        ("other 7 Web Content", Listener(7, "Web Content")),
        ("other - ", Listener(None, None)),
    ],
)
def test_who_holds_a_port(value: str, listener: Listener) -> None:
    assert told(f"listener\t8080 {value}").listeners == {8080: listener}


def test_a_model_by_path() -> None:
    probe = told("model_path\t5 640 47475546 - /my model.gguf", "no_model_path\t/none.gguf")
    assert probe.model_paths == {
        "/my model.gguf": ModelPath(True, 5, world_readable=False, magic="47475546"),
        "/none.gguf": ModelPath(exists=False),
    }


@given(st.lists(st.text()))
def test_no_output_is_a_traceback(lines: list[str]) -> None:
    parse([*lines, "end\t1"])


KEYS = ["uid", "gpu", "disk", "compiler", "toolkit", "release", "blob", "file", "link", "job",
        "listener", "service", "memory_kib", "glibc", "package",
        "model_path", "no_model_path", "tool"]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.text(max_size=30))))
def test_no_odd_value_is_a_traceback(pairs: list[tuple[str, str]]) -> None:
    parse([*(f"{key}\t{value}" for key, value in pairs), "end\t1"])


def run_here(**wanted: object) -> subprocess.CompletedProcess[str]:
    command = HostProbe().command(**wanted)  # type: ignore[arg-type]
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)


def test_the_script_reads_this_machine_quickly_and_quietly() -> None:
    done = run_here()
    assert done.returncode == 0
    assert done.stderr == ""
    probe = parse(done.stdout.splitlines())
    assert probe.cores
    assert probe.kernel


def test_another_cpu_is_one_of_which_the_compiler_makes_something_else(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase $1 in -m*=native) echo "$TARGET" ;; esac\n')
    compiler.chmod(0o755)

    def target(said: str) -> str | None:
        path = f"{tmp_path}:{os.environ['PATH']}"
        told = subprocess.run(
            ["sh", "-c", HostProbe().command()],
            capture_output=True, text=True, check=True, env={"PATH": path, "TARGET": said},
        )  # fmt: skip
        return parse(told.stdout.splitlines()).cpu_target

    assert target("-mavx2") == target("-mavx2")
    assert target("-mavx2") != target("-mavx512f")
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert target("") is not None  # or what is compiled would have no name


def test_where_no_program_runs_and_where_links_lead_is_seen(tmp_path: Path) -> None:
    (tmp_path / "my model.gguf").symlink_to(tmp_path / "blob")
    path = str(tmp_path / "my model.gguf")
    # As if all was on one disk, mounted three times.
    (tmp_path / "df").write_text("#!/bin/sh\necho heading\necho disk 9 1 8 9% /\n")
    (tmp_path / "df").chmod(0o755)
    mounts = tmp_path / "mounts"
    lines = [f"disk / ext4 {options} 0 0\n" for options in ("rw", "rw,noexec", "rw,relatime")]

    def probe(count: int) -> Probe:
        mounts.write_text("".join(lines[:count]))
        script = HostProbe().command(model_paths=[path]).replace("/proc/mounts", str(mounts))
        done = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, check=True,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.stderr == ""
        return parse(done.stdout.splitlines())

    assert "/usr" not in probe(1).noexec
    assert "/usr" in probe(2).noexec
    assert "/usr" not in probe(3).noexec
    assert probe(3).real_paths[path] == str(tmp_path / "blob")


def test_the_script_survives_a_machine_that_has_nothing(tmp_path: Path) -> None:
    command = HostProbe().command()
    bare = {"PATH": str(tmp_path)}
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace(":/usr/local/sbin:/usr/sbin:/sbin", "")],
        capture_output=True, text=True, check=False, env=bare,
    )  # fmt: skip
    assert done.returncode == 0
    assert parse(done.stdout.splitlines()).cores is None


def test_a_hostile_file_name_is_data_not_code(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = f"/tmp/'; touch {trap}; '$(touch {trap})`touch {trap}`.gguf"
    done = run_here(model_paths=[path])
    assert done.returncode == 0
    assert not trap.exists()
    assert parse(done.stdout.splitlines()).model_paths == {path: ModelPath(exists=False)}


def test_a_model_file_is_looked_at_for_real(tmp_path: Path) -> None:
    model = tmp_path / "my model.gguf"
    model.write_bytes(b"GGUF" + b"\0" * 96)
    model.chmod(0o644)
    probe = parse(run_here(model_paths=[str(model)]).stdout.splitlines())
    there = ModelPath(True, 100, world_readable=True, magic="47475546")
    assert probe.model_paths == {str(model): there}


def test_what_listens_on_a_port_is_found_for_real() -> None:
    import socket  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        probe = parse(run_here(ports=[server_port_free(), port]).stdout.splitlines())
    (listener,) = probe.listeners.values()
    assert listener.unit is None
    assert listener.pid
    assert parse(run_here(ports=[server_port_free()]).stdout.splitlines()).listeners == {}


def server_port_free() -> int:
    import socket  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_the_command_is_one_shell_script() -> None:
    command = HostProbe().command(packages=("g++", "nvidia-*"), files=("/etc/x",))
    assert shlex.quote("g++ nvidia-*") in command
    subprocess.run(["sh", "-n", "-c", command], check=True)
