"""What model a GGUF file holds: its transformers config, and which stored tensor fills which parameter.

Takes a header; gives a config that the engine supports. A key or a tensor of the model that is not known here is
refused by name, because it may change what the model computes. transformers passes over such keys in silence.
"""

import math
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import reason
from ..inference.families import check_config
from .gguf_header import Header, Stored

ARCHITECTURES = {name: arch for arch, name in MODEL_ARCH_NAMES.items() if name in ("llama", "qwen2", "qwen3")}
"""general.architecture, which is also the family's name in transformers -> gguf's enum. A Mistral is a llama there."""
PERMUTED = ("llama",)
"""Architectures whose rotated channels the file holds in pairs, where transformers has them in halves."""

FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Key behind the architecture's name -> field of the transformers config. The file must have every one."""
ALSO_READ = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
             "rope.freq_base", "vocab_size")  # fmt: skip
"""Keys that a file may have, and that `_shape_of_heads` and `config_of` read or compare."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.finetuned": (True, False),
    "rope.scale_linear": (1,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that change nothing at these values."""
EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3 has; the file keeps only the divisors that follow from it."""
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Behind tokenizer.ggml: the tokens at which llama.cpp ends a text."""


def check_kind(header: Header) -> None:
    """Raises UserError for a GGUF that is not one whole model of a supported architecture, with a tokenizer."""
    fields, kind = header.fields, header.fields.get("general.type", "model")
    if kind != "model":
        raise header.error(f"general.type={kind}: is not a model by itself; give the GGUF of the model")
    if fields.get("split.count", 1) > 1:
        raise header.error(
            f"is one of {fields['split.count']} parts of a split model; join them first: "
            "llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    if header.architecture not in ARCHITECTURES:
        raise header.error(
            f"general.architecture={header.architecture}: not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    if not header.tensors:
        raise header.error("holds a vocabulary alone, no weights; give the GGUF of the model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens or not fields.get("tokenizer.ggml.model") or fields["tokenizer.ggml.model"] == "none":
        raise header.error(
            "holds no tokenizer (tokenizer.ggml.tokens): give a GGUF that has one, or the original checkpoint"
        )


def config_of(header: Header) -> Any:
    """The transformers config of the model. Raises UserError for a model that the engine does not compute exactly."""
    check_kind(header)
    name, own = header.architecture, _own_fields(header)
    for key, field in FIELDS.items():
        if not isinstance(own.get(key), int | float):
            raise header.error(f"{name}.{key}: one number is needed, not {own.get(key)} (it gives {field})")
    if EMBEDDING not in header.tensors:
        raise header.error(f"no tensor {EMBEDDING} in it: give a whole model")
    values = {field: own[key] for key, field in FIELDS.items()} | _heads(header, own)
    ids = {end: header.fields.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos", "padding")}
    try:
        config = AutoConfig.for_model(
            name,
            **values,
            vocab_size=header.tensors[EMBEDDING].shape[0],
            rope_parameters=_rope(header, own, values["head_dim"]),
            tie_word_embeddings=OUTPUT not in header.tensors,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["padding"],
            architectures=[f"{name.capitalize()}ForCausalLM"],
            dtype="float32",
        )
        check_config(config)
    except Exception as error:  # transformers validates with exceptions of many types
        raise header.error(reason(error)) from None
    return config


def sources_of(header: Header, config: Any) -> dict[str, Stored]:
    """Parameter of the transformers model -> its tensor in the file.

    Raises UserError for a parameter without one, a wrong shape, and a tensor that would be left over.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = get_tensor_name_map(ARCHITECTURES[header.architecture], config.num_hidden_layers)
    found, used = {}, {ROPE_FACTORS}
    for parameter, weight in model.named_parameters():  # names a tied LM head once, as the embedding
        module, _, suffix = parameter.rpartition(".")
        name = f"{names.get_name(module)}.{suffix}"
        if name not in header.tensors:
            raise header.error(f"no tensor {name} in it: give a whole model")
        stored = header.tensors[name]
        if stored.shape != tuple(weight.shape):
            raise header.error(f"{name} is {list(stored.shape)}, by its metadata it should be {list(weight.shape)}")
        found[parameter] = stored
        used.add(name)
    if left := sorted(header.tensors.keys() - used):
        raise header.error(
            f"{left[0]}: a {config.model_type} as transformers has it computes nothing with this tensor "
            f"({len(left)} such); not supported"
        )
    return found


def as_transformers(parameter: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """A dequantised tensor with its rows in transformers' order, which differs for the queries and keys of a llama.

    The file pairs the channels (0, 1), (2, 3), ... of a head to be rotated; transformers pairs (0, d/2), (1, d/2 + 1).
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for name, n in heads.items() if f".{name}." in parameter), None)
    if count is None or config.model_type not in PERMUTED:
        return weight
    half = weight.shape[0] // count // 2
    return weight.reshape(count, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def end_ids(header: Header) -> list[int]:
    """The token ids that end a text by the file's metadata, each once."""
    found = (header.fields.get(f"tokenizer.ggml.{name}") for name in END_IDS)
    return list(dict.fromkeys(i for i in found if i is not None))


def _own_fields(header: Header) -> dict[str, Any]:
    """The metadata of the architecture, by key without its name. Raises UserError for a key that is not known here."""
    prefix = f"{header.architecture}."
    own = {key.removeprefix(prefix): value for key, value in header.fields.items() if key.startswith(prefix)}
    for key, value in own.items():
        if key in FIELDS or key in ALSO_READ or value in NEUTRAL.get(key, ()):
            continue
        raise header.error(f"{prefix}{key}={value}: the decoder's layers do not do that; not supported")
    return own


def _heads(header: Header, own: dict[str, Any]) -> dict[str, int]:
    """Key-value heads and the size of a head. Raises UserError where layers or keys and values differ in them."""
    heads, groups = own["attention.head_count"], own.get("attention.head_count_kv", own["attention.head_count"])
    if not isinstance(groups, int):
        raise header.error(f"attention.head_count_kv={groups}: one number for all layers is supported")
    size = own.get("attention.key_length", own["embedding_length"] // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, size) != size:
            raise header.error(f"{header.architecture}.{key}={own[key]}: a head has {size} channels; not supported")
    return {"num_key_value_heads": groups, "head_dim": size}


def _rope(header: Header, own: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """transformers' rope_parameters. Raises UserError for divisors of the frequencies that are not those of a Llama 3.

    A Llama 3 divides its low frequencies by a factor; llama.cpp keeps the divisor of each frequency as a tensor.
    """
    theta = float(own.get("rope.freq_base", 10000.0))
    stored = header.tensors.get(ROPE_FACTORS)
    if stored is None:
        return {"rope_type": "default", "rope_theta": theta}
    if stored.kind.name == "F32" and stored.shape == (head_dim // 2,):
        divisors = np.fromfile(header.path, "<f4", head_dim // 2, offset=stored.start)
        factor = float(divisors.max())
        if np.allclose(divisors, _llama3_divisors(factor, theta, head_dim), rtol=1e-5):
            return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}
    raise header.error(f"{ROPE_FACTORS}: the frequencies are not scaled as in Llama 3; not supported")


def _llama3_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """The divisor of each of the head_dim / 2 frequencies in Llama 3.1, as in transformers' modeling_rope_utils."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    context = LLAMA3["original_max_position_embeddings"]
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
