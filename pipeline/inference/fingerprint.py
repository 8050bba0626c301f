"""The fingerprint of a backbone: a hash by which an exit head recognises the model that it was trained for.

Takes a model, or a config and a function that reads its tensors; gives 64 hex digits.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .families import family_of


def fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model in memory; see `fingerprint_of`."""
    return fingerprint_of(model.config, model.get_parameter)


def fingerprint_of(config: Any, weight: Callable[[str], Any]) -> str:
    """sha256 of the architecture, the vocabulary size and a fixed sample of the weights, cast to bfloat16.

    Because of the cast, a checkpoint and its float32 copy have the same fingerprint; a fine-tuned one differs.

    The config must be of a supported family.

    weight: gives a tensor by its name, or an object with `shape` that can be sliced by rows like a tensor, such as a
    slice of a safetensors file.
    """
    fields = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    digest = hashlib.sha256(json.dumps([getattr(config, f, None) for f in fields]).encode())
    for name in family_of(config).samples(config):
        tensor = weight(name)
        count = tensor.shape[0]
        if len(tensor.shape) == 1:
            rows = tensor[0:count]
        else:
            rows = torch.cat([tensor[i : i + 1] for i in range(0, count, max(1, count // 8))[:8]])
        digest.update(rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
