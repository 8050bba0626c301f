"""Tests that decoding was lossless: greedy texts are compared by token ids, sampled texts by a statistical test.

Takes engines and the texts that evaluate decoded; gives the `lossless` part of results.json. Sampled texts are tested
by the randomised probability integral transform (Brockwell, 2007), whose values are uniform if the text has the
backbone's distribution.

T tokens of a text, C of them in a chunk, V vocabulary, D hidden, P passes;
p: the backbone's processed distribution, q: the exit head's
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ..inference.backbone import SplitBackbone
from ..inference.controllers import branches
from ..inference.fixed_shapes import BRANCHED
from ..inference.law import Law
from ..inference.rounds import WIDTHS
from ..inference.sampling import Sampler

CELLS = 20
ALARM = 1e-3
"""The probability that an evaluation fails the sampling test although all its texts are lossless."""
CHUNK = 32
"""How many rows of V numbers are in memory at once (planning/memory.py counts them)."""

Ids = dict[str, list[int]]
"""Prompt id -> token ids."""


# ---- greedy


@torch.inference_mode()
def greedy(engine: SplitBackbone, prompt_ids: Ids, generations: pd.DataFrame) -> dict[str, Any] | None:
    """Compare every greedy text with autoregressive decoding, by token ids; None if nothing greedy was measured.

    In float32 all must be equal. In bfloat16, passes of one and of several tokens round differently, so a text may
    diverge from the baseline's where the wanted and the emitted token are nearly tied: `explain` decides this at each
    first divergence.
    """
    rows = generations[generations.temperature == 0.0]
    if rows.empty:
        return None
    expected = {(r.prompt, r.repeat): list(r.tokens) for r in rows[rows.exit_layer == 0].itertuples()}
    divergences = []
    texts = rows[rows.exit_layer != 0]
    for row in texts.itertuples():
        widths = (*WIDTHS, *BRANCHED[-3:]) if branches(row.controller) else WIDTHS
        wanted = expected[row.prompt, row.repeat]
        found = explain(engine, prompt_ids[row.prompt], wanted, list(row.tokens), widths=widths)
        if found is not None:
            who = {"prompt": row.prompt, "exit_layer": int(row.exit_layer), "controller": row.controller}
            divergences.append(who | found._asdict())
    exact = engine.dtype == torch.float32
    return {
        "prompts": int(texts.prompt.nunique()),
        "texts": len(texts),
        "identical": len(texts) - len(divergences),
        "divergences": divergences,
        "passed": not divergences if exact else all(d["explained"] for d in divergences),
    }


class Divergence(NamedTuple):
    """The first place where two texts differ."""

    first_divergence: int
    """Index of the token, 0 for the first one after the prompt."""
    wanted: int | None
    """The baseline's token there; None if its text ends before it."""
    emitted: int | None
    """The other text's token there; None if that text ends before it."""
    logit_gap: float | None
    """Logit of the wanted token minus that of the emitted one, in a pass of one token; None if either is missing."""
    logit_noise: float | None
    """The largest change of that gap that rounding may cause."""
    explained: bool
    """Whether rounding can be the reason: the gap is no larger than the noise."""


def first_divergence(wanted: list[int], emitted: list[int]) -> int | None:
    """Index of the first token that differs, or that only one of the texts has; None for equal texts."""
    if wanted == emitted:
        return None
    pairs = enumerate(zip(wanted, emitted, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(emitted)))


@torch.inference_mode()
def explain(
    engine: SplitBackbone,
    prompt: list[int],
    wanted: list[int],
    emitted: list[int],
    others: Callable[[list[int]], Sequence[Tensor]] | None = None,
    widths: Sequence[int] = WIDTHS,
) -> Divergence | None:
    """Where the emitted text diverges from the wanted one, and whether rounding can be the reason; None if equal.

    The wanted and the emitted token themselves must be nearly tied; that two other tokens are is no explanation. A text
    that ends before the other is an error too, because equal texts end together.

    others: gives further logits [V] after the given token ids, from code that computes them in another way. widths: of
    the passes in which the emitted text may have been computed.
    """
    at = first_divergence(wanted, emitted)
    if at is None:
        return None
    if at >= len(wanted) or at >= len(emitted):
        want_or_end, got_or_end = (int(text[at]) if at < len(text) else None for text in (wanted, emitted))
        return Divergence(at, want_or_end, got_or_end, None, None, False)
    want, got = int(wanted[at]), int(emitted[at])
    ids = [*prompt, *(int(token) for token in wanted[:at])]
    passes = [logits_V[[want, got]].float().cpu() for logits_V in by_width(engine, len(prompt), ids, widths)]
    passes += [logits_V[[want, got]].float().cpu() for logits_V in (others(ids) if others else ())]
    gap, noise = tie(torch.stack(passes), engine.dtype)
    return Divergence(at, want, got, gap, noise, gap <= noise)


def tie(logits_P2: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(gap, noise) of two tokens' logits in P passes, of which the first is the reference.

    gap: the first token's logit minus the second's. noise: for each token, the largest change of its logit between the
    reference and another pass, but at least half the spacing of `dtype` at that value, by which rounding alone may
    change it; summed over the two tokens.
    """
    reference_2 = logits_P2[0]
    spacing_2 = torch.finfo(dtype).eps * 2.0 ** reference_2.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    noise_2 = torch.maximum((logits_P2 - reference_2).abs().amax(0), spacing_2 / 2)
    return float(reference_2[0] - reference_2[1]), float(noise_2.sum())


def by_width(engine: SplitBackbone, prompt: int, ids: list[int], widths: Sequence[int]) -> Iterator[Tensor]:
    """Logits [V] of the token after `ids` in passes of each width; the first as the baseline computes them.

    The first `prompt` ids are prefilled in one pass, as in decoding, and the rest in passes of one width, starting with
    width 1. Keys and values computed at other widths differ by rounding too, so the whole text is processed again for
    each width.
    """
    for width in widths:
        cache = engine.new_cache(len(ids))
        hidden_MD = engine.full(ids[:prompt], 0, cache)
        for base in range(prompt, len(ids), width):
            hidden_MD = engine.full(ids[base : base + width], base, cache)
        yield engine.logits(hidden_MD)[-1]


# ---- sampling


def sampling(
    engines: dict[int, SplitBackbone],
    prompt_ids: Ids,
    generations: pd.DataFrame,
    sampler_of: Callable[[float], Sampler],
    seed: int = 0,
) -> dict[str, Any] | None:
    """Test every sampled method, and the baseline as a control, by chi-square; None if nothing was sampled.

    `passed` in the result: no p-value is below ALARM divided by the number of tests (Bonferroni).
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
    """u [T-1] of the tokens after the first, uniform and independent if the text has the backbone's distribution.

    This is the randomised probability integral transform (Brockwell, 2007): with the vocabulary in descending order of
    q, u = P(tokens before y) + U P(y), where P is the backbone's distribution given the text so far and
    U ~ Uniform(0, 1). The order by q puts tokens that drafting favours next to each other, where a bias shows most;
    tokens of equal q keep the vocabulary's order. The first token of a text is never drafted.
    """
    if len(tokens) < 2:
        return torch.empty(0, dtype=torch.float64)
    uniform_T = torch.rand(len(tokens) - 1, generator=generator, dtype=torch.float64)
    u = []
    for start, p_CV, q_CV in teacher_forced_chunks(engine, prompt, tokens, sampler, first=1):
        y_C1 = torch.tensor(tokens[start : start + len(p_CV)], device=p_CV.device)[:, None]
        q_of_y_C1, p_of_y_C1 = q_CV.gather(1, y_C1), p_CV.gather(1, y_C1)
        before_CV = q_CV > q_of_y_C1
        before_CV |= (q_CV == q_of_y_C1) & (torch.arange(q_CV.shape[1], device=q_CV.device) < y_C1)
        before_C = p_CV.mul_(before_CV).sum(-1, dtype=torch.float64).cpu()
        u.append(before_C + uniform_T[start - 1 : start - 1 + len(before_C)] * p_of_y_C1[:, 0].double().cpu())
    return torch.cat(u)


def teacher_forced(
    engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """Processed p and q, each [T, V], of every token given all before it, for texts whose rows fit into memory."""
    chunks = list(teacher_forced_chunks(engine, prompt, tokens, sampler))
    return torch.cat([p_CV for _, p_CV, _ in chunks]), torch.cat([q_CV for _, _, q_CV in chunks])


def teacher_forced_chunks(
    engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler, first: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (index of a chunk's first token, p, q), with p and q [C, V] of each token given all before it.

    It starts at token `first`. The layers run once over the whole text; only CHUNK rows of logits are in memory at
    once.
    """
    ids = prompt + tokens[:-1]
    cache = engine.new_cache(len(ids))
    engine.shallow(ids, 0, cache)
    past = len(prompt) - 1
    deep_TD = engine.deep(0, len(ids), cache)[past:]
    drafting_TD = engine.draft_hidden_of_all(len(ids), cache)[past:]
    for start in range(first, len(tokens), CHUNK):
        stop = min(start + CHUNK, len(tokens))
        p_CV = sampler.shape(engine.logits(deep_TD[start:stop]), prompt, tokens[: stop - 1]).softmax(-1)
        # Not `sampler.law`, nor arguments in a tuple: they would keep the unprocessed logits, which are as large as q.
        q_logits_CW = sampler.shape(engine.draft_logits_of(drafting_TD[start:stop]), prompt, tokens[: stop - 1])
        q_CV = Law(q_logits_CW, engine.draft_vocabulary).q_V
        del q_logits_CW
        yield start, p_CV, q_CV


@torch.inference_mode()
def check_p(engine: SplitBackbone, prompt: list[int], tokens: list[int], sampler: Sampler) -> float:
    """The largest difference of p between one teacher-forced pass and the passes of autoregressive decoding."""
    worst = 0.0
    for start, p_CV, _ in teacher_forced_chunks(engine, prompt, tokens, sampler):
        if start == 0:  # only now: with fixed shapes there is one cache, and the teacher-forced pass no longer needs it
            cache = engine.new_cache(len(prompt) + len(tokens))
            hidden_1D = engine.full(prompt, 0, cache)[-1:]
        for t, forced_V in enumerate(p_CV, start):
            p_V = sampler.shape(engine.logits(hidden_1D), prompt, tokens[:t]).softmax(-1)[0]
            worst = max(worst, float((p_V - forced_V).abs().max()))
            hidden_1D = engine.full([tokens[t]], len(prompt) + t, cache)
    return worst


def uniform(u: Tensor) -> dict[str, Any]:
    """Chi-square test of u against the uniform distribution: statistic, degrees of freedom, p-value."""
    counts = np.histogram(u.numpy(), bins=CELLS, range=(0.0, 1.0))[0]
    expected = len(u) / CELLS
    statistic = float(((counts - expected) ** 2).sum() / max(expected, 1e-9))
    freedom = CELLS - 1
    p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64),
                                            torch.tensor(statistic / 2, dtype=torch.float64)))  # fmt: skip
    return {"tokens": len(u), "statistic": round(statistic, 2), "freedom": freedom, "p_value": p_value}
