"""Measures the plugin for vLLM: an exit head beside the draft model exported from it, and draft lengths that adapt.

    python benchmarks/vllm_plugin.py --backbone pipeline/pocket/backbone --hub runs/pocket/hub/2 --questions FILE.jsonl

Greedy, through vLLM in an environment of its own (`make test-vllm` makes it). The engines are started once and take
turns, so that what disturbs the machine disturbs all of them; every figure is a ratio of times of the same texts,
given as its median over the repeats and their range. Part `same`: plugin and draft model with the same K, one and
eight in flight. Part `load`: phases of 1, 16, 1, 16, ... and 1 in flight, in which the next request follows one that
ends, with fixed lengths and with the scheduler that adapts: `cold`, when it knows nothing, and `warm`, when it has
learned from other prompts and another load, 2, 8 and 2 in flight. The fixed length that it is compared with was chosen
on that load too; `hindsight` has in each phase the fixed length that turned out best there.
"""

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integrations/vllm/tests"))

from vllm_serving import Engine, greedy

ADAPTIVE = "exit_heads_vllm.scheduler.AdaptiveScheduler"
IN_FLIGHT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="folder of the served model")
    parser.add_argument("--hub", required=True, help="published head; the draft model is beside it, with -draft")
    parser.add_argument("--questions", required=True, help="JSON lines with `prompt`")
    parser.add_argument("--chat", action="store_true", help="put the prompts into the model's chat template")
    parser.add_argument("--drafts", type=int, default=2, help="K of part same")
    parser.add_argument("--longest", type=int, default=4, help="largest K of part load")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--cycles", type=int, default=2, help="how often part load goes from 1 to 16 in flight and back"
    )
    parser.add_argument("--waves", type=int, default=2, help="requests of a phase of 16 in flight, in sixteens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", default="seconds", choices=["seconds", "cpu"], help="cpu: of the engine's process")
    parser.add_argument("--parts", nargs="+", default=["same", "load"], choices=["same", "load"])
    args = parser.parse_args()
    prompts = read(args)
    print(f"{date.today()}, {args.clock}, {args.tokens} tokens, {args.repeats} repeats; `python {' '.join(sys.argv)}`")
    for part in args.parts:
        {"same": same, "load": load}[part](args, prompts)


def read(args: argparse.Namespace) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    texts = [json.loads(line)["prompt"] for line in Path(args.questions).read_text().splitlines()]
    if args.chat:
        chats = ([{"role": "user", "content": text}] for text in texts)
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    ids = [tokenizer(text, add_special_tokens=not args.chat)["input_ids"] for text in texts]
    return [row for row in ids if len(row) + args.tokens + args.longest < 256][: 2 * IN_FLIGHT]


def engine(args: argparse.Namespace, head: str | None, k: int, **llm) -> Engine:
    found = Engine(args.backbone, head, k, enable_prefix_caching=False, max_num_seqs=IN_FLIGHT, **llm)
    if found.error:
        raise SystemExit(found.error)
    return found


def same(args: argparse.Namespace, prompts: list[list[int]]) -> None:
    """Plugin, draft model and vLLM alone: memory, and times with the same K."""
    engines = {
        "vLLM alone": engine(args, None, 0),
        "plugin": engine(args, args.hub, args.drafts),
        "draft model": engine(args, f"{args.hub.rstrip('/')}-draft", args.drafts),
    }
    print("\n| | weights, bytes | KV bytes per block | resident, bytes |\n|---|---|---|---|")
    for name, one in engines.items():
        m = one.memory
        print(f"| {name} | {m['weights']:,} | {m['kv_bytes'] // m['kv_blocks']:,} | {m['resident']:,} |")
    calls = {
        "1 in flight": {"prompts": prompts[:4], "params": greedy(args.tokens), "one_by_one": True},
        "8 in flight": {"prompts": prompts[:8], "params": greedy(args.tokens)},
    }
    for one in engines.values():
        one.call(**calls["8 in flight"])  # warm-up
    print(f"\nK = {args.drafts}\n\n| in flight | plugin / draft model | plugin / vLLM alone | rounds | ids |")
    print("|---|---|---|---|---|")
    for load_name, call in calls.items():
        times: dict[str, list[float]] = {name: [] for name in engines}
        found = {}
        for _ in range(args.repeats):
            for name, one in engines.items():
                found[name] = one.call(**call)
                times[name].append(found[name][args.clock])
        equal = all(f["ids"] == found["plugin"]["ids"] for f in found.values())
        rounds = [found[name]["rounds"] for name in ("plugin", "draft model")]
        ratios = [ratio(times[other], times["plugin"]) for other in ("draft model", "vLLM alone")]
        print(
            f"| {load_name[0]} | {' | '.join(ratios)} | {rounds[0]}, {rounds[1]} | {'equal' if equal else 'differ'} |"
        )
    for one in engines.values():
        one.close()


def load(args: argparse.Namespace, prompts: list[list[int]]) -> None:
    """Fixed lengths and the one that adapts, in one engine, under a load that changes."""
    one = engine(args, args.hub, args.longest, scheduler_cls=ADAPTIVE)
    fixed = [*range(args.longest + 1)]
    tuning = [prompts[-2:], prompts[-10:-2], prompts[-2:]]
    alone = [[row] for row in prompts[IN_FLIGHT : IN_FLIGHT + args.cycles + 1]]
    trace = [alone[0]]
    for one_more in alone[1:]:
        trace += [prompts[:IN_FLIGHT] * args.waves, one_more]

    def seconds(batches: list[list[list[int]]], **how) -> list[float]:
        """Of each phase of a load."""
        return [one.call(prompts=batch, params=greedy(args.tokens), **how)[args.clock] for batch in batches]

    def learned(batches: list[list[list[int]]]) -> list[float]:
        """Adaptive, from nothing but these."""
        return seconds(batches[:1], fresh=True) + seconds(batches[1:])

    seconds(tuning, lengths=[1])  # warm-up
    tuned = {k: [sum(seconds(tuning, lengths=[k])) for _ in range(args.repeats)] for k in fixed}
    best = min(tuned, key=lambda k: statistics.median(tuned[k]))
    runs: dict[int | str, list[list[float]]] = {name: [] for name in [*fixed, "cold", "warm"]}
    for _ in range(args.repeats):
        for k in fixed:
            runs[k].append(seconds(trace, lengths=[k]))
        runs["cold"].append(learned(trace))
        learned(tuning)
        runs["warm"].append(seconds(trace))
    # Phase by phase the fixed length that turned out best there: what no rule can know before.
    medians = {k: [statistics.median(phase) for phase in zip(*runs[k], strict=True)] for k in fixed}
    chosen = [min(fixed, key=lambda k: medians[k][i]) for i in range(len(trace))]
    runs["hindsight"] = [[runs[k][r][i] for i, k in enumerate(chosen)] for r in range(args.repeats)]
    times = {name: [sum(phases) for phases in found] for name, found in runs.items()}
    in_flight = ", ".join(str(min(len(batch), IN_FLIGHT)) for batch in trace)
    print(f"\nLoad {in_flight} in flight; best fixed length on the load 2, 8, 2: K = {best}; in hindsight, by phase: "
          f"{', '.join(map(str, chosen))}\n")  # fmt: skip
    print(f"| | tokens per second over K = 0 | over K = {best} | over hindsight |\n|---|---|---|---|")
    for name in runs:
        over = " | ".join(ratio(times[other], times[name]) for other in (0, best, "hindsight"))
        print(f"| {f'K = {name}' if name in fixed else name} | {over} |")
    one.close()


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median and range of the ratios of each repeat."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


if __name__ == "__main__":
    main()
