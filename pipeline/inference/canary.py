"""Is this the backbone that was measured? A few short texts and what must follow them: a canary.

`record` takes the split backbone and gives the canary, `differing` takes a model and a canary and gives a number. The
fingerprint reads some rows of some weights; a backbone fine-tuned in others passes it, and decodes to its own text with
an exit head that was trained for another. Knows nothing of heads, prompts or users' data: the texts are the backbone's.
"""

from typing import Any

import torch

from .backbone import SplitBackbone
from .decoding import Request, autoregressive
from .sampling import Sampler

TEXTS, LENGTH = 4, 16
CLEAR = 1.0
"""Nats by which a token must lead to be in the canary: dtypes and kernels move logits by less."""


@torch.inference_mode()
def record(backbone: SplitBackbone) -> list[dict[str, list[int]]]:
    """Greedy texts from tokens spread over the vocabulary: ids, the places of clear decisions, what follows there."""
    canary = []
    for i in range(TEXTS):
        start = (2 * i + 1) * len(backbone.embedding_VD) // (2 * TEXTS)
        ids = [start, *autoregressive(backbone, Request([start], LENGTH), Sampler()).tokens[:-1]]
        logits_TV = backbone.logits(backbone.full(ids, 0, backbone.new_cache(len(ids))))
        top_T2, best_T2 = logits_TV.topk(2)
        places = (top_T2[:, 0] - top_T2[:, 1] > CLEAR).nonzero()[:, 0]
        canary.append({"ids": ids, "places": places.tolist(), "next": best_T2[places, 0].tolist()})
    return canary


@torch.inference_mode()
def differing(model: Any, canary: list[dict[str, list[int]]]) -> tuple[int, int]:
    """(at how many places another token follows, of how many)."""
    best_BT = model(torch.tensor([text["ids"] for text in canary], device=model.device)).logits.argmax(-1)
    pairs = [(int(best_T[place]), token) for text, best_T in zip(canary, best_BT, strict=True)
             for place, token in zip(text["places"], text["next"], strict=True)]  # fmt: skip
    return sum(found != expected for found, expected in pairs), len(pairs)
