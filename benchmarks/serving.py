"""Measures the speedup of a published folder through transformers: generate with and without custom_generate.

    python benchmarks/serving.py --hub runs/pocket/hub/1

Decoding is greedy on pocket's evaluation prompts, in an order that rotates from prompt to prompt, and the time includes
prefill. The ids of all methods must be equal. Speedups are ratios of total time, with 95 % bootstrap intervals over
prompts.
"""

import argparse
import json
import sys
import time
from datetime import date

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.intervals import interval
from pipeline.evaluation.measuring import in_turns
from pipeline.pocket.paths import BACKBONE, PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", required=True, help="published folder, or a Hub id")
    parser.add_argument("--backbone", default=str(BACKBONE))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.backbone)
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    rows = [json.loads(line)["prompt"] for line in PROMPTS["evaluate"].read_text().splitlines()[: args.prompts]]
    ours = {"custom_generate": args.hub, "trust_remote_code": True}
    methods = {"generate": {}, 'controller="none"': ours | {"controller": "none"}, "custom_generate": ours}
    seconds = {name: np.zeros(len(rows)) for name in methods}
    names = list(methods)
    texts: dict[int, list] = {i: [] for i in range(len(rows))}

    def decode(name: str, i: int) -> list:
        inputs = tokenizer(rows[i], return_tensors="pt")
        return model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, **methods[name]).tolist()

    for name in names:  # warm-up
        decode(name, 0)
    for _, i, name in in_turns(len(rows), names, label="generate"):
        started = time.perf_counter()
        texts[i].append(decode(name, i))
        seconds[name][i] = time.perf_counter() - started
    differ = sum(each.count(each[0]) != len(names) for each in texts.values())
    print(
        f"{date.today()}, {args.threads} thread(s), {model.dtype}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {len(rows)} prompts x {args.tokens} tokens; `python {' '.join(sys.argv)}`\n"
    )
    print("| custom_generate over | speedup (95 % interval) |\n|---|---|")
    for name in names[:2]:
        value, (low, high) = interval(lambda a, b: a / b, seconds[name], seconds["custom_generate"])
        print(f"| {name} | {value:.2f} ({low:.2f}-{high:.2f}) |")
    print(f"\nPrompts whose ids differ: {differ}.")


if __name__ == "__main__":
    main()
