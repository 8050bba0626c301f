"""Attention of one new token for each row of a batch on a CPU, where torch's own kernel reads the cache slowly.

Takes a transformers model; changes which attention function it calls while a block of code runs.

Letters: B rows, H query heads, G key/value heads, R = H/G, C channels of a head, T positions of the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "exit_heads_grouped"


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """While this context lasts, a model on a CPU that attends by `sdpa` attends by `attend`."""
    config: Any = model.config
    if config._attn_implementation != "sdpa" or {p.device.type for p in model.parameters()} != {"cpu"}:
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [B, 1, H, C] of queries [B, H, 1, C] over keys and values [B, G, T, C], by batched matrix products.

    Several new tokens for each row, and what else an architecture asks for, are left to transformers' own function.
    """
    if query.shape[2] != 1 or any(others.get(name) for name in ("dropout", "softcap", "position_bias", "cache")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    (rows, heads, _, channels), (groups, length) = query.shape, key.shape[1:3]
    scale = channels**-0.5 if scaling is None else scaling
    q_GRC = (query * scale).view(rows * groups, heads // groups, channels)
    scores_BHT = torch.bmm(q_GRC, key.flatten(0, 1).transpose(1, 2)).view(rows, heads, 1, length)
    if attention_mask is not None:  # True or 0 where a row attends
        hidden = attention_mask.dtype == torch.bool
        scores_BHT = scores_BHT.masked_fill_(~attention_mask, -torch.inf) if hidden else scores_BHT + attention_mask
    p_GRT = scores_BHT.softmax(-1).view(rows * groups, -1, length)
    return torch.bmm(p_GRT, value.flatten(0, 1)).view(rows, 1, heads, -1), None
