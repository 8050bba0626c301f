"""Several texts at once on a real model: drafting against not drafting, and against transformers, by batch size.

    python benchmarks/batches.py --run RUN --exit-layer 2 --backbone FILE.gguf --batch-sizes 1 4 16 --threads 2

Takes a head and prompts that it has not seen; gives tokens per second of the batch engine without drafts and with each
controller, in turns in one run, and of transformers' `generate` on the same prompts sorted by length, in left-padded
batches of the same size. All count without prefills, transformers' as the difference to a text of one token. Ratios are
medians of the repeats with their least and most. Where a round's time goes is printed too, with --profile by operators
of torch. The machine should do nothing else.
"""

import argparse
import statistics
import time
from datetime import date
from pathlib import Path

import numpy
import pandas as pd
import torch

from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import Backbone, Prompts
from pipeline.evaluation import plots
from pipeline.evaluation.batches import AUTOREGRESSIVE, decode, measure, speedups
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.batch_controllers import make_batch_controller
from pipeline.inference.batch_decoding import decode_batch
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import load_prompts
from pipeline.runs.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder with heads/")
    parser.add_argument("--exit-layer", type=int, required=True)
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-file", default="pocket")
    parser.add_argument("--chat-template", default="none")
    parser.add_argument("--held-out", type=float, default=0.5)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--controllers", nargs="+", default=["thompson", "fixed:1", "fixed:2", "goodput"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--transformers", action="store_true", help="also time transformers' generate")
    parser.add_argument(
        "--one", action="store_true", help="also compare a batch of one text with the decoder of one text"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="write all repeats to this .csv")
    parser.add_argument("--picture", type=Path, help="draw speedup over the number of texts into this .png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = Backbone(name_or_path=args.backbone, dtype=args.dtype, gguf_dir="runs/backbones")
    model, tokenizer = load_model(backbone, torch.device(args.device)), load_tokenizer(backbone)
    settings = Prompts(path=args.prompt_file, held_out=args.held_out, too_long="drop", chat_template=args.chat_template)
    texts = load_prompts(settings, "evaluate")[: args.prompts]
    ids = [row for _, row in encode(texts, tokenizer, settings, model.config.max_position_embeddings, args.tokens)]
    ends = frozenset([tokenizer.eos_token_id])
    engine = BatchEngine(SplitBackbone(model, ExitHead.load(args.run / "heads" / f"exit-{args.exit_layer}")))
    print(
        f"{date.today()}  {provenance()['hardware']}  torch {torch.__version__}, {args.threads} threads, {args.dtype}, "
        f"T = {args.temperature}, {len(ids)} prompts x {args.tokens} tokens of {args.prompt_file}\n"
    )

    def sampler(seed: int) -> Sampler:
        return Sampler(args.temperature, generator=torch.Generator(args.device).manual_seed(seed))

    requests = [Request(prompt, args.tokens, ends) for prompt in ids]
    if args.profile:
        profile(engine, requests, sampler, args)
    frame, rounds = measure(engine, requests, sampler, args.controllers, args.batch_sizes, args.repeats)
    found = speedups(frame)
    print(found.round(3).to_string(index=False))
    print(f"\nMilliseconds of a round in which all places were taken, means:\n{parts(rounds)}")
    if args.picture:
        curves = found[found.method != AUTOREGRESSIVE].assign(predicted=None).groupby("method", sort=False)
        controllers = {name: {"sizes": rows.to_dict("records")} for name, rows in curves}
        entry = {"exit_layer": args.exit_layer, "temperature": args.temperature, "batch_sizes": args.batch_sizes}
        plots.draw_batches(entry | {"controllers": controllers}, args.picture)
    if args.transformers:
        for size in args.batch_sizes:
            rate = generate_rate(model, sorted(ids, key=len), size, args)
            ours = frame[(frame.batch_size == size) & (frame.method == AUTOREGRESSIVE)]
            print(f"transformers' generate, batch {size}: {rate:.1f} tokens/s; batched autoregressive here is "
                  f"{(ours.tokens / ours.seconds).median() / rate:.2f} times as fast")  # fmt: skip
    if args.one:
        one_text(engine, requests, sampler, args)
    if args.out:
        frame.drop(columns="texts").to_csv(args.out, index=False)


def parts(rounds: pd.DataFrame) -> str:
    full = rounds[(rounds["count"] == rounds.batch_size) & (rounds.repeat >= 0)]
    seconds = {"shallow": full.shallow_seconds.map(sum), "head": full.head_seconds.map(sum),
               "verify": full.verify_seconds, "rest": full.rest_seconds}  # fmt: skip
    table = full[["batch_size", "method", "rows"]].assign(**{name: 1000 * part for name, part in seconds.items()})
    return table.groupby(["batch_size", "method"], sort=False).mean().round(2).reset_index().to_string(index=False)


def one_text(engine: BatchEngine, requests: list[Request], sampler, args: argparse.Namespace) -> None:
    """Rates of the batch engine with one text over those of the decoder of one text, in turns from prompt to prompt."""
    for name in ("none", "fixed:2"):
        ratios = []
        for i, request in enumerate(requests):
            seconds = {}
            for kind in ("alone", "batch") if i % 2 else ("batch", "alone"):
                began = time.perf_counter()
                if kind == "batch":
                    made = None if name == "none" else make_batch_controller(name)
                    (text,) = decode_batch(engine, [(request, sampler(i))], made, 1)
                    prefill = text.generation.prefill_seconds
                elif name == "none":
                    prefill = autoregressive(engine.backbone, request, sampler(i)).prefill_seconds
                else:
                    out = self_speculative(engine.backbone, request, sampler(i), make_controller(name))
                    prefill = out.prefill_seconds
                seconds[kind] = time.perf_counter() - began - prefill
            ratios.append(seconds["alone"] / seconds["batch"])
        middle, (low, high) = statistics.median(ratios), numpy.quantile(ratios, [0.1, 0.9])
        print(f"one text, {name}: batch engine / decoder of one text {middle:.3f} ({low:.3f}-{high:.3f} of prompts)")


def generate_rate(model, ids: list[list[int]], size: int, args: argparse.Namespace) -> float:
    """Tokens per second of transformers' generate; every batch goes on until its last row ends, as it does there."""
    pad, tokens, seconds = model.generation_config.pad_token_id or 0, 0, 0.0
    for start in range(0, len(ids), size):
        rows = ids[start : start + size]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=args.device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=args.device)
        options = {"attention_mask": mask_BT, "do_sample": args.temperature > 0, "pad_token_id": pad}
        took = []
        for new in (1, args.tokens):
            began = time.perf_counter()
            out_BT = model.generate(ids_BT, max_new_tokens=new, **options)
            took.append(time.perf_counter() - began)
        ends_BT = torch.isin(
            out_BT[:, longest:], torch.tensor(model.generation_config.eos_token_id, device=out_BT.device)
        )
        tokens += int((ends_BT.int().cumsum(1) - ends_BT.int() == 0).sum()) - len(rows)  # up to each row's end token
        seconds += took[1] - took[0]
    return tokens / seconds


def profile(engine: BatchEngine, requests: list[Request], sampler, args: argparse.Namespace) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        decode({"": engine}, requests[: args.batch_sizes[-1]], sampler, {"": None}, args.batch_sizes[-1])
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


if __name__ == "__main__":
    main()
