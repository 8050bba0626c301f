"""Which engine of generate is faster here? All of them interleaved in one process, as ratios.

Takes a backbone and a handful of prompts, prints a Markdown table of tokens/s: prompts one after another with
transformers' generate, transformers' generate on padded batches, and the two engines of pipeline/generation.py.
Knows nothing of run folders.

  python benchmarks/generation.py                                  the pocket backbone, about 5 minutes on 2 cores
  python benchmarks/generation.py backbone.name_or_path=... machine.device=cuda backbone.dtype=bfloat16
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch

from pipeline.backbones import device_of, load_model, load_tokenizer, public_name
from pipeline.config import load
from pipeline.generation import Sampling, answer_continuous, answer_padded, end_tokens
from pipeline.prompts import encode, load_prompts
from pipeline.rundir import provenance

Prompts = list[list[int]]


def transformers_generate(model: torch.nn.Module, prompts: Prompts, temperature: float, sampling: Sampling) -> Prompts:
    """transformers' own generate on left-padded batches of `sampling.batch_size`, sorted by length."""
    ends = end_tokens(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: Prompts = [[] for _ in prompts]
    torch.manual_seed(sampling.seed)
    for at in range(0, len(order), sampling.batch_size):
        rows = order[at : at + sampling.batch_size]
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=model.device
        )
        hot = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=0,
            **hot,
        )
        for i, row in zip(rows, out[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            answers[i] = row[:end]
    return answers


def engines(
    temperature: float, args: argparse.Namespace
) -> dict[str, Callable[[torch.nn.Module, Prompts, int], Prompts]]:
    def sampling(seed: int, batch_size: int) -> Sampling:
        return Sampling(args.new_tokens, 1.0, batch_size, seed)

    return {
        "one by one (transformers generate)": lambda m, p, s: transformers_generate(
            m, p[: args.sequential], temperature, sampling(s, 1)
        ),
        "padded batches (transformers generate)": lambda m, p, s: transformers_generate(
            m, p, temperature, sampling(s, args.batch_size)
        ),
        "`padded`": lambda m, p, s: answer_padded(m, p, [temperature] * len(p), sampling(s, args.batch_size)),
        "`continuous`": lambda m, p, s: answer_continuous(m, p, [temperature] * len(p), sampling(s, args.batch_size)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="prompts answered by each batched engine")
    parser.add_argument("--sequential", type=int, default=6, help="prompts answered one by one")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds over all engines")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the config: backbone.*, machine.*, prompts.*")
    args = parser.parse_args()
    config = load(None, ["backbone.dtype=float32", *args.words])
    if config.machine.threads > 0:
        torch.set_num_threads(config.machine.threads)
    model = load_model(config.backbone, device_of(config.machine.device))
    found = load_prompts(config.prompts, "distill")[: args.prompts]
    context = model.config.max_position_embeddings
    prompts = [
        ids for _, ids in encode(found, load_tokenizer(config.backbone), config.prompts, context, args.new_tokens)
    ]
    speeds: dict[str, list[float]] = {}
    chosen = engines(args.temperature, args)
    for repeat in range(-1, args.repeats):  # the round before the first warms up
        for name, engine in chosen.items():
            started = time.perf_counter()
            answers = engine(model, prompts[:8] if repeat < 0 else prompts, max(repeat, 0))
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                speeds.setdefault(name, []).append(sum(map(len, answers)) / (time.perf_counter() - started))
    print_table(speeds, args, model, public_name(config.backbone))


def print_table(
    speeds: dict[str, list[float]], args: argparse.Namespace, model: torch.nn.Module, backbone: str
) -> None:
    """Median and range over the repeats; a ratio is taken inside each repeat."""
    where = provenance()
    hardware = ", ".join(where["hardware"]["gpus"]) if model.device.type == "cuda" else where["hardware"]["cpu"]
    versions = ", ".join(f"{p} {where['versions'][p]}" for p in ("python", "torch", "transformers"))
    baseline = speeds["padded batches (transformers generate)"]
    facts = [
        where["time"][:10],
        f"{hardware}, {where['hardware']['cores']} cores, {torch.get_num_threads()} threads",
        versions,
        f"{backbone} in {str(model.dtype).removeprefix('torch.')}",
        f"{args.prompts} prompts, {args.new_tokens} new tokens, batches of {args.batch_size}",
        f"temperature {args.temperature}, {args.repeats} interleaved repeats",
    ]
    print(f"\n{'; '.join(facts)}.  \n`{shlex.join(['python', *sys.argv])}`\n")
    print("| engine | tokens/s | range | over transformers' padded batches | range |\n|---|---|---|---|---|")
    for name, each in speeds.items():
        ratios = [a / b for a, b in zip(each, baseline, strict=True)]
        print(
            f"| {name} | {statistics.median(each):.0f} | {min(each):.0f}-{max(each):.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
