"""Measures decoding of several texts at once: tokens per second by the number of texts, with drafts and without.

Takes a batch engine, prompts and names of controllers; gives one row for every number of texts, method and repeat, and
one for every round. In a repeat all methods decode the same prompts, each in an engine of its own, and take turns round
by round: slow phases of the machine, which on shared hosts last for seconds, so concern all of them. Counted are the
rounds in which all places are taken: neither prefills, nor the end of a run, when texts of equal length that do not
draft end at once and others do not. Before the first repeat of a number of texts, rounds without drafts warm up, and
time what they verify.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..inference.batch_controllers import make_batch_controller
from ..inference.batch_decoding import Finished, step_by_step
from ..inference.batch_engine import BatchEngine
from ..inference.batch_rounds import BatchRound
from ..inference.decoding import Request
from ..inference.sampling import Sampler
from .intervals import interval_of_repeats

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
    engines: dict[str, BatchEngine], requests: list[Request], sampler: Callable[[int], Sampler],
    controllers: dict[str, Any], batch_size: int, report: Callable[[], object] = lambda: None,
) -> dict[str, Decoded]:  # fmt: skip
    """Decode the requests by every method through `batch_size` places; the methods take turns round by round.

    engines, controllers: one for each method; a controller of None decodes autoregressively. report: called for every
    text that ends. Raises what a text's request raises.
    """
    found = {name: Decoded([[] for _ in requests], []) for name in controllers}
    running = {}
    for name, controller in controllers.items():
        jobs = ((request, sampler(i)) for i, request in enumerate(requests))
        running[name] = step_by_step(engines[name], jobs, controller, batch_size, found[name].rounds.append)
    while running:
        for name, steps in list(running.items()):
            text: Finished | None
            for text in steps:
                if text is None:  # its round is done
                    break
                if text.error is not None:
                    raise text.error
                found[name].texts[text.number][:] = text.generation.tokens
                report()
            else:
                del running[name]
    return found


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
    greedy, rows, kept = sampler(0).greedy, [], []
    engines = {name: BatchEngine(engine.backbone) for name in (AUTOREGRESSIVE, *controllers)}
    for batch_size in batch_sizes:
        some = [requests[i % len(requests)] for i in range(max(len(requests), WAVES * batch_size))]
        plain = decode({PLAIN: engine}, some, sampler, {PLAIN: make_batch_controller(PLAIN)}, batch_size)[PLAIN]
        kept += [_round_row(batch_size, PLAIN, -1, round) for round in plain.rounds]
        made = {AUTOREGRESSIVE: None} | {name: make_batch_controller(name, greedy=greedy) for name in controllers}
        with tqdm(total=repeats * len(made) * len(some), desc=f"{batch_size} texts at once", unit="text") as bar:
            for repeat in range(repeats):
                gc.collect()
                gc.disable()  # its time would count for any of the methods
                try:
                    found = decode(engines, some, sampler, made, batch_size, bar.update)
                finally:
                    gc.enable()
                for method, out in found.items():
                    kept += [_round_row(batch_size, method, repeat, round) for round in out.rounds]
                    rows.append(_run_row(batch_size, method, repeat, out))
    return pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(kept, columns=ROUND_COLUMNS)


def _run_row(batch_size: int, method: str, repeat: int, out: Decoded) -> tuple[Any, ...]:
    rounds = out.full(batch_size)
    texts = [text for round in rounds for text in round.texts]
    tokens, seconds = sum(round.tokens for round in rounds), sum(round.seconds for round in rounds)
    return (batch_size, method, repeat, tokens, seconds, seconds * batch_size / max(1, tokens), len(rounds),
            sum(t.drafted for t in texts), sum(t.accepted for t in texts),
            float(np.mean([round.verify_seconds for round in rounds])), out.texts)  # fmt: skip


def _round_row(batch_size: int, method: str, repeat: int, round: BatchRound) -> tuple[Any, ...]:
    passes = [[*zip(*of, strict=True)] or [(), ()] for of in (round.shallow_seconds, round.head_seconds)]
    (shallow, shallow_seconds), (head, head_seconds) = passes
    return (batch_size, method, repeat, round.count, round.rows, round.tokens, list(shallow), list(shallow_seconds),
            list(head), list(head_seconds), round.verify_seconds, round.rest_seconds)  # fmt: skip


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
