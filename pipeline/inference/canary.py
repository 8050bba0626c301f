"""Compares the probabilities that two computations of one model give on short texts.

`compare` checks that the engine computes what transformers computes: it takes the split backbone, its model and a text,
and returns the largest difference of their logits. Speculative and autoregressive decoding both run in the engine, so
a comparison of these two cannot find an error of the engine; this one can.

`record` and `distance` check that a model is the backbone that was measured. A canary is a few greedy texts with the
log-probability of each of their tokens. The fingerprint covers only some rows of some weights: a backbone whose other
weights were fine-tuned passes it, and still decodes its own text, but the exit head was not trained for it.

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
"""In nats. Another dtype or kernel changes the log-probabilities by less than this, averaged over all tokens."""
SPREAD = 16
"""Number of prefilled positions of a text whose logits are compared, spread evenly."""


class Difference(NamedTuple):
    """How far apart the logits of two computations are."""

    largest: float
    """The maximum over positions of the difference's root mean square, divided by the standard deviation of the logits
    there. 0 means equal, about 1.4 unrelated."""
    position: int
    """The position where the difference is largest."""
    positions: int
    """K, the number of positions compared."""


def rounding(dtype: torch.dtype, num_layers: int) -> float:
    """The largest `Difference.largest` that rounding explains, when two computations add the same numbers in different
    orders.

    Measured on random backbones and the pocket one (maximum over positions, CPU): float32 1e-6; float16 0.003 with 4
    layers, 0.004 with 32; bfloat16 0.02 and 0.03. Real errors are larger: attention scaled by 1.1 instead of 1 gives
    0.01 to 0.15, another activation 0.07 to 0.4, another window or order of norms more.
    """
    return max(1e-4, 6 * torch.finfo(dtype).eps * (1 + num_layers / 4) ** 0.5)


@torch.inference_mode()
def compare(backbone: SplitBackbone, model: Any, ids: list[int]) -> Difference:
    """Compare the engine's logits with those of `model(ids)`: after a prefill, and after passes of all widths over a
    filled cache, split at the exit layer as in verification."""
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
    """The canary of a backbone: greedy texts that start from tokens spread over the vocabulary, as `ids`, and the
    log-probability in nats of each token after the first, as `logp`."""
    canary = []
    for i in range(TEXTS):
        start = (2 * i + 1) * len(backbone.embedding_VD) // (2 * TEXTS)
        ids = [start, *autoregressive(backbone, Request([start], LENGTH), Sampler()).tokens]
        logits_TV = backbone.logits(backbone.full(ids[:-1], 0, backbone.new_cache(LENGTH)))
        canary.append({"ids": ids, "logp": [round(x, 5) for x in _chosen(logits_TV, ids)]})
    return canary


@torch.inference_mode()
def distance(model: Any, canary: list[dict[str, list]]) -> float:
    """Mean absolute difference in nats between the model's log-probabilities and those of a recorded canary; infinite
    if the canary has tokens that the model does not know."""
    if max(max(text["ids"]) for text in canary) >= model.config.vocab_size:
        return float("inf")
    ids_BT = torch.tensor([text["ids"] for text in canary], device=model.device)
    logits_BTV = model(ids_BT[:, :-1]).logits.float()
    found = [_chosen(logits_TV, text["ids"]) for logits_TV, text in zip(logits_BTV, canary, strict=True)]
    return float((torch.tensor(found) - torch.tensor([text["logp"] for text in canary])).abs().mean())


def _chosen(logits_TV: torch.Tensor, ids: list[int]) -> list[float]:
    """Log-probability of each of the ids after the first."""
    next_T1 = torch.tensor(ids[1:], device=logits_TV.device)[:, None]
    return logits_TV.log_softmax(-1).gather(1, next_T1)[:, 0].tolist()
