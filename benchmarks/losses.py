"""Compares losses and initial weights by the acceptance length of the exit heads that they give.

On the pocket backbone and one set of responses, one exit head is trained for each cell (loss, init, seed), all with the
same number of steps. Printed for each are its acceptance length on held-out responses (expected, from the overlap, and
greedy) and in decoding with a fixed K, the latter also over that of the first loss. All of these are counts, so other
work on the machine does not matter. A seed changes the order of the batches, the weights of init random and the
sampling at temperature 1, but not the responses.

The learning rate of pocket.yaml was chosen for kl, so each loss is tried with every rate of --rates on the first seed,
and keeps the one with the longest expected acceptance length. Gradients are clipped at norm 1; two columns show their
median norm and how many were clipped. Trained heads and decoded texts stay in --folder, so a second start resumes.

  python benchmarks/losses.py            exit layer 2, 3 seeds; about an hour on one core
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backbones.ends import end_tokens
from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import load
from pipeline.evaluation.intervals import interval
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed
from pipeline.inference.decoding import Request, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import evaluation_prompts, evaluation_settings
from pipeline.runs.files import atomic_write
from pipeline.runs.folder import RunDir
from pipeline.runs.provenance import provenance
from pipeline.stages import cache, distill, generate

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "pocket.yaml"
LOSSES = ["kl", "ce", "tvd", "tvd++", "overlap", "kl,0.1*ce", "kl,tvd"]
INITS = ["last", "layer", "random"]
TEMPERATURES = [0.0, 1.0]


@dataclass(frozen=True)
class Cell:
    """One head to train and to decode with."""

    loss: str
    init: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.init}-{self.rate:g}-{self.seed}".replace("*", "x")


class Sweep:
    """Trains the heads of cells, decodes with them and keeps the figures."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        answers = self.run_of("responses", "seed=0")
        generate.run(answers)
        cache.run(answers)
        self.given = [answers / "responses", answers / "cache"]
        config = answers.config
        self.model, tokenizer = load_model(config.backbone, torch.device("cpu")), load_tokenizer(config.backbone)
        self.ends = frozenset(end_tokens(config.backbone, tokenizer))
        chosen, settings = evaluation_prompts(config)[: args.held_out], evaluation_settings(config)
        context = self.model.config.max_position_embeddings
        self.prompts = [ids for _, ids in encode(chosen, tokenizer, settings, context, args.new_tokens)]

    def run_of(self, name: str, *words: str) -> RunDir:
        args = self.args
        same = [f"run.dir={args.folder}", f"run.name={name}", "wandb.mode=disabled", "machine.device=cpu",
                f"generate.num_prompts={args.prompts}", f"distill.exit_layers=[{args.exit_layer}]",
                f"distill.max_steps={args.steps}", f"distill.validate_every={max(1, args.steps // 8)}",
                "distill.checkpoint_every=1000000", "distill.held_out=0.1"]  # fmt: skip
        return RunDir(load(CONFIG, [*same, *words]))

    def trained(self, cell: Cell) -> RunDir:
        """The cell's run folder, with its head."""
        words = (f"seed={cell.seed}", f"distill.loss=[{cell.loss}]", f"distill.init={cell.init}")
        run = self.run_of(cell.name, *words, f"distill.learning_rate={cell.rate}")
        for folder in self.given:
            if not (run / folder.name).exists():
                shutil.copytree(folder, run / folder.name, copy_function=os.link)
        if not (run / "heads").exists():
            print(f"\n{cell.name}", flush=True)
            distill.run(run)
        return run

    def learned(self, cell: Cell) -> dict[str, float]:
        """From the run's log: the best validation by each criterion, and the gradients' norms before clipping."""
        run, head = self.trained(cell), f"exit-{self.args.exit_layer}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

        def logged(key: str) -> np.ndarray:
            return np.array([line[key] for line in lines if key in line])

        norms = logged(f"train/{head}/grad_norm")
        return {
            "expected": logged(f"val/{head}/expected_acceptance_length").max(),
            "greedy": logged(f"val/{head}/greedy_acceptance_length").max(),
            "grad_norm": np.median(norms),
            "clipped": np.mean(norms > run.config.distill.clip_norm),
        }

    def decoded(self, cell: Cell) -> dict[str, list[list[int]]]:
        """Temperature -> [tokens, rounds] of each held-out prompt. The first token, from prefill, is not counted."""
        run = self.trained(cell)
        if (run / "decoded.json").exists():
            return json.loads((run / "decoded.json").read_text())
        engine = SplitBackbone(self.model, ExitHead.load(run / "heads" / f"exit-{self.args.exit_layer}"))
        found: dict[str, list[list[int]]] = {}
        for temperature, (i, ids) in itertools.product(TEMPERATURES, enumerate(self.prompts)):
            sampler = Sampler(temperature, generator=torch.Generator().manual_seed(1000 * cell.seed + i))
            request = Request(ids, self.args.new_tokens, self.ends)
            rounds = self_speculative(engine, request, sampler, Fixed(self.args.k)).rounds
            found.setdefault(f"{temperature:g}", []).append([sum(r.tokens for r in rounds), len(rounds)])
        atomic_write(run / "decoded.json", json.dumps(found) + "\n")
        return found

    def figures(self, cell: Cell) -> dict[str, Any]:
        return self.learned(cell) | {"decoded": self.decoded(cell)}

    def best_rate(self, loss: str) -> float:
        return max(self.args.rates, key=lambda rate: self.learned(Cell(loss, "last", rate, 0))["expected"])


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def length(cell: dict[str, Any], temperature: str) -> float:
    tokens, rounds = np.sum(cell["decoded"][temperature], 0)
    return tokens / rounds


def over(cells: list[dict[str, Any]], base: list[dict[str, Any]], temperature: str) -> str:
    """The ratio of acceptance lengths over all seeds' rounds, its 95 % bootstrap interval over prompts, and the ratio
    of each seed."""
    ours, theirs = (np.sum([c["decoded"][temperature] for c in group], 0, dtype=float) for group in (cells, base))
    ratio, (low, high) = interval(lambda a, b, c, d: (a / b) / (c / d), *ours.T, *theirs.T)
    each = ", ".join(f"{length(a, temperature) / length(b, temperature):.2f}" for a, b in zip(cells, base, strict=True))
    return f"{ratio:.3f} ({low:.3f}-{high:.3f}); {each}"


def show(title: str, rows: dict[str, list[dict[str, Any]]], base: str) -> None:
    """rows: label -> the figures of each seed."""
    ratio = f"over {base} (95 %); by seed"
    columns = [title, "held out: expected", "greedy", "T=0", ratio, "T=1", ratio, "gradient norm", "clipped"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for label, cells in rows.items():
        columns = [spread([c["expected"] for c in cells]), spread([c["greedy"] for c in cells])]
        for temperature in ("0", "1"):
            columns += [spread([length(c, temperature) for c in cells]), over(cells, rows[base], temperature)]
        norm, clipped = (np.mean([c[name] for c in cells]) for name in ("grad_norm", "clipped"))
        print(f"| {label} | {' | '.join(columns)} | {norm:.2g} | {clipped:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/losses", help="folder of the cells' run folders")
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument(
        "--losses",
        nargs="+",
        default=LOSSES,
        help="each as in distill.loss, without brackets; the first is what the others are compared with",
    )
    parser.add_argument("--inits", nargs="+", default=INITS, help="tried with the first loss")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 2e-2], help="learning rates tried")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=768)
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--held-out", type=int, default=24, help="prompts of pocket's evaluate file")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("-k", type=int, default=4, help="tokens drafted in every round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sweep = Sweep(args)
    base, rates = args.losses[0], {loss: sweep.best_rate(loss) for loss in args.losses}
    cells = [Cell(loss, "last", rate, seed) for seed in range(args.seeds) for loss, rate in rates.items()]
    cells += [Cell(base, init, rates[base], seed) for seed in range(args.seeds) for init in args.inits]
    found = {cell: sweep.figures(cell) for cell in cells}

    def seeds(loss: str, init: str) -> list[dict[str, Any]]:
        return [found[Cell(loss, init, rates[loss], seed)] for seed in range(args.seeds)]

    where = provenance()
    facts = [where["time"][:10], where["hardware"]["cpu"], f"torch {where['versions']['torch']}",
             f"N = {args.exit_layer}, fixed:{args.k}, {args.steps} steps, {args.seeds} seeds",
             f"{args.prompts} prompts answered, {len(sweep.prompts)} held out"]  # fmt: skip
    print(f"\n{'; '.join(facts)}.  \n`{shlex.join(['python', *sys.argv])}`\n\n| loss | rate | expected, first seed |")
    print("|---|---|---|")
    for loss, rate in itertools.product(args.losses, args.rates):
        print(f"| {loss} | {rate:g} | {sweep.learned(Cell(loss, 'last', rate, 0))['expected']:.3f} |")
    show("loss", {f"{loss}, {rate:g}": seeds(loss, "last") for loss, rate in rates.items()}, f"{base}, {rates[base]:g}")
    if args.inits:
        show("init", {init: seeds(base, init) for init in args.inits}, args.inits[0])


if __name__ == "__main__":
    main()
