"""Which configs family_generic.py can run: checked before any weights are loaded.

Takes a transformers config; raises ValueError that names what is not supported. It looks at the model that transformers
makes of the config on the meta device, with one layer of each type.

T positions, D hidden
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .layers import ROPE_TYPES, Shape
from .outline import Outline, packed_masks
from .unmodified import as_built

PARTS, WEIGHTS = ("embed_tokens", "layers", "norm", "rotary_emb"), ("embed_tokens", "norm")
"""Of `model.model`: modules, and those of them with a weight."""
ELSEWHERE = ("kv_lora_rank", "num_kv_shared_layers", "attention_chunk_size", "is_encoder_decoder",
             "use_bidirectional_attention")  # fmt: skip
"""Fields of models whose layers keep other keys and values than a head's channels, or share them, or see the future."""
CAPS = {"final_logit_softcapping": ("gemma2", "gemma3"), "final_logit_softcap": None, "logits_soft_cap": None}
"""Fields by which logits are bent -> how the model_types begin in which `layers.logit_cap` knows them."""
SCALES = {"logits_scaling": "granite", "logit_scale": "cohere", "output_multiplier_scale": None,
          "lm_head_multiplier": None}  # fmt: skip
"""Fields by which logits are multiplied -> how the model_types begin in which `layers.logit_scale` knows them."""


def skeleton(config: Any) -> Any:
    """transformers' model of the config on the meta device, with one layer of each type."""
    kind: Any = type(config)
    return as_built(kind, config.to_json_string(use_diff=False))


def samples(config: Any) -> list[str]:
    """Names of the weights of which rows are in the fingerprint: embedding, final norm, LM head, and of three layers
    the first and the last matrix of their attention, which is alike in all layers."""
    layer = skeleton(config).model.layers[0]
    matrices = [name for name, w in layer.named_parameters() if w.ndim == 2 and name.startswith("self_attn.")]
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1):
        names += [f"model.layers.{i}.{name}" for name in dict.fromkeys((matrices[0], matrices[-1]))]
    return names


def check_fits(config: Any) -> None:
    """Raises ValueError for a config whose model is not of the form that family_generic.py runs."""
    where = f"model_type={config.model_type}"
    _check_fields(config, where)
    try:
        Shape.of(config)  # raises where layers differ in their heads
        model = skeleton(config)
    except KeyError:
        raise ValueError(f"{where}: transformers has no causal LM of this type; not supported") from None
    except Exception as error:  # transformers validates with exceptions of many types
        raise ValueError(f"{where}: its config does not make a model: {error}") from None
    body = getattr(model, "model", None)
    missing = [f"model.{name}" for name in PARTS if not hasattr(body, name)]
    missing += [f"{name}.weight" for name in WEIGHTS if not hasattr(getattr(body, name, None), "weight")]
    missing += [] if hasattr(model, "lm_head") else ["lm_head"]
    if missing:
        raise ValueError(
            f"{where}: transformers' {type(model).__name__} has no {', '.join(missing)}; models with one list of "
            "attention layers between an embedding and an LM head are supported"
        )
    if model.lm_head.bias is not None:
        raise ValueError(f"{where}: its LM head has a bias; not supported")
    for layer in model.model.layers:
        if not hasattr(layer, "self_attn"):
            raise ValueError(
                f"{where}: a {type(layer).__name__} without self_attn (a state-space layer?), from whose state "
                "rejected drafts cannot be dropped; not supported"
            )
    _check_separates(config, model, where)


def _check_fields(config: Any, where: str) -> None:
    for field in ELSEWHERE:
        if getattr(config, field, None):
            raise ValueError(f"{where}: {field}={getattr(config, field)} is not supported")
    for field, known in (SCALES | CAPS).items():
        neutral, is_known = 0 if field in CAPS else 1, known is not None and config.model_type.startswith(known)
        if getattr(config, field, None) not in (None, neutral) and not is_known:
            raise ValueError(f"{where}: {field}={getattr(config, field)} is not supported in this family")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{where}: is_causal=False: its layers see the future; not supported")
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if not isinstance(getattr(config, field, None), int):
            raise ValueError(
                f"{where}: its config has no {field}, so it is no causal LM of one list of attention layers; not "
                "supported"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:  # a row may be rotated in another way in a longer pass
            raise ValueError(
                f"{where}: rope_type={kind}: its rotation may depend on the length of the text; not supported. "
                f"Supported are {', '.join(ROPE_TYPES)}"
            )


def _check_separates(config: Any, model: Any, where: str) -> None:
    """Raises ValueError if the family's forward lets the texts of a packed sequence see each other: nothing right could
    be learned from it."""
    body = Outline(model.model, list(model.model.layers))
    body.body._modules["rotary_emb"] = type(model.model.rotary_emb)(model.config)  # on the CPU, to compare masks
    hidden_1TD = torch.zeros(1, 4, config.hidden_size)
    found = []
    for positions in ([0, 1, 2, 3], [0, 1, 0, 1]):
        positions_1T = torch.tensor([positions])
        masks = packed_masks(model.config, hidden_1TD, positions_1T)
        _, calls = body(inputs_embeds=hidden_1TD, position_ids=positions_1T, use_cache=False, **masks)
        found.append(calls[0].named.get("attention_mask"))
    one, two = found
    if two is None or (one is not None and torch.equal(one, two)):
        raise ValueError(
            f"{where}: transformers' masks let the texts of a packed sequence see each other in this family, so heads "
            "would learn from wrong states; not supported"
        )


def is_mixture(weights: Iterable[Tensor]) -> bool:
    """Whether a layer with these weights has experts, which transformers holds in tensors of three dimensions."""
    return any(weight.ndim == 3 for weight in weights)
