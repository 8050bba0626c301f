"""Measures decoding of several texts at once: tokens per second by the number of texts, with drafts and without.

Takes a batch engine, prompts and names of controllers; gives one row for every number of texts, method and repeat, and
one for every round. In a repeat all methods decode the same prompts one after the other, beginning with another one
each time, and ratios are taken within a repeat, so that slow phases of the machine concern all of them. Counted are the
rounds in which all places are taken: neither prefills, nor the end of a run, when texts of equal length that do not
draft end at once and others do not. Before the first repeat of a number of texts, rounds without drafts warm up, and
time what they verify.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..inference.batch_controllers import make_batch_controller
from ..inference.batch_decoding import decode_batch
from ..inference.batch_engine import BatchEngine
from ..inference.batch_rounds import BatchRound
from ..inference.decoding import Request
from ..inference.sampling import Sampler
from .intervals import interval_of_repeats
from .measuring import in_turns

AUTOREGRESSIVE = "autoregressive"
WAVES = 4
"""At least so many texts are decoded for each place, prompts repeated if need be: at a run's end places are empty."""
PLAIN = "none"
"""The controller of the rounds without drafts that warm up."""
COLUMNS = ("batch_size", "method", "repeat", "tokens", "seconds", "latency", "rounds", "drafted", "accepted", "verify",
           "texts")  # fmt: skip
ROUND_COLUMNS = ("batch_size", "method", "repeat", "count", "rows", "tokens", "shallow", "shallow_seconds", "head",
                 "head_seconds", "verify_seconds", "rest_seconds")  # fmt: skip


class Decoded(NamedTuple):
    """What decoding some texts gave."""

    texts: list[list[int]]
    """The new ids of each request."""
    rounds: list[BatchRound]

    def full(self, batch_size: int) -> list[BatchRound]:
        """The rounds in which all places were taken; all rounds where there were too few texts for any."""
        return [round for round in self.rounds if round.count == batch_size] or self.rounds


def decode(
    engine: BatchEngine, requests: list[Request], sampler: Callable[[int], Sampler], controller: Any, batch_size: int
) -> Decoded:
    """Decode the requests through `batch_size` places. controller: None for autoregressive decoding. Raises what a
    text's request raises."""
    jobs = ((request, sampler(i)) for i, request in enumerate(requests))
    texts: list[list[int]] = [[] for _ in requests]
    rounds: list[BatchRound] = []
    for text in decode_batch(engine, jobs, controller, batch_size, rounds.append):
        if text.error is not None:
            raise text.error
        texts[text.number] = text.generation.tokens
    return Decoded(texts, rounds)


def measure(
    engine: BatchEngine, requests: list[Request], sampler: Callable[[int], Sampler], controllers: list[str],
    batch_sizes: list[int], repeats: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """(one row of `COLUMNS` for each number of texts, method and repeat, one of `ROUND_COLUMNS` for each of their
    rounds and of those of the warm-up, whose repeat is -1); seconds of wall time.

    Of the first are tokens, drafts and times sums over the rounds in which all places were taken; `latency` is the mean
    seconds per token of a text, `verify` those of a verification or of an autoregressive pass. `texts` are the new ids
    of each text; text i is of request i, counted round and round.
    """
    greedy = sampler(0).greedy
    rows, kept = [], []
    for batch_size, repeat, method, made in _runs(controllers, batch_sizes, repeats, greedy):
        some = [requests[i % len(requests)] for i in range(max(len(requests), WAVES * batch_size))]
        out = decode(engine, some, sampler, made, batch_size)
        kept += [_round_row(batch_size, method, repeat, round) for round in out.rounds]
        if repeat < 0:
            continue
        rounds = out.full(batch_size)
        texts = [text for round in rounds for text in round.texts]
        tokens, seconds = sum(round.tokens for round in rounds), sum(round.seconds for round in rounds)
        rows.append(
            (batch_size, method, repeat, tokens, seconds, seconds * batch_size / max(1, tokens), len(rounds),
             sum(t.drafted for t in texts), sum(t.accepted for t in texts),
             float(np.mean([round.verify_seconds for round in rounds])), out.texts)
        )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(kept, columns=ROUND_COLUMNS)


def _round_row(batch_size: int, method: str, repeat: int, round: BatchRound) -> tuple[Any, ...]:
    passes = [[*zip(*of, strict=True)] or [(), ()] for of in (round.shallow_seconds, round.head_seconds)]
    (shallow, shallow_seconds), (head, head_seconds) = passes
    return (batch_size, method, repeat, round.count, round.rows, round.tokens, list(shallow), list(shallow_seconds),
            list(head), list(head_seconds), round.verify_seconds, round.rest_seconds)  # fmt: skip


def _runs(
    controllers: list[str], batch_sizes: list[int], repeats: int, greedy: bool
) -> Iterator[tuple[int, int, str, Any]]:
    """(number of texts, repeat, method, its controller) of every run, of repeat -1 to warm up."""
    for batch_size in batch_sizes:
        yield batch_size, -1, PLAIN, make_batch_controller(PLAIN)
        made = {name: make_batch_controller(name, greedy=greedy) for name in controllers}
        methods = [AUTOREGRESSIVE, *controllers]
        for repeat, _, method in in_turns(1, methods, repeats, f"{batch_size} texts at once", "run"):
            yield batch_size, repeat, method, made.get(method)


def speedups(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each number of texts and method: tokens per second, the ratio to autoregressive decoding of as many texts
    (median, least and most of the repeats, and a 95 % interval), seconds per token of a text, drafts per token, and how
    many of them were accepted.

    The interval is Student's, of the mean log ratio over the repeats; nan for a single one. It says how well the ratio
    is known on these prompts, not how it would be on others.
    """
    frame = frame.assign(rate=frame.tokens / frame.seconds)
    base = frame[frame.method == AUTOREGRESSIVE].set_index(["batch_size", "repeat"])
    frame = frame.assign(ratio=frame.rate / frame.set_index(["batch_size", "repeat"]).index.map(base.rate))
    rows = []
    for (batch_size, method), some in frame.groupby(["batch_size", "method"], sort=False):
        ratios = some.ratio
        rows.append(
            (batch_size, method, some.rate.median(), ratios.median(), ratios.min(), ratios.max(),
             *interval_of_repeats(ratios.to_numpy()), some.latency.median(),
             some.drafted.sum() / max(1, some.tokens.sum()), some.accepted.sum() / max(1, some.drafted.sum()))
        )  # fmt: skip
    columns = ["batch_size", "method", "tokens_per_second", "speedup", "least", "most", "low", "high",
               "seconds_per_token", "drafted_per_token", "draft_acceptance_rate"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
