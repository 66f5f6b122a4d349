from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from packaging.version import Version

from tasks.probe import CACHE, PREFIX, Probe, Release, Toolkit
from tasks.rules import build, stack, tables
from tasks.rules.findings import Severity
from tasks.rules.plan import make_plan

from .hosts import (
    BARE,
    COMMIT,
    GIB,
    H200,
    RTX_4090,
    RTX_5090,
    SOURCE,
    WITH_CARD,
    WITH_COMPILER,
    WITH_DRIVER,
    card,
    on,
    settings,
    with_release,
)


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"),
    [(8, 32, 8), (8, 8, 4), (64, 16, 8), (2, 64, 2), (4, 1, 1), (None, None, 1), (16, None, 1)],
)
def test_jobs_are_bounded_by_cores_and_memory(
    cores: int | None, memory: int | None, jobs: int
) -> None:
    probe = replace(BARE, cores=cores, memory_bytes=memory and memory * GIB)
    assert build.jobs(settings(), probe) == jobs


def test_the_user_may_set_the_jobs() -> None:
    assert build.jobs(settings(llama_cpp_jobs=3), BARE) == 3


def test_without_a_compiler_the_build_id_waits_for_one() -> None:
    assert build.plan(settings(), BARE, SOURCE).build_id is None
    assert build.plan(settings(), WITH_COMPILER, SOURCE).build_id is not None


def build_id(**data: object) -> str | None:
    return build.plan(settings(**data), WITH_COMPILER, SOURCE).build_id


def test_the_build_id_depends_on_what_the_binary_depends_on_and_nothing_else() -> None:
    same = build_id()
    assert build_id() == same
    assert build_id(llama_cpp_jobs=1) == same
    assert build_id(server_port=9000) == same
    assert build_id(llama_cpp_cmake_args={"GGML_LTO": "ON"}) != same
    assert build_id(llama_cpp_targets=["llama-cli"]) != same
    assert build_id(llama_cpp_native=False) != same


@pytest.mark.parametrize(
    "change",
    [
        {"compilers": {"g++": Version("15.1.0")}},
        {"glibc": Version("2.42")},
        {"cpu_target": "0" * 64},
        {"os_version": "12"},
    ],
)
def test_another_host_is_another_build(change: dict[str, object]) -> None:
    other = build.plan(settings(), replace(WITH_COMPILER, **change), SOURCE)  # type: ignore[arg-type]
    assert other.build_id != build_id()


def test_a_portable_build_does_not_depend_on_the_processor() -> None:
    wanted = settings(llama_cpp_native=False)
    other = replace(WITH_COMPILER, cpu_target="0" * 64)
    assert (
        build.plan(wanted, other, SOURCE).build_id
        == build.plan(wanted, WITH_COMPILER, SOURCE).build_id
    )
    assert build.plan(wanted, other, SOURCE).options["GGML_NATIVE"] == "OFF"


def test_a_release_made_from_the_same_inputs_is_found() -> None:
    probe = with_release(WITH_COMPILER, settings())
    plan = build.plan(settings(), probe, SOURCE)
    assert plan.release == probe.releases[0]
    assert plan.release_name == probe.releases[0].name


def test_a_release_stays_good_when_the_compiler_was_removed() -> None:
    probe = replace(with_release(WITH_COMPILER, settings()), compilers={}, packages={})
    assert build.plan(settings(), probe, SOURCE).release is not None


def test_a_release_of_other_options_is_not_taken() -> None:
    probe = with_release(WITH_COMPILER, settings())
    assert build.plan(settings(llama_cpp_native=False), probe, SOURCE).release is None


def test_of_two_releases_that_fit_the_one_in_use_stays() -> None:
    probe = with_release(WITH_COMPILER, settings())
    other = replace(probe.releases[0], name="aaaa-other")
    both = replace(probe, releases=(other, probe.releases[0]))
    assert build.plan(settings(), both, SOURCE).release_name == probe.current


def test_the_users_options_win_and_an_empty_one_leaves_ours_out() -> None:
    wanted = settings(llama_cpp_cmake_args={"GGML_OPENMP": "OFF", "LLAMA_BUILD_APP": ""})
    options = build.options(wanted, BARE)
    assert options["GGML_OPENMP"] == "OFF"
    assert "LLAMA_BUILD_APP" not in options


def test_what_the_user_asks_for_has_to_be_in_the_source_and_so_has_what_we_rely_on() -> None:
    wanted = settings(llama_cpp_cmake_args={"GGML_LTO": "ON", "CMAKE_CXX_FLAGS": "-g"})
    assert build.plan(wanted, WITH_COMPILER, SOURCE).needed_options == {"GGML_LTO"}
    assert plan_for(WITH_CARD).needed_options == {"GGML_CUDA"}


def test_nothing_is_downloaded_in_the_middle_of_the_build() -> None:
    assert build.options(settings(), BARE)["LLAMA_USE_PREBUILT_UI"] == "OFF"


@pytest.mark.parametrize(
    ("version", "tags", "label"),
    [
        (COMMIT, (), COMMIT[:9]),
        (COMMIT, ("b9999",), "b9999"),
        ("v1.2", ("b9999", "v1.2"), "v1.2"),
        ("feature/x y", ("feature/x y",), "feature_x_y"),
        ("../../etc", ("../../etc",), ".._.._etc"),
    ],
)
def test_a_release_is_called_by_its_tag(version: str, tags: tuple[str, ...], label: str) -> None:
    assert build.label(version, COMMIT, tags) == label


@pytest.mark.parametrize(
    ("tags", "number"), [((), None), (("b12",), 12), (("v1", "b3"), 3), (("b1x",), None)]
)
def test_the_build_number_is_told_by_a_tag_or_not_at_all(
    tags: tuple[str, ...], number: int | None
) -> None:
    assert build.build_number(tags) == number


def codes(probe: object, **data: object) -> list[tuple[str, str]]:
    plan = build.plan(settings(**data), probe, SOURCE)  # type: ignore[arg-type]
    found = build.findings(plan, settings(**data), probe)  # type: ignore[arg-type]
    return [(each.severity.value, each.code) for each in found]


def test_a_good_host_has_nothing_against_the_build() -> None:
    assert codes(BARE) == []


def test_little_memory_is_a_warning() -> None:
    assert codes(replace(BARE, memory_bytes=GIB)) == [(Severity.WARNING.value, "little-memory")]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("libstdc++.so.6", True),
        ("libc.so.6", True),
        ("ld-linux-x86-64.so.2", True),
        ("ld-linux-aarch64.so.1", True),
        ("libgomp.so.1", True),
        ("libssl.so.3", True),
        ("libnccl.so.2", False),
        ("libibverbs.so.1", False),
        ("libopenblas.so.0", False),
        ("libcurl.so.4", False),
    ],
)
def test_no_library_is_taken_in_by_chance(library: str, allowed: bool) -> None:
    assert is_allowed(library, "cpu") is allowed


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("libcudart.so.13", True),
        ("libcublas.so.12", True),
        ("libcublasLt.so.12", True),
        ("libcuda.so.1", True),
        ("libstdc++.so.6", True),
        ("libnccl.so.2", False),
        ("libibverbs.so.1", False),
        ("libcudnn.so.9", False),
    ],
)
def test_a_build_for_cuda_takes_in_cuda_and_nothing_else(library: str, allowed: bool) -> None:
    assert is_allowed(library, "cuda") is allowed
    assert not (is_allowed(library, "cpu") and "cu" in library)


def is_allowed(library: str, backend: tables.Backend) -> bool:
    expression = "|".join(tables.allowed_libraries(backend))
    grep = subprocess.run(["grep", "-qxE", expression], input=library, text=True, check=False)
    return grep.returncode == 0


# For CUDA


def plan_for(probe: Probe, **data: object) -> build.BuildPlan:
    wanted = settings(**data)
    return build.plan(wanted, probe, SOURCE, stack.plan(wanted, probe))


NVCC = Toolkit("/usr/local/cuda-13.2", Version("13.2.86"))
WITH_TOOLKIT = replace(WITH_DRIVER, toolkits=(NVCC,))


def cuda_release(made: build.BuildPlan) -> Release:
    return Release(f"b9999-{made.build_id}", COMMIT, made.inputs, frozenset())


def test_cuda_is_compiled_by_the_plans_toolkit_for_the_cards_that_are_there() -> None:
    made = plan_for(WITH_TOOLKIT)
    assert made.backend == "cuda"
    assert made.options["GGML_CUDA"] == "ON"
    assert made.options["CMAKE_CUDA_ARCHITECTURES"] == "120a-real"
    assert made.options["CMAKE_CUDA_COMPILER"] == "/usr/local/cuda-13.2/bin/nvcc"
    assert made.options["CMAKE_INSTALL_RPATH"].endswith(";$ORIGIN;/usr/local/cuda-13.2/lib64")
    assert made.options["GGML_CUDA_NCCL"] == "OFF"
    assert made.options["GGML_CUDA_COMPRESSION_MODE"] == "size"
    assert "CMAKE_CUDA_HOST_COMPILER" not in made.options
    assert made.inputs["toolkit"] == "nvcc 13.2.86"
    assert made.build_id is not None


def test_the_cpu_knows_nothing_of_cuda() -> None:
    made = build.plan(settings(), WITH_COMPILER, SOURCE)
    assert made.options["GGML_CUDA"] == "OFF"
    assert [name for name in made.options if "CUDA" in name] == ["GGML_CUDA"]
    assert made.toolkit_root is None


@pytest.mark.parametrize(
    ("devices", "forced"),
    [((H200,), True), ((H200, H200), True), ((H200, RTX_4090), False), ((RTX_5090,), False)],
)
def test_cublas_is_forced_on_hopper_alone(devices: tuple[int, ...], forced: bool) -> None:
    cards = tuple(card(device) for device in devices)
    made = plan_for(on("ubuntu 24.04", replace(WITH_CARD, gpus=cards)))
    assert ("GGML_CUDA_FORCE_CUBLAS" in made.options) is forced


def test_different_cards_are_compiled_for_each() -> None:
    cards = (card(RTX_4090), card(RTX_5090))
    made = plan_for(on("ubuntu 24.04", replace(WITH_CARD, gpus=cards)))
    assert made.options["CMAKE_CUDA_ARCHITECTURES"] == "89;120a-real"


def test_compressing_takes_a_toolkit_that_can() -> None:
    old = Toolkit("/usr/local/cuda-12.6", Version("12.6.85"))
    probe = on("ubuntu 24.04", replace(WITH_CARD, gpus=(card(RTX_4090),), toolkits=(old,)))
    made = plan_for(probe)
    assert made.toolkit_root == "/usr/local/cuda-12.6"
    assert "GGML_CUDA_COMPRESSION_MODE" not in made.options


def test_a_compiler_too_new_for_nvcc_gets_an_older_one_beside_it() -> None:
    probe = on("ubuntu 26.04", compilers={"g++": Version("16.1.0")})
    made = plan_for(probe)
    assert made.options["CMAKE_CUDA_HOST_COMPILER"] == "/usr/bin/g++-15"
    assert "g++-15" in made.packages
    assert made.inputs["cuda_host_compiler"] is None
    both = replace(probe, compilers={"g++": Version("16.1.0"), "g++-15": Version("15.2.0")})
    assert plan_for(both).inputs["cuda_host_compiler"] == "g++ 15.2.0"


def test_without_the_toolkit_the_build_id_waits_for_it() -> None:
    made = plan_for(WITH_CARD)
    assert made.toolkit_root == "/usr/local/cuda-13.2", "where it will be"
    assert made.build_id is None
    after = build.replan(made, settings(), WITH_TOOLKIT)
    assert after.build_id is not None
    assert after.options == made.options


def test_a_release_for_the_cpu_is_not_taken_for_cuda_nor_the_other_way_round() -> None:
    for_cpu = with_release(WITH_COMPILER, settings())
    assert plan_for(replace(WITH_TOOLKIT, releases=for_cpu.releases)).release is None
    for_cuda = cuda_release(plan_for(WITH_TOOLKIT))
    assert plan_for(replace(WITH_TOOLKIT, releases=(for_cuda,))).release == for_cuda
    there = replace(WITH_TOOLKIT, releases=(for_cuda,))
    assert plan_for(there, llama_cpp_backend="cpu").release is None


@pytest.mark.parametrize(
    "change",
    [
        {"toolkits": (replace(NVCC, nvcc_version=Version("13.2.92")),)},
        {"gpus": (card(RTX_5090), card(RTX_4090))},
        {"toolkits": ()},
    ],
)
def test_another_toolkit_or_card_is_another_build(change: dict[str, object]) -> None:
    release = cuda_release(plan_for(WITH_TOOLKIT))
    probe = replace(WITH_TOOLKIT, releases=(release,), **change)  # type: ignore[arg-type]
    assert plan_for(probe).release is None


def test_nvcc_takes_more_memory_than_gcc() -> None:
    probe = replace(WITH_TOOLKIT, cores=16, memory_bytes=24 * GIB)
    assert plan_for(probe).jobs == 8
    assert plan_for(probe, llama_cpp_backend="cpu").jobs == 12


def test_cuda_takes_more_space() -> None:
    made = {need.place: need.bytes for need in build.needs(plan_for(WITH_TOOLKIT))}
    plain = {need.place: need.bytes for need in build.needs(plan_for(WITH_COMPILER))}
    assert all(made[place] > plain[place] for place in plain)
    two = replace(WITH_TOOLKIT, gpus=(card(RTX_5090), card(RTX_4090)))
    more = {need.place: need.bytes for need in build.needs(plan_for(two))}
    assert all(more[place] > made[place] for place in made)


def test_rpc_is_built_when_its_program_is_and_without_what_happens_to_be_there() -> None:
    assert "GGML_RPC_RDMA" not in plan_for(WITH_TOOLKIT).options
    assert plan_for(WITH_TOOLKIT).options["GGML_RPC"] == "OFF"
    rpc = plan_for(WITH_TOOLKIT, llama_cpp_targets=["ggml-rpc-server"])
    assert (rpc.options["GGML_RPC"], rpc.options["GGML_RPC_RDMA"]) == ("ON", "OFF")
    assert "GGML_RPC" in rpc.needed_options


def test_flash_attention_is_compiled_for_the_caches_types() -> None:
    plain = plan_for(WITH_TOOLKIT, server_cache_type_k="q8_0", server_cache_type_v="q8_0")
    assert "GGML_CUDA_FA_QUANTS" not in plain.options
    mixed = plan_for(WITH_TOOLKIT, server_cache_type_k="q8_0", server_cache_type_v="q5_1")
    assert mixed.options["GGML_CUDA_FA_QUANTS"].endswith(";bf16-bf16;q8_0-q5_1")
    odd = settings(server_cache_type_k="iq4_nl", server_cache_type_v="iq4_nl")
    made = build.plan(odd, WITH_TOOLKIT, SOURCE, stack.plan(odd, WITH_TOOLKIT))
    (found,) = build.findings(made, odd, WITH_TOOLKIT)
    assert found.code == "cache-type"
    assert "does not know iq4_nl for" in found.cause


@pytest.mark.parametrize("gone", [each.name for each in tables.gone_options()])
def test_options_that_are_gone_are_never_passed(gone: str) -> None:
    assert gone not in plan_for(WITH_TOOLKIT).options
    assert gone not in {each.name for each in tables.build_options()}
    said = settings(llama_cpp_cmake_args={gone: "ON"})
    (found,) = build.findings(build.plan(said, WITH_COMPILER, SOURCE), said, WITH_COMPILER)
    assert (found.code, gone in found.cause) == ("option-gone", True)


def test_where_no_program_may_run_nothing_is_compiled_or_served() -> None:
    there = with_release(WITH_COMPILER, settings())

    def codes(probe: Probe) -> list[str]:
        return [found.code for found in make_plan(settings(), probe, SOURCE).errors]

    for place in (PREFIX, CACHE):
        assert codes(replace(WITH_COMPILER, noexec=frozenset({place}))) == ["mounted-noexec"]
    assert codes(replace(there, noexec=frozenset({CACHE}))) == []
    assert codes(replace(there, noexec=frozenset({PREFIX}))) == ["mounted-noexec"]
