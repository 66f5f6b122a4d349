from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.facts.proof import ServerProof, parse
from tasks.rules import proof
from tasks.rules.proof import Answers, judge, table

UNIT = "llama-server.service"
URL = "http://127.0.0.1:8080"
GOOD = Answers(
    health=200,
    props={
        "default_generation_settings": {"n_ctx": 4096},
        "total_slots": 4,
        "model_alias": "tiny",
    },
    answer={"timings": {"predicted_n": 32, "predicted_per_second": 51.26,
                            "prompt_per_second": 1234.5}},
    executable="/opt/llama.cpp/releases/b1-abc/bin/llama-server",
    memory_bytes=2**30,
    exposure=1.1,
)  # fmt: skip
GPU_LOG = (
    "ggml_cuda_init: found 1 CUDA devices:",
    "  Device 0: NVIDIA GeForce RTX 5090, compute capability 12.0, VMM: yes",
    "load_tensors: offloaded 25/25 layers to GPU",
)


def test_a_server_that_generates_is_proven() -> None:
    verdict = judge(UNIT, URL, GOOD)
    assert verdict.faults == ()
    assert verdict.device == "CPU"
    assert verdict.release == "b1-abc"
    text = "\n".join(f"{what} {value}" for what, value in table("box", verdict))
    assert "tokens/s 51.3 generated, 1,234.5 read" in text
    assert "slots 4 x 4096 tokens" in text
    json.dumps(verdict.as_json())


def test_the_gpu_and_its_layers_are_read_from_the_log_of_this_start() -> None:
    verdict = judge(UNIT, URL, replace(GOOD, log=GPU_LOG))
    assert verdict.device == "NVIDIA GeForce RTX 5090"
    assert verdict.layers == "25 of 25 on the GPU"


def test_the_loader_names_the_cards_that_it_uses() -> None:
    log = (
        "I llama_prepare_model_devices: using device CUDA0 (NVIDIA H100) (0000:00:06.0) - 80 MiB",
        "I llama_prepare_model_devices: using device CUDA1 (NVIDIA L4 (Ada)) (0000:00:07.0) - 4",
        "0.00.200.816 I load_tensors: offloaded 3/3 layers to GPU",
    )
    verdict = judge(UNIT, URL, replace(GOOD, log=log), on_gpu=True)
    assert verdict.device == "NVIDIA H100, NVIDIA L4 (Ada)"
    assert verdict.layers == "3 of 3 on the GPU"


def test_a_gpu_with_no_layer_on_it_is_no_gpu() -> None:
    log = (*GPU_LOG[:2], "load_tensors: offloaded 0/25 layers to GPU")
    assert judge(UNIT, URL, replace(GOOD, log=log)).device == "CPU"


def test_a_server_that_serves_from_the_cpu_where_a_gpu_was_meant_is_no_proof() -> None:
    (fault,) = judge(UNIT, URL, GOOD, on_gpu=True).faults
    assert "from the CPU, not from the GPU" in fault
    log = (*GPU_LOG[:2], "load_tensors: offloaded 0/25 layers to GPU")
    assert judge(UNIT, URL, replace(GOOD, log=log), on_gpu=True).faults
    assert judge(UNIT, URL, replace(GOOD, log=GPU_LOG), on_gpu=True).faults == ()
    # Its backend alone, which upstream's own tools print, proves nothing.
    assert judge(UNIT, URL, replace(GOOD, log=GPU_LOG[:2], gpu_handles=9), on_gpu=True).faults


def test_a_gpu_is_known_by_what_the_server_holds_when_the_log_is_gone() -> None:
    for held in ({"gpu_handles": 4}, {"gpu_memory_bytes": 2**30}):
        verdict = judge(UNIT, URL, replace(GOOD, **held), on_gpu=True)  # type: ignore[arg-type]
        assert verdict.faults == ()
        assert "not in the log any more" in verdict.layers


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"health": 503}, "says 503"),
        ({"health": None}, "says nothing"),
        ({"props": {"role": "router"}}, "router mode"),
        ({"answer": {}}, "was asked to generate and did not"),
        ({"answer": {"timings": {"predicted_n": 0}}}, "was asked to generate and did not"),
        ({"answer": {"error": {"message": "Loading model"}}}, "Loading model"),
        ({"answer": {"timings": 3}}, "was asked to generate and did not"),
    ],
)
def test_what_proves_nothing_is_refused(change: dict[str, object], part: str) -> None:
    (fault,) = judge(UNIT, URL, replace(GOOD, **change)).faults  # type: ignore[arg-type]
    assert part in fault


def test_answers_are_parsed_and_what_is_not_json_is_nothing() -> None:
    answers = parse(
        [
            *("health\t200", 'props\t{"a": 1}', "answer\tcurl: (7) refused"),
            *("memory_kib\t1024", "exposure\t1.1", "gpu_handles\t3"),
            *("gpu_memory_mib\t10", "gpu_memory_mib\t20", "log\tone", "log\ttwo", "end\t1"),
        ]
    )
    assert answers.health == 200
    assert answers.props == {"a": 1}
    assert answers.answer == {}
    assert answers.memory_bytes == 2**20
    assert answers.gpu_handles == 3
    assert answers.gpu_memory_bytes == 30 * 2**20
    assert answers.log == ("one", "two")
    assert parse([]) == Answers()


@pytest.mark.parametrize(
    ("purpose", "answer", "work"),
    [
        ("embed", {"data": [{"embedding": [0.0, 0.5, 0.1]}]}, "embedding 3 numbers"),
        ("embed", {"data": [{"embedding": [0.0, 0.0]}]}, None),
        ("embed", {"data": [{"embedding": [None, "x"]}]}, None),
        ("embed", {"error": {"message": "pooling"}}, None),
        ("embed", GOOD.answer, None),
        ("rerank", {"results": [{"relevance_score": 1.5}, {"relevance_score": -2}]},
         "ranking 2 documents"),
        ("rerank", {"results": [{"relevance_score": None}, {"relevance_score": 1}]}, None),
        ("rerank", {"results": 7}, None),
        ("generate", {"data": [{"embedding": [1.0]}]}, None),
    ],
)  # fmt: skip
def test_each_server_is_asked_for_what_it_is_for(
    purpose: str, answer: dict[str, object], work: str | None
) -> None:
    verdict = judge(UNIT, URL, replace(GOOD, answer=answer), purpose=purpose)
    text = "\n".join(f"{what} {value}" for what, value in table("box", verdict))
    if work is None:
        assert f"asked to {purpose} and did not" in verdict.faults[0]
    else:
        assert verdict.faults == ()
        assert work in text


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["data", "embedding", "results", "relevance_score", "timings",
                         "predicted_n", "error"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.sampled_from(["generate", "embed", "rerank"]), values)
def test_no_answer_is_a_traceback(purpose: str, answer: object) -> None:
    told = parse([f"answer\t{json.dumps(answer)}", f"props\t{json.dumps(answer)}"])
    verdict = judge(UNIT, URL, told, purpose=purpose)
    assert table("box", verdict)
    json.dumps(verdict.as_json())


def test_the_api_key_is_read_on_the_host_and_not_sent_with_the_command() -> None:
    command = ServerProof().command(UNIT, URL, with_key=True)
    assert "key_file=/etc/llamastead/api-key" in command
    assert proof.table is table
