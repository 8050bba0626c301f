"""The speedup that no controller can exceed with a given head: the oracle's, which knows every outcome beforehand.

Takes the engines, the texts that autoregressive decoding wrote and the measured costs; gives a speedup for each head
and temperature. A target that a controller misses is to be read as a share of it: the rest is up to the head.

T tokens of a text
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from ..inference.backbone import SplitBackbone
from ..inference.sampling import Sampler
from . import simulation
from .losslessness import teacher_forced_chunks
from .metrics import BASELINE, CostModel

DRAWS = 8
"""Sets of outcomes drawn for a sampled text; a greedy one has a single set."""


@torch.inference_mode()
def acceptance(engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler) -> np.ndarray:
    """The probability [T] that a draft for each token of a text is accepted, given all tokens before it."""
    chunks = teacher_forced_chunks(engine, prompt, tokens, sampler)
    found = [simulation.acceptance(p, q, tokens[start : start + len(p)], sampler) for start, p, q in chunks]
    return torch.cat(found).cpu().numpy()


def speedup(
    engine: SplitBackbone,
    prompts: dict[str, list[int]],
    generations: pd.DataFrame,
    sampler: Sampler,
    costs: dict[str, Any],
    max_new_tokens: int,
    seed: int,
) -> float | None:
    """The oracle's speedup on the texts of the baseline; None if nothing could be drafted in any of them.

    prompts: id -> token ids. generations: rows of one temperature, with columns prompt, repeat, controller and tokens.
    sampler: that temperature's.
    """
    texts = generations[(generations.controller == BASELINE) & (generations.repeat == 0)]
    tokens, time = 0, 0.0
    for row in texts.itertuples():
        if len(row.tokens) < 2:  # the first token comes from the prefill
            continue
        chance_T = acceptance(engine, prompts[row.prompt], list(row.tokens), sampler)
        trace = simulation.Trace.of(row.prompt, max_new_tokens, chance_T)
        for draw in range(1 if sampler.greedy else DRAWS):
            (accepted_T,) = simulation.outcomes([trace], seed + draw)
            time += simulation.oracle(trace, accepted_T, CostModel(costs))
            tokens += len(trace) - 1
    return tokens / time if time else None
