"""Is this the backbone that was measured? A few short texts and how sure it was of each of their tokens: a canary.

`record` takes the split backbone and gives the canary, `distance` takes a model and a canary and gives nats. The
fingerprint reads some rows of some weights; a backbone fine-tuned in others passes it, and decodes to its own text with
an exit head that was trained for another. Knows nothing of heads, prompts or users' data: the texts are the backbone's.
"""

from typing import Any

import torch

from .backbone import SplitBackbone
from .decoding import Request, autoregressive
from .sampling import Sampler

TEXTS, LENGTH = 4, 16
TOLERANCE = 0.05
"""Nats. Another dtype or another kernel moves log-probabilities by less, in the mean over all tokens."""


@torch.inference_mode()
def record(backbone: SplitBackbone) -> list[dict[str, list]]:
    """Greedy texts from tokens spread over the vocabulary, and the log-probability of each token behind the first."""
    canary = []
    for i in range(TEXTS):
        start = (2 * i + 1) * len(backbone.embedding_VD) // (2 * TEXTS)
        ids = [start, *autoregressive(backbone, Request([start], LENGTH), Sampler()).tokens]
        logits_TV = backbone.logits(backbone.full(ids[:-1], 0, backbone.new_cache(LENGTH)))
        canary.append({"ids": ids, "logp": [round(x, 5) for x in _chosen(logits_TV, ids)]})
    return canary


@torch.inference_mode()
def distance(model: Any, canary: list[dict[str, list]]) -> float:
    """Mean absolute difference of the log-probabilities, in nats."""
    ids_BT = torch.tensor([text["ids"] for text in canary], device=model.device)
    logits_BTV = model(ids_BT[:, :-1]).logits.float()
    found = [_chosen(logits_TV, text["ids"]) for logits_TV, text in zip(logits_BTV, canary, strict=True)]
    return float((torch.tensor(found) - torch.tensor([text["logp"] for text in canary])).abs().mean())


def _chosen(logits_TV: torch.Tensor, ids: list[int]) -> list[float]:
    """Log-probability of each of the ids behind the first."""
    next_T1 = torch.tensor(ids[1:], device=logits_TV.device)[:, None]
    return logits_TV.log_softmax(-1).gather(1, next_T1)[:, 0].tolist()
