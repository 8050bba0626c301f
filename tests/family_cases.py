"""The model families that are tested, and what is tested of each: docs/update_families.py makes a table of it.

Those that run through transformers' own layers have config fields that bring out what each has of its own: windows
shorter than the texts, layers without rotary embedding, multipliers, few experts."""

from collections.abc import Collection
from typing import Any

import pytest

from pipeline.inference.families import FAMILIES

WINDOW = {"sliding_window": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

GENERIC = {
    "gemma": {},
    "gemma2": WINDOW | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 12,
                             "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "olmo2": {},
    "olmo3": WINDOW,
    "phi3": {},
    "smollm3": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": WINDOW | {"logit_scale": 0.5},
    "glm": {},
    "glm4": {},
    "starcoder2": WINDOW,
    "stablelm": {},
    "ernie4_5": {},
    "seed_oss": {},
    "exaone4": WINDOW,
    "arcee": {},
    "nemotron": {},
    "ministral": WINDOW,
    "hunyuan_v1_dense": {},
    "mixtral": EXPERTS,
    "phimoe": EXPERTS,
    "gpt_oss": WINDOW | EXPERTS,
    "granitemoe": EXPERTS,
    "qwen2_moe": QWEN_EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": QWEN_EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                 "first_k_dense_replace": 1},
}  # fmt: skip
"""model_type -> fields of its config besides those of `helpers.tiny_backbone`."""
OWN = list(FAMILIES)
"""Families that are computed here."""
ALL = [*OWN, *GENERIC]
"""Of each of these, texts and logits are transformers' own, weights are loaded shard by shard as transformers loads
them, losses and gradients of packed texts are those of each text alone, and the loss is the KL divergence of the
distributions that decoding drafts and verifies with."""
BRANCHING = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
}
"""Families that are computed here, with windows and head sizes in which passes of trees or of several texts could
err."""
WHOLE = ["gemma3_text", "granite", "smollm3", "qwen3_moe", "gpt_oss"]
"""The whole road, from generate to a process with only torch and transformers."""
MIXTURES = ["glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]
DENSE_WHOLE = ["qwen3_moe", "gpt_oss"]
"""The whole road with a dense head."""
REFUSED = {
    "deepseek_v3": "kv_lora_rank",
    "gemma4_text": "rope_type=proportional",
    "gpt2": "has no model.embed_tokens",
    "gpt_neox": "has no model.embed_tokens",
    "jamba": "does not make a model",
    "llama4_text": "attention_chunk_size",
    "mamba": "its config has no num_attention_heads",
    "olmo": "has no norm.weight",
    "phi": "has no model.norm",
    "qwen3_next": "without self_attn",
}
"""model_type -> what the refusal says."""


def slow_but(quick: Collection[str], families: Collection[str]) -> list[Any]:
    """The families as parameters of a test, all but some marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in families]
