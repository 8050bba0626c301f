"""Is the measured text the backbone's own? Greedy by token ids, sampled by a randomised probability transform.

Takes engines and the texts that evaluate decoded, gives the `lossless` part of results.json. Knows nothing of how
long anything took, or of what drafted a text.

T tokens of a text, V vocabulary;  p: backbone's processed distribution, q: exit head's
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ..inference.backbone import SplitBackbone
from ..inference.rounds import WIDTHS
from ..inference.sampling import Sampler

CELLS = 20
ALARM = 1e-3
"""Chance that a run of nothing but lossless texts fails the sampling test."""

Ids = dict[str, list[int]]
"""Prompt id -> token ids."""


# ---- greedy


@torch.inference_mode()
def greedy(engine: SplitBackbone, prompt_ids: Ids, generations: pd.DataFrame) -> dict[str, Any] | None:
    """Token ids of every greedy text against autoregressive decoding; None if nothing greedy was measured.

    In float32 all must be equal. In bfloat16 passes of one and of several tokens round differently, so a text may
    leave the baseline's where two tokens are nearly tied: at each first divergence the gap between the two largest
    logits must be at most twice the largest logit difference between such passes at that prefix.
    """
    rows = generations[generations.temperature == 0.0]
    if rows.empty:
        return None
    expected = {(r.prompt, r.repeat): list(r.tokens) for r in rows[rows.exit_layer == 0].itertuples()}
    divergences = []
    texts = rows[rows.exit_layer != 0]
    for row in texts.itertuples():
        want, got = expected[row.prompt, row.repeat], list(row.tokens)
        if want == got:
            continue
        at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        gap, noise = near_tie(engine, prompt_ids[row.prompt] + want[:at])
        divergences.append(
            {"prompt": row.prompt, "exit_layer": row.exit_layer, "controller": row.controller,
             "first_divergence": at, "top2_gap": gap, "logit_noise": noise, "explained": gap <= 2 * noise}
        )  # fmt: skip
    exact = engine.dtype == torch.float32
    return {
        "prompts": int(texts.prompt.nunique()),
        "texts": len(texts),
        "identical": len(texts) - len(divergences),
        "divergences": divergences,
        "passed": not divergences if exact else all(d["explained"] for d in divergences),
    }


def near_tie(engine: SplitBackbone, ids: list[int]) -> tuple[float, float]:
    """(gap between the two largest next-token logits, largest logit difference between pass widths) behind `ids`."""
    logits = {}
    for width in (w for w in WIDTHS if w == 1 or w < len(ids)):
        cache = engine.new_cache(len(ids))
        if len(ids) > width:
            engine.full(ids[:-width], 0, cache)
        logits[width] = engine.logits(engine.full(ids[-width:], len(ids) - width, cache)[-1:])[0]
    top = logits[1].topk(2).values
    noise = max((float((x - logits[1]).abs().max()) for x in logits.values()), default=0.0)
    return float(top[0] - top[1]), noise


# ---- sampling


def sampling(
    engines: dict[int, SplitBackbone],
    prompt_ids: Ids,
    generations: pd.DataFrame,
    sampler_of: Callable[[float], Sampler],
    seed: int = 0,
) -> dict[str, Any] | None:
    """A chi-square test of every sampled method, the baseline too as a control; None if nothing was sampled.

    passed: no p-value lies below ALARM over the number of tests (Bonferroni).
    """
    rows = generations[generations.temperature > 0.0]
    if rows.empty:
        return None
    tests = []
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=len(rows), desc="transform", unit="text")
    for (temperature, n, controller), texts in rows.groupby(["temperature", "exit_layer", "controller"], sort=False):
        engine = engines[n] if n else next(iter(engines.values()))
        u = []
        for row in texts.itertuples():
            u.append(transform(engine, prompt_ids[row.prompt], list(row.tokens), sampler_of(temperature), generator))
            bar.update()
        test = {"temperature": float(temperature), "exit_layer": int(n), "controller": controller}
        tests.append(test | uniform(torch.cat(u)))
    bar.close()
    first = next(iter(rows.itertuples()))
    smallest = min((t["p_value"] for t in tests), default=1.0)
    return {
        "test": f"randomised probability integral transform, chi-square over {CELLS} cells",
        "tests": tests,
        "p_value": smallest,
        "corrected_p_value": min(1.0, smallest * len(tests)),
        "passed": smallest * len(tests) > ALARM,
        "largest_p_difference": check_p(
            next(iter(engines.values())), prompt_ids[first.prompt], list(first.tokens), sampler_of(first.temperature)
        ),
    }


@torch.inference_mode()
def transform(
    engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler, generator: torch.Generator
) -> Tensor:
    """u [T-1] of the tokens after the first, uniform and independent if the text is distributed as the backbone's.

    With the vocabulary in descending order of q, u = P(before y) + U P(y), P the backbone's distribution behind the
    true past and U ~ Uniform(0, 1): the randomised probability integral transform (Brockwell, 2007). The order by
    q puts tokens that drafting favours next to each other, where a bias shows most. The first token follows the
    prompt and is never drafted.
    """
    if len(tokens) < 2:
        return torch.empty(0, dtype=torch.float64)
    p_TV, q_TV = teacher_forced(engine, prompt, tokens, sampler)
    p_TV, order = p_TV[1:].double(), torch.argsort(q_TV[1:], dim=-1, descending=True, stable=True)
    y_T1 = torch.tensor(tokens[1:], device=p_TV.device)[:, None]
    rank_TV = order.argsort(-1)
    before_T = (p_TV * (rank_TV < rank_TV.gather(1, y_T1))).sum(-1)
    uniform_T = torch.rand(len(y_T1), generator=generator, dtype=torch.float64).to(p_TV.device)
    return (before_T + uniform_T * p_TV.gather(1, y_T1)[:, 0]).cpu()


def teacher_forced(
    engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """Processed p and q [T, V] of each of the tokens given all before it, in one pass."""
    ids = prompt + tokens[:-1]
    cache = engine.new_cache(len(ids))
    engine.shallow(ids, 0, cache)
    past = len(prompt) - 1
    p_logits_TV = engine.logits(engine.deep(0, len(ids), cache)[past:])
    q_logits_TV = engine.draft_logits_of_all(len(ids), cache)[past:]
    shaped = [sampler.shape(x, prompt, tokens[:-1]).softmax(-1) for x in (p_logits_TV, q_logits_TV)]
    return shaped[0], shaped[1]


@torch.inference_mode()
def check_p(engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler) -> float:
    """Largest difference of p between one teacher-forced pass and the autoregressive loop's own passes."""
    forced_TV, _ = teacher_forced(engine, prompt, tokens, sampler)
    cache = engine.new_cache(len(prompt) + len(tokens))
    hidden_1D, worst = engine.full(prompt, 0, cache)[-1:], 0.0
    for t, token in enumerate(tokens):
        p_V = sampler.shape(engine.logits(hidden_1D), prompt, tokens[:t]).softmax(-1)[0]
        worst = max(worst, float((p_V - forced_TV[t]).abs().max()))
        hidden_1D = engine.full([token], len(prompt) + t, cache)
    return worst


def uniform(u: Tensor) -> dict[str, Any]:
    """Chi-square of u against the uniform distribution: statistic, degrees of freedom, p-value."""
    counts = np.histogram(u.numpy(), bins=CELLS, range=(0.0, 1.0))[0]
    expected = len(u) / CELLS
    statistic = float(((counts - expected) ** 2).sum() / max(expected, 1e-9))
    freedom = CELLS - 1
    p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64),
                                            torch.tensor(statistic / 2, dtype=torch.float64)))  # fmt: skip
    return {"tokens": len(u), "statistic": round(statistic, 2), "freedom": freedom, "p_value": p_value}
