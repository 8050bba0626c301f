"""What model a GGUF file holds: its transformers config, and which stored tensor fills which parameter.

Takes a header; gives a config that the engine supports. A key or a tensor of the model that is not known here is
refused by name, because it may change what the model computes. transformers passes over such keys in silence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import reason
from ..inference.families import check_config
from .gguf_header import Header, Stored


class Kind(NamedTuple):
    """What a GGUF architecture is in transformers, and how its files differ from transformers' checkpoints."""

    model_type: str
    model_class: str
    pairs: bool = False
    """The file holds rotated channels in pairs, where transformers has them in halves."""
    norms_from: float = 0.0
    """What the file has added to the weights of norms."""
    own_keys: tuple[str, ...] = ()
    """Keys that only this architecture has, and `fields` reads."""
    fields: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda own, values: {}
    """The file's own keys and the config fields that follow from them -> more config fields, or other values."""


def _of_gemma3(own: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What every Gemma 3 has, and its GGUF files leave to the engine: the order of its two types of layers, the rotary
    embedding of those with a window, and the scale of attention. Models of 4 billion parameters and more also scale
    their positions; their files are refused by that key."""
    layers = values["num_hidden_layers"]
    return {
        "sliding_window": own["attention.sliding_window"],
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "query_pre_attn_scalar": values["head_dim"],
    }


KINDS = {
    "llama": Kind("llama", "LlamaForCausalLM", pairs=True),
    "qwen2": Kind("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Kind("qwen3", "Qwen3ForCausalLM"),
    "gemma3": Kind("gemma3_text", "Gemma3ForCausalLM", norms_from=1.0, own_keys=("attention.sliding_window",),
                   fields=_of_gemma3),
}  # fmt: skip
"""general.architecture -> what it is. A Mistral is a llama there."""
ENUMS = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
"""general.architecture -> gguf's enum."""

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
    if header.architecture not in KINDS:
        raise header.error(f"general.architecture={header.architecture}: not supported; these are: {', '.join(KINDS)}")
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
    name, own, kind = header.architecture, _own_fields(header), KINDS[header.architecture]
    for key in (*FIELDS, *kind.own_keys):
        if not isinstance(own.get(key), int | float):
            gives = f" (it gives {FIELDS[key]})" if key in FIELDS else ""
            raise header.error(f"{name}.{key}: one number is needed, not {own.get(key)}{gives}")
    if EMBEDDING not in header.tensors:
        raise header.error(f"no tensor {EMBEDDING} in it: give a whole model")
    values = {field: own[key] for key, field in FIELDS.items()} | _heads(header, own)
    values["rope_parameters"] = _rope(header, own, values["head_dim"])
    values |= kind.fields(own, values)
    ids = {end: header.fields.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos", "padding")}
    try:
        config = AutoConfig.for_model(
            kind.model_type,
            **values,
            vocab_size=header.tensors[EMBEDDING].shape[0],
            tie_word_embeddings=OUTPUT not in header.tensors,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["padding"],
            architectures=[kind.model_class],
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
    names = get_tensor_name_map(ENUMS[header.architecture], config.num_hidden_layers)
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
    """A dequantised tensor as transformers has it: with norms that the file has added a number to, and with the rows of
    queries and keys in another order.

    The file of a llama pairs the channels (0, 1), (2, 3), ... of a head to be rotated; transformers pairs (0, d/2),
    (1, d/2 + 1).
    """
    kind = next(kind for kind in KINDS.values() if kind.model_type == config.model_type)
    if kind.norms_from and "norm" in parameter:
        return weight - np.float32(kind.norms_from)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for name, n in heads.items() if f".{name}." in parameter), None)
    if count is None or not kind.pairs:
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
        known = (*FIELDS, *ALSO_READ, *KINDS[header.architecture].own_keys)
        if key in known or value in NEUTRAL.get(key, ()):
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
