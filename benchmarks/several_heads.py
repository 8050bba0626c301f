"""Would a second exit head of the same backbone add to the drafts of one? Counts over greedy texts, and oracles.

Takes a run folder with heads of several exit layers; gives, at places behind committed prefixes of texts that the
backbone wrote: how often each head's first candidate is right; where that of the first-named head is wrong, how often
its own further candidates are right, and how often another head's first one is; and the speedups of oracles, which know
every outcome beforehand: with one head's chains, with those of whichever head is better in each round, and with drafts
of which each level may come from either head, as leaves beside a chain could. Costs are given; everything else is a
count, so other work on the machine does not matter.

  python benchmarks/several_heads.py --config configs/smollm2-135m.yaml --run runs/NAME --exit-layers 2 1 3

T tokens of a text, V vocabulary
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.backbones.ends import end_tokens
from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import load
from pipeline.evaluation import simulation
from pipeline.evaluation.intervals import interval, ratio_of_rates
from pipeline.evaluation.losslessness import teacher_forced
from pipeline.evaluation.metrics import CostModel
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import evaluation_prompts, evaluation_settings
from pipeline.runs.files import sha256_of

FEW = 4
"""Candidates for a place."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder with heads/")
    parser.add_argument("--exit-layers", nargs="+", type=int, default=[2, 1, 3], help="the main head's, then others'")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--traces", type=Path, help="take the greedy texts that controllers.py recorded instead")
    parser.add_argument("--layer", type=float, default=0.030, help="time of a shallow layer, in autoregressive tokens")
    parser.add_argument("--head", type=float, default=0.055, help="time of a head pass")
    parser.add_argument("--verify", nargs=2, type=float, default=[0.93, 0.015], help="time of a token's verification "
                        "with 2 layers below it, and of each further one")  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for exit-heads")
    a = parser.parse_args()
    config = load(a.config, a.words)
    torch.set_num_threads(config.evaluate.threads or torch.get_num_threads())
    model, tokenizer = load_model(config.backbone, torch.device("cpu")), load_tokenizer(config.backbone)
    engines = {n: SplitBackbone(model, ExitHead.load(a.run / "heads" / f"exit-{n}")) for n in a.exit_layers}
    engine = engines[a.exit_layers[0]]
    if a.traces:
        sha = sha256_of(a.run / "heads" / f"exit-{engine.exit_layer}" / "model.safetensors")
        traces = simulation.load(a.traces, sha)
        texts = [(t.ids.tolist(), t.tokens.tolist()) for t in traces if t.ids is not None and t.tokens is not None]
    else:
        chosen, ends = evaluation_prompts(config)[: a.prompts], frozenset(end_tokens(config.backbone, tokenizer))
        ids = [row for _, row in encode(chosen, tokenizer, evaluation_settings(config), engine.max_context, a.tokens)]
        written = (autoregressive(engine, Request(row, a.tokens, ends), Sampler()).tokens for row in ids)
        texts = list(zip(ids, tqdm(written, "texts", len(ids)), strict=True))
    ranks = [ranks_of(engines, *text) for text in tqdm(texts, "ranks") if len(text[1]) > 1]
    main, *others = a.exit_layers
    count(main, others, {n: np.concatenate([r[n][1:] for r in ranks]) for n in a.exit_layers})
    models = {n: cost_model(n, a) for n in a.exit_layers}
    choices = {f"{n} alone": [n] for n in a.exit_layers} | {f"{main} or {n}": [main, n] for n in others}
    times = {name: np.array([by_rounds(r, heads, models, 1) for r in ranks]) for name, heads in choices.items()}
    times |= {f"{name}, trees of {FEW}": np.array([by_rounds(r, heads, models, FEW) for r in ranks])
              for name, heads in choices.items()}  # fmt: skip
    times |= {f"{main} or {n} at each level": np.array([by_levels(r, [main, n], models) for r in ranks])
              for n in others}  # fmt: skip
    tokens = np.array([len(r[main]) - 1 for r in ranks], float)
    for name, time in times.items():
        trees = f", trees of {FEW}" if "trees" in name else ""
        gain, (low, high) = interval(ratio_of_rates, tokens, time, tokens, times[f"{main} alone{trees}"])
        print(f"oracle, {name}: {tokens.sum() / time.sum():.3f}, over {main} alone {gain:.3f} ({low:.3f}-{high:.3f})")


@torch.inference_mode()
def ranks_of(engines: dict[int, SplitBackbone], prompt: list[int], text: list[int]) -> dict[int, np.ndarray]:
    """Exit layer -> how many candidates [T] its head finds more likely than each token of the backbone's text."""
    return {
        n: simulation.ranks(teacher_forced(engine, prompt, text, Sampler())[1], text).numpy()
        for n, engine in engines.items()
    }


def count(main: int, others: list[int], rank_T: dict[int, np.ndarray]) -> None:
    wrong = rank_T[main] > 0
    first = ", ".join(f"N = {n}: {(rank == 0).mean():.3f}" for n, rank in rank_T.items())
    print(f"{len(wrong)} places; the first candidate is right: {first}")
    own = [float((rank_T[main][wrong] == s).mean()) for s in range(1, FEW)]
    print(f"where that of N = {main} is wrong ({wrong.sum()} places): its candidates 2 to {FEW} are right at "
          + ", ".join(f"{p:.3f}" for p in own))  # fmt: skip
    for n in others:
        right = rank_T[n] == 0
        left = [(wrong & right & (rank_T[main] > s)).sum() / (wrong & (rank_T[main] > s)).sum() for s in range(FEW)]
        print(f"  the first of N = {n} is right at {(wrong & right).sum() / wrong.sum():.3f}; where candidates 2, 3, 4 "
              f"of N = {main} are wrong too: {left[1]:.3f}, {left[2]:.3f}, {left[3]:.3f}")  # fmt: skip


def cost_model(n: int, a: argparse.Namespace) -> CostModel:
    """A layer that is shallow is not passed again to verify. `--verify` is of N = 2."""
    one, more = a.verify[0] - a.layer * (n - 2), a.verify[1]
    verify = {1: one, 2: one + more, 17: one + 16 * more}
    return CostModel({"shallow": a.layer * n, "head": a.head, "rest": 0.0, "verify": verify})


def by_rounds(rank_T: dict[int, np.ndarray], heads: list[int], models: dict[int, CostModel], few: int) -> float:
    """The least time of a text if one of the heads drafts each round: the right candidates and those before them."""
    size = len(next(iter(rank_T.values())))
    least = np.zeros(size + 1)
    for t in reversed(range(1, size)):
        least[t] = min(models[n].round(0, 0)[0] for n in heads) + least[t + 1]
        for n in heads:
            drafted = 0
            for k in range(1, size - t):
                rank = rank_T[n][t + k - 1]
                if rank >= few:
                    break
                drafted += int(rank) + 1
                least[t] = min(least[t], models[n].round(drafted, k, k)[0] + least[t + k + 1])
    return float(least[1])


def by_levels(rank_T: dict[int, np.ndarray], heads: list[int], models: dict[int, CostModel]) -> float:
    """The same if each level's right draft may come from either head: at best each level costs one pass of the head
    that is right, and the layers below the shallower one."""
    cheap = models[min(heads)]
    best_T = np.min([rank_T[n] for n in heads], 0)
    return by_rounds({0: best_T}, [0], {0: cheap}, 1)


if __name__ == "__main__":
    main()
