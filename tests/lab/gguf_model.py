"""A real model that weighs 3 MB: the llama architecture, random weights, a vocabulary of bytes.

It speaks in made-up lower-case words, never in bytes that are no text, and never ends by itself, so
that an answer always has as many tokens as were asked for.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tools import LabError, cache_directory, locked, say

if TYPE_CHECKING:
    import numpy.typing as npt

    Tensor = npt.NDArray[Any]

MODEL_SHA256 = "0b45f88f5e56c2594d0b24f0116634fd86a6b4cb2e0b4b0ccf327120e73c46a6"
MODEL_NAME = "tiny.gguf"

_WIDTH = 256
_FEED_FORWARD = 512
_LAYERS = 2
_HEADS = 8
_CONTEXT = 4096
_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_TOKENS = (*_SPECIAL, *_BYTES, _SPACE)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_model() -> Path:
    """Return the model file, made first if it isn't there."""
    models = cache_directory("models")
    path = models / f"{MODEL_SHA256}.gguf"
    with locked(models / ".lock"):
        if not path.exists():
            say("making a tiny model")
            unfinished = models / f".{os.getpid()}.tmp"
            write_model(unfinished)
            made = hashlib.sha256(unfinished.read_bytes()).hexdigest()
            if made != MODEL_SHA256:
                unfinished.unlink()
                raise LabError(f"the tiny model came out as {made}, not as {MODEL_SHA256}")
            unfinished.rename(path)
    return path


def write_model(path: Path) -> None:
    """Write the model; the same bytes on every machine."""
    import gguf  # noqa: PLC0415  (takes a while to load; only needed here)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer)
    for name, tensor in _tensors().items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any) -> None:
    unknown, control, byte, normal = 2, 3, 6, 1  # gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(_TOKENS))
    writer.add_token_scores([0.0] * len(_TOKENS))
    writer.add_token_types([unknown, control, control, *[byte] * 256, normal])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_vocab_size(len(_TOKENS))
    writer.add_chat_template(_CHAT_TEMPLATE)


def _tensors() -> dict[str, Tensor]:
    import numpy as np  # noqa: PLC0415  (as above)

    def norm() -> Tensor:
        return np.ones(_WIDTH, dtype=np.float32)

    def matrix(name: str, rows: int, columns: int) -> Tensor:
        # A hash, since a random generator's numbers may change from one release to the next.
        data = hashlib.shake_256(name.encode()).digest(rows * columns)
        uniform: Tensor = (np.frombuffer(data, dtype=np.uint8).astype(np.float32) - 127.5) / 127.5
        weights: Tensor = (uniform * np.float32(columns**-0.5)).astype(np.float16)
        return weights.reshape(rows, columns)

    embedding = matrix("token_embd", len(_TOKENS), _WIDTH)
    output = matrix("output", len(_TOKENS), _WIDTH)
    # The first dimension is the same for every token, and so stands for a bias of the output.
    embedding[:, 0] = 1
    output[:, 0] = [_bias(token) for token in _TOKENS]
    tensors: dict[str, Tensor] = {
        "token_embd.weight": embedding,
        "output_norm.weight": norm(),
        "output.weight": output,
    }
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        tensors[f"{block}.attn_norm.weight"] = norm()
        tensors[f"{block}.ffn_norm.weight"] = norm()
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}.{part}.weight"] = matrix(f"{block}.{part}", _WIDTH, _WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            tensors[f"{block}.{part}.weight"] = matrix(f"{block}.{part}", _FEED_FORWARD, _WIDTH)
        down = f"{block}.ffn_down"
        tensors[f"{down}.weight"] = matrix(down, _WIDTH, _FEED_FORWARD)
    return tensors


def _bias(token: str) -> float:
    if token not in _BYTES:
        return -4.0
    character = chr(_BYTES.index(token))
    return 4.0 if character in "abcdefghijklmnopqrstuvwxyz " else -4.0
