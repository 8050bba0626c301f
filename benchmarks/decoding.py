"""Compares the engine's speedup with its theoretical limit, on random weights of real shapes with forced acceptance.

    python benchmarks/decoding.py --shape 110M --dtype float32
    python benchmarks/decoding.py --shape 7B --dtype bfloat16 --device cuda --cuda-graphs

Random weights give random drafts, so each draft is accepted with a given probability instead of by its token; all
computation is the usual. Each method decodes the same texts, in rotating order. Printed, with 95 % bootstrap intervals
over texts: the speed of the engine's autoregressive loop over that of transformers' `generate` (dynamic cache, static
cache); the speedup of self-speculative decoding with fixed K over that loop, beside the speedup predicted from the
costs of the *other* half of the texts, and the ideal speedup, where a pass of several tokens costs as much as a pass of
one and nothing else costs anything:

    ideal = (1 + a + ... + a^K) / ((K + 1) N / L  +  K h  +  (L - N) / L),   h: head layer and LM head, by their bytes.

At batch 1 a token reads every weight once, so autoregressive tokens/s <= memory bandwidth / bytes of the model.
"""

import argparse
import platform
import sys
import time
from datetime import date

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.evaluation import rivals
from pipeline.evaluation.intervals import interval, ratio_of_rates
from pipeline.evaluation.measuring import in_turns
from pipeline.evaluation.metrics import conditional_rates, cost_table, pass_seconds, predicted_speedup
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.kernels import TIMED
from pipeline.inference.rounds import Round
from pipeline.inference.sampling import Sampler
from pipeline.runs.provenance import provenance

# hidden, intermediate, layers, heads, key/value heads, vocabulary
SHAPES = {
    "30M": (512, 1408, 8, 8, 8, 8192),
    "110M": (768, 2048, 12, 12, 12, 32000),
    "1B": (2048, 5632, 22, 32, 4, 32000),
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}


class Forced(Sampler):
    """A greedy sampler that does all of its computation, but accepts each draft with probability `chance`."""

    def __init__(self, chance: float, seed: int):
        super().__init__()
        self.chance, self.dice = chance, np.random.default_rng(seed)

    def accept(self, drafts, q, p_logits_MV):
        _, bonus = super().accept(drafts, q, p_logits_MV)
        return next((i for i in range(len(drafts)) if self.dice.random() >= self.chance), len(drafts)), bonus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="110M", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--exit-layer", type=int, help="default: an eighth of the layers")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 4], help="K of the fixed controllers")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="torch's own matrix products, even if others are faster")
    parser.add_argument("--unpacked", action="store_true", help="no copies of the weights in oneDNN's order")
    parser.add_argument("--cuda-graphs", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = random_model(args)
    n = args.exit_layer or max(1, model.config.num_hidden_layers // 8)
    head = ExitHead(n, model.config.num_hidden_layers, {}, new_exit_layer(model).state_dict())
    engine = SplitBackbone(
        model,
        head,
        check=False,
        fixed_shapes=args.cuda_graphs,
        products="plain" if args.plain else "timed",
        pack=not args.unpacked,
    )
    print_header(args, model, engine, n)
    tokens, seconds, rounds = decode_all(args, model, engine)
    show(args, engine, tokens, seconds, rounds)


def random_model(args: argparse.Namespace) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, args.dtype))
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    model.model.rotary_emb.float()
    return model.eval().requires_grad_(False)


def decode_all(args, model, engine):
    """(method -> tokens of each text, method -> seconds of each text, method -> [(text, round)])"""
    prompts = torch.randint(0, model.config.vocab_size, (args.texts, args.prompt)).tolist()
    names: list = ["autoregressive", rivals.Rival("generate"), rivals.Rival("generate:static")]
    names += [(k, a) for a in args.acceptance for k in args.drafts]
    tokens, seconds = ({name: np.zeros(args.texts) for name in [*names, "with prefill"]} for _ in range(2))
    rounds: dict = {name: [] for name in names}

    def decode(name, i: int):
        request = Request(prompts[i], args.tokens)
        if isinstance(name, rivals.Rival):
            made, took = rivals.decode(model, name, prompts[i], args.tokens, frozenset())
            return len(made), took, [], 0.0
        if name == "autoregressive":
            out = autoregressive(engine, request, Sampler())
        else:
            out = self_speculative(engine, request, Forced(name[1], i), Fixed(name[0]))
        return len(out.tokens), out.seconds, out.rounds, out.prefill_seconds

    for name in names:
        decode(name, 0)
    for _, i, name in in_turns(args.texts, names, label="decode"):
        tokens[name][i], seconds[name][i], made, prefill = decode(name, i)
        rounds[name] += [(i, round) for round in made]
        if name == "autoregressive":
            # the time of transformers' generate includes prefill, so the comparison with it includes ours
            tokens["with prefill"][i], seconds["with prefill"][i] = tokens[name][i], seconds[name][i] + prefill
    return tokens, seconds, rounds


def show(args, engine, tokens, seconds, rounds) -> None:
    def over(name, base) -> str:
        value, (low, high) = interval(ratio_of_rates, tokens[name], seconds[name], tokens[base], seconds[base])
        return f"{value:.2f} ({low:.2f}-{high:.2f})"

    for name in ("generate", "generate:static"):
        print(f"own autoregressive loop over {name}: {over('with prefill', rivals.Rival(name))}")
    unit = pass_seconds(seconds["autoregressive"], tokens["autoregressive"])
    size = sum(part.nbytes for w in engine.weights[:-1] for part in w if part is not None) + engine.lm_head.nbytes
    print(f"autoregressive: {1000 * unit:.1f} ms/token, {size / unit / 1e9:.1f} GB/s of weights\n")
    print("| acceptance | K | speedup | predicted | ideal | of ideal | acceptance length | costs: shallow, head, "
          "verify, rest |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for a in args.acceptance:
        for k in args.drafts:
            name = (k, a)
            value = interval(ratio_of_rates, tokens[name], seconds[name], tokens["autoregressive"],
                             seconds["autoregressive"])[0]  # fmt: skip
            mine = table(rounds[name])
            costs = cost_table(mine[mine.drafted == k], unit)
            best, foretold = ideal(engine, k, a), predicted(mine, k, seconds, tokens)
            print(
                f"| {a} | {k} | {over(name, 'autoregressive')} | {foretold:.2f} | {best:.2f} | {value / best:.0%} | "
                f"{1 + mine.accepted.mean():.2f} | {costs['shallow']:.3f}, {costs['head']:.3f}, "
                f"{costs['verify'][k + 1]:.3f}, {costs['rest']:.3f} |"
            )


def table(rounds: list[tuple[int, Round]]) -> pd.DataFrame:
    names = ("drafted", "accepted", "head_passes", "seconds", "shallow_seconds", "head_seconds", "verify_seconds")
    return pd.DataFrame([{"text": i} | {name: getattr(r, name) for name in names} for i, r in rounds])


def predicted(mine: pd.DataFrame, k: int, seconds, tokens) -> float:
    """The speedup predicted for one half of the texts from costs and acceptance of the other; the mean of both ways."""
    values = []
    for half in (0, 1):
        seen = mine[mine.text % 2 == half]
        unit = pass_seconds(seconds["autoregressive"][half::2], tokens["autoregressive"][half::2])
        values.append(predicted_speedup(k, conditional_rates(seen), cost_table(seen[seen.drafted == k], unit)))
    return float(np.mean(values))


def ideal(engine: SplitBackbone, k: int, a: float) -> float:
    """The speedup if every pass costs its share of the bytes of the weights, however many tokens it computes."""
    layer = sum(part.nbytes for part in engine.weights[0] if part is not None)
    lm_head, n, layers = engine.lm_head.nbytes, engine.exit_layer, engine.num_layers
    whole = layers * layer + lm_head
    time = ((k + 1) * n * layer + k * (layer + lm_head) + (layers - n) * layer + lm_head) / whole
    return sum(a**i for i in range(k + 1)) / time


def print_header(args, model, engine, n: int) -> None:
    machine = provenance()["hardware"]
    where = (
        ", ".join(machine["gpus"]) if args.device.startswith("cuda") else f"{machine['cpu']} ({machine['cores']} cores)"
    )
    chosen = "; ".join(f"{shape}: {', '.join(names)}" for shape, names in engine.kernels.table().items())
    print(
        f"\n{date.today()}, {where}, {args.threads} thread(s), {args.dtype}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {args.shape}: "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, L = {engine.num_layers}, N = {n}, "
        f"{args.texts} texts of {args.prompt} + {args.tokens} tokens; kernels at {TIMED} rows: "
        f"{chosen or 'plain'}; `python {' '.join(sys.argv)}`\n"
    )


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s")
