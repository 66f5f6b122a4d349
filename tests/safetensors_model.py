"""A tiny model as it is published before anybody made a GGUF of it: llama, in bfloat16, in parts.

Weights are random; the vocabulary is that of bytes, as a SentencePiece model.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, FEED_FORWARD, LAYERS, HEADS, CONTEXT = 256, 512, 2, 8, 4096
_PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def repository(architecture: str = "LlamaForCausalLM", parts: int = 2) -> dict[str, bytes]:
    """Every file of it, by name."""
    config = {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": len(_PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "chat_template": CHAT_TEMPLATE}
    tensors = _tensors()
    names = sorted(tensors)
    share = -(-len(names) // parts)
    split = [names[number * share :][:share] for number in range(parts)]
    files = {f"model-{n + 1:05d}-of-{parts:05d}.safetensors": own for n, own in enumerate(split)}
    index = {"metadata": {}, "weight_map": {each: n for n, own in files.items() for each in own}}
    return {
        "README.md": b"# Tiny\n",
        "config.json": json.dumps(config).encode(),
        "tokenizer.model": _sentencepiece(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{
            name: _safetensors({each: tensors[each] for each in own}) for name, own in files.items()
        },
        "modeling_tiny.py": b"raise SystemExit('code of the repository was run')\n",
    }


def _tensors() -> dict[str, npt.NDArray[np.uint16]]:
    numbers = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.uint16]:
        return _bfloat16(numbers.standard_normal((rows, columns)) / columns**0.5)

    norm = _bfloat16(np.ones(WIDTH))
    found = {
        "model.embed_tokens.weight": matrix(len(_PIECES), WIDTH),
        "model.norm.weight": norm,
        "lm_head.weight": matrix(len(_PIECES), WIDTH),
    }
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for part in ("q", "k", "v", "o"):
            found[f"{layer}.self_attn.{part}_proj.weight"] = matrix(WIDTH, WIDTH)
        found[f"{layer}.mlp.gate_proj.weight"] = matrix(FEED_FORWARD, WIDTH)
        found[f"{layer}.mlp.up_proj.weight"] = matrix(FEED_FORWARD, WIDTH)
        found[f"{layer}.mlp.down_proj.weight"] = matrix(WIDTH, FEED_FORWARD)
        found[f"{layer}.input_layernorm.weight"] = norm
        found[f"{layer}.post_attention_layernorm.weight"] = norm
    return found


def _bfloat16(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def _safetensors(tensors: dict[str, npt.NDArray[np.uint16]]) -> bytes:
    told: dict[str, Any] = {}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        told[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(told).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"".join(v.tobytes() for v in tensors.values())


def _sentencepiece() -> bytes:
    """A ModelProto by hand: pieces, and that it is BPE with bytes to fall back to."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    def number(field_number: int, value: int) -> bytes:
        return _varint(field_number << 3) + _varint(value)

    normal, unknown, control, byte = 1, 2, 3, 6
    kinds = (unknown, control, control, *[byte] * 256, normal)
    pieces = b"".join(
        field(1, field(1, piece.encode()) + struct.pack("<Bf", 2 << 3 | 5, 0.0) + number(3, kind))
        for piece, kind in zip(_PIECES, kinds, strict=True)
    )
    trainer = number(3, 2) + number(4, len(_PIECES)) + number(35, 1)
    return pieces + field(2, trainer) + field(3, field(1, b"identity"))


def _varint(value: int) -> bytes:
    content = b""
    while value > 127:
        content += bytes([value & 127 | 128])
        value >>= 7
    return content + bytes([value])
