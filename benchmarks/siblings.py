"""What would a tree add to a chain of drafts? An estimate from texts, before anything is built.

The tree is a chain of the head's first choices, each with up to S - 1 further candidates beside it as leaves: a leaf
needs no head pass, only one more row in the shallow pass of its level and in verification. Where the chain's draft is
rejected, a right leaf still gives one more token. With texts of greedy decoding all of this is known: at each place,
the rank of the backbone's token among the head's candidates, and their probabilities.

Both shapes are drafted by one rule, which compares tokens and time as `thompson` does (docs/control.md) and whose
chances are calibrated on one half of the texts; figures are of the other half. The oracle of each shape, which knows
all ranks beforehand, stands beside them. A row in a shallow pass beyond the first costs what it costs in verification,
or nothing with --free-rows, as nearly on a GPU.

  python benchmarks/siblings.py --run runs/smollm2-135m --exit-layer 2

Takes an evaluated run; prints speedups over autoregressive decoding, computed from the run's measured costs.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from pipeline.backbones.load import load_model
from pipeline.config import load
from pipeline.evaluation.losslessness import teacher_forced
from pipeline.evaluation.metrics import BASELINE, CostModel
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.rounds import LONGEST
from pipeline.inference.sampling import Sampler

BINS = 12
WIDEST = 4


class Text(NamedTuple):
    """Of each place t of a text: the rank of its token among the head's candidates (WIDEST: none), and their q."""

    rank_T: np.ndarray
    q_TS: np.ndarray


class Costs:
    """Times of a level and of a round in autoregressive tokens."""

    def __init__(self, costs: dict, free_rows: bool):
        if free_rows:
            costs = costs | {"verify": {"1": costs["verify"]["1"]}}
        self.model = CostModel(costs)
        self.row = max(0.0, (self.model.verify(5) - self.model.verify(2)) / 3)
        """Of one more row in verification."""
        self.shallow_row = self.row * self.model.shallow / self.model.verify(1)

    def level(self, leaves: int) -> float:
        """A head pass, and a shallow pass of a draft with leaves beside it."""
        return self.model.head + self.model.shallow + leaves * self.shallow_row

    def verify(self, rows: int) -> float:
        return self.model.shallow + self.model.rest + self.model.verify(rows)


def bins(q: np.ndarray) -> np.ndarray:
    return np.minimum(BINS - 1, (np.asarray(q) * BINS).astype(int))


def calibrate(texts: list[Text]) -> np.ndarray:
    """[WIDEST, BINS]: how often candidate s is right, given its q; a prior of two draws at the bin's middle."""
    rank, q = np.concatenate([t.rank_T for t in texts]), np.concatenate([t.q_TS for t in texts])
    found = np.empty((WIDEST, BINS))
    for s in range(WIDEST):
        for b in range(BINS):
            here = bins(q[:, s]) == b
            found[s, b] = ((rank[here] == s).sum() + 2 * (b + 0.5) / BINS) / (here.sum() + 2)
    return found


def decode(text: Text, chance: np.ndarray, rate: float, ahead: float, costs: Costs, widest: int) -> tuple[int, float]:
    """(tokens, time) of one text. `ahead`: expected tokens after an accepted draft of the chain, the bonus left out."""
    t, tokens, time, end = 0, 0, 0.0, len(text.rank_T)
    while t < end:
        k, reach, rows, right, gained = 0, 1.0, 1, True, 0
        while k < min(LONGEST, end - t - 1):
            at = t + k  # after a rejected draft the true place stands in for the one that nobody recorded
            if reach * chance[0].max() * (1 + ahead) < rate * costs.level(0):
                break
            theta = chance[np.arange(WIDEST), bins(text.q_TS[at])]
            if reach * theta[0] * (1 + ahead) < rate * (costs.level(0) - costs.model.head + costs.row):
                time += costs.model.head
                break
            worth = rate * (costs.row + costs.shallow_row)
            leaves = sum(reach * theta[s] > worth for s in range(1, widest))
            time += costs.level(leaves)
            rows, k, reach = rows + 1 + leaves, k + 1, reach * theta[0]
            if right:
                rank = text.rank_T[at]
                gained += rank <= leaves
                right = rank == 0
        time += costs.verify(rows)
        tokens += gained + 1
        t += gained + 1
    return tokens, time


def oracle(text: Text, costs: Costs, widest: int) -> tuple[int, float]:
    """(tokens, time) with all ranks known: a rejected draft is never made, and no leaf but a right one."""
    end = len(text.rank_T)
    best = np.full(end + 1, np.inf)
    best[end] = 0.0
    for t in range(end - 1, -1, -1):
        time, rows = 0.0, 1
        best[t] = costs.verify(1) + best[t + 1]
        for k in range(min(LONGEST, end - t - 1)):
            rank = text.rank_T[t + k]
            if rank >= widest:
                break
            leaf = 0 if rank == 0 else 1  # the first choice beside it goes through too; candidates between do not
            time, rows = time + costs.level(leaf), rows + 1 + leaf
            best[t] = min(best[t], time + costs.verify(rows) + best[t + k + 2])
            if rank:
                break
    return end, float(best[0])


def speedup(texts: list[Text], chance: np.ndarray, costs: Costs, widest: int) -> tuple[float, float, float]:
    """(speedup, rate, ahead) at the rule's fixed point, over a few values of `ahead`."""
    best = (0.0, 1.0, 0.0)
    for ahead in (0.0, 0.3, 0.6, 1.0, 1.5):
        rate = 1.0
        for _ in range(6):
            found = np.array([decode(t, chance, rate, ahead, costs, widest) for t in texts]).sum(0)
            rate = float(found[0] / found[1])
        best = max(best, (rate, rate, ahead))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of an evaluated run")
    parser.add_argument("--exit-layer", type=int, required=True)
    parser.add_argument("--free-rows", action="store_true", help="verifying many rows costs what one costs")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of the config")
    a = parser.parse_args()
    config = load(a.run / "config.yaml", a.words)
    torch.set_num_threads(config.machine.threads or torch.get_num_threads())
    head = ExitHead.load(a.run / "heads" / f"exit-{a.exit_layer}")
    engine = SplitBackbone(load_model(config.backbone, torch.device("cpu")), head)
    generations = pd.read_parquet(a.run / "eval" / "generations.parquet")
    prompts = pd.read_parquet(a.run / "eval" / "prompts.parquet").set_index("prompt").ids
    results = json.loads((a.run / "eval" / "results.json").read_text())
    (measured,) = (h for h in results["heads"] if (h["exit_layer"], h["temperature"]) == (a.exit_layer, 0.0))
    costs = Costs(measured["costs"], a.free_rows)
    chosen = generations[(generations.controller == BASELINE) & (generations.temperature == 0.0)]
    texts = []
    for row in chosen.itertuples():
        p_TV, q_TV = teacher_forced(engine, list(prompts[row.prompt]), list(row.tokens), Sampler())
        q_TS, ids_TS = q_TV[1:].topk(WIDEST)
        right_TS = ids_TS == p_TV[1:].argmax(-1, keepdim=True)
        rank_T = torch.where(right_TS.any(-1), right_TS.int().argmax(-1), WIDEST)
        texts.append(Text(rank_T.numpy(), q_TS.numpy()))
    ranks = np.concatenate([t.rank_T for t in texts])
    print("share of places where candidate s is right:", [round(float((ranks == s).mean()), 3) for s in range(WIDEST)])
    # kinds of prompts may take turns, so pairs of neighbours are divided
    known_texts, judged = ([t for i, t in enumerate(texts) if i // 2 % 2 == half] for half in (0, 1))
    chance = calibrate(known_texts)
    for widest in range(1, WIDEST + 1):
        _, rate, ahead = speedup(known_texts, chance, costs, widest)
        found = np.array([decode(t, chance, rate, ahead, costs, widest) for t in judged]).sum(0)
        known = np.array([oracle(t, costs, widest) for t in judged]).sum(0)
        print(f"S = {widest}: speedup {found[0] / found[1]:.3f}, oracle {known[0] / known[1]:.3f}")


if __name__ == "__main__":
    main()
