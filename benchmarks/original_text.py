"""Compares distillation on the backbone's own answers with distillation on the original text.

On the pocket backbone, for each seed, one exit head is trained on the backbone's answers to the prompts, and one on the
original text after each prompt in the module that it was cut from (generate.engine=original). Prompts, tokens and steps
are equal. Printed is the acceptance length of both on held-out prompts with a fixed K; it is a count, so other work on
the machine does not matter.

  python benchmarks/original_text.py            exit layer 1, 3 seeds; about 30 minutes on one core
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config import load
from pipeline.evaluation.intervals import interval
from pipeline.pocket import corpus
from pipeline.pocket.paths import PROMPTS
from pipeline.runs.folder import RunDir
from pipeline.runs.provenance import provenance
from pipeline.stages import cache, distill, evaluate, generate

CHARACTERS = 1000
"""Length of the original text after a prompt: more than enough for --new-tokens."""


def with_originals(path: Path, stdlib: Path | None) -> int:
    """Write pocket's prompts with the original text after them; returns how many were found in their modules."""
    modules = corpus.modules(stdlib)["distill"]
    count = 0
    with path.open("w") as file:
        for line in PROMPTS["distill"].read_text().splitlines():
            row = json.loads(line)
            source, said = modules[row["source"]], row["prompt"]
            while said and said not in source:  # a method's prompt begins with the head of its class
                said = said.partition("\n")[2]
            if said:
                end = source.index(said) + len(said)
                file.write(json.dumps({"prompt": row["prompt"], "answer": source[end : end + CHARACTERS]}) + "\n")
                count += 1
    return count


def measure(engine: str, seed: int, folder: str, prompts: Path, args: argparse.Namespace) -> pd.DataFrame:
    """The rounds of decoding the held-out prompts, with a head trained on the answers of generate.engine=`engine`."""
    words = [
        f"run.dir={folder}", f"run.name={engine}-{seed}", f"seed={seed}", "machine.threads=1", "backbone.dtype=float32",
        f"prompts.path={prompts}", "prompts.held_out=0", "prompts.too_long=drop", f"generate.engine={engine}",
        f"generate.num_prompts={args.prompts}", f"generate.max_new_tokens={args.new_tokens}",
        f"distill.exit_layers=[{args.exit_layer}]", "distill.teacher=cached", "distill.truncated=keep",
        "distill.repeated_share=1.0", f"distill.max_steps={args.steps}", "distill.sequences_per_step=4",
        "distill.learning_rate=1.0e-2", "distill.validate_every=110", "distill.checkpoint_every=1000",
        "evaluate.prompts.path=pocket", f"evaluate.num_prompts={args.held_out}", "evaluate.max_new_tokens=64",
        f'evaluate.controllers=["fixed:{args.k}"]', "evaluate.rivals=[]", "wandb.mode=disabled",
    ]  # fmt: skip
    run = RunDir(load(None, words))
    for stage in (generate, cache, distill, evaluate):
        stage.run(run)
    return pd.read_parquet(run / "eval" / "rounds.parquet")


def lengths(rounds: pd.DataFrame) -> pd.DataFrame:
    """Tokens and rounds of each prompt."""
    return rounds.groupby("prompt").agg(tokens=("tokens", "sum"), rounds=("tokens", "size")).sort_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exit-layer", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=768)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--held-out", type=int, default=24, help="prompts of pocket's evaluate file")
    parser.add_argument("-k", type=int, default=4, help="tokens drafted in every round")
    parser.add_argument("--stdlib", type=Path, help="Lib/ of CPython 3.11.7 (default: the running interpreter's)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "originals.jsonl"
        found = with_originals(prompts, args.stdlib)
        rounds = {(engine, seed): measure(engine, seed, folder, prompts, args)
                  for seed in range(args.seeds) for engine in ("padded", "original")}  # fmt: skip
    where = provenance()
    facts = [where["time"][:10], where["hardware"]["cpu"], f"torch {where['versions']['torch']}",
             f"{found} prompts found in their modules, {args.prompts} answered",
             f"N = {args.exit_layer}, fixed:{args.k}"]  # fmt: skip
    print(f"\n{'; '.join(facts)}.  \n`{shlex.join(['python', *sys.argv])}`\n")
    print("| temperature | seed | acceptance length, own text | original text | own over original | 95 % interval |")
    print("|---|---|---|---|---|---|")
    for temperature in (0.0, 1.0):
        ratios = []
        for seed in range(args.seeds):
            own, original = (lengths(r[r.temperature == temperature])
                             for r in (rounds["padded", seed], rounds["original", seed]))  # fmt: skip
            columns = [np.asarray(x, float) for x in (own.tokens, own.rounds, original.tokens, original.rounds)]
            ratio, (low, high) = interval(lambda a, b, c, d: (a / b) / (c / d), *columns)
            ratios.append(ratio)
            a, b = columns[0].sum() / columns[1].sum(), columns[2].sum() / columns[3].sum()
            print(f"| {temperature:g} | {seed} | {a:.2f} | {b:.2f} | {ratio:.2f} | {low:.2f}-{high:.2f} |")
        print(f"| {temperature:g} | mean | | | {np.mean(ratios):.2f} | |")


if __name__ == "__main__":
    main()
