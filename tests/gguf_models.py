"""Small models of many architectures, made with the gguf package: empty, but real to llama.cpp.

All weights are zero. What matters is their number, their types and the metadata: everything that
memory depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Shape = tuple[int, ...]
"""The first dimension is the one whose values lie beside each other, as llama.cpp prints it."""

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Dimensions:
    """What a model is made from."""

    arch: str
    layers: int = 4
    width: int = 512
    feed_forward: int = 1536
    heads: int = 8
    heads_kv: int = 8
    head_size: int = 64
    vocabulary: int = 4096
    context: int = 32768
    tied: bool = False
    """Whether the output is the embedding once more."""
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward: int = 0
    shared_feed_forward: int = 0
    window: int = 0
    quantization: str = "Q8_0"
    more: Mapping[str, Any] = field(default_factory=dict)
    """More metadata of the architecture; an int, a float, a bool, or a list of them."""


def write(path: Path, dims: Dimensions, *, data: bool = True, parts: int = 1) -> list[Path]:
    """Write a model, in several parts if told so. Without data: the header only."""
    writer = gguf.GGUFWriter(path, dims.arch)
    _add_metadata(writer, dims)
    _add_vocabulary(writer, dims)
    tensors = dict(tensors_of(dims))
    if parts == 1:
        _add_tensors(writer, dims, tensors)
        _finish(writer, data)
        return [path]
    names = list(tensors)
    stem = path.name.removesuffix(".gguf")
    paths = [path.with_name(f"{stem}-{n + 1:05d}-of-{parts:05d}.gguf") for n in range(parts)]
    for number, each in enumerate(paths):
        part = gguf.GGUFWriter(each, dims.arch)
        if number == 0:
            _add_metadata(part, dims)
            _add_vocabulary(part, dims)
        part.add_uint16("split.no", number)
        part.add_uint16("split.count", parts)
        part.add_int32("split.tensors.count", len(names))
        share = -(-len(names) // parts)
        _add_tensors(part, dims, {name: tensors[name] for name in names[number * share :][:share]})
        _finish(part, data)
    return paths


def write_imatrix(path: Path, dims: Dimensions) -> Path:
    """Write an importance matrix for a model without experts: every input matters as much."""
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["nothing.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape in tensors_of(dims):
        if len(shape) > 1:
            writer.add_tensor(f"{name}.in_sum2", np.ones((1, shape[0]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    _finish(writer, data=True)
    return path


def _finish(writer: Any, data: bool) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if data:
        writer.write_tensors_to_file()
    else:
        writer.write_ti_data_to_file()
    writer.close()


def _add_metadata(writer: Any, dims: Dimensions) -> None:
    writer.add_context_length(dims.context)
    writer.add_embedding_length(dims.width)
    writer.add_block_count(dims.layers)
    writer.add_feed_forward_length(dims.feed_forward)
    writer.add_head_count(dims.heads)
    if "attention.head_count_kv" not in dims.more:
        writer.add_head_count_kv(dims.heads_kv)
    mla = "attention.kv_lora_rank" in dims.more
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if dims.heads and dims.head_size != dims.width // dims.heads and not mla:
        writer.add_key_length(dims.head_size)
        writer.add_value_length(dims.head_size)
    if dims.experts:
        writer.add_expert_count(dims.experts)
        writer.add_expert_used_count(dims.experts_used)
        if dims.expert_feed_forward:
            writer.add_expert_feed_forward_length(dims.expert_feed_forward)
        if dims.shared_feed_forward:
            writer.add_expert_shared_feed_forward_length(dims.shared_feed_forward)
    if dims.window:
        writer.add_sliding_window(dims.window)
    for name, value in dims.more.items():
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        add[type(value)](f"{dims.arch}.{name}", value)


def _add_vocabulary(writer: Any, dims: Dimensions) -> None:
    if "bert" in dims.arch:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        letters = [*"abcdefghijklmnopqrstuvwxyz"]
        tokens = [*special, *["\u2581" + each for each in letters], *letters]
        tokens += [f"\u2581word{n}" for n in range(dims.vocabulary - len(tokens))]
        writer.add_tokenizer_model("bert")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
        writer.add_token_type_count(2)
        for name, number in (("pad", 0), ("unk", 1), ("cls", 2), ("sep", 3), ("mask", 4)):
            getattr(writer, f"add_{name}_token_id", lambda _number: None)(number)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(3)
        return
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581"]
    types = [2, 3, 3, *[6] * 256, 1]
    count = dims.vocabulary - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *[f"word{n}" for n in range(count)]])
    writer.add_token_scores([0.0] * dims.vocabulary)
    writer.add_token_types([*types, *[1] * count])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _add_tensors(writer: Any, dims: Dimensions, tensors: Mapping[str, Shape]) -> None:
    quantized = gguf.GGMLQuantizationType[dims.quantization]
    zeros: dict[tuple[Shape, Any], Any] = {}
    for name, shape in tensors.items():
        # As llama-quantize does: vectors and small matrices stay as they are.
        plain = len(shape) == 1 or not name.endswith(".weight") or "ffn_gate_inp" in name
        plain = plain or any(each in name for each in ("conv1d", "ssm_norm", "types", "position"))
        kind = gguf.GGMLQuantizationType.F32 if plain else quantized
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if (shape, kind) not in zeros:
            rows = tuple(reversed(shape[1:]))
            zeros[shape, kind] = (
                np.zeros((*rows, shape[0]), dtype=np.float32)
                if kind == gguf.GGMLQuantizationType.F32
                else np.zeros((*rows, shape[0] // block * size), dtype=np.uint8)
            )
        data = zeros[shape, kind]
        writer.add_tensor(name, data, raw_dtype=kind if data.dtype == np.uint8 else None)


# Architectures


def tensors_of(dims: Dimensions) -> Iterator[tuple[str, Shape]]:
    """Every tensor that llama.cpp wants of such a model."""
    yield "token_embd.weight", (dims.width, dims.vocabulary)
    if "bert" in dims.arch:
        yield from _bert(dims)
        return
    yield "output_norm.weight", (dims.width,)
    if not dims.tied:
        yield "output.weight", (dims.width, dims.vocabulary)
    for number in range(dims.layers):
        for name, shape in _LAYERS[dims.arch](dims, number).items():
            yield f"blk.{number}.{name}", shape


def _attention(dims: Dimensions, *, norms: bool = False, biases: bool = False) -> dict[str, Shape]:
    wide, narrow = dims.heads * dims.head_size, dims.heads_kv * dims.head_size
    tensors: dict[str, Shape] = {
        "attn_norm.weight": (dims.width,),
        "attn_q.weight": (dims.width, wide),
        "attn_k.weight": (dims.width, narrow),
        "attn_v.weight": (dims.width, narrow),
        "attn_output.weight": (wide, dims.width),
    }
    if norms:
        tensors |= {
            "attn_q_norm.weight": (dims.head_size,),
            "attn_k_norm.weight": (dims.head_size,),
        }
    if biases:
        tensors |= {"attn_q.bias": (wide,), "attn_k.bias": (narrow,), "attn_v.bias": (narrow,)}
    return tensors


def _dense(dims: Dimensions) -> dict[str, Shape]:
    return {
        "ffn_norm.weight": (dims.width,),
        "ffn_gate.weight": (dims.width, dims.feed_forward),
        "ffn_up.weight": (dims.width, dims.feed_forward),
        "ffn_down.weight": (dims.feed_forward, dims.width),
    }


def _experts(dims: Dimensions) -> dict[str, Shape]:
    inner = dims.expert_feed_forward or dims.feed_forward
    return {
        "ffn_norm.weight": (dims.width,),
        "ffn_gate_inp.weight": (dims.width, dims.experts),
        "ffn_gate_exps.weight": (dims.width, inner, dims.experts),
        "ffn_up_exps.weight": (dims.width, inner, dims.experts),
        "ffn_down_exps.weight": (inner, dims.width, dims.experts),
    }


def _shared_expert(dims: Dimensions) -> dict[str, Shape]:
    inner = dims.shared_feed_forward
    return {
        "ffn_gate_shexp.weight": (dims.width, inner),
        "ffn_up_shexp.weight": (dims.width, inner),
        "ffn_down_shexp.weight": (inner, dims.width),
    }


def _gemma(dims: Dimensions, *, norms: bool) -> dict[str, Shape]:
    after = {"post_attention_norm.weight": (dims.width,), "post_ffw_norm.weight": (dims.width,)}
    return _attention(dims, norms=norms) | _dense(dims) | after


def _delta_net(dims: Dimensions, number: int) -> dict[str, Shape]:
    """A layer of Qwen3.5: every fourth one has attention, the others a state."""
    after: dict[str, Shape] = {"post_attention_norm.weight": (dims.width,)}
    dense = {name: shape for name, shape in _dense(dims).items() if name != "ffn_norm.weight"}
    if (number + 1) % 4 == 0:
        attention = _attention(dims, norms=True)
        attention["attn_q.weight"] = (dims.width, 2 * dims.heads * dims.head_size)
        return attention | after | dense
    state, groups, rank = (
        dims.more[f"ssm.{each}"] for each in ("state_size", "group_count", "time_step_rank")
    )
    keys, values = state * groups, state * rank
    return (
        {
            "attn_norm.weight": (dims.width,),
            "attn_qkv.weight": (dims.width, 2 * keys + values),
            "attn_gate.weight": (dims.width, values),
            "ssm_conv1d.weight": (dims.more["ssm.conv_kernel"], 2 * keys + values),
            "ssm_dt.bias": (rank,),
            "ssm_a": (rank,),
            "ssm_beta.weight": (dims.width, rank),
            "ssm_alpha.weight": (dims.width, rank),
            "ssm_norm.weight": (state,),
            "ssm_out.weight": (values, dims.width),
        }
        | after
        | dense
    )


def _mamba2(dims: Dimensions) -> dict[str, Shape]:
    inner, state, groups, rank, kernel = (
        dims.more[f"ssm.{each}"]
        for each in ("inner_size", "state_size", "group_count", "time_step_rank", "conv_kernel")
    )
    mixed = inner + 2 * groups * state
    return {
        "attn_norm.weight": (dims.width,),
        "ssm_in.weight": (dims.width, inner + mixed + rank),
        "ssm_conv1d.weight": (kernel, mixed),
        "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (rank,),
        "ssm_a": (1, rank),
        "ssm_d": (1, rank),
        "ssm_norm.weight": (inner // groups, groups),
        "ssm_out.weight": (inner, dims.width),
    }


def _deepseek2(dims: Dimensions, number: int) -> dict[str, Shape]:
    rank = dims.more["attention.kv_lora_rank"]
    queries = dims.more["attention.q_lora_rank"]
    rope = dims.more["rope.dimension_count"]
    keys, values = (dims.more[f"attention.{each}_length_mla"] for each in ("key", "value"))
    attention: dict[str, Shape] = {
        "attn_norm.weight": (dims.width,),
        "attn_q_a_norm.weight": (queries,),
        "attn_kv_a_norm.weight": (rank,),
        "attn_q_a.weight": (dims.width, queries),
        "attn_q_b.weight": (queries, dims.heads * keys),
        "attn_kv_a_mqa.weight": (dims.width, rank + rope),
        "attn_k_b.weight": (keys - rope, rank, dims.heads),
        "attn_v_b.weight": (rank, values, dims.heads),
        "attn_output.weight": (dims.heads * values, dims.width),
    }
    if number < dims.more["leading_dense_block_count"]:
        return attention | _dense(dims)
    inner = dims.expert_feed_forward * dims.more["expert_shared_count"]
    shared = _shared_expert(replace(dims, shared_feed_forward=inner))
    return attention | _experts(dims) | shared


def _gpt_oss(dims: Dimensions) -> dict[str, Shape]:
    inner, count = dims.expert_feed_forward, dims.experts
    experts = {name: shape for name, shape in _experts(dims).items() if name != "ffn_norm.weight"}
    return (
        _attention(dims, biases=True)
        | experts
        | {
            "post_attention_norm.weight": (dims.width,),
            "attn_sinks.weight": (dims.heads,),
            "attn_output.bias": (dims.width,),
            "ffn_gate_inp.bias": (count,),
            "ffn_gate_exps.bias": (inner, count),
            "ffn_up_exps.bias": (inner, count),
            "ffn_down_exps.bias": (dims.width, count),
        }
    )


def _bert(dims: Dimensions) -> Iterator[tuple[str, Shape]]:
    yield "token_types.weight", (dims.width, 2)
    if dims.arch == "bert":
        yield "position_embd.weight", (dims.width, dims.context)
    for norm in ("weight", "bias"):
        yield f"token_embd_norm.{norm}", (dims.width,)
    gate = () if dims.arch == "bert" else ("gate",)
    for number in range(dims.layers):
        layer: dict[str, Shape] = {
            name: shape for name, shape in _attention(dims).items() if name != "attn_norm.weight"
        }
        for norm in ("attn_output_norm", "layer_output_norm"):
            layer |= {f"{norm}.weight": (dims.width,), f"{norm}.bias": (dims.width,)}
        for part in ("up", *gate):
            layer[f"ffn_{part}.weight"] = (dims.width, dims.feed_forward)
        layer["ffn_down.weight"] = (dims.feed_forward, dims.width)
        yield from ((f"blk.{number}.{name}", shape) for name, shape in layer.items())


_LAYERS: dict[str, Callable[[Dimensions, int], dict[str, Shape]]] = {
    "llama": lambda dims, _: _attention(dims) | (_experts(dims) if dims.experts else _dense(dims)),
    "qwen2": lambda dims, _: _attention(dims, biases=True) | _dense(dims),
    "qwen3": lambda dims, _: _attention(dims, norms=True) | _dense(dims),
    "gemma2": lambda dims, _: _gemma(dims, norms=False),
    "gemma3": lambda dims, _: _gemma(dims, norms=True),
    "qwen2moe": lambda dims, _: (
        _attention(dims, biases=True)
        | _experts(dims)
        | _shared_expert(dims)
        | {"ffn_gate_inp_shexp.weight": (dims.width,)}
    ),
    "qwen3moe": lambda dims, _: _attention(dims, norms=True) | _experts(dims),
    "gpt-oss": lambda dims, _: _gpt_oss(dims),
    "deepseek2": _deepseek2,
    "qwen35": _delta_net,
    "mamba2": lambda dims, _: _mamba2(dims),
}


MODELS: dict[str, Dimensions] = {
    "llama (every head its own)": Dimensions("llama"),
    "llama (heads share, output tied)": Dimensions(
        "llama", heads_kv=2, tied=True, feed_forward=2048
    ),
    "qwen2 (heads share, biases)": Dimensions("qwen2", heads_kv=2, vocabulary=16384),
    "qwen3 (heads share, wide heads)": Dimensions(
        "qwen3", heads_kv=2, head_size=128, feed_forward=1024, tied=True
    ),
    "gemma2 (every other layer a window)": Dimensions(
        "gemma2", heads_kv=4, head_size=128, feed_forward=2048, window=1024, tied=True
    ),
    "gemma3 (five of six layers a window)": Dimensions(
        "gemma3", layers=7, heads_kv=4, head_size=128, feed_forward=2048, window=512, tied=True
    ),
    "mixtral (eight experts)": Dimensions(
        "llama", heads_kv=2, experts=8, experts_used=2, feed_forward=512
    ),
    "qwen2moe (experts and a shared one)": Dimensions(
        "qwen2moe",
        experts=16,
        experts_used=4,
        expert_feed_forward=256,
        shared_feed_forward=1024,
    ),
    "qwen3moe (many small experts)": Dimensions(
        "qwen3moe",
        heads_kv=2,
        head_size=128,
        experts=32,
        experts_used=8,
        expert_feed_forward=128,
    ),
    "gpt-oss (window, experts, sinks)": Dimensions(
        "gpt-oss",
        heads_kv=2,
        experts=8,
        experts_used=4,
        expert_feed_forward=512,
        window=128,
        more={"rope.dimension_count": 64},
    ),
    "deepseek2 (compressed cache)": Dimensions(
        "deepseek2",
        heads_kv=1,
        experts=8,
        experts_used=2,
        expert_feed_forward=256,
        more={
            "attention.key_length": 320,
            "attention.value_length": 256,
            "attention.key_length_mla": 128,
            "attention.value_length_mla": 64,
            "attention.q_lora_rank": 256,
            "attention.kv_lora_rank": 256,
            "rope.dimension_count": 64,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
        },
    ),
    "qwen35 (attention and state)": Dimensions(
        "qwen35",
        heads_kv=2,
        head_size=128,
        more={
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 512,
            "ssm.state_size": 64,
            "ssm.time_step_rank": 8,
            "ssm.group_count": 4,
            "full_attention_interval": 4,
            "rope.dimension_count": 64,
            "rope.dimension_sections": [11, 11, 10, 0],
        },
    ),
    "mamba2 (state only)": Dimensions(
        "mamba2",
        heads=0,
        heads_kv=0,
        head_size=0,
        more={
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 1024,
            "ssm.state_size": 64,
            "ssm.time_step_rank": 16,
            "ssm.group_count": 1,
        },
    ),
    "bert (embeddings)": Dimensions(
        "bert", context=512, more={"attention.causal": False, "pooling_type": 1}
    ),
    "nomic-bert (embeddings)": Dimensions(
        "nomic-bert", context=2048, more={"attention.causal": False, "pooling_type": 1}
    ),
}


def write_adapter(path: Path, *, width: int = 256, layers: int = 2, rank: int = 4) -> Path:
    """Write a LoRA adapter for the queries of a llama model; it changes what that says."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for number in range(layers):
        name = f"blk.{number}.attn_q.weight"
        values = np.linspace(-1, 1, width * rank, dtype=np.float32)
        writer.add_tensor(f"{name}.lora_a", values.reshape(rank, width))
        writer.add_tensor(f"{name}.lora_b", values.reshape(width, rank))
    _finish(writer, data=True)
    return path
