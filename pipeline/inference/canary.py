"""Are these the probabilities they should be? Short texts on which two computations of one model are compared.

`compare` asks whether the engine computes what transformers computes: it takes the split backbone, its model and a
text, and returns the largest difference of their logits. Both sides of every later comparison (speculative and
autoregressive decoding) run in the engine, so only this one can find what the engine itself gets wrong.

`record` and `distance` ask whether a model is the backbone that was measured: a canary is a few greedy texts and how
sure the backbone was of each of their tokens. The fingerprint reads some rows of some weights; a backbone fine-tuned in
others passes it, and decodes to its own text with an exit head that was trained for another.

T tokens of a text, V vocabulary, K positions compared
"""

from typing import Any, NamedTuple

import torch

from .backbone import SplitBackbone
from .decoding import Request, autoregressive
from .rounds import WIDTHS
from .sampling import Sampler

TEXTS, LENGTH = 4, 16
TOLERANCE = 0.05
"""Nats. Another dtype or another kernel moves log-probabilities by less, in the mean over all tokens."""
SPREAD = 16
"""Positions of a text compared behind its prefill."""


class Difference(NamedTuple):
    """How far apart the logits of two computations are."""

    largest: float
    """Over the positions: root mean square of the difference, over that of the logits around their mean. 0 is equal,
    about 1.4 unrelated."""
    position: int
    """Where it is largest."""
    positions: int
    """K."""


def rounding(dtype: torch.dtype, num_layers: int) -> float:
    """The largest difference of logits, as `Difference.largest`, that two orders of the same sums explain.

    Measured on random backbones and the pocket one (largest of all positions, CPU): float32 1e-6; float16 0.003 with 4
    layers, 0.004 with 32; bfloat16 0.02 and 0.03. Attention scaled by 1.1 instead of 1 gives 0.01 to 0.15, another
    activation 0.07 to 0.4, another window or order of norms more.
    """
    return max(1e-4, 6 * torch.finfo(dtype).eps * (1 + num_layers / 4) ** 0.5)


@torch.inference_mode()
def compare(backbone: SplitBackbone, model: Any, ids: list[int]) -> Difference:
    """The engine's logits against `model(ids)`: behind a prefill, and behind passes of all widths over what is cached,
    split at the exit layer as a verification is."""
    end = len(ids)
    pieces = [width for width in reversed(WIDTHS) if width < end]
    while sum(pieces) >= end:
        pieces.pop(0)
    start = end - sum(pieces)
    spread_K = sorted({round(i * (start - 1) / max(1, SPREAD - 1)) for i in range(SPREAD)})
    cache = backbone.new_cache(end)
    found = [backbone.logits(backbone.full(ids[:start], 0, cache)[spread_K])]
    for width in pieces:
        backbone.shallow(ids[start : start + width], start, cache)
        found.append(backbone.logits(backbone.deep(start, start + width, cache)))
        start += width
    positions_K = torch.tensor([*spread_K, *range(end - sum(pieces), end)])
    ids_1T = torch.tensor([ids], device=model.device)
    wanted_KV = model(ids_1T, use_cache=False, logits_to_keep=positions_K.to(model.device)).logits[0].float()
    found_KV = torch.cat(found).to(wanted_KV.device)
    around_KV = wanted_KV - wanted_KV.mean(-1, keepdim=True)
    error_K = (found_KV - wanted_KV).square().mean(-1).sqrt() / around_KV.square().mean(-1).sqrt()
    error_K = error_K.nan_to_num(nan=float("inf"))
    at = int(error_K.argmax())
    return Difference(float(error_K[at]), int(positions_K[at]), len(positions_K))


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
