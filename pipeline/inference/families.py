"""The model families that the engine computes, and which of their configs it computes exactly.

Takes a transformers config; gives its `Family`, or raises ValueError that names the field, its value and the remedy.
The check needs no weights, so `plan` and `generate` can refuse early what decoding would refuse later. A family in
`FAMILIES` is computed here, by a module like family_llama.py. All others that have the usual form run through
transformers' own layers (family_generic.py), which takes longer.

All checkpoints of a family compute the same function of their weights unless a field of the config changes it.
transformers reads some of these fields (`hidden_act`, `rope_parameters`, `layer_types`). Others are written by other
libraries for their own variants of a family, and transformers ignores them: then neither its logits nor ours are those
that the checkpoint was trained to give, so such a checkpoint is refused too.
"""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .family import Family
from .family_generic import GENERIC
from .family_llama import LLAMA
from .generic_configs import check_fits
from .layers import ROPE_TYPES

FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
"""model_type -> family. All others are GENERIC."""
ACTIVATIONS = ("silu", "swish")
"""Both are names of x * sigmoid(x)."""
LAYER_TYPES = ("full_attention", "sliding_attention")
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Fields by which transformers and other libraries mark quantised weights."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "attn_logit_softcapping": (0,),
    "attn_logit_softcap": (0,),
    "attention_logit_cap": (0,),
    "final_logit_softcapping": (0,),
    "final_logit_softcap": (0,),
    "logits_soft_cap": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "lm_head_multiplier": (1,),
    "output_multiplier_scale": (1,),
    "embedding_multiplier": (1,),
    "embedding_multiplier_scale": (1,),
    "scale_emb": (1,),
    "residual_multiplier": (1,),
    "scale_depth": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "dim_model_base": (),
    "mup_width_scale": (1,),
    "clip_qkv": (),
    "qkv_clip": (),
    "alibi": (False,),
    "use_alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "n_routed_experts": (0,),
    "num_kv_shared_layers": (0,),
}
"""Fields that change a layer or the logits -> the values with which they change nothing; None is always one of them."""


def family_of(config: Any) -> Family:
    """The family of a config that `check_config` lets pass."""
    return FAMILIES.get(config.model_type, GENERIC)


def is_known(config: Any) -> bool:
    """Whether models of the config's family are computed here, from their weights."""
    return getattr(config, "model_type", None) in FAMILIES


def check_config(config: Any, quantised: bool = False) -> None:
    """Raises ValueError for a config whose model the engine does not compute exactly (see the module's docstring).

    quantised: let configs of quantised weights pass, whose layers must then be called as they are.
    """
    kind = getattr(config, "model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type={kind}: transformers has no such model; not supported")
    if not quantised:
        check_not_quantised(config)
    if type(config) is not CONFIG_MAPPING[kind]:
        raise ValueError(
            f"model_type={kind}: its config is a {type(config).__module__}.{type(config).__qualname__}, not the one of "
            "transformers, so its layers may be others; set backbone.trust_remote_code=false to take transformers' own"
        )
    if kind not in FAMILIES:
        check_fits(config)
        return
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act={config.hidden_act}: the decoder computes {ACTIVATIONS[0]} only; "
            "give a backbone that was trained with it"
        )
    for field, harmless in NEUTRAL.items():
        value = getattr(config, field, None)
        if value is not None and value not in harmless:
            raise ValueError(f"{field}={value}: the decoder's layers do not do that; give a backbone without it")
    _check_heads(config)
    _check_rope(config)
    _check_windows(config)


def check_not_quantised(config: Any) -> None:
    """Raises ValueError for a config that marks the weights as quantised, by any library."""
    for field in QUANTISED:
        found = getattr(config, field, None)
        if found:
            raise ValueError(
                f"{field}: {_method(found)}: quantised weights are not supported; give the unquantised checkpoint that "
                "this one was made from"
            )


def _method(found: Any) -> str:
    """The name of the quantisation method in a dictionary or an object of transformers; without a name, the fields."""
    fields = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    method = fields.get("quant_method") or fields.get("quant_algo") or ", ".join(sorted(map(str, fields)))
    return str(getattr(method, "value", method))


def _check_heads(config: Any) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if not groups or heads % groups:
        raise ValueError(
            f"num_key_value_heads={groups}: does not divide num_attention_heads={heads}; "
            "mend the backbone's config.json"
        )


def _check_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if nested:
        raise ValueError(f"rope_parameters: of its own for {', '.join(nested)}; one for all layers is supported")
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        why = "its tables depend on the sequence length" if kind in ("dynamic", "longrope") else "not known here"
        raise ValueError(f"rope_type={kind}: {why}; not supported. Supported are {', '.join(ROPE_TYPES)}")
    factor = rope.get("partial_rotary_factor")
    if factor not in (None, 1):
        raise ValueError(f"partial_rotary_factor={factor}: every channel of a head is rotated here; not supported")


def _check_windows(config: Any) -> None:
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    kinds = list(kinds or [])
    if window is not None and window < 1:
        raise ValueError(f"sliding_window={window}: must be positive, or null; mend the backbone's config.json")
    if kinds and len(kinds) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types: {len(kinds)} of them for num_hidden_layers={config.num_hidden_layers}; "
            "mend the backbone's config.json"
        )
    for kind in kinds:
        if kind not in LAYER_TYPES:
            raise ValueError(f"layer_types: {kind} is not supported; these are: {', '.join(LAYER_TYPES)}")
    slides = "sliding_attention" in kinds
    if config.model_type == "llama" and (slides or window is not None):
        raise ValueError(
            f"sliding_window={window}: transformers' llama has no windows, though its cache would; give the backbone "
            "as the family that it was trained as"
        )
    if config.model_type == "mistral" and kinds and set(kinds) != {LAYER_TYPES[window is not None]}:
        raise ValueError(
            f"layer_types: {', '.join(sorted(set(kinds)))} with sliding_window={window}: transformers' mistral has one "
            "type for all layers; not supported"
        )
    if slides and window is None:
        raise ValueError("sliding_window=null: layer_types has sliding_attention; mend the backbone's config.json")
