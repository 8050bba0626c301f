"""What evaluate.batch_sizes asks for: how much faster each head makes several texts that are decoded together, up to
how many of them it pays, whether the texts are the backbone's own, and what a cost model predicts.

Takes engines, the measured prompts and the evaluate section; keeps eval/batches.parquet and eval/batch_rounds.parquet
(batches.py has their columns); gives `batches` and `lossless.batches` of results.json. All methods are those of the
first temperature.

B texts at once, K drafts of each in a round, R rows of a pass, V vocabulary
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..config import Evaluate
from ..errors import UserError
from ..inference.backbone import SplitBackbone
from ..inference.batch_controllers import BATCH_NAMES, is_of_batches
from ..inference.batch_costs import BatchCosts
from ..inference.batch_engine import BatchEngine
from ..inference.batch_rounds import BatchRound
from ..inference.controllers import fixed_length
from ..inference.decoding import Request
from ..inference.literature import expected_tokens
from ..inference.passes import Span
from ..inference.rounds import LONGEST
from ..inference.sampling import Sampler
from ..runs.files import atomic_path
from .batches import AUTOREGRESSIVE, PLAIN, measure, speedups
from .losslessness import explain, sampling
from .measuring import Measured
from .metrics import of_fixed

REPEATS = 3
"""The fewest repeats: an interval needs several."""
ADAPTIVE = ("thompson", "goodput")
"""Controllers that shall do as well as the best K."""
RUNS, ROUNDS = "batches.parquet", "batch_rounds.parquet"
NESTED = ("shallow", "shallow_seconds", "head", "head_seconds")
WIDTHS = (1, 3, 9)
"""Rows of a text in the passes by which a difference is explained."""
Tables = tuple[pd.DataFrame, pd.DataFrame]
"""(runs, rounds) of `batches.measure`, with a column exit_layer."""


# ---- measuring


def engines_of(config: Evaluate, engines: dict[int, SplitBackbone]) -> tuple[dict[int, BatchEngine], list[str]]:
    """(exit layer -> engine of several texts, controllers that know of several), both empty if nothing is to be
    measured; says what is left out."""
    if not config.batch_sizes:
        return {}, []
    try:
        found = {n: BatchEngine(engine) for n, engine in engines.items()}
    except ValueError as error:
        print(f"evaluate.batch_sizes={config.batch_sizes}: left out: {error}")
        return {}, []
    known = [name for name in config.controllers if is_of_batches(name)]
    left = [name for name in config.controllers if name not in known]
    if left:
        print(f"evaluate.batch_sizes={config.batch_sizes}: {', '.join(left)}: left out; of several texts at once are "
              f"{BATCH_NAMES}")  # fmt: skip
    return (found, known) if known else ({}, [])


def measured(
    folder: Path, engines: dict[int, BatchEngine], controllers: list[str], prompts: pd.DataFrame, config: Evaluate,
    ends: frozenset[int], seed: int,
) -> Tables:  # fmt: skip
    """The tables in the folder; measured and saved there if there are none."""
    if not (folder / RUNS).exists():
        requests = [Request(row, config.max_new_tokens, ends) for row in prompts.ids]
        longest = max(len(request.prompt) for request in requests) + config.max_new_tokens
        methods = 1 + len(controllers)  # with autoregressive decoding; each has its own texts
        fitting = min(engine.fitting(longest) for engine in engines.values()) // methods
        if max(config.batch_sizes) > fitting:
            raise UserError(
                f"evaluate.batch_sizes={config.batch_sizes}: the free memory holds {fitting} texts of {longest} tokens "
                f"at once for each of {methods} methods: leave larger numbers or controllers out"
            )
        device, repeats = next(iter(engines.values())).backbone.device, max(REPEATS, config.repeats)
        runs, rounds = [], []

        def sampler(text: int) -> Sampler:
            return sampler_of(config, torch.Generator(device).manual_seed(seed + text))

        for n, engine in engines.items():
            found = measure(engine, requests, sampler, controllers, config.batch_sizes, repeats)
            runs.append(found[0].assign(exit_layer=n))
            rounds.append(found[1].assign(exit_layer=n))
        for name, tables in ((ROUNDS, rounds), (RUNS, runs)):  # the runs last: with them the tables are complete
            with atomic_path(folder / name) as temporary:
                pd.concat(tables, ignore_index=True).to_parquet(temporary)
    runs, rounds = pd.read_parquet(folder / RUNS), pd.read_parquet(folder / ROUNDS)
    runs["texts"] = [[text.tolist() for text in texts] for texts in runs.texts]
    for column in NESTED:
        rounds[column] = [row.tolist() for row in rounds[column]]
    return runs, rounds


def sampler_of(config: Evaluate, generator: torch.Generator | None = None) -> Sampler:
    """A sampler of the first temperature."""
    return Sampler(config.temperatures[0], config.top_k, config.top_p, generator, block=config.block_verification)


# ---- figures


def figures(tables: Tables, heads: list[dict[str, Any]], temperature: float) -> list[dict[str, Any]]:
    """One entry for each exit layer, with the speedups of every controller by the number of texts, and up to how many
    it pays. heads: the entries of results.json, whose acceptance of one text at a time the prediction takes."""
    runs, rounds = tables
    entries = []
    for n, mine in runs.groupby("exit_layer"):
        of_rounds = rounds[rounds.exit_layer == n]
        entry = next(h for h in heads if (h["exit_layer"], h["temperature"]) == (n, temperature))
        sizes = [int(b) for b in mine.batch_size.unique()]
        expected = predicted(costs_of(of_rounds), rates_of(entry), sizes[-1])
        found = speedups(mine)
        controllers = {
            name: _controller(name, rows, of_rounds, expected)
            for name, rows in found[found.method != AUTOREGRESSIVE].groupby("method", sort=False)
        }
        plain = found[found.method == AUTOREGRESSIVE]
        entries.append(
            {
                "exit_layer": int(n),
                "temperature": temperature,
                "batch_sizes": sizes,
                "repeats": int(mine.repeat.nunique()),
                "autoregressive": plain[["batch_size", "tokens_per_second", "seconds_per_token"]].to_dict("records"),
                "controllers": controllers,
            }
        )
    return entries


def _controller(name: str, rows: pd.DataFrame, rounds: pd.DataFrame, expected: np.ndarray | None) -> dict[str, Any]:
    curve = _curve(name, expected)
    columns = ["batch_size", "tokens_per_second", "speedup", "low", "high", "seconds_per_token", "drafted_per_token",
               "draft_acceptance_rate"]  # fmt: skip
    sizes = rows[columns].to_dict("records")
    for at in sizes:
        b = at["batch_size"]
        if at["drafted_per_token"] == 0:
            at["draft_acceptance_rate"] = None
        at["rows_per_text"], at["target_efficiency"] = target_efficiency(rounds, b, name)
        at["predicted"] = None if curve is None else float(curve[b - 1])
    return {
        "sizes": sizes,
        "pays_up_to": up_to([(at["batch_size"], at["low"]) for at in sizes]),
        "predicted_up_to": None if curve is None else up_to(list(enumerate(curve, start=1))),
    }


def up_to(points: list[tuple[int, float]]) -> int:
    """The largest number of texts such that there and at all smaller ones the value is above 1; 0 if it is not even at
    the smallest. points: (texts, lower end of the interval or prediction), ascending."""
    most = 0
    for batch_size, value in points:
        if not value > 1:
            break
        most = batch_size
    return most


def target_efficiency(rounds: pd.DataFrame, batch_size: int, method: str) -> tuple[float, float] | tuple[None, None]:
    """(rows that the deep layers verify per text, time of verifying one row of each text over the time of verifying
    these), mean and medians of the rounds of so many texts; (None, None) if texts were too short for such rounds. Of a
    pass through all layers, the time of a pass of the shallow ones is taken off. MoESD (Huang et al., 2025, arXiv
    2505.19645) calls the ratio target efficiency: at 1, drafts are verified for nothing."""
    full = rounds[(rounds.batch_size == batch_size) & (rounds["count"] == batch_size)]
    cut = full.shallow.map(len) > 0
    shallow = full[cut].shallow_seconds.map(lambda seconds: seconds[0]).median() if cut.any() else 0.0
    one = full[(full.method == PLAIN) & (full.repeat < 0)].verify_seconds.median() - shallow
    mine = full[(full.method == method) & (full.repeat >= 0)]
    if mine.empty or one != one:
        return None, None
    # What a controller verifies without drafts is a pass through all layers too.
    verify = mine.verify_seconds.where(cut[mine.index], mine.verify_seconds - shallow)
    return float(mine.rows.mean() / batch_size), float(one / verify.median())


# ---- the cost model


def rates_of(entry: dict[str, Any]) -> list[float] | None:
    """Conditional acceptance rates by position, of one text at a time, from the `fixed:K` that drafted furthest: a rule
    that chooses when to go on is accepted more often than one without a choice. None if no fixed:K was measured."""
    fixed = {k: c["conditional_rates"] for k, c in of_fixed(entry["controllers"]).items() if c["conditional_rates"]}
    return fixed[max(fixed)] if fixed else None


def costs_of(rounds: pd.DataFrame) -> BatchCosts:
    """Seconds of the passes by their rows, of the rounds that a controller was asked in."""
    costs = BatchCosts()
    drafting = rounds.shallow.map(len) > 0  # first, as they say what of a pass through all layers is the shallow ones'
    asked = rounds.method != AUTOREGRESSIVE
    for row in pd.concat([rounds[asked & drafting], rounds[asked & ~drafting]]).to_dict("records"):
        round = BatchRound(row["count"], rows=row["rows"])
        round.shallow_seconds = list(zip(row["shallow"], row["shallow_seconds"], strict=True))
        round.head_seconds = list(zip(row["head"], row["head_seconds"], strict=True))
        round.verify_seconds, round.rest_seconds = row["verify_seconds"], row["rest_seconds"]
        costs.observe(round)
    return costs


def predicted(costs: BatchCosts, rates: list[float] | None, most: int) -> np.ndarray | None:
    """Speedups [B, K] of 1..most texts that draft K = 0..8 tokens each in every round; None without rates.

    A round of B texts takes C(B, K) (`BatchCosts.rounds`) and gives each of them E(K) tokens (`expected_tokens`), which
    do not depend on B, as the texts do not. The speedup is E(K) C(B, 0) / C(B, K). The last rate is taken for all
    positions behind it.
    """
    if not rates:
        return None
    seconds_BK = np.array([costs.rounds(b, LONGEST) for b in range(1, most + 1)])
    tokens_K = np.array(expected_tokens([*rates, *[rates[-1]] * LONGEST][:LONGEST]))
    return tokens_K * seconds_BK[:, :1] / seconds_BK


def _curve(name: str, expected_BK: np.ndarray | None) -> np.ndarray | None:
    """The predicted speedup of a controller by the number of texts, from 1 on; None where nothing is predicted."""
    if expected_BK is None:
        return None
    if (k := fixed_length(name)) is not None:
        return expected_BK[:, k] if k <= LONGEST else None
    return expected_BK.max(1) if name in ADAPTIVE else None


# ---- losslessness


@torch.inference_mode()
def losslessness(
    engines: dict[int, BatchEngine], runs: pd.DataFrame, measured: Measured, config: Evaluate, seed: int
) -> dict[str, Any]:
    """Greedy texts must be those of autoregressive decoding of one text at a time, autoregressive decoding of several
    included; sampled ones are tested as losslessness.sampling does."""
    ids = dict(zip(measured.prompts.prompt, measured.prompts.ids, strict=True))
    temperature = config.temperatures[0]
    if temperature > 0:
        frame = _texts(runs[runs.repeat == 0], list(ids)).assign(temperature=temperature)  # others draw the same
        backbones = {n: engine.backbone for n, engine in engines.items()}
        found = sampling(backbones, ids, frame, lambda _: sampler_of(config), seed)
        assert found is not None
        return {"texts": len(frame), **found}
    plain = measured.generations.query("exit_layer == 0 and temperature == 0")
    expected = {row.prompt: list(row.tokens) for row in plain.itertuples()}
    frame = _texts(runs, list(ids))
    differ = frame[[tokens != expected[prompt] for tokens, prompt in zip(frame.tokens, frame.prompt, strict=True)]]
    divergences: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in differ.itertuples():
        who = {"prompt": row.prompt, "exit_layer": int(row.exit_layer), "controller": row.controller}
        key = (*who.values(), *row.tokens)
        if key not in divergences:
            engine, wanted = engines[row.exit_layer], expected[row.prompt]
            divergences[key] = who | _explained(engine, ids[row.prompt], wanted, row.tokens, row.batch_size)
    exact = next(iter(engines.values())).backbone.dtype == torch.float32
    return {
        "texts": len(frame),
        "identical": len(frame) - len(differ),
        "divergences": list(divergences.values()),
        "passed": differ.empty if exact else all(d["explained"] for d in divergences.values()),
    }


def _texts(runs: pd.DataFrame, prompts: list[str]) -> pd.DataFrame:
    """A row for each text of the runs, whose controller is named with the number of texts at once."""
    rows = [
        (run.exit_layer, run.batch_size, f"{run.method}, {run.batch_size} at once", prompts[i % len(prompts)], tokens)
        for run in runs.itertuples()
        for i, tokens in enumerate(run.texts)
    ]
    return pd.DataFrame(rows, columns=["exit_layer", "batch_size", "controller", "prompt", "tokens"])


def _explained(
    engine: BatchEngine, prompt: list[int], wanted: list[int], tokens: list[int], batch_size: int
) -> dict[str, Any]:
    """Whether rounding of passes of many rows can be the reason for a difference."""
    found = explain(
        engine.backbone, prompt, wanted, tokens, lambda ids: list(in_batches(engine, len(prompt), ids, batch_size))
    )
    assert found is not None
    return found._asdict()


def in_batches(engine: BatchEngine, prompt: int, ids: list[int], count: int) -> Iterator[Tensor]:
    """Logits [V] of the token after `ids`, when so many copies of the text are decoded together in passes of several
    widths. The first `prompt` ids are prefilled alone, as in decoding."""
    for width in WIDTHS:
        caches, logits_PV = engine.enter([ids[:prompt]] * count)
        logits_V = logits_PV[0]
        engine.reserve(len(ids) - prompt)
        for base in range(prompt, len(ids), width):
            row = ids[base : base + width]
            hidden_RD = engine.full(row * count, [Span(place, base, len(row)) for place in range(count)])
            logits_V = engine.logits(hidden_RD[len(row) - 1 : len(row)])[0]
            for cache in caches:
                cache.commit(base + len(row))
        engine.leave_all()
        yield logits_V
