"""Predicts for how many texts at once drafting pays on a GPU: from some number on its passes are bound by arithmetic,
and every draft that is verified in vain takes as long as a token.

Takes an architecture, a GPU, a config and the predictions of gain.py; gives speedups by the number of texts. Letters
and formulas as in docs/planning.md.

B texts at once, K drafts of each in a round
"""

from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..inference.places import slots_for
from . import memory, work
from .architecture import Architecture
from .gain import ROUND, Prediction
from .hardware import Gpu

SHOWN = (1, 4, 16, 64, 256)
"""Numbers of texts whose speedup is shown."""
MOST = 4096
"""No more texts are looked at."""


@dataclass(frozen=True)
class Crossover:
    """Of one prediction: the speedup of fixed K over autoregressive decoding of as many texts."""

    exit_layer: int
    temperature: float | None
    k: int
    """The best K of one text at a time."""
    speedups: dict[int, float]
    """Texts at once -> speedup, for those of SHOWN."""
    pays: list[tuple[int, int]]
    """The ranges (first, last) of B, MOST at most, in which the speedup is above 1. A dense backbone has one from 1 on;
    a mixture of experts may need several texts, which read most of its experts anyway (MoESD)."""
    pays_of_one: list[tuple[int, int]]
    """The same for K = 1."""
    fit: int
    """Texts whose keys and values fit into the memory of the GPUs that hold a copy."""


def crossovers(a: Architecture, config: Config, gpu: Gpu, gpus: int, predictions: list[Prediction]) -> list[Crossover]:
    """One for each prediction with an expected acceptance. gpus: those that hold one copy of the backbone."""
    found = []
    for p in predictions:
        if p.expected is not None:
            mine, one = (speedups(a, config, gpu, p.exit_layer, k, p.expected.rates) for k in (p.best, 1))
            shown, fit = {b: float(mine[b - 1]) for b in SHOWN}, texts_that_fit(a, config, gpu, gpus)
            found.append(Crossover(p.exit_layer, p.expected.temperature, p.best, shown, ranges(mine), ranges(one), fit))
    return found


def speedups(
    a: Architecture, config: Config, gpu: Gpu, exit_layer: int, k: int, rates: list[float], most: int = MOST
) -> np.ndarray:
    """Predicted speedup [B] of fixed K for B = 1..most texts at once.

    E(K) A(B) / C(B, K), where A(B) are the seconds of an autoregressive pass, C(B, K) = (K+1) shallow(B) + K head(B) +
    verify(B, K+1) + 0.05 A(1), and E(K) the tokens of a round. rates: as `Expected.rates`.
    """
    b, n = np.arange(1, most + 1), exit_layer
    drafted = a.draft_vocabulary(config.distill.draft_vocabulary)

    def seconds(layers: int, vocabulary: int, rows: int = 1, is_head: bool = False) -> np.ndarray:
        return work.pass_seconds(a, config, gpu, layers, vocabulary, b, rows, memory.mean_positions(config), is_head)

    alone = seconds(a.layers, a.vocabulary)
    round = (k + 1) * seconds(n, 0) + k * seconds(1, drafted, is_head=True) + seconds(a.layers - n, a.vocabulary, k + 1)
    tokens = 1 + np.cumprod([*rates, *[rates[-1]] * k][:k]).sum()
    return tokens * alone / (round + ROUND * alone[0])


def ranges(speedups: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) of every run of numbers of texts, from 1 on, whose speedup is above 1."""
    edges = np.flatnonzero(np.diff([False, *(speedups > 1), False]))
    return [(int(start) + 1, int(stop)) for start, stop in edges.reshape(-1, 2)]


def texts_that_fit(a: Architecture, config: Config, gpu: Gpu, gpus: int) -> int:
    """Texts whose places (inference/places.py) fit beside the backbone and one head at their full length, half of the
    memory being left for copies that are made when places grow; 1 at least."""
    w = memory.weight_bytes(config)
    slots = slots_for(memory.prompt_tokens(config) + config.evaluate.max_new_tokens)
    text = slots * (2 * (a.layers + 1) * a.key + a.hidden) * w
    room = gpus * memory.usable(gpu) - (a.parameters + a.head) * w
    return max(1, int(room // 2 // text))
