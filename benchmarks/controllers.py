"""Compares all controllers: by wall clock on the same prompts, and by simulation over recorded traces.

    python benchmarks/controllers.py --run runs/pocket --exit-layers 1 2 --prompts 64 --out docs/controllers

For each exit layer and sampling setting, autoregressive decoding and every controller in TIMED decode the same prompts,
in an order that rotates from prompt to prompt; their rounds give the wall-clock speedups and the costs. Then the
backbone's answers are recorded as traces, and every controller is replayed over them with those costs and several
seeds. The K of the rival "fixed, tuned on other prompts" is tuned on one half of the prompts and used on the other,
both ways. Ratios have 95 % bootstrap intervals over prompts. `signals` are printed too: how well several quantities
predict acceptance.

The upper bound is the oracle, which knows every outcome beforehand and drafts exactly the tokens that will be accepted.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import Backbone, Prompts
from pipeline.evaluation import simulation
from pipeline.evaluation.intervals import interval, ratio_of_rates
from pipeline.evaluation.measuring import in_turns
from pipeline.evaluation.metrics import cost_table, pass_seconds
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.branching import CANDIDATES
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import load_prompts
from pipeline.runs.files import sha256_of
from pipeline.runs.provenance import provenance

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "T=1": {"temperature": 1.0},
    "T=0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
}
FIXED = [f"fixed:{k}" for k in range(7)]
RIVALS = ["confidence:0.3", "confidence:0.5", "confidence:0.7", "entropy:0.4", "entropy:0.6", "cumulative:0.2",
          "cumulative:0.4", "beta", "calibration", "calibration:shift", "goodput", "logistic", "adaptive_steps",
          "schedule", "ucb", "tapout", "thompson"]  # fmt: skip
TREES = ["tree:2", "tree:2x2", "tree:3x2x1", "tree:4x2x2x1", "thompson+tree", "thompson+tree+lookup"]
"""Simulated for greedy texts only."""
PAIRS = [("thompson+lookup", "thompson"), ("thompson+lookup", "none+lookup"), ("thompson+tree", "thompson"),
         ("thompson+tree+lookup", "thompson+lookup"), ("thompson+tree+lookup", "thompson")]  # fmt: skip
COPYING = ["none+lookup", "fixed:1+lookup", "thompson+lookup"]
PARTS = ["drafted", "levels", "head_passes", "seconds", "shallow_seconds", "head_seconds", "verify_seconds"]
TIMED = ["fixed:1", "fixed:2", "fixed:3", "fixed:4", "confidence:0.5", "beta", "calibration:shift", "thompson"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run folder with heads/")
    parser.add_argument("--exit-layers", nargs="+", type=int, required=True)
    parser.add_argument("--backbone", default="pocket")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-file", default="pocket", help="pocket, or a .jsonl of prompts the head has not seen")
    parser.add_argument("--chat-template", default="none", help="none, or tokenizer for a chat model")
    parser.add_argument("--held-out", type=float, default=0.5, help="share of the prompts, by a hash, that is used")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--timed", type=int, default=24, help="how many of the prompts, from the first, are timed")
    parser.add_argument("--clock", nargs="+", default=TIMED, help="controllers that are timed")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the simulation")
    parser.add_argument(
        "--free-rows",
        action="store_true",
        help="simulate also as if a verification took the same time for any number of drafts",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    backbone = Backbone(name_or_path=args.backbone, dtype=args.dtype, gguf_dir="runs/backbones")
    model, tokenizer = load_model(backbone, torch.device(args.device)), load_tokenizer(backbone)
    template = args.chat_template
    settings = Prompts(path=args.prompt_file, held_out=args.held_out, too_long="drop", chat_template=template)
    texts = load_prompts(settings, "evaluate")[: args.prompts]
    ids = [row for _, row in encode(texts, tokenizer, settings, model.config.max_position_embeddings, args.tokens)]
    ends = frozenset([tokenizer.eos_token_id])
    machine = provenance()["hardware"]
    print(f"{date.today()}  {machine}  torch {torch.__version__}, {args.threads} threads, {args.dtype}, "
          f"{len(ids)} prompts ({args.timed} timed) x {args.tokens} tokens of {args.prompt_file}\n")  # fmt: skip
    record = []
    for n in args.exit_layers:
        folder = args.run / "heads" / f"exit-{n}"
        engine = SplitBackbone(model, ExitHead.load(folder))
        sha = sha256_of(folder / "model.safetensors")
        for name in args.settings:
            entry = compare(engine, ids, ends, name, args, sha)
            record.append({"exit_layer": n, "setting": name} | entry)
            show(record[-1])
    if args.out:
        about = {"date": str(date.today()), "hardware": machine, "torch": torch.__version__, "prompts": len(ids),
                 "timed": args.timed, "tokens": args.tokens, "seeds": args.seeds,
                 "source": Path(args.prompt_file).name}  # fmt: skip
        args.out.with_suffix(".json").write_text(json.dumps({"about": about, "entries": record}, indent=1) + "\n")
        draw(record, args.out.with_suffix(".png"))


def compare(engine, ids, ends, setting: str, args, sha: str) -> dict:
    def sampler(seed: int) -> Sampler:
        return Sampler(**SETTINGS[setting], generator=torch.Generator().manual_seed(seed))

    wall, rounds, baseline = clock(engine, ids[: args.timed], ends, sampler, args.tokens, args.clock)
    costs = smooth(cost_table(rounds, baseline), rounds)
    traces = []
    for i, prompt in enumerate(tqdm(ids, desc=f"N={engine.exit_layer} {setting}: traces", unit="text")):
        text = autoregressive(engine, Request(prompt, args.tokens, ends), sampler(i)).tokens
        if len(text) > 1:
            traces.append(simulation.record(engine, str(i), prompt, text, sampler(10_000 + i), args.tokens))
    path = args.run / "eval" / f"traces-{engine.exit_layer}-{list(SETTINGS).index(setting)}.npz"
    path.parent.mkdir(exist_ok=True)  # a run that was never evaluated
    simulation.save(path, traces, sha)
    models = {
        name: simulation.CostModel(costs | own_costs(name, rounds, baseline, args.clock))
        for name in [*FIXED, *RIVALS, *COPYING, *TREES]
    }
    greedy = SETTINGS[setting]["temperature"] == 0
    found = {"costs": costs, "wall": wall, "simulated": simulate(traces, models, args.seeds, greedy)}
    if args.free_rows:
        flat = {"verify": {1: costs["verify"][1]}}
        models = {name: simulation.CostModel(flat | {k: getattr(model, k) for k in ("shallow", "head", "rest")})
                  for name, model in models.items()}  # fmt: skip
        found["free_rows"] = simulate(traces, models, args.seeds, greedy)
    return found | {"signals": signals(traces)}


def clock(engine, ids, ends, sampler, new: int, timed: list[str]):
    """(speedup of each timed controller with its interval, all rounds, seconds of an autoregressive pass)"""
    greedy = sampler(0).greedy
    controllers = {name: make_controller(name, greedy=greedy) for name in timed}
    names = ["autoregressive", *timed]

    def decode(name: str, prompt: list[int], seed: int):
        request = Request(prompt, new, ends)
        if name == "autoregressive":
            return autoregressive(engine, request, sampler(seed))
        return self_speculative(engine, request, sampler(seed), controllers[name])

    for name in names:
        decode(name, ids[0], 0)
    tokens, seconds = ({name: np.zeros(len(ids)) for name in names} for _ in range(2))
    rows = []
    for _, i, name in in_turns(len(ids), names, label=f"N={engine.exit_layer} wall clock"):
        out = decode(name, ids[i], i)
        tokens[name][i], seconds[name][i] = len(out.tokens), out.seconds
        rows += [{"controller": name} | {part: getattr(r, part) for part in PARTS} for r in out.rounds]
    base = tokens["autoregressive"], seconds["autoregressive"]
    wall = {name: rated(tokens[name], seconds[name], *base) for name in timed}
    for rival in [name for name in timed if name != "thompson" and "thompson" in timed]:
        wall[f"thompson / {rival}"] = rated(tokens["thompson"], seconds["thompson"], tokens[rival], seconds[rival])
    return wall, pd.DataFrame(rows), pass_seconds(base[1], base[0])


def smooth(costs: dict, rounds: pd.DataFrame) -> dict:
    """Replaces the costs of verifying two and more tokens by a fitted line that does not fall: widths that few rounds
    used are noisy, and beyond those that were timed a falling line would make long rounds cost nothing."""
    counts = (rounds.drafted + 1).value_counts()
    several = [w for w in costs["verify"] if 1 < w <= simulation.LONGEST + 1]
    slope, start = np.polyfit(several, [costs["verify"][w] for w in several], 1, w=[counts[w] ** 0.5 for w in several])
    if slope < 0:
        slope, start = 0.0, np.average([costs["verify"][w] for w in several], weights=[counts[w] for w in several])
    line = {w: round(float(start + slope * w), 4) for w in range(2, simulation.LONGEST + 2)}
    wider = {w: cost for w, cost in costs["verify"].items() if w > simulation.LONGEST + 1}  # of trees: another kernel
    return costs | {"verify": {1: costs["verify"].get(1, line[2])} | line | wider}


def own_costs(name: str, rounds: pd.DataFrame, baseline: float, timed: list[str]) -> dict:
    """The costs `head` and `rest`, which include the controller's own decisions: measured for this controller if it was
    timed, else over the timed controllers of its kind (fixed or not), if there are any."""
    like = rounds.controller.str.startswith("fixed") == name.startswith("fixed")
    mine = rounds[rounds.controller == name] if name in timed else rounds[like] if like.any() else rounds
    costs = cost_table(mine, baseline)
    return {"head": costs["head"], "rest": costs["rest"]}


def rated(n, s, m, t) -> list[float]:
    """[ratio of the rates n/s and m/t, low, high], with a 95 % bootstrap interval over prompts."""
    value, (low, high) = interval(ratio_of_rates, n, s, m, t)
    return [round(x, 4) for x in (value, low, high)]


def simulate(traces, costs: dict, seeds: int, greedy: bool) -> dict:
    """Simulated speedup of every controller over the traces, and thompson over several rivals; summed over seeds."""
    names = FIXED + RIVALS + COPYING + (TREES if greedy else [])
    bounds: dict[str, dict] = {"oracle": {}, "oracle with copies": {"copies": True}}
    if greedy:
        bounds["oracle of trees"] = {"candidates": CANDIDATES}
        bounds["oracle of trees with copies"] = {"candidates": CANDIDATES, "copies": True}
    sums = {name: [np.zeros(len(traces)), np.zeros(len(traces))] for name in [*names, *bounds]}
    for seed in range(seeds):
        accepted = simulation.outcomes(traces, seed)
        for name in names:
            tokens, seconds = simulation.play(
                lambda name=name, seed=seed: make_controller(name, seed, greedy), traces, accepted, costs[name]
            )
            sums[name][0] += tokens
            sums[name][1] += seconds
        for name, drafts in bounds.items():
            pairs = zip(traces, accepted, strict=True)
            sums[name][0] += [len(t) - 1 for t in traces]
            sums[name][1] += [simulation.oracle(t, a, costs["fixed:1"], **drafts) for t, a in pairs]
    halves = np.arange(len(traces)) % 2
    tuned = [np.zeros(len(traces)), np.zeros(len(traces))]
    chosen = []
    for half in (0, 1):
        rate = {k: sums[k][0][halves != half].sum() / sums[k][1][halves != half].sum() for k in FIXED}
        best = max(rate, key=rate.__getitem__)
        chosen.append(best)
        for column in (0, 1):
            tuned[column][halves == half] = sums[best][column][halves == half]
    ones = sums["fixed:0"][0]
    result = {name: rated(*sums[name], ones, ones) for name in sums}
    result["fixed, tuned on other prompts"] = rated(*tuned, ones, ones)
    result["thompson / fixed tuned"] = rated(*sums["thompson"], *tuned)
    for name, other in PAIRS if greedy else PAIRS[:2]:
        result[f"{name} / {other}"] = rated(*sums[name], *sums[other])
    for name in [name for name in RIVALS if name != "thompson"] + ["oracle"]:
        result[f"thompson / {name}"] = rated(*sums["thompson"], *sums[name])
    return {"speedup": result, "tuned": chosen}


def signals(traces) -> dict[str, float]:
    """Signal -> share of the log-loss of acceptance that knowing its value, in 8 bins, removes.

    It is fitted on one half of the traces and measured on the other, both ways.
    """
    found = {}
    for name, of in {
        "max q": lambda t: t.said_TC[:, 0],
        "sum q^2": lambda t: t.said_TC[:, 1],
        "exp(-H)": lambda t: np.exp(-t.said_TC[:, 2]),
    }.items():
        halves = []
        for half in (0, 1):
            x, a = (np.concatenate([f(t)[1:] for t in traces[half::2]]) for f in (of, lambda t: t.acceptance_T))
            halves.append((np.minimum((x * 8).astype(int), 7), a))
        gains = []
        for (x, a), (y, b) in (halves, halves[::-1]):
            rates = np.array([(a[x == i].sum() + a.mean()) / ((x == i).sum() + 1) for i in range(8)]).clip(1e-3, 0.999)
            loss = -(b * np.log(rates[y]) + (1 - b) * np.log(1 - rates[y])).mean()
            flat = -(b * np.log(a.mean()) + (1 - b) * np.log(1 - a.mean())).mean()
            gains.append(1 - loss / flat)
        found[name] = round(float(np.mean(gains)), 4)
    return found


def show(entry: dict) -> None:
    print(f"\n## N = {entry['exit_layer']}, {entry['setting']}\n")
    c = entry["costs"]
    verify = ", ".join(f"{w}: {v:.2f}" for w, v in c["verify"].items())
    print(f"costs in tokens: shallow {c['shallow']:.3f}, head {c['head']:.3f}, verify {verify}, rest {c['rest']:.3f}")
    print(f"log-loss of acceptance removed by: {entry['signals']}")
    print(f"fixed K tuned on other prompts: {entry['simulated']['tuned']}\n")
    print("| controller | wall clock | simulated |\n|---|---|---|")
    simulated = entry["simulated"]["speedup"]
    for name in [*simulated, *(n for n in entry["wall"] if n not in simulated)]:
        cells = [
            f"{x[0]:.3f} ({x[1]:.3f}-{x[2]:.3f})" if x else "" for x in (entry["wall"].get(name), simulated.get(name))
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} |")


def draw(record: list[dict], path: Path) -> None:
    """Plots the simulated speedups, one panel for each setting and exit layer."""
    from matplotlib.figure import Figure

    names = ["fixed, tuned on other prompts", "confidence:0.5", "entropy:0.6", "beta", "calibration",
             "calibration:shift", "thompson"]  # fmt: skip
    columns = min(3, len(record))
    lines = -(-len(record) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * lines), layout="constrained")
    for i, entry in enumerate(record):
        axes = figure.add_subplot(lines, columns, i + 1)
        speedup = entry["simulated"]["speedup"]
        for y, name in enumerate(reversed(names)):
            value, low, high = speedup[name]
            colour = "tab:green" if name == "thompson" else "tab:blue"
            axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
        axes.set_yticks(range(len(names)), [n.replace(", tuned on other prompts", " (tuned)") for n in reversed(names)])
        axes.axvline(1, color="grey", linestyle="--", linewidth=1)
        axes.set_title(f"N = {entry['exit_layer']}, {entry['setting']} (oracle {speedup['oracle'][0]:.2f})", fontsize=9)
    figure.supxlabel("simulated speedup over autoregressive decoding", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
