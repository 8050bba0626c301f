"""The language model inside a model that reads images too.

Takes a config or a model of transformers; gives the config or the causal LM of its text part, which shares the weights,
and any other as it is. Text alone is drafted and verified.
"""

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

WITH_TEXT = ("gemma3",)
"""Model types of which `text_config` makes a causal LM whose layers are those of `model.model.language_model`."""
KEY_MAPPING = {r"^(language_model\.model|model\.language_model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}
"""Names of the text part's weights in the files of such a checkpoint -> in the causal LM, for from_pretrained."""


def has_text_part(config: Any) -> bool:
    return getattr(config, "model_type", None) in WITH_TEXT


def text_config(config: Any) -> Any:
    """The config of the text part; another config as it is."""
    return config.text_config if has_text_part(config) else config


def text_model(model: Any) -> Any:
    """The causal LM of the text part of a model, made once and kept on it; another model as it is."""
    if not has_text_part(model.config):
        return model
    known = model.__dict__.get("_text_part")
    if known is None or known.model is not model.model.language_model or known.lm_head is not model.lm_head:
        config = text_config(model.config)
        with torch.device("meta"):
            known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        known.model, known.lm_head = model.model.language_model, model.lm_head
        model.__dict__["_text_part"] = known  # not as a child: its weights stay the model's
    known.generation_config = model.generation_config
    return known.train(model.training)


def stored_names(parameter: str) -> list[str]:
    """The names that a parameter of the text part may have in the files of such a checkpoint."""
    if parameter.startswith("model."):
        rest = parameter.removeprefix("model.")
        return [f"language_model.model.{rest}", f"model.language_model.{rest}"]
    return [f"language_model.{parameter}"]
