"""Compares all controllers: by wall clock on the same prompts, and by simulation over recorded traces.

    python benchmarks/controllers.py --run runs/pocket --exit-layers 1 2 --prompts 64 --out docs/controllers

For each exit layer and sampling setting, autoregressive decoding and every controller in TIMED decode the same prompts,
in an order that rotates from prompt to prompt; their rounds give the wall-clock speedups and the costs. Then the
backbone's answers are recorded as traces, and every controller is replayed over them with those costs and several
seeds. The K of the rival "fixed, tuned on other prompts" is tuned on one half of the prompts and used on the other,
both ways, as is the shape of "tree, tuned on other prompts", chains included. Ratios have 95 % bootstrap intervals over
prompts. `signals` are printed too: how well several quantities predict acceptance.

With `--timings FILE.json`, what was timed is kept, and a later run with the same file only simulates; with
`--time-only` nothing is simulated. So the timed part can have the machine alone, and the simulation, which is exact
beside other work, need not.

The upper bound is the oracle, which knows every outcome beforehand and drafts exactly the tokens that will be accepted.
"""

import argparse
import json
from datetime import date
from functools import partial
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
SHAPES = ["tree:2", "tree:3", "tree:2x1", "tree:3x1", "tree:2x2", "tree:2x1x1", "tree:2x2x1", "tree:3x2x1",
          "tree:4x2x2x1"]  # fmt: skip
TREES = [*SHAPES, "thompson+tree", "thompson+tree+lookup"]
COPYING = ["none+lookup", *(f"{name}+lookup" for name in (*FIXED[1:], *RIVALS))]
PAIRS = [("thompson+lookup", "thompson"), ("thompson+lookup", "none+lookup"), ("thompson+tree", "thompson"),
         ("thompson+tree+lookup", "thompson+lookup"), ("thompson+tree+lookup", "thompson")]  # fmt: skip
TUNED = {
    "fixed, tuned on other prompts": FIXED,
    "tree, tuned on other prompts": [*FIXED, *SHAPES],
    "fixed+lookup, tuned on other prompts": ["none+lookup", *(f"{name}+lookup" for name in FIXED[1:])],
}
USELESS = 0.01
"""Copies bring nothing in a text of which the oracle with copies takes at least 1 - USELESS of the time without."""
PARTS = ["source", "drafted", "levels", "head_passes", "seconds", "shallow_seconds", "head_seconds", "verify_seconds"]
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
    parser.add_argument("--timings", type=Path, help="a .json of what was timed: read where it has it, else written")
    parser.add_argument("--time-only", action="store_true", help="write --timings, and simulate nothing")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    if args.time_only and (args.timings is None or args.out):
        parser.error("--time-only: needs --timings, where it goes, and gives nothing for --out")
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
            timed = timings(engine, ids, ends, name, args)
            if not args.time_only:
                entry = compare(engine, ids, ends, name, timed, args, sha)
                record.append({"exit_layer": n, "setting": name} | entry)
                show(record[-1])
    if args.out:
        about = {"date": str(date.today()), "hardware": machine, "torch": torch.__version__, "prompts": len(ids),
                 "timed": args.timed, "tokens": args.tokens, "seeds": args.seeds,
                 "source": Path(args.prompt_file).name}  # fmt: skip
        args.out.with_suffix(".json").write_text(json.dumps({"about": about, "entries": record}, indent=1) + "\n")
        draw(record, args.out.with_suffix(".png"))


def sampler_of(setting: str, seed: int) -> Sampler:
    return Sampler(**SETTINGS[setting], generator=torch.Generator().manual_seed(seed))


CIRCUMSTANCES = ("run", "backbone", "dtype", "device", "prompt_file", "chat_template", "held_out", "timed", "tokens",
                 "clock", "threads")  # fmt: skip
"""Arguments on which what is timed depends."""


def timings(engine, ids, ends, setting: str, args) -> dict:
    """`wall`: speedups by the clock; `costs`: of a round's parts; `own`: those that differ between controllers."""
    kept = json.loads(args.timings.read_text()) if args.timings and args.timings.exists() else {}
    asked = {key: str(value) for key, value in vars(args).items() if key in CIRCUMSTANCES}
    if kept.setdefault("circumstances", asked) != asked:
        raise SystemExit(
            f"{args.timings}: was timed with {kept['circumstances']}, asked for is {asked}: give another file"
        )
    name = f"N = {engine.exit_layer}, {setting}"
    if name not in kept:
        sampler = partial(sampler_of, setting)
        wall, rounds, baseline = clock(engine, ids[: args.timed], ends, sampler, args.tokens, args.clock)
        own = {one: own_costs(one, rounds, baseline, args.clock) for one in [*FIXED, *RIVALS, *COPYING, *TREES]}
        kept[name] = {"wall": wall, "costs": smooth(cost_table(rounds, baseline), rounds), "own": own}
        if args.timings:
            args.timings.write_text(json.dumps(kept, indent=1) + "\n")
    return kept[name]


def compare(engine, ids, ends, setting: str, timed: dict, args, sha: str) -> dict:
    costs, traces, greedy = timed["costs"], [], sampler_of(setting, 0).greedy
    path = args.run / "eval" / f"traces-{engine.exit_layer}-{list(SETTINGS).index(setting)}.npz"
    for i, prompt in enumerate(tqdm(ids, desc=f"N={engine.exit_layer} {setting}: traces", unit="text")):
        text = autoregressive(engine, Request(prompt, args.tokens, ends), sampler_of(setting, i)).tokens
        if len(text) > 1:
            sampler = sampler_of(setting, 10_000 + i)
            traces.append(simulation.record(engine, str(i), prompt, text, sampler, args.tokens))
    path.parent.mkdir(exist_ok=True)  # a run that was never evaluated
    simulation.save(path, traces, sha)
    models = {name: simulation.CostModel(costs | own) for name, own in timed["own"].items()}
    found = {"costs": costs, "wall": timed["wall"], "simulated": simulate(traces, models, args.seeds, greedy)}
    if args.free_rows:
        flat = {"verify": {1: simulation.CostModel(costs).verify(1)}}
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
    pairs = [("thompson", rival) for rival in timed if kind(rival)[0]] + PAIRS
    for name, rival in [(name, rival) for name, rival in pairs if name in timed and rival in timed]:
        wall[f"{name} / {rival}"] = rated(tokens[name], seconds[name], tokens[rival], seconds[rival])
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
    timed, else over the timed controllers of its kind, if there are any."""
    if name in timed:
        mine = rounds[rounds.controller == name]
    else:
        mine = rounds[[kind(other) == kind(name) for other in rounds.controller]]
    costs = cost_table(mine if mine.head_passes.sum() else rounds, baseline)
    return {"head": costs["head"], "rest": costs["rest"]}


def kind(name: str) -> tuple[bool, bool]:
    """Whether a controller decides without thinking, and whether it copies."""
    return name.startswith(("fixed", "tree", "none")), name.endswith("+lookup")


def rated(n, s, m, t) -> list[float]:
    """[ratio of the rates n/s and m/t, low, high], with a 95 % bootstrap interval over prompts."""
    value, (low, high) = interval(ratio_of_rates, n, s, m, t)
    return [round(x, 4) for x in (value, low, high)]


def simulate(traces, costs: dict, seeds: int, greedy: bool) -> dict:
    """Simulated speedup of every controller over the traces, and thompson over its rivals; summed over seeds.
    `useless`: numbers of the prompts in whose texts copies bring nothing."""
    bounds: dict[str, dict] = {"oracle": {}, "oracle with copies": {"copies": True},
                               "oracle of trees": {"candidates": CANDIDATES},
                               "oracle of trees with copies": {"candidates": CANDIDATES, "copies": True}}  # fmt: skip
    sums: dict[str, np.ndarray] = {}  # name -> tokens and time of each text
    names = list(costs)
    for seed in range(seeds):
        accepted = simulation.outcomes(traces, seed)
        for name in list(names):
            try:
                played = simulation.play(partial(make_controller, name, seed, greedy), traces, accepted, costs[name])
            except ValueError as error:  # it depends on what is drawn whether the traces hold all that it asks for
                print(f"{name} is left out: {error}")
                names.remove(name)
                sums.pop(name, None)
                continue
            sums[name] = sums.get(name, 0) + np.array(played)
        for name, drafts in bounds.items():
            pairs = zip(traces, accepted, strict=True)
            least = [(len(t) - 1, simulation.oracle(t, a, costs["fixed:1"], **drafts)) for t, a in pairs]
            sums[name] = sums.get(name, 0) + np.array(least).T
    chosen = {}
    for tuned, names in TUNED.items():
        sums[tuned], chosen[tuned] = tuned_on_others({name: sums[name] for name in names if name in sums})
    ones = sums["fixed:0"][0]
    result = {name: rated(*found, ones, ones) for name, found in sums.items()}
    over = [("thompson", name) for name in (*TUNED, *RIVALS, "oracle") if "lookup" not in name and name != "thompson"]
    over += [("thompson+lookup", n) for n in (*COPYING, *TUNED) if "lookup" in n and n != "thompson+lookup"]
    over += [("thompson+tree", "tree, tuned on other prompts"), ("thompson+tree", "oracle of trees")]
    over += [("thompson+tree+lookup", "oracle of trees with copies")]
    pairs_of = [(a, b) for a, b in [*PAIRS, *over] if a in sums and b in sums]
    result |= {f"{a} / {b}": rated(*sums[a], *sums[b]) for a, b in pairs_of}
    useless = sums["oracle with copies"][1] > (1 - USELESS) * sums["oracle"][1]
    if useless.any():
        for a, b in [pair for pair in PAIRS if pair in pairs_of]:
            if "lookup" in a and "lookup" not in b:
                pair = rated(*sums[a][:, useless], *sums[b][:, useless])
                result[f"{a} / {b}, where copies bring nothing"] = pair
    return {"speedup": result, "tuned": chosen, "useless": np.array([int(t.prompt) for t in traces])[useless].tolist()}


def tuned_on_others(sums: dict[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """(tokens and time of each text with the controller that is fastest on the other half of the texts, which these
    are for either half)"""
    tuned, chosen = np.zeros_like(next(iter(sums.values()))), []
    halves = np.arange(tuned.shape[1]) % 2
    for half in (0, 1):
        rate = {name: found[0, halves != half].sum() / found[1, halves != half].sum() for name, found in sums.items()}
        chosen.append(max(rate, key=rate.__getitem__))
        tuned[:, halves == half] = sums[chosen[-1]][:, halves == half]
    return tuned, chosen


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
    print(f"tuned on other prompts: {entry['simulated']['tuned']}")
    print(f"copies bring nothing for prompts {entry['simulated']['useless']}\n")
    columns = [entry["wall"], entry["simulated"]["speedup"], entry.get("free_rows", {}).get("speedup", {})]
    print("| controller | wall clock | simulated | rows free |\n|---|---|---|---|")
    for name in dict.fromkeys([*columns[1], *columns[0]]):
        found = [column.get(name) for column in columns]
        print(f"| {name} | {' | '.join(f'{x[0]:.3f} ({x[1]:.3f}-{x[2]:.3f})' if x else '' for x in found)} |")


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
