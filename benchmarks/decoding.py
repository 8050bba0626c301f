"""Own autoregressive loop, self-speculation, transformers' generate and its speculation, side by side in one run.

    python benchmarks/decoding.py --head runs/pocket/heads/exit-2 --controllers fixed:2 fixed:4 beta

Every method decodes the same prompts greedily, the order rotating from prompt to prompt. The table gives tokens
per second over two baselines, each with a 95 % bootstrap interval over prompts: this engine's autoregressive
loop, and the fastest of transformers' plain caches. Tokens that differ from the own loop's are counted: with
floating point alone between them, none may.

The limit: at batch 1 a token reads every weight once, so tokens/s <= memory bandwidth / bytes of the model. A
model as thin as the pocket backbone is far below it: its time is the number of kernel calls.
"""

import argparse
import platform
import sys
import time
from datetime import date

import numpy as np
import torch
import transformers
from tqdm import tqdm

from pipeline import prompts
from pipeline.backbones import load_model, load_tokenizer
from pipeline.config import Backbone, Prompts
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.metrics import interval
from pipeline.rundir import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", required=True, help="folder of an exit head")
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--controllers", nargs="*", default=["fixed:1", "fixed:2", "fixed:4", "beta"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    backbone = Backbone(name_or_path=args.backbone, dtype=args.dtype)
    model, tokenizer = load_model(backbone, torch.device(args.device)), load_tokenizer(backbone)
    head = ExitHead.load(args.head)
    engine = SplitBackbone(model, head)
    ids = [tokenizer(p.text)["input_ids"] for p in prompts.load_prompts(Prompts(), "evaluate")[: args.prompts]]

    def hf(**kwargs):
        def decode(prompt: list[int]) -> list[int]:
            row = torch.tensor([prompt], device=args.device)
            mask = torch.ones_like(row)
            out = model.generate(
                row, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False, eos_token_id=None, **kwargs
            )
            return out[0, len(prompt) :].tolist()

        return decode

    methods = {
        "own autoregressive": lambda p: autoregressive(engine, Request(p, args.tokens), Sampler()).tokens,
        "HF generate, dynamic cache": hf(),
        "HF generate, static cache": hf(cache_implementation="static", disable_compile=True),
        "HF prompt lookup (5)": hf(prompt_lookup_num_tokens=5),
        f"HF assistant_early_exit={head.exit_layer}": hf(assistant_early_exit=head.exit_layer),
    }
    for name in args.controllers:
        decide = make_controller(name)
        methods[f"self-speculative {name}, N={head.exit_layer}"] = lambda p, d=decide: (
            self_speculative(engine, Request(p, args.tokens), Sampler(), d).tokens
        )

    seconds = {name: np.zeros(len(ids)) for name in methods}
    texts: dict[str, list[list[int]]] = {name: [] for name in methods}
    names = list(methods)
    for name in names:
        methods[name](ids[0])
    for i, prompt in enumerate(tqdm(ids, unit="prompt")):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            started = time.perf_counter()
            texts[name].append(methods[name](prompt))
            seconds[name][i] = time.perf_counter() - started

    versions = provenance()
    machine = versions["hardware"]
    print(
        f"\n{date.today()}, {machine['cpu']} ({machine['cores']} cores), {args.threads} thread(s), {args.device}, "
        f"{args.dtype}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {args.prompts} prompts x {args.tokens} tokens, prefill included; "
        f"`python {' '.join(sys.argv)}`\n"
    )
    plain = min((n for n in names if n.startswith("HF generate")), key=lambda n: seconds[n].sum())
    print(f"| method | tokens/s | over own autoregressive | over {plain} | texts that differ |\n|---|---|---|---|---|")
    for name in names:
        cells = []
        for base in ("own autoregressive", plain):
            value, (low, high) = interval(lambda t, s: t / s, seconds[base], seconds[name])
            cells.append(f"{value:.2f} ({low:.2f}-{high:.2f})")
        differ = sum(a != b for a, b in zip(texts[name], texts["own autoregressive"], strict=True))
        rate = args.tokens * len(ids) / seconds[name].sum()
        print(f"| {name} | {rate:.0f} | {' | '.join(cells)} | {differ} |")
    bandwidth_bound = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"\nBytes read per token: {bandwidth_bound / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
