"""What a model is made from, what that takes, and by what it is known again."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.facts.source_folder import SourceFolder
from tasks.probe import BLOBS, INCOMING, MODELS, Probe
from tasks.rules import build, making, model, model_record, server
from tasks.rules.hub_files import Candidate, HubFile, HubModel, Reference
from tasks.rules.making import Folder, Ingredient, Listed, key_of, mark, shape_of_config
from tasks.rules.model import Found, ModelPlan
from tasks.rules.model_record import Made, Record, Removal
from tasks.rules.plan import make_plan
from tasks.rules.quantisation import pythons, quantisation, quantisations, torches
from tasks.settings import Settings
from tests.safetensors_model import repository

from .hosts import BARE, GIB, SHA256, SOURCE, settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def on_hub(*files: tuple[str, int, str]) -> HubModel:
    found = (
        HubFile(name, size, letter * 64, f"https://hub/user/Model/resolve/{COMMIT}/{name}")
        for name, size, letter in files
    )
    candidate = Candidate("Model", None, tuple(found))
    return HubModel(
        Reference("user/Model"), COMMIT, gated=False, candidate=candidate, projector=None
    )


WEIGHTS = on_hub(
    ("model-00001-of-00002.safetensors", 10 * GIB, "a"),
    ("model-00002-of-00002.safetensors", 6 * GIB, "b"),
    ("config.json", 700, "c"),
    ("tokenizer.json", 9_000_000, "d"),
)
PLAIN = on_hub(("Model-BF16.gguf", 16 * GIB, "e"))
RESULT = "f" * 64


def wanted(**data: Any) -> Settings:
    return settings(
        **{"model": "user/Model", "model_sha256": None, "model_quantize": "Q4_K_M", **data}
    )


def planned(found: Found, probe: Probe = BARE, **data: Any) -> ModelPlan:
    made = model.plan(wanted(**data), probe, found)
    assert made is not None
    return made


def after(made: ModelPlan, probe: Probe = BARE, **data: Any) -> Probe:
    """The host once it was made, and served."""
    assert made.record is not None
    assert made.making is not None
    record = replace(
        made.record,
        files={made.path: RESULT},
        made=Made(made.making.key, "Q4_K_M", {"config.json": "c" * 64}, True, None, COMMIT),
    )
    link = replace(made.parts[0], sha256=RESULT).target
    return replace(
        probe,
        blobs={RESULT: 5 * GIB},
        links={made.path: link},
        records={model_record.path_of(wanted(**data)): (7, record.as_json())},
    )


def going(found: Found, probe: Probe, **data: Any) -> Removal:
    """What the whole plan lets go."""
    return make_plan(wanted(**data), probe, SOURCE, found={"": found}).removal


# The tables


def test_a_quantisation_is_known_by_every_name_of_it() -> None:
    assert quantisation("q4_k_m").name == "Q4_K_M"
    assert quantisation("Q4_K").name == "Q4_K_M"
    with pytest.raises(ValueError, match="makes no Q4_K_X; it makes Q4_K_S"):
        quantisation("Q4_K_X")


def test_eight_billion_weights_become_as_large_as_llama_cpp_says() -> None:
    """Llama 3.1 8B, tools/quantize/README.md: F16 14.96 GiB."""
    whole = round(14.96 * GIB)
    for name, gib in {"Q8_0": 7.95, "Q6_K": 6.14, "Q4_K_M": 4.58, "IQ2_XXS": 2.23}.items():
        assert quantisation(name).size(whole) == pytest.approx(gib * GIB, rel=0.01)


def test_every_quantisation_is_one_that_llama_quantize_makes() -> None:
    source = os.environ.get("LLAMA_CPP_SOURCE")
    if not source:
        pytest.skip("LLAMA_CPP_SOURCE names no source of llama.cpp")
    text = (Path(source) / "tools" / "quantize" / "quantize.cpp").read_text()
    theirs = set(re.findall(r'\{ "(\w+)", *LLAMA_FTYPE', text)) - {"F32", "COPY", "Q1_0", "Q2_0"}
    assert {name for each in quantisations() for name in (each.name, *each.aliases)} == theirs


def test_pytorch_is_known_by_address_and_hash_or_comes_from_the_distribution() -> None:
    for torch in torches().values():
        assert re.fullmatch(r"[0-9a-f]{64}", torch.sha256)
        assert torch.url("https://x/").startswith(f"https://x/torch-{torch.version}%2Bcpu-cp3")
    assert len({torch.sha256 for torch in torches().values()}) == len(torches())
    for python in pythons().values():
        assert python.torch or (python.version, "aarch64") in torches()


def test_what_converts_on_debian_13_is_its_own_and_elsewhere_a_wheel_by_hash() -> None:
    own = making.environment(wanted(), BARE)
    assert own is not None
    assert own.packages == ("git", "python3-venv", "python3-torch")
    assert own.torch == ""
    wheel = making.environment(wanted(), replace(BARE, os_version="12"))
    assert wheel is not None
    assert re.fullmatch(
        r"torch @ https://download\.pytorch\.org/\S+-cp311-cp311-\S+x86_64\.whl "
        r"--hash=sha256:[0-9a-f]{64}",
        wheel.torch,
    )
    assert making.environment(wanted(), replace(BARE, os_id="gentoo")) is None
    chosen = wanted(
        model_convert_torch_url="https://x/torch.whl", model_convert_torch_sha256=SHA256
    )
    mine = making.environment(chosen, replace(BARE, os_id="gentoo"))
    assert mine is not None
    assert mine.torch == f"torch @ https://x/torch.whl --hash=sha256:{SHA256}"


# The key

NAMES = st.text("abc", min_size=1, max_size=3)
SOURCES = st.lists(
    st.builds(
        Ingredient, NAMES, st.integers(1, 9), st.sampled_from(["1" * 64, "2" * 64, "3" * 64])
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda each: each.name,
)


@given(SOURCES, SOURCES, st.sampled_from(["Q8_0", "Q4_0"]), st.sampled_from(["Q8_0", "Q4_0"]))
def test_what_is_made_from_something_else_or_otherwise_is_another_model(
    one: list[Ingredient], other: list[Ingredient], first: str, second: str
) -> None:
    def told(sources: list[Ingredient]) -> set[tuple[str, str | None]]:
        return {(each.name, each.sha256) for each in sources}

    same = told(one) == told(other) and first == second
    assert (key_of(first, one) == key_of(second, other)) is same
    assert key_of(first, one) == key_of(first, list(reversed(one)))
    assert key_of(first, one) != key_of(first, one, one[0])


def test_a_file_of_the_host_is_another_one_once_it_was_changed() -> None:
    listed = Listed("m.gguf", 5, 100)
    keys = {
        planned(Found(folder=Folder("/srv", (each,))), model="/srv/m.gguf").identity
        for each in (listed, replace(listed, size=6), replace(listed, mtime=101), listed)
    }
    assert len(keys) == 3


# The plan


def test_weights_are_fetched_converted_and_quantised() -> None:
    made = planned(Found(hub=WEIGHTS, config=CONFIG))
    assert made.making is not None
    assert made.making.converts
    assert made.to_make
    assert not made.stored
    assert made.name == "Model-Q4_K_M.gguf"
    assert made.path == f"{MODELS}/made/{made.making.key[:12]}/Model-Q4_K_M.gguf"
    assert [file.name for file in made.missing] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "config.json",
        "tokenizer.json",
    ]
    assert made.size == pytest.approx(16 * GIB * 4.8944 / 16, rel=0.001)
    assert making.packages(made.making) == ("git", "python3-venv", "python3-torch")
    said = model.sentence(made)
    assert said.startswith(
        "make Model-Q4_K_M.gguf (about 5,255.3 MB): fetch 17,188.9 MB, convert, "
    )
    assert list(model.findings(wanted(), made, BARE)) == []


def test_a_gguf_needs_no_conversion_and_no_packages() -> None:
    made = planned(Found(hub=PLAIN))
    assert made.making is not None
    assert not made.making.converts
    assert making.packages(made.making) == ()
    needs = {need.what: need.bytes for need in model.needs([made], BARE)}
    assert "the conversion" not in needs
    assert needs["Model-BF16.gguf"] == 16 * GIB


def test_all_of_it_has_to_fit_the_disk_at_once() -> None:
    made = planned(Found(hub=WEIGHTS, config=CONFIG))
    assert made.making is not None
    needs = {need.what: need.bytes for need in model.needs([made], BARE)}
    assert needs["the conversion"] == 16 * GIB + making.HEADER_BYTES
    assert needs["the Q4_K_M"] == (made.size or 0) + making.HEADER_BYTES
    begun = replace(BARE, partials={"a" * 64: 10 * GIB, made.making.key: 4 * GIB})
    less = {need.what: need.bytes for need in model.needs([made], begun)}
    assert less["model-00001-of-00002.safetensors"] == 0
    assert less["the conversion"] == 12 * GIB + making.HEADER_BYTES


def test_what_is_in_the_store_already_is_not_fetched() -> None:
    made = planned(Found(hub=PLAIN), replace(BARE, blobs={"e" * 64: 16 * GIB}))
    assert made.making is not None
    assert made.missing == ()
    assert made.making.sources[0].place == f"{BLOBS}/{'e' * 64}"
    assert planned(Found(hub=PLAIN)).making.sources[0].place == f"{INCOMING}/{'e' * 64}.part"  # type: ignore[union-attr]


def test_once_it_is_made_nothing_is_left_to_do() -> None:
    found = Found(hub=WEIGHTS, config=CONFIG)
    first = planned(found)
    second = planned(found, after(first))
    assert second.stored
    assert not second.to_make
    assert second.missing == ()
    assert second.path == first.path
    assert second.has_served
    assert list(model.needs([second], BARE)) == []
    assert going(found, after(first)).partials == ()
    # What the unit depends on is the same before and after.
    assert second.identity == first.identity
    units = {server.plan(wanted(), BARE, each, None).digest for each in (first, second)}
    assert len(units) == 1


def test_what_was_made_but_not_handed_over_is_only_stored() -> None:
    first = planned(Found(hub=WEIGHTS, config=CONFIG))
    assert first.making is not None
    worked = replace(BARE, partials={mark("done", first.making.key): 300, RESULT: 5 * GIB})
    second = planned(Found(hub=WEIGHTS, config=CONFIG), worked)
    assert second.to_make
    assert second.missing == ()
    assert model.sentence(second) == "store Model-Q4_K_M.gguf, which was made by an earlier run"


def test_another_quantisation_is_another_model_that_leaves_the_first_where_it_is() -> None:
    found = Found(hub=WEIGHTS, config=CONFIG)
    probe = after(planned(found))
    other = planned(found, probe, model_quantize="Q8_0")
    assert other.to_make
    assert other.path not in planned(found, probe).path
    assert going(found, probe, model_quantize="Q8_0").records == ()


def test_downloads_that_it_is_made_from_are_not_given_up() -> None:
    found = Found(hub=WEIGHTS, config=CONFIG)
    first = planned(found)
    partials = {"a" * 64: 5, "9" * 64: 5}
    assert going(found, replace(BARE, partials=partials)).partials == ("9" * 64,)
    done = replace(after(first), partials=partials)
    assert set(going(found, done).partials) == set(partials)


def test_a_record_of_other_things_is_not_believed() -> None:
    found = Found(hub=WEIGHTS, config=CONFIG)
    probe = after(planned(found))
    (path, (time, text)), *_ = probe.records.items()
    record = Record.from_json(text)
    assert record is not None
    assert record.made is not None
    strange = replace(record, made=replace(record.made, key="0" * 64))
    assert planned(found, replace(probe, records={path: (time, strange.as_json())})).to_make


@pytest.mark.parametrize(
    ("data", "found", "probe", "code"),
    [
        ({"model_quantize": "IQ1_S"}, Found(hub=PLAIN), BARE, "imatrix-needed"),
        ({}, Found(hub=WEIGHTS, config={}), BARE, "no-architecture"),
        ({}, Found(hub=WEIGHTS, config=CONFIG), replace(BARE, os_id="gentoo"), "no-torch"),
    ],
)
def test_what_stands_in_the_way(
    data: dict[str, Any], found: Found, probe: Probe, code: str
) -> None:
    made = planned(found, probe, **data)
    assert [each.code for each in model.findings(wanted(**data), made, probe)] == [code]


def test_llama_quantize_is_built_exactly_where_it_is_needed() -> None:
    assert build.targets(settings()) == ("llama-server", "llama-bench")
    assert build.targets(wanted()) == ("llama-server", "llama-bench", "llama-quantize")


# config.json


def test_the_shape_that_config_json_tells_is_that_of_llama_3_8b() -> None:
    found = shape_of_config(CONFIG, 16 * GIB)
    assert found is not None
    assert (len(found.layers), found.layers[0].keys, found.layers[0].queries) == (32, 1024, 4096)
    assert found.weights.total == pytest.approx(16 * GIB, rel=0.001)
    assert found.doubts
    assert shape_of_config({**CONFIG, "kv_lora_rank": 512}, GIB) is None
    assert shape_of_config({"text_config": CONFIG}, GIB) is not None


@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "text_config", "head_dim"]),
        st.none()
        | st.integers(-1, 2**40)
        | st.text(max_size=3)
        | st.lists(st.integers(), max_size=2),
    ),
    st.integers(0, 2**50),
)
def test_whatever_config_json_says_it_is_read(config: dict[str, Any], size: int) -> None:
    found = shape_of_config(config, size)
    assert found is None or len(found.layers) <= 512
    making.architecture_of(config)


# On the host


def listed(path: Path, *parts: Path) -> Folder | None:
    fact = SourceFolder()
    command = fact.command(path=str(path), parts=tuple(map(str, parts)))
    said = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    return fact.process(said.splitlines())


def test_a_folder_of_the_host_is_listed_with_its_config(tmp_path: Path) -> None:
    home = tmp_path / "a folder"
    home.mkdir()
    for name, content in repository().items():
        (home / name).write_bytes(content)
    found = listed(home)
    assert found is not None
    assert {each.name: each.size for each in found.files} == {
        name: len(content) for name, content in repository().items()
    }
    assert making.architecture_of(found.config) == "LlamaForCausalLM"


def test_a_file_of_the_host_is_listed_with_its_parts(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in paths:
        path.write_bytes(b"GGUF")
    found = listed(paths[0], *paths)
    assert found is not None
    assert [(each.name, each.size) for each in found.files] == [(path.name, 4) for path in paths]
    assert found.path == str(tmp_path)
    assert listed(tmp_path / "none") is None


# The script of the work

Work = Callable[..., subprocess.CompletedProcess[str]]
KEY = "5" * 64


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Runs quantise-model.sh with programs that only say what they were told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    incoming = tmp_path / "incoming"
    incoming.mkdir()

    def program(name: str, text: str) -> None:
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    program("llama-quantize", f'echo "quantize $*" >>{tmp_path}/said; cp "$1" "$2"')
    program("llama-server", "exec sleep 60")
    program(
        "curl",
        "while [ $# -gt 1 ]; do\n"
        '[ "$1" != -o ] || echo \'{"tokens_predicted":4}\' >"$2"; shift; done; printf 200',
    )
    program("python", f'echo "python $*" >>{tmp_path}/said; cp "$2/model.safetensors" "$4"')
    source = tmp_path / "a source.gguf"
    source.write_bytes(b"weights")

    def run(sources: str = f"-\t{source}\tm.gguf", **more: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "KEY": KEY,
            "INCOMING": str(incoming),
            "WORK": str(incoming / "making-5"),
            "RESULT": str(incoming / "result.part"),
            "SOURCES": sources,
            "QUANT": "Q8_0",
            "BIN": str(programs),
            "IMATRIX": "",
            "PYTHON": "",
            "TOOL": "/tool",
            "BASE_BYTES": "1",
            "RESULT_BYTES": "1",
            "DONE": str(incoming / "done.part"),
            "CHECK_SECONDS": "5",
            **more,
        }
        script = Path(__file__).parents[2] / "files" / "quantise-model.sh"
        return subprocess.run(
            ["sh", str(script)], env={"PATH": f"{programs}:/usr/bin:/bin", **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_the_work_tells_what_was_made_from_what_and_leaves_the_users_file(
    work: Work, tmp_path: Path
) -> None:
    done = work()
    assert done.returncode == 0, done.stdout + done.stderr
    sha256 = hashlib.sha256(b"weights").hexdigest()
    told = (tmp_path / "incoming" / "done.part").read_text()
    assert told == (
        f'{{"sha256":"{sha256}","bytes":7,"sources":{{"m.gguf":"{sha256}"}},"imatrix":null}}\n'
    )
    left = sorted(path.name for path in (tmp_path / "incoming").iterdir())
    assert left == sorted(["done.part", f"{sha256}.part"])
    assert (tmp_path / "a source.gguf").exists()
    # Killed before it was handed over: once more costs nothing.
    (tmp_path / "said").unlink()
    assert work().returncode == 0
    assert not (tmp_path / "said").exists()


def converting(tmp_path: Path) -> dict[str, str]:
    part = tmp_path / "incoming" / f"{'a' * 64}.part"
    part.write_bytes(b"tensors")
    sources = f"{'a' * 64}\t{part}\tmodel.safetensors"
    return {"sources": sources, "PYTHON": str(tmp_path / "bin" / "python")}


def test_a_conversion_that_was_finished_is_not_done_twice(work: Work, tmp_path: Path) -> None:
    data = converting(tmp_path)
    quantize = tmp_path / "bin" / "llama-quantize"
    right = quantize.read_text()
    quantize.write_text("#!/bin/sh\nkill -9 $PPID\n")  # the power goes
    assert work(**data).returncode != 0
    quantize.write_text(right)
    done = work(**data)
    assert done.returncode == 0, done.stdout
    assert "[1/4] it is converted already" in done.stdout
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["python", "quantize"]
    # Nothing is left but the result, and what tells of it.
    assert len(list((tmp_path / "incoming").iterdir())) == 2


def test_half_a_conversion_is_begun_again(work: Work, tmp_path: Path) -> None:
    data = converting(tmp_path)
    (tmp_path / "incoming" / f"{KEY}.part").write_bytes(b"tens")
    done = work(**data)
    assert done.returncode == 0, done.stdout
    assert "already" not in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        (
            "python",
            'echo "INFO:hf-to-gguf:Go"; echo "ERROR:hf-to-gguf:Model X is not supported"; exit 1',
            "error: convert_hf_to_gguf.py: Model X is not supported",
        ),
        (
            "llama-quantize",
            'echo "llama_model_quantize: failed to quantize: it is odd"; echo main: end; exit 1',
            "error: llama-quantize: llama_model_quantize: failed to quantize: it is odd",
        ),
        (
            "llama-quantize",
            'echo "write failed: No space left on device"; exit 1',
            "error: the disk of ",
        ),
        (
            "llama-server",
            "echo cannot load it",
            "error: what was made does not load: cannot load it",
        ),
    ],
)
def test_what_goes_wrong_is_said_in_the_tools_words_and_nothing_is_made(
    work: Work, tmp_path: Path, name: str, text: str, error: str
) -> None:
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    if name == "llama-server":
        (tmp_path / "bin" / "curl").write_text("#!/bin/sh\nsleep 0.2; exit 7\n")
    done = work(**converting(tmp_path))
    assert done.returncode == 1
    assert error in done.stdout
    assert not (tmp_path / "incoming" / "done.part").exists()


def test_a_full_disk_is_seen_before_the_work(work: Work) -> None:
    done = work(RESULT_BYTES=str(2**60))
    assert done.returncode == 1
    assert "error: the result needs 1152921504606.8 MB in " in done.stdout


def test_a_file_that_cannot_be_read_is_named(work: Work) -> None:
    assert "error: /none.gguf cannot be read" in work("-\t/none.gguf\tnone.gguf").stdout
