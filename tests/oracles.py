"""Reference outputs: transformers' own greedy texts, which the decoder must reproduce, and untrained heads for it."""

import torch
from transformers import AutoModelForCausalLM

from pipeline.inference.exit_head import ExitHead, HeadSpec, new_exit_layer
from pipeline.inference.fingerprint import fingerprint

PROMPT = [72, 5, 33, 33, 190, 7, 81, 2, 64, 11, 250]


def load(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def head_for(model, exit_layer: int) -> ExitHead:
    """An untrained head: a copy of the last layer, from which distillation starts."""
    weights = {k: v.clone() for k, v in new_exit_layer(model).state_dict().items()}
    record = {"name": "tiny", "fingerprint": fingerprint(model)}
    return ExitHead(exit_layer, model.config.num_hidden_layers, record, weights)


def dense_head_for(model, exit_layer: int, width: int = 0) -> tuple[torch.nn.Module, ExitHead]:
    """An untrained dense head, random but for attention and norms, which are those of the last layer."""
    spec, last = HeadSpec.of("dense", width, model.config), model.model.layers[-1]
    layer = spec.build(type(last), model.config).float().requires_grad_(False)
    missing, unexpected = layer.load_state_dict(last.state_dict(), strict=False)
    assert missing and all("mlp" in name or "moe" in name for name in [*missing, *unexpected])
    head = head_for(model, exit_layer)
    return layer, ExitHead(exit_layer, head.num_layers, head.backbone, dict(layer.named_parameters()), None, spec)


def transformers_greedy(model, new: int, **kwargs) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, **kwargs
    )
    return out[0, len(PROMPT) :].tolist()
