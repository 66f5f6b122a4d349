"""What is predicted of a model's memory is what a real llama-server logs of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tasks.rules.architecture import CacheKind, architectures, shape_of
from tasks.rules.fit import MIB, Demand, on_host
from tasks.rules.gguf import Bytes, read_header
from tasks.settings import LLAMA_CPP_COMMIT
from tests.e2e.conftest import Deployed
from tests.gguf_models import MODELS, write
from tests.lab import Lab, LabHost

pytestmark = pytest.mark.lab

DENSE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "bert", "nomic-bert")
CASES = {
    "one slot": Demand(2048, 1),
    "four slots": Demand(2048, 4),
    "long, small batches": Demand(16384, 2, ubatch_size=256),
    "q8_0 cache": Demand(2048, 1, cache_type_k="q8_0", cache_type_v="q8_0"),
    "no flash attention": Demand(2048, 1, flash_attn=False),
}
LOGGED = {
    "weights": "CPU(?:_Mapped)? model",
    "cache": "KV",
    "state": "RS",
    "compute": "compute",
    "output": "output",
}
UNTIL_IT_HAS_SAID_IT = """
{command} >/tmp/fit.log 2>&1 &
server=$!
n=0
until grep -q 'graph.*splits = ' /tmp/fit.log || ! kill -0 $server || [ $n -gt 600 ]
do n=$((n + 1)); sleep 0.1
done
kill -KILL $server
wait $server
cat /tmp/fit.log
echo {end}
"""
END = "--- the next ---"


def logged(host: LabHost, model: str, more: tuple[str, ...]) -> list[dict[str, float]]:
    """MiB of each buffer in each case, as the host's llama-server logs them when it starts."""
    script = ""
    for demand in CASES.values():
        command = [
            *("/opt/llama.cpp/current/bin/llama-server", "--model", model, "--port", "18080"),
            *("--ctx-size", str(demand.ctx_size * demand.parallel)),
            *("--parallel", str(demand.parallel), "--ubatch-size", str(demand.ubatch_size)),
            *("--cache-type-k", demand.cache_type_k, "--cache-type-v", demand.cache_type_v),
            *("--flash-attn", "on" if demand.flash_attn else "off"),
            *("--threads", "1", "--no-warmup", "--verbosity", "4", *more),
        ]
        script += UNTIL_IT_HAS_SAID_IT.format(command=shlex.join(command), end=shlex.quote(END))
    *said, rest = host.run(script).stdout.split(f"{END}\n")
    assert rest == ""
    found = [
        {
            what: sum(map(float, re.findall(rf"{name} buffer size\s*=\s*([\d.]+) MiB", text)))
            for what, name in LOGGED.items()
        }
        for text in said
    ]
    for buffers, text in zip(found, said, strict=True):
        assert buffers["compute"], text[-2000:]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_what_was_predicted(debian_13: Deployed, name: str, tmp_path: Path) -> None:
    (path,) = write(tmp_path / "model.gguf", MODELS[name])
    there = debian_13.host.root / "var/tmp/fit.gguf"
    shape = shape_of(read_header(Bytes(path.read_bytes())))
    there.write_bytes(path.read_bytes())
    more = ("--embedding",) if shape.cache is CacheKind.NONE else ()
    try:
        all_theirs = logged(debian_13.host, "/var/tmp/fit.gguf", more)
    finally:
        there.unlink()
    for case, theirs in zip(CASES, all_theirs, strict=True):
        demand = CASES[case]
        needed = on_host(shape, demand)
        ours = {what: getattr(needed, what) / MIB for what in theirs}
        print(f"{name:40} {case:20} {sum(ours.values()):9.2f} {sum(theirs.values()):9.2f} MiB")
        assert ours["weights"] == pytest.approx(theirs["weights"], rel=0.01)
        assert ours["cache"] == pytest.approx(theirs["cache"], abs=0.02)
        assert ours["state"] == pytest.approx(theirs["state"], abs=0.02)
        usual = demand.flash_attn and demand.cache_type_k == "f16"
        dense = MODELS[name].arch in DENSE and not MODELS[name].experts
        tolerance = 0.02 if usual and dense else 0.1
        assert ours["compute"] == pytest.approx(theirs["compute"], rel=tolerance)
        tolerance = 0.05 if dense or usual else 0.07
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=tolerance)


def test_every_architecture_of_the_tested_llama_cpp_is_in_the_table(lab: Lab) -> None:
    text = lab.outside.repository.read("src/llama-arch.cpp", LLAMA_CPP_COMMIT).split(
        "LLM_KV_NAMES"
    )[0]
    theirs = set(re.findall(r'\{ LLM_ARCH_\w+,\s+"([^"]+)"', text)) - {"(unknown)"}
    assert theirs == set(architectures())
