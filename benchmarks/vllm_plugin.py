"""Measures the plugin for vLLM: an exit head beside the draft model exported from it, and draft lengths that adapt.

    python benchmarks/vllm_plugin.py --backbone pipeline/pocket/backbone --hub runs/pocket/hub/2 --questions FILE.jsonl

Greedy, through vLLM in an environment of its own (`make test-vllm` makes it). The engines are started once and take
turns, so that what disturbs the machine disturbs all of them; every figure is a ratio of times of the same texts,
given as its median over the repeats and their range. Part `same`: plugin and draft model with the same K, one and
eight in flight. Part `load`: requests of 1, 16 and 1 in flight with fixed lengths and with the scheduler that adapts;
the fixed length that it is compared with was chosen on other prompts and another load, 2, 8 and 2 in flight.
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
    names = [*range(args.longest + 1), "adaptive"]
    tuning = [prompts[-2:], prompts[-10:-2], prompts[-2:]]
    trace = [prompts[:1], prompts[:IN_FLIGHT], prompts[1:2]]

    def seconds(name: int | str, batches: list[list[list[int]]]) -> float:
        lengths = {} if name == "adaptive" else {"lengths": [name]}
        found = [one.call(prompts=batch, params=greedy(args.tokens), **lengths) for batch in batches]
        return sum(f[args.clock] for f in found)

    seconds("adaptive", tuning)  # warm-up; it learns from this
    tuned = {k: [] for k in names[:-1]}
    for _ in range(args.repeats):
        for k, times in tuned.items():
            times.append(seconds(k, tuning))
    best = min(tuned, key=lambda k: statistics.median(tuned[k]))
    times = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            times[name].append(seconds(name, trace))
    print(f"\nLoad 1, {IN_FLIGHT}, 1; best fixed length on the other load: K = {best}\n")
    print("| | tokens per second over K = 0 |\n|---|---|")
    for name in names[1:]:
        print(f"| {name if name == 'adaptive' else f'K = {name}'} | {ratio(times[0], times[name])} |")
    print(f"| adaptive over K = {best} | {ratio(times[best], times['adaptive'])} |")
    one.close()


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median and range of the ratios of each repeat."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


if __name__ == "__main__":
    main()
