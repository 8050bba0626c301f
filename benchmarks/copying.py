"""Our decoder beside transformers' own prompt lookup, on prompts whose answers copy: summaries with quotes, code edits.

Takes a config, a head and a .jsonl of prompts with a task each; gives tokens/s of every method, prefill included, and
each controller's ratio to `generate(prompt_lookup_num_tokens=10)` with a 95 % interval over prompts. All methods decode
greedily on one backbone in one process, in turns. The machine should do nothing else.

  python benchmarks/copying.py --config configs/smollm2-135m.yaml --head FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from pipeline.backbones.ends import end_tokens
from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import Prompts, load
from pipeline.evaluation import rivals
from pipeline.evaluation.intervals import interval, ratio_of_rates
from pipeline.evaluation.measuring import in_turns
from pipeline.evaluation.threads import threads
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import load_prompts
from pipeline.runs.provenance import provenance

LOOKUP, PLAIN, OWN = "transformers' prompt_lookup", "transformers' generate", "autoregressive"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--head", type=Path, required=True, help="folder of an exit head")
    parser.add_argument("--prompts", default="pipeline/smollm2/prompts/copying.jsonl")
    parser.add_argument("--count", type=int, default=0, help="how many of the prompts, from the first; 0 = all")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--controllers", nargs="+", default=["thompson+lookup", "thompson+tree+lookup"])
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for exit-heads")
    a = parser.parse_args()
    config = load(a.config, a.words)
    model, tokenizer = load_model(config.backbone, torch.device("cpu")), load_tokenizer(config.backbone)
    engine = SplitBackbone(model, ExitHead.load(a.head))
    settings = Prompts(path=a.prompts, held_out=1.0, chat_template=config.evaluate.prompts.chat_template)
    chosen = load_prompts(settings, "evaluate")[: a.count or None]
    pairs = encode(chosen, tokenizer, settings, engine.max_context, a.tokens)
    ends = frozenset(end_tokens(config.backbone, tokenizer))
    tasks = [prompt.task for prompt, _ in pairs]
    with threads(config.evaluate.threads):
        print(f"{provenance()['hardware']}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
              f"{config.backbone.dtype}, {len(pairs)} prompts x {a.tokens} tokens")  # fmt: skip
        compare(engine, model, [ids for _, ids in pairs], tasks, ends, a)


def compare(engine, model, prompts: list[list[int]], tasks: list[str], ends: frozenset[int], a) -> None:
    controllers = {name: make_controller(name) for name in a.controllers}
    methods = [PLAIN, LOOKUP, OWN, *controllers]

    def decode(method: str, ids: list[int]):
        """(tokens, seconds, rounds)"""
        if method in (PLAIN, LOOKUP):
            rival = rivals.Rival("prompt_lookup" if method == LOOKUP else "generate")
            return *rivals.decode(model, rival, ids, a.tokens, ends), []
        request = Request(ids, a.tokens, ends)
        if method == OWN:
            out = autoregressive(engine, request, Sampler())
        else:
            out = self_speculative(engine, request, Sampler(), controllers[method])
        return out.tokens, out.prefill_seconds + out.seconds, out.rounds

    for method in methods:
        decode(method, prompts[0][:16])  # kernels are chosen, nothing is learned of these prompts
    tokens, seconds = ({method: np.zeros(len(prompts)) for method in methods} for _ in range(2))
    texts: dict[str, list] = {method: [] for method in methods}
    rounds: dict[str, list] = {method: [] for method in methods}
    for _, i, method in in_turns(len(prompts), methods, label="texts"):
        text, seconds[method][i], made = decode(method, prompts[i])
        tokens[method][i] = len(text)
        texts[method].append((i, text))
        rounds[method] += made
    print("| method | tokens/s | over prompt lookup (95 %) | over own autoregressive | same text | acceptance length "
          "| rounds that copy |\n|---|---|---|---|---|---|---|")  # fmt: skip
    same = dict(texts[PLAIN])
    for method in methods:
        equal = sum(text == same[i] for i, text in texts[method])
        made = rounds[method]
        length = f"{sum(r.tokens for r in made) / len(made):.2f}" if made else ""
        copied = f"{sum(r.source == 'lookup' for r in made) / len(made):.0%}" if made else ""
        rate = tokens[method].sum() / seconds[method].sum()
        over = [ratio(tokens, seconds, method, other) for other in (LOOKUP, OWN)]
        print(f"| {method} | {rate:.1f} | {' | '.join(over)} | {equal} of {len(prompts)} | {length} | {copied} |")
    for task in dict.fromkeys(tasks):
        these = np.array([one == task for one in tasks])
        for method in controllers:
            found = ratio(tokens, seconds, method, LOOKUP, these)
            print(f"{task}, {these.sum()} prompts: {method} over prompt lookup {found}")


def ratio(tokens: dict, seconds: dict, method: str, other: str, these: np.ndarray | slice = slice(None)) -> str:
    rows = tokens[method], seconds[method], tokens[other], seconds[other]
    value, (low, high) = interval(ratio_of_rates, *(row[these] for row in rows))
    return f"{value:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
