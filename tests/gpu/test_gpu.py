"""What only a real GPU can show: llama.cpp as the plan compiles it sees the GPU and serves from it.

    LLAMA_CPP_SOURCE=/path/to/llama.cpp GPU_MODEL=/path/to/a.gguf ./run pytest -m gpu -s tests/gpu

Needs no root, no systemd and no network, and compiles for some minutes. GPU_TEST_OUT names a folder
where the probe's output, the logs and what was measured are left. bundle.py takes all of it to a
machine that has nothing of this project.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tasks.facts.probe import HostProbe, parse
from tasks.operations import release as release_operation
from tasks.probe import SERVER_UNIT, Probe, Toolkit
from tasks.rules import build, memory, model, nvidia, proof, server, stack
from tasks.rules.architecture import shape_of
from tasks.rules.build import BuildPlan, Source
from tasks.rules.fit import MIB
from tasks.rules.gguf import Bytes, read_header
from tasks.rules.nvidia import Stack
from tasks.rules.plan import watched_packages
from tasks.settings import Settings, load
from tests.gguf_models import Dimensions, write

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

GIT_SHIM = """#!/bin/sh
# Stands in for git where there is none: the source is there already.
case $* in *rev-parse*) cat "$SOURCE_COMMIT" ;; esac
exit 0
"""


@dataclass(frozen=True)
class Made:
    """A release that was compiled here."""

    folder: Path
    plan: BuildPlan
    gpu: Stack
    settings: Settings
    log: Path
    objects_bytes: int

    @property
    def program(self) -> Path:
        return self.folder / "bin" / "llama-server"


def kept(name: str, text: str) -> None:
    """Leave something for whoever ran this."""
    out = os.environ.get("GPU_TEST_OUT")
    if out:
        (Path(out) / name).write_text(text)


@pytest.fixture(scope="module")
def told() -> list[str]:
    command = HostProbe().command(packages=watched_packages())
    began = time.monotonic()
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    took = time.monotonic() - began
    anonymous = re.sub(r"^hostname\t.*$", "hostname\tgpu", done.stdout, flags=re.MULTILINE)
    kept("probe.txt", anonymous)
    print(f"\nthe probe took {took:.2f} s:\n{anonymous}{done.stderr}")
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def probe(told: list[str]) -> Probe:
    found = parse(told)
    if not nvidia.identify(found.gpus)[0]:
        pytest.skip("there is no NVIDIA card")
    return found


@pytest.fixture(scope="module")
def made(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Made:
    source = os.environ.get("LLAMA_CPP_SOURCE")
    if not source:
        pytest.skip("LLAMA_CPP_SOURCE names no source of llama.cpp")
    work = tmp_path_factory.mktemp("build")
    settings = load(
        {
            "llama_cpp_backend": "cuda",
            "llama_cpp_targets": ["llama-bench"],
            "llama_cpp_jobs": os.cpu_count() or 1,  # such machines are lent by the minute
        }
    )
    where = with_some_toolkit(probe)
    gpu = stack.plan(settings, where)
    assert gpu is not None
    repository, path = as_repository(Path(source), work)
    plan = build.plan(settings, where, repository, gpu)
    print(f"\nCMake options: {json.dumps(plan.options, indent=1)}")
    job = release_operation._job(plan, settings)
    log = work / "build.log"
    variables = {
        **job.variables,
        "WORK": str(work),
        "STAGE": str(work / "stage"),
        "STUBS": str(work / "stubs"),
        "LOG": str(log),
    }
    head = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
    environment = {**os.environ, "PATH": path, "REPO": repository.repo}
    environment["SOURCE_COMMIT"] = str(work / "commit")
    with log.open("w") as output:
        done = subprocess.run(
            ["sh", "-c", head + job.script], stdout=output, stderr=output, env=environment,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    kept("build.log", log.read_text())
    assert done.returncode == 0, log.read_text()[-3000:]
    return Made(work / "stage", plan, gpu, settings, log, size(work / "build"))


def with_some_toolkit(probe: Probe) -> Probe:
    """The host with the nvcc that is in PATH, if the probe knows of none; taken for complete."""
    nvcc = shutil.which("nvcc")
    if probe.toolkits or nvcc is None:
        whole = tuple(replace(each, has_cublas=True) for each in probe.toolkits)
        return replace(probe, toolkits=whole)
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r", V([0-9.]+)", said)
    assert found is not None
    root = str(Path(nvcc).resolve().parents[1])
    print(f"\nthe probe does not see the toolkit in {root}")
    return replace(probe, toolkits=(Toolkit(root, Version(found[1])),))


def as_repository(source: Path, work: Path) -> tuple[Source, str]:
    """The source as a git repository; and the PATH with which the build finds one."""
    path = os.environ["PATH"]
    if shutil.which("git"):
        copy = work / "origin"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"), symlinks=True)
        git = ["git", "-C", str(copy), "-c", "user.name=x", "-c", "user.email=x@localhost"]
        for words in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", "source"]):
            subprocess.run([*git, *words], check=True)
        subprocess.run([*git, "config", "uploadpack.allowAnySHA1InWant", "true"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True)
        return Source(f"file://{copy}", head.stdout.decode().strip(), "source", None), path
    shim = work / "shim" / "git"
    shim.parent.mkdir()
    shim.write_text(GIT_SHIM)
    shim.chmod(0o755)
    shutil.copytree(source, work / "source", symlinks=True)
    (work / "source" / ".git").mkdir(exist_ok=True)
    (work / "commit").write_text("0" * 40)
    return Source("file:///nowhere", "0" * 40, "source", None), f"{shim.parent}:{path}"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_probe_knows_card_driver_and_toolkit(probe: Probe) -> None:
    (card, *_) = nvidia.identify(probe.gpus)[0]
    assert not card.guessed
    query = ["nvidia-smi", "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    version, name, capability = said.splitlines()[0].split(", ")
    print(f"\n{said}{card}")
    assert probe.driver_loaded is not None
    assert str(probe.driver_loaded.version) == version
    assert str(card.chip.capability) == capability
    assert card.name.split()[0] in name
    driver = nvidia.present_driver_of(probe)
    assert driver is not None
    assert str(driver.version) == version
    assert probe.toolkits


def test_the_driver_that_is_there_stays(probe: Probe) -> None:
    gpu = stack.plan(load({}), probe)
    assert gpu is not None
    print(f"\n{gpu.driver.reason}\n{gpu.toolkit.reason}")
    assert gpu.driver.choice is not None
    assert gpu.driver.choice.installed
    assert gpu.driver.errors == ()


def test_a_release_holds_code_for_this_card_and_no_other(made: Made) -> None:
    told = json.loads((made.folder / "release.json").read_text())
    library = made.folder / "lib" / "libggml-cuda.so"
    measured = {
        "built_seconds": told["built_seconds"],
        "jobs": made.plan.jobs,
        "objects_bytes": made.objects_bytes,
        "release_bytes": size(made.folder),
        "libggml_cuda_bytes": library.stat().st_size,
    }
    kept("measured.json", json.dumps(measured, indent=1))
    print(f"\n{measured}")
    assert measured["objects_bytes"] < made.plan.cost.building(len(made.plan.architectures))
    assert measured["release_bytes"] < made.plan.cost.release(len(made.plan.architectures))
    assert told["backend"] == "cuda"
    cuobjdump = shutil.which("cuobjdump", path=f"{made.plan.toolkit_root}/bin:{os.environ['PATH']}")
    if cuobjdump:
        said = subprocess.run(
            [cuobjdump, "--list-elf", str(library)], capture_output=True, text=True, check=True
        ).stdout
        wanted = {f"sm_{each.removesuffix('-real')}" for each in made.plan.architectures}
        assert set(re.findall(r"\bsm_[0-9]+[af]?\b", said)) == wanted


def count(made: Made, probe: Probe) -> int:
    """GPUs that the server has to see."""
    seen = server.gpus(made.settings, probe, made.gpu)
    assert seen is not None
    return seen.count


def gate(
    made: Made, wanted: int, cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(server.FILES / "gpu-gate.sh"), str(made.program), str(wanted)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "CACHE_DIRECTORY": str(cache), **environment},
    )  # fmt: skip


def test_the_gate_opens_for_every_gpu(made: Made, probe: Probe, tmp_path: Path) -> None:
    done = gate(made, count(made, probe), tmp_path)
    kept("gate.log", (tmp_path / "gate.log").read_text())
    print(f"\n{(tmp_path / 'gate.log').read_text()}")
    assert done.returncode == 0, done.stderr


def test_the_gate_stays_shut_with_one_too_few(made: Made, probe: Probe, tmp_path: Path) -> None:
    wanted = count(made, probe)
    there = ",".join(map(str, range(wanted - 1)))
    done = gate(made, wanted, tmp_path, CUDA_VISIBLE_DEVICES=there)
    print(f"\n{done.stderr}")
    assert done.returncode == 1
    assert f"sees {wanted - 1} of {wanted} GPUs and would serve" in done.stderr


@contextmanager
def serving(
    made: Made, probe: Probe, tmp_path: Path, wanted: Mapping[str, Any], **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """llama-server with the plan's arguments and environment, healthy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = load({"server_port": port, **wanted})
    model_plan = model.plan(settings, probe)
    assert model_plan is not None
    plan = server.plan(settings, probe, model_plan, None, made.gpu)
    seen = server.gpus(settings, probe, made.gpu)
    assert seen is not None
    told = {**seen.environment(str(tmp_path)), **environment}
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(made.program), *plan.arguments], stdout=output, stderr=output,
            env={**os.environ, **told},
        )  # fmt: skip
    try:
        wait_healthy(plan.url, process, log)
        yield plan.url, process, log
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def tiny() -> dict[str, Any]:
    path = os.environ.get("GPU_MODEL")
    if not path:
        pytest.skip("GPU_MODEL names no model")
    return {"model": path, "server_ctx_size": 512}


def wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"not healthy within a minute: {log.read_text()[-3000:]}")


def asked(url: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
    data = json.dumps(request).encode() if request is not None else None
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        told: dict[str, Any] = json.load(answer)
        return told


def answers(url: str, process: subprocess.Popen[bytes], log: Path) -> proof.Answers:
    """What facts/proof.sh would tell, of a server that no systemd runs."""
    request = {"prompt": "The quick brown fox", "n_predict": 32, "cache_prompt": False}
    completion = asked(f"{url}/completion", request)
    open_files = [handle.readlink() for handle in Path(f"/proc/{process.pid}/fd").iterdir()]
    handles = [path for path in open_files if str(path).startswith("/dev/nvidia")]
    return proof.Answers(
        health=200,
        props=asked(f"{url}/props"),
        answer=completion,
        gpu_handles=len(handles),
        log=tuple(
            line
            for line in log.read_text(errors="replace").splitlines()
            if re.search(r"offloaded \d+/\d+ layers|  Device \d+: |using device ", line)
        ),
    )


def test_the_server_is_proven_to_serve_from_the_gpu(
    made: Made, probe: Probe, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    with serving(made, probe, tmp_path, tiny) as (url, process, log):
        found = answers(url, process, log)
        kept("server.log", log.read_text(errors="replace"))
        verdict = proof.judge(SERVER_UNIT, url, found, on_gpu=True)
        print("\n" + "\n".join(f"{what:10} {value}" for what, value in proof.table("gpu", verdict)))
        print(f"files of the driver that are open: {found.gpu_handles}")
        assert verdict.faults == ()
        assert "on the GPU" in verdict.layers
        assert verdict.device.count("NVIDIA") == count(made, probe)
        assert found.gpu_handles
        # And without its log it is still told apart from one on the CPU.
        assert proof.judge(SERVER_UNIT, url, replace(found, log=()), on_gpu=True).faults == ()


def test_a_server_that_fell_back_to_the_cpu_is_found_out(
    made: Made, probe: Probe, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    with serving(made, probe, tmp_path, tiny, CUDA_VISIBLE_DEVICES="") as (url, process, log):
        found = answers(url, process, log)
        kept("server-cpu.log", log.read_text(errors="replace"))
        print(f"\nfiles of the driver that are open: {found.gpu_handles}")
        assert proof.judge(SERVER_UNIT, url, found, on_gpu=True).faults
        assert proof.judge(SERVER_UNIT, url, replace(found, log=()), on_gpu=True).faults


def test_servers_beside_each_other_keep_to_the_cards_they_are_given(
    made: Made, probe: Probe, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    cards = sorted(gpu.address for gpu in probe.gpus)
    if len(cards) < 2:
        pytest.skip("there is one card only")
    with ExitStack() as stack:
        for number, address in enumerate(cards):
            folder = tmp_path / str(number)
            folder.mkdir()
            wanted = {**tiny, "server_gpu_devices": [number]}
            url, process, log = stack.enter_context(serving(made, probe, folder, wanted))
            found = answers(url, process, log)
            verdict = proof.judge(SERVER_UNIT, url, found, on_gpu=True)
            assert verdict.faults == ()
            used = re.findall(r"using device CUDA\d+ \(.+?\) \(([0-9a-f:.]+)\)", log.read_text())
            print(f"\n{number}: {verdict.device} at {used}", end="")
            assert used == [address]


SHAPES = {
    "llama": Dimensions(
        "llama", layers=16, width=4096, feed_forward=14336, heads=32, heads_kv=8, head_size=128,
        vocabulary=32000,
    ),
    "gemma3": Dimensions(
        "gemma3", layers=13, width=2560, feed_forward=10240, heads=8, heads_kv=4, head_size=256,
        window=1024, vocabulary=65536, tied=True,
    ),
}  # fmt: skip
WANTED = (
    {"server_ctx_size": 8192, "server_parallel": 2},
    {"server_ctx_size": 4096, "server_parallel": 1, "server_ubatch_size": 1024},
    {"server_ctx_size": 32768, "server_parallel": 1, "server_cache_type_k": "q8_0",
     "server_cache_type_v": "q8_0"},
)  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_memory_on_the_cards_is_what_was_predicted(
    made: Made, probe: Probe, tmp_path: Path, name: str
) -> None:
    (path,) = write(tmp_path / "model.gguf", SHAPES[name])
    shape = shape_of(read_header(Bytes(path.read_bytes()[:50_000_000])))
    for number, wanted in enumerate(WANTED):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = {"model": str(path), **wanted}
        judged = memory.judge(load(data), probe, shape)
        assert judged is not None
        with serving(made, probe, folder, data) as (_, _, log):
            text = log.read_text(errors="replace")
        kept(f"memory-{name}-{number}.log", text)
        *cards, _ = judged.shares
        assert len(cards) == count(made, probe)
        for device, share in enumerate(cards):
            theirs = {
                what: sum(
                    float(mib)
                    for mib in re.findall(
                        rf"CUDA{device} {said} buffer size = +([0-9.]+) MiB", text
                    )
                )
                for what, said in (("weights", "model"), ("cache", "KV"), ("compute", "compute"))
            }
            ours = {what: getattr(share.memory, what) / MIB for what in theirs}
            print(f"\n{name} {wanted} CUDA{device}: {ours} {theirs}", end="")
            assert theirs["weights"]
            assert theirs["cache"]
            assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.05)
