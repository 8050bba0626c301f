"""Reference outputs: transformers' own greedy texts, which the decoder must reproduce, and untrained heads for it."""

import torch
from transformers import AutoModelForCausalLM

from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.fingerprint import fingerprint

PROMPT = [72, 5, 33, 33, 190, 7, 81, 2, 64, 11, 250]


def load(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def head_for(model, exit_layer: int) -> ExitHead:
    """An untrained head: a copy of the last layer, from which distillation starts."""
    weights = {k: v.clone() for k, v in new_exit_layer(model).state_dict().items()}
    record = {"name": "tiny", "fingerprint": fingerprint(model)}
    return ExitHead(exit_layer, model.config.num_hidden_layers, record, weights)


def transformers_greedy(model, new: int, **kwargs) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, **kwargs
    )
    return out[0, len(PROMPT) :].tolist()
