"""Where the time of decoding goes on a real chat model: passes of one and of several tokens, products, exit head.

    python benchmarks/real_model.py --backbone FOLDER|HUB-ID --threads 2

Takes a backbone; gives three tables, all measured in turns in one run. (1) Milliseconds of a pass of m rows with
logits, and its ratio to one row: with torch's own products, with kernels chosen among torch's and oneDNN's, and with
packed weights too. (2) Weights read per second in a pass of one row, and in its products alone: the rest is everything
that is no product. (3) Parts of a round in units of an autoregressive token, the head pass also with draft
vocabularies of several sizes, and the engine's autoregressive loop beside transformers' `generate` with a dynamic and
with a static cache. The exit head is a copy of the last layer: what it costs does not depend on what it has learned. A
ratio is that of the medians, with the 2.5 % and 97.5 % quantiles of the repeats' own ratios. The machine should do
nothing else.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from pipeline.evaluation import rivals
from pipeline.evaluation.threads import threads
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.kernels import TIMED
from pipeline.inference.sampling import Sampler
from pipeline.runs.provenance import provenance

ROWS = (1, 2, 3, 4, 5, 8, 9)
DRAFTED = (4096, 8192, 16_384)
"""Sizes of draft vocabularies whose head pass is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="folder or Hub id of the backbone")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--exit-layer", type=int, help="default: a tenth of the layers")
    parser.add_argument("--context", type=int, default=256, help="positions in the cache before a pass")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each text of the loops")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    n = args.exit_layer or max(1, model.config.num_hidden_layers // 10)
    head = ExitHead(n, model.config.num_hidden_layers, {}, new_exit_layer(model).state_dict())
    sizes = [w for w in DRAFTED if w < model.config.vocab_size]
    cut = {w: dataclasses.replace(head, draft_ids_W=torch.arange(w)) for w in sizes}
    with threads(args.threads), torch.inference_mode():
        engines = {
            "torch's own": SplitBackbone(model, head, check=False, products="plain"),
            "chosen": SplitBackbone(model, head, check=False, pack=False),
            "chosen, packed too": SplitBackbone(model, head, check=False),
        }
        header(args, model, n, engines["chosen, packed too"])
        passes(args, engines)
        one_row(args, engines)
        parts(args, engines["chosen, packed too"], {w: SplitBackbone(model, h, check=False) for w, h in cut.items()})
        loops(args, model, engines["chosen, packed too"])


def header(args: argparse.Namespace, model: Any, n: int, engine: SplitBackbone) -> None:
    hardware = provenance()["hardware"]
    where = hardware["cpu"] if args.device == "cpu" else ", ".join(hardware["gpus"])
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{date.today()}, {where}, {args.threads} thread(s), {args.dtype}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {model.config.model_type}, {size:.0f} M parameters, L = {engine.num_layers}, "
        f"N = {n}, {args.context} positions before each pass; `python {' '.join(sys.argv)}`\n\n"
        f"Kernels at {', '.join(map(str, TIMED))} rows:"
    )
    for shape, names in engine.kernels.table().items():
        print(f"  {shape}: {', '.join(names)}")
    print(f"Packed copies: {engine.extra_bytes(1)['packed_bytes'] / 1e6:.0f} MB\n")


def timed(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each call in every repeat, after one that is not counted."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def over(a: list[float], b: list[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    low, high = ratios[int(0.025 * len(ratios))], ratios[int(0.975 * (len(ratios) - 1))]
    return f"{statistics.median(a) / statistics.median(b):.2f} ({low:.2f}-{high:.2f})"


def filled(engine: SplitBackbone, args: argparse.Namespace) -> Any:
    cache = engine.new_cache(args.context + args.tokens + ROWS[-1])
    engine.shallow(torch.randint(0, 1000, (args.context,)).tolist(), 0, cache)
    engine.deep(0, args.context, cache)
    engine.draft_logits([args.context - 1], cache)
    return cache


def passes(args: argparse.Namespace, engines: dict[str, SplitBackbone]) -> None:
    calls = {}
    for name, engine in engines.items():
        cache = filled(engine, args)
        for m in ROWS:
            ids = list(range(10, 10 + m))
            calls[name, m] = lambda e=engine, c=cache, i=ids: e.logits(e.full(i, args.context, c))
    seconds = timed(calls, args.repeats)
    print("| rows | " + " | ".join(f"{name}: ms, over one row" for name in engines) + " |")
    print("|---" * (1 + len(engines)) + "|")
    for m in ROWS:
        cells = [f"{1e3 * statistics.median(seconds[e, m]):.1f}, {over(seconds[e, m], seconds[e, 1])}" for e in engines]
        print(f"| {m} | " + " | ".join(cells) + " |")
    print()


def one_row(args: argparse.Namespace, engines: dict[str, SplitBackbone]) -> None:
    calls, size = {}, 0
    for name, engine in engines.items():
        cache = filled(engine, args)
        products = [p for p in engine.products() if all(p is not part for part in engine.weights[-1])]
        inputs = {
            len(p.weight_IO): torch.ones(1, len(p.weight_IO), dtype=engine.dtype, device=args.device) for p in products
        }
        size = sum(p.nbytes for p in products)
        calls[name, "pass"] = lambda e=engine, c=cache: e.logits(e.full([10], args.context, c))
        calls[name, "products"] = lambda ps=products, x=inputs: [p(x[len(p.weight_IO)]) for p in ps]
    seconds = timed(calls, args.repeats)
    print("| one row | pass: ms, GB/s | products alone: ms, GB/s | products over pass |\n|---|---|---|---|")
    for name in engines:
        cells = []
        for what in ("pass", "products"):
            median = statistics.median(seconds[name, what])
            cells.append(f"{1e3 * median:.1f}, {size / median / 1e9:.1f}")
        print(f"| {name} | {' | '.join(cells)} | {over(seconds[name, 'products'], seconds[name, 'pass'])} |")
    print()


def parts(args: argparse.Namespace, engine: SplitBackbone, cut: dict[int, SplitBackbone]) -> None:
    """Each part as a round calls it: one token through the shallow layers, one head pass, K + 1 rows verified.

    cut: size of a draft vocabulary -> engine with such a head.
    """
    cache, at = filled(engine, args), args.context

    def head(drafting: SplitBackbone, own: Any) -> None:
        own.head_length = at
        drafting.draft_logits([at], own)

    with_cache = {w: (e, filled(e, args)) for w, e in cut.items()}
    calls: dict[str, Callable[[], Any]] = {
        "token": lambda: engine.logits(engine.full([10], at, cache)),
        "shallow": lambda: engine.shallow([10], at, cache),
        "head": lambda: head(engine, cache),
        **{f"head that drafts {w:,} tokens": lambda e=e, c=c: head(e, c) for w, (e, c) in with_cache.items()},
    }
    for k in (1, 2, 3, 4, 8):
        calls[f"verify {k + 1}"] = lambda k=k: engine.logits(engine.deep(at, at + k + 1, cache))
    seconds = timed(calls, args.repeats)
    print("| part of a round | autoregressive tokens |\n|---|---|")
    for name in list(calls)[1:]:
        print(f"| {name} | {over(seconds[name], seconds['token'])} |")
    print()


def loops(args: argparse.Namespace, model: Any, engine: SplitBackbone) -> None:
    prompt = torch.randint(0, 1000, (32,)).tolist()
    calls: dict[str, Callable[[], Any]] = {
        "own": lambda: autoregressive(engine, Request(prompt, args.tokens), Sampler()),
        **{
            name: lambda name=name: rivals.decode(model, rivals.Rival(name), prompt, args.tokens, frozenset())
            for name in ("generate", "generate:static")
        },
    }
    seconds = timed(calls, max(5, args.repeats // 3))
    rate = args.tokens / statistics.median(seconds["own"])
    print(f"Own autoregressive loop: {rate:.1f} tokens/s, the prefill of 32 tokens included")
    for name in ("generate", "generate:static"):
        print(f"  {name}: its time is {over(seconds[name], seconds['own'])} times that")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
