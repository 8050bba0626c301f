"""Tiny GGUF files for tests, written with gguf's own writer from the tiny checkpoints of helpers.py.

Takes a checkpoint's folder; gives a GGUF file of the same weights, quantised or not, and a tokenizer of bytes.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from helpers import END, PAD
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
WHOLE = ("ab", "bc")
"""Tokens 258 and 259; only the first has a merge."""


def stored_name(parameter: str, names: dict[str, str] = NAMES) -> str:
    """`blk.3.attn_q.weight` for `model.layers.3.self_attn.q_proj.weight`."""
    module, _, suffix = parameter.rpartition(".")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{found[1]}.{names[found[2]]}.{suffix}"
    return f"{names[module]}.{suffix}"


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama's queries or keys as llama.cpp's converter writes them: channel i beside channel i + d/2."""
    rows = np.arange(weight.shape[0]).reshape(heads, -1)
    half = rows.shape[1] // 2
    return weight[np.stack([rows[:, :half], rows[:, half:]], axis=2).reshape(-1)]


def tiny_gguf(checkpoint: Path, path: Path, kind: str = "F32", without: tuple[str, ...] = (), **more: Any) -> Path:
    """Write `path` with the checkpoint's matrices as `kind` (F32, F16, BF16, Q8_0, Q4_1) and its vectors as F32.

    without: metadata keys, or names of tensors, to leave out. more: further keys, with __ for a dot, and tensors (numpy
    arrays).
    """
    config = AutoConfig.from_pretrained(checkpoint)
    arch = config.model_type.removesuffix("_text")
    is_gemma = arch == "gemma3"
    rope = config.rope_parameters["full_attention"] if is_gemma else config.rope_parameters
    fields: dict[str, Any] = {
        "general.name": "Tiny test model",
        "general.license": "apache-2.0",
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*sorted(pre_tokenizers.ByteLevel.alphabet()), END, PAD, *WHOLE],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 257,
        "tokenizer.chat_template": TEMPLATE,
    }
    if is_gemma:
        fields[f"{arch}.attention.sliding_window"] = config.sliding_window
    tensors = {}
    for parameter, weight in load_file(checkpoint / "model.safetensors").items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for part, n in heads.items() if f".{part}." in parameter), None)
        values = weight.float().numpy()
        if is_gemma and "norm" in parameter:  # as llama.cpp's converter: its norms multiply by the weight itself
            values = values + np.float32(1)
        name = stored_name(parameter, GEMMA_NAMES if is_gemma else NAMES)
        tensors[name] = in_pairs(values, count) if count and arch == "llama" else values
    more = {key.replace("__", "."): value for key, value in more.items()}
    tensors |= {key: value for key, value in more.items() if isinstance(value, np.ndarray)}
    fields |= {key: value for key, value in more.items() if not isinstance(value, np.ndarray)}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", arch))
    for key, value in fields.items():
        if key not in without:
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        if name not in without:
            quant = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
