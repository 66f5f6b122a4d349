"""Whether a model fits, by llama.cpp's own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.rules.architecture import CacheKind, Shape, architectures, shape_of
from tasks.rules.findings import Severity
from tasks.rules.fit import (
    GIB,
    HOST_MARGIN_BYTES,
    MIB,
    Demand,
    Place,
    Verdict,
    cells_of,
    findings,
    fit,
    on_host,
    shares,
)
from tasks.rules.gguf import Bytes, GgufError, read_header
from tasks.settings import Settings
from tests.gguf_models import MODELS, Dimensions, write


@cache
def shape(name: str) -> Shape:
    return made(MODELS[name])


def made(dims: Dimensions) -> Shape:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, dims, data=False)
        return shape_of(read_header(Bytes(path.read_bytes())))


@cache
def llama_8b() -> Shape:
    """The shape of Llama 3 8B in Q8_0, but for its vocabulary."""
    return made(
        Dimensions(
            "llama",
            layers=32,
            width=4096,
            feed_forward=14336,
            heads=32,
            heads_kv=8,
            head_size=128,
            vocabulary=32000,
        )
    )


def cache_of(of: Shape, demand: Demand) -> int:
    return on_host(of, demand).cache


# The cache


@pytest.mark.parametrize(("kind", "gib"), [("f16", 8.0), ("q8_0", 4.25), ("q4_0", 2.25)])
def test_the_cache_of_a_common_model(kind: str, gib: float) -> None:
    demand = Demand(65536, 1, cache_type_k=kind, cache_type_v=kind)
    assert cache_of(llama_8b(), demand) == gib * GIB


def test_the_context_is_padded_as_llama_cpp_does() -> None:
    assert Demand(1000, 1).cells == 1024
    assert Demand(1000, 3).cells == 1024
    assert Demand(256, 4).cells == 256
    assert Demand(4096, 4).cells == 4096


def test_every_slot_has_a_cache_of_its_own() -> None:
    one, four = (cache_of(llama_8b(), Demand(4096, slots)) for slots in (1, 4))
    assert four == 4 * one


def test_a_window_keeps_no_more_than_it_sees() -> None:
    gemma = shape("gemma3 (five of six layers a window)")
    assert [layer.window for layer in gemma.layers] == [512] * 5 + [None, 512]
    demand = Demand(16384, 1)
    near, far = gemma.layers[0], gemma.layers[5]
    assert cells_of(near, demand) == 1024  # the window and what is computed at a time
    assert cells_of(far, demand) == 16384
    assert cells_of(near, replace(demand, ctx_size=512)) == 512
    assert cells_of(near, replace(demand, ubatch_size=100)) == 768


def test_a_compressed_cache_has_no_values() -> None:
    deepseek = shape("deepseek2 (compressed cache)")
    assert {(layer.keys, layer.values) for layer in deepseek.layers} == {(320, 0)}
    assert cache_of(deepseek, Demand(2048, 1)) == 4 * 2048 * 320 * 2


def test_embedding_models_keep_nothing() -> None:
    for name in ("bert (embeddings)", "nomic-bert (embeddings)"):
        needed = on_host(shape(name), Demand(2048, 4))
        assert (needed.cache, needed.state) == (0, 0)
        assert needed.compute > 0


def test_a_state_does_not_grow_with_the_context() -> None:
    mamba = shape("mamba2 (state only)")
    short, long = (on_host(mamba, Demand(size, 2)) for size in (1024, 65536))
    assert short.state == long.state > 0
    assert long.cache == 0


def test_some_layers_have_attention_and_the_others_a_state() -> None:
    qwen = shape("qwen35 (attention and state)")
    assert [bool(layer.keys) for layer in qwen.layers] == [False, False, False, True]
    assert [bool(layer.state) for layer in qwen.layers] == [True, True, True, False]


def test_layers_may_differ() -> None:
    dims = replace(
        MODELS["llama (every head its own)"], more={"attention.head_count_kv": [8, 0, 2, 4]}
    )
    assert [layer.keys // 64 for layer in made(dims).layers] == [8, 0, 2, 4]


def test_layers_for_drafting_ahead_are_not_loaded() -> None:
    dims = MODELS["llama (every head its own)"]
    plain, more = made(dims), made(replace(dims, more={"nextn_predict_layers": 1}))
    assert len(more.layers) == len(plain.layers) - 1
    assert more.weights.unused == plain.weights.layers[-1]
    assert more.weights.total == plain.weights.total


def test_shared_layers_keep_nothing_of_their_own() -> None:
    dims = replace(MODELS["llama (every head its own)"], more={"attention.shared_kv_layers": 3})
    assert [bool(layer.keys) for layer in made(dims).layers] == [True, False, False, False]


def test_without_flash_attention_it_takes_more() -> None:
    with_it, without = (
        on_host(llama_8b(), Demand(8192, 1, flash_attn=flash)) for flash in (True, False)
    )
    assert without.compute > 4 * with_it.compute
    assert without.cache == with_it.cache


def test_the_settings_are_what_is_demanded() -> None:
    demand = Demand.of(Settings())
    assert (demand.ctx_size, demand.parallel, demand.cache_type_k) == (4096, 4, "f16")
    assert demand.gpu_layers == "all"
    assert not Demand.of(Settings(server_flash_attn="off")).flash_attn


# Architectures


def test_an_unknown_architecture_is_predicted_with_a_doubt() -> None:
    content = (read_bytes := _header_of("llama")).replace(b"llama", b"lxama")
    assert len(content) == len(read_bytes)
    found = shape_of(read_header(Bytes(content)))
    assert found.cache is CacheKind.ATTENTION
    assert "new to this software" in found.doubts[0]


def _header_of(arch: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, Dimensions(arch), data=False)
        return path.read_bytes()


def test_caches_of_their_own_kind_are_said_to_be_unsure() -> None:
    special = [name for name, row in architectures().items() if row.cache is CacheKind.SPECIAL]
    assert "deepseek32" in special
    content = _header_of("llama")
    # The name appears in front of every key; one as long keeps the offsets right.
    found = shape_of(read_header(Bytes(content.replace(b"llama", b"hy_v4"))))
    assert "cache of its own kind" in found.doubts[0]


@pytest.mark.parametrize("layers", [0, 513, 2**40])
def test_absurd_models_are_refused(layers: int) -> None:
    content = _header_of("llama")
    at = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    changed = content[:at] + (layers % 2**32).to_bytes(4, "little") + content[at + 4 :]
    if layers % 2**32:
        with pytest.raises(GgufError, match="impossible"):
            shape_of(read_header(Bytes(changed)))
    else:
        with pytest.raises(GgufError, match="block_count"):
            shape_of(read_header(Bytes(changed)))


# Where it goes


HOST = Place("the host", 64 * GIB)


def card(gib: float, name: str = "card") -> Place:
    return Place(name, round(gib * GIB))


def test_everything_is_somewhere_exactly_once() -> None:
    demand = Demand(8192, 4)
    whole = on_host(llama_8b(), demand)
    for layers in range(34):
        found = shares(llama_8b(), demand, [card(8), card(24)], HOST, layers)
        assert sum(share.memory.weights for share in found) == whole.weights
        assert sum(share.memory.cache for share in found) == whole.cache


def test_an_output_that_is_the_embedding_is_on_the_card_too() -> None:
    tied = shape("llama (heads share, output tied)")
    demand = Demand(2048, 1)
    on_card, at_home = shares(tied, demand, [card(8)], HOST, len(tied.layers) + 1)
    assert at_home.memory.weights == tied.weights.input
    assert on_card.memory.weights == tied.weights.total


def test_the_last_layers_go_to_the_card_first() -> None:
    few = shares(llama_8b(), Demand(4096, 1), [card(8)], HOST, 3)[0].memory
    assert few.weights == sum(llama_8b().weights.layers[-2:]) + llama_8b().weights.output


def test_a_larger_card_takes_more_layers() -> None:
    small, large, _ = shares(llama_8b(), Demand(4096, 1), [card(8), card(24)], HOST, 33)
    assert 2.5 < large.memory.cache / small.memory.cache < 3.6


# Whether it fits


def test_it_fits() -> None:
    found = fit(llama_8b(), Demand(8192, 1), [card(24)], HOST)
    assert found.verdict is Verdict.FITS
    assert found.gpu_layers == 33
    assert not list(findings(found, "m"))


def test_without_a_card_it_is_the_hosts_memory() -> None:
    assert fit(llama_8b(), Demand(4096, 4), [], HOST).verdict is Verdict.FITS
    tight = fit(llama_8b(), Demand(4096, 4), [], Place("the host", 8 * GIB))
    assert tight.verdict is Verdict.TOO_LARGE
    assert tight.shares[0].margin == HOST_MARGIN_BYTES


def test_what_would_have_to_change_is_told_with_the_settings() -> None:
    found = fit(llama_8b(), Demand(32768, 2), [card(14)], HOST)
    assert found.verdict is Verdict.FITS_CHANGED
    told = {name: value for change in found.changes for name, value in change.settings}
    assert told["server_cache_type_k"] == told["server_cache_type_v"] == "q8_0"
    assert 1024 <= told["server_ctx_size"] < 32768
    assert told["server_parallel"] == 1
    assert 0 < told["server_gpu_layers"] < 33
    [said] = findings(found, "Llama-3-8B Q8_0", ["user/repo:Q4_K_M"])
    assert said.severity is Severity.ERROR
    assert "\n" not in str(said)
    for word in ("server_ctx_size = ", "user/repo:Q4_K_M", "of which 1.0 GiB stay free", "on card"):
        assert word in str(said)


def test_nothing_helps() -> None:
    found = fit(llama_8b(), Demand(4096, 1), [card(2)], Place("the host", 4 * GIB))
    assert found.verdict is Verdict.TOO_LARGE
    [said] = findings(found, "m")
    assert said.fix == "Choose a smaller model."


def test_automatic_layers_are_as_many_as_fit() -> None:
    demand = Demand(4096, 1, gpu_layers="auto")
    found = fit(llama_8b(), demand, [card(6)], HOST)
    assert found.verdict is Verdict.FITS
    assert 1 < found.gpu_layers < 33
    more = shares(llama_8b(), demand, [card(6)], HOST, found.gpu_layers + 1)
    assert min(share.left for share in more) < 0


def test_an_unsure_prediction_is_a_warning_at_least() -> None:
    doubtful = replace(llama_8b(), doubts=("this is new",))
    [said] = findings(fit(doubtful, Demand(4096, 1), [card(24)], HOST), "m")
    assert said.severity is Severity.WARNING
    assert "this is new" in str(said)
    [said] = findings(fit(doubtful, Demand(4096, 1), [card(2)], HOST), "m")
    assert said.severity is Severity.ERROR


def test_another_quantisation_is_judged_by_its_size() -> None:
    whole = llama_8b().weights
    half = whole.scaled(whole.total // 2)
    assert abs(half.total - whole.total // 2) < 100
    smaller = replace(llama_8b(), weights=half)
    assert fit(smaller, Demand(4096, 1), [card(7)], HOST).verdict is Verdict.FITS
    assert fit(llama_8b(), Demand(4096, 1), [card(7)], HOST).verdict is Verdict.FITS_CHANGED


demands = st.builds(
    Demand,
    ctx_size=st.integers(256, 2**20),
    parallel=st.integers(1, 64),
    batch_size=st.integers(1, 4096),
    ubatch_size=st.integers(1, 4096),
    cache_type_k=st.sampled_from(["f16", "q8_0", "q4_0", "f32"]),
    cache_type_v=st.sampled_from(["f16", "q8_0", "f32"]),
    flash_attn=st.booleans(),
    gpu_layers=st.one_of(st.integers(0, 40), st.sampled_from(["all", "auto"])),
)
shapes = st.one_of(st.sampled_from(sorted(MODELS)).map(shape), st.builds(llama_8b))
cards = st.lists(st.floats(0.5, 96).map(card), max_size=3)
hosts = st.floats(1, 256).map(lambda gib: Place("the host", round(gib * GIB)))


@given(shapes, demands, cards, hosts)
def test_what_is_proposed_really_fits(
    of: Shape, demand: Demand, places: list[Place], host: Place
) -> None:
    found = fit(of, demand, places, host)
    fits = all(share.left >= 0 for share in found.shares)
    assert fits == (found.verdict is Verdict.FITS)
    assert bool(found.changes) == (found.verdict is Verdict.FITS_CHANGED)
    for change in found.changes:
        changed = {name.removeprefix("server_"): value for name, value in change.settings}
        again = fit(of, replace(demand, **changed), places, host)
        assert again.verdict is Verdict.FITS, str(change)
        Settings(**dict(change.settings))
    for said in findings(found, "m"):
        assert "\n" not in str(said)


@given(shapes, demands, st.sampled_from(["ctx_size", "parallel"]))
def test_more_never_takes_less(of: Shape, demand: Demand, what: str) -> None:
    more = replace(demand, **{what: getattr(demand, what) * 2})
    assert on_host(of, more).total >= on_host(of, demand).total


# What llama-server logged on a card


CARDS = {
    "llama 8b": Dimensions(
        "llama",
        layers=32,
        width=4096,
        feed_forward=14336,
        heads=32,
        heads_kv=8,
        head_size=128,
        vocabulary=128256,
        quantization="Q4_0",
    ),
    "qwen3 4b": Dimensions(
        "qwen3",
        layers=12,
        width=2560,
        feed_forward=9728,
        heads=32,
        heads_kv=8,
        head_size=128,
        vocabulary=151936,
        tied=True,
    ),
    "gemma3 4b": Dimensions(
        "gemma3",
        layers=13,
        width=2560,
        feed_forward=10240,
        heads=8,
        heads_kv=4,
        head_size=256,
        window=1024,
        vocabulary=262144,
        tied=True,
    ),
    "qwen3 30b": Dimensions(
        "qwen3moe",
        layers=4,
        width=2048,
        heads=32,
        heads_kv=4,
        head_size=128,
        experts=128,
        experts_used=8,
        expert_feed_forward=768,
        vocabulary=151936,
        quantization="Q4_0",
    ),
}
# Real shapes, some with fewer layers, on one H200 (driver 580, CUDA 13.0): what was asked for;
# then, in MiB, weights, cache and working memory on the card, weights and working memory at home.
# The server then held 600 MiB more of the card, and up to 780 MiB after its first request.
RECORDED = [
    ("llama 8b", Demand(8192, 1), (4026.83, 1024.00, 116.01, 281.81, 24.01)),
    ("llama 8b", Demand(8192, 4), (4026.83, 4096.00, 116.01, 281.81, 24.01)),
    ("llama 8b", Demand(4096, 16), (4026.83, 8192.00, 112.01, 281.81, 20.01)),
    ("llama 8b", Demand(8192, 2, ubatch_size=2048), (4026.83, 2048.00, 464.04, 281.81, 96.05)),
    (
        "llama 8b",
        Demand(65536, 1, cache_type_k="q8_0", cache_type_v="q8_0"),
        (4026.83, 4352.00, 352.09, 281.81, 80.09),
    ),
    ("llama 8b", Demand(8192, 1, flash_attn=False), (4026.83, 1024.00, 564.01, 281.81, 36.01)),
    ("llama 8b", Demand(8192, 1, gpu_layers=20), (2505.42, 608.00, 129.50, 1803.24, 24.01)),
    ("qwen3 4b", Demand(8192, 2), (1621.56, 768.00, 83.01, 394.12, 18.01)),
    (
        "qwen3 4b",
        Demand(32768, 1, cache_type_k="q8_0", cache_type_v="q8_0"),
        (1621.56, 816.00, 186.09, 394.12, 42.09),
    ),
    ("gemma3 4b", Demand(8192, 2), (1923.67, 260.00, 83.52, 680.00, 19.52)),
    ("qwen3 30b", Demand(8192, 2), (1507.50, 128.00, 92.01, 166.92, 16.01)),
]


@cache
def real(name: str) -> Shape:
    return made(CARDS[name])


@pytest.mark.parametrize(("name", "demand", "mib"), RECORDED)
def test_what_is_predicted_is_what_was_logged_on_an_h200(
    name: str, demand: Demand, mib: tuple[float, ...]
) -> None:
    found = fit(real(name), demand, [card(140)], HOST)
    assert found.verdict is Verdict.FITS
    on_card, at_home = (share.memory for share in found.shares)
    weights, kept, working, weights_at_home, working_at_home = (each * MIB for each in mib)
    assert on_card.weights == pytest.approx(weights, rel=0.001)
    assert on_card.cache == pytest.approx(kept, abs=0.01 * MIB)
    assert on_card.compute == pytest.approx(working, rel=0.05)
    assert on_card.total == pytest.approx(weights + kept + working, rel=0.005)
    assert at_home.weights == pytest.approx(weights_at_home, rel=0.001)
    assert at_home.compute == pytest.approx(working_at_home, rel=0.12)


def test_several_cards_work_on_several_batches_at_once() -> None:
    one, two = (
        fit(real("llama 8b"), Demand(8192, 1), [card(40)] * count, HOST).shares[0].memory.compute
        for count in (1, 2)
    )
    assert two - one == 3 * 16 * MIB
