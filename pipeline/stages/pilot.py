"""Chooses the exit layer, for distill.exit_layers=auto.

Takes the responses and the teacher's cache, which then holds the hidden states of every candidate; gives
pilot/choice.json. `prepare` makes a run folder pilot/ in the run folder, where cli.py trains a head for each candidate
for a few steps, by the stage distill. `run` decodes a few prompts with each of these heads, which gives the costs, and
replays fixed K over held-out responses, which gives the acceptance. The exit layer of the largest speedup wins.
"""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..backbones.ends import end_tokens
from ..backbones.load import device_of, engine_options, load_model, load_tokenizer
from ..backbones.source import load_config
from ..config import Config
from ..errors import UserError
from ..evaluation import bound, simulation, threads
from ..evaluation.measuring import Measured, measure
from ..evaluation.metrics import CostModel, of_fixed, summarise
from ..generation.documents import Document, read_manifest, read_temperatures
from ..inference.backbone import SplitBackbone
from ..inference.controllers import Fixed
from ..inference.exit_head import ExitHead
from ..inference.sampling import Sampler
from ..launchers import launched
from ..planning import tables
from ..planning.gain import DRAFTS, candidates, speedups, with_exit_layers
from ..prompts.prompt import Prompt
from ..runs.files import atomic_write
from ..runs.folder import RunDir
from ..training import packing

STEPS = 150
"""Optimizer steps of the pilot's heads. The order of the exit layers shows long before the heads are good."""
PROMPTS, FEWEST = 6, 4
"""Held-out responses whose prompts are decoded for the costs, and the fewest of them by which a choice is made."""
TEXTS = 32
"""Held-out responses over which fixed K is replayed: acceptance differs more from text to text than from N to N."""
TOKENS = 40
"""Largest number of tokens of a decoded text."""
TRIED = (1, 4)
"""The K that are measured: they time verifications of 2 and of 5 tokens, between which costs are interpolated."""


def check(config: Config) -> None:
    """Raises UserError if several processes were started: each would make the choice."""
    by = launched()
    if not config.distill.exit_layers and by is not None and by.processes > 1:
        raise UserError(
            f"distill.exit_layers=auto: {by.launcher} started {by.processes} processes ({by.variable}), and the pilot "
            f"takes one. Run `exit-heads pilot` without a launcher first; unset {by.variable} if there is none."
        )


def prepare(run: RunDir) -> RunDir | None:
    """The run folder pilot/ for training the candidates' heads; None if there is nothing to choose, or it was chosen.

    Raises UserError if the stage was begun with other values, its inputs are missing, or too few responses are held
    out.
    """
    if run.config.distill.exit_layers or not run.plan("pilot", _inputs(run)):
        return None
    _held_out(run)  # checks
    config = deepcopy(run.config)
    config.run = replace(config.run, name="pilot", dir=str(run.path))
    config.machine = replace(config.machine, nodes=1, processes_per_node=1, shard_degree=0)
    config.wandb = replace(config.wandb, mode="disabled")
    layers = candidates(load_config(config.backbone).num_hidden_layers)
    d, steps = config.distill, min(STEPS, config.distill.max_steps)
    config.distill = replace(
        d, exit_layers=layers, max_steps=steps, warmup_steps=min(d.warmup_steps, steps // 10), validate_every=steps,
        checkpoint_every=steps, patience=0,
    )  # fmt: skip
    print(f"pilot: {steps} steps for a head at each of the exit layers {', '.join(map(str, layers))}")
    sub = RunDir(config)
    for name in ("responses", "cache"):
        if not (sub / name).is_symlink():
            (sub / name).symlink_to(Path("..") / name)
    try:
        sub.plan("distill", _inputs(sub))
    except UserError:  # the config has changed since a kill: what these heads learned so far is of no use
        sub.redo("distill")
    return sub


def run(run: RunDir) -> None:
    """Measure the heads in pilot/ and write the choice. Raises UserError if too few responses are held out."""
    config, inputs = run.config, _inputs(run)
    if config.distill.exit_layers:
        print(f"pilot: distill.exit_layers={config.distill.exit_layers} is given, so there is nothing to choose")
        return
    if not run.plan("pilot", inputs):
        print(f"pilot: done already: exit layer {read_choice(run)}")
        return
    temperature = min(config.evaluate.temperatures)
    responses = _held_out(run)
    encoded = [(Prompt(d.id, ("",), ""), prompt_of(d)) for d in _spread(responses, PROMPTS)]
    tokenizer = load_tokenizer(config.backbone)
    model = load_model(config.backbone, device_of(config.machine.device), config.machine.device_map)
    heads = [ExitHead.load(folder) for folder in sorted((run / "pilot" / "heads").glob("exit-*"))]
    heads.sort(key=lambda head: head.exit_layer)
    e = replace(
        config.evaluate, controllers=[f"fixed:{k}" for k in TRIED], temperatures=[temperature], max_new_tokens=TOKENS,
        rivals=[], repeats=1, top_k=0, top_p=config.generate.top_p, block_verification=False,
    )  # fmt: skip
    with run.stage("pilot", inputs) as summary:
        with threads.threads(e.threads or threads.fastest(SplitBackbone(model, heads[0], products="plain"))):
            options = engine_options(config.machine, model.device)
            try:
                engines = {head.exit_layer: SplitBackbone(model, head, **options) for head in heads}
            except ValueError as error:  # of the places of its layers, or a backbone that was modified
                raise UserError(f"{run / 'pilot' / 'heads'}: {error}") from None
            room = next(iter(engines.values())).max_context - max(len(ids) for _, ids in encoded)
            e = replace(e, max_new_tokens=min(TOKENS, room))
            ends = frozenset(end_tokens(config.backbone, tokenizer))
            found = Measured.of(measure(model, engines, encoded, ends, e, config.seed, {}, {}), encoded, {})
            texts = _spread(_of_temperature(run, responses, temperature), TEXTS)
            sampler = Sampler(temperature, top_p=config.generate.top_p)  # as the responses were written
            rows = _rows(engines, summarise(found.generations, found.rounds), texts, sampler, config.seed)
            summary |= {
                "exit_layer": max(rows, key=lambda row: row["predicted"])["exit_layer"],
                "candidates": rows, "temperature": temperature, "prompts": len(encoded), "tokens": TOKENS,
                "texts": len(texts), "threads": torch.get_num_threads(), "steps": min(STEPS, config.distill.max_steps),
            }  # fmt: skip
        atomic_write(run / "pilot" / "choice.json", json.dumps(summary, indent=1) + "\n")
    _show(summary)


def chosen(run: RunDir, must_fit: bool = False) -> RunDir:
    """The same run with the pilot's choice in place of distill.exit_layers=auto, if there is a choice.

    must_fit: raise UserError if there is none, or if it was made for other responses, backbone or packing.
    """
    if run.config.distill.exit_layers:
        return run
    if must_fit and run.plan("pilot", _inputs(run)):
        raise UserError(
            f"distill.exit_layers=auto: {run.path} has no choice yet; run `exit-heads pilot` first, or `exit-heads run`"
        )
    if (choice := read_choice(run)) is None:
        return run
    return RunDir(with_exit_layers(run.config, [choice]))


def read_choice(run: RunDir) -> int | None:
    path = run / "pilot" / "choice.json"
    return json.loads(path.read_text())["exit_layer"] if path.exists() else None


def _inputs(run: RunDir) -> list[Path]:
    return [run / "responses" / "manifest.json", run / "cache" / "manifest.json"]


def _held_out(run: RunDir) -> list[Document]:
    """The held-out responses of more than one token, the first of which is never drafted: nothing is trained on them,
    nor do they serve to evaluate."""
    _, _, held_out, _ = packing.read_sides(run / "responses", run.config.distill)
    found = [document for document in held_out if document.spans[0][1] - document.spans[0][0] > 1]
    if len(found) < FEWEST:
        raise UserError(
            f"distill.exit_layers=auto: {len(found)} held-out responses are too few to choose by; {FEWEST} are needed. "
            "Raise generate.num_prompts or distill.held_out, or name the exit layer, such as distill.exit_layers=[2]."
        )
    return found


def prompt_of(document: Document) -> list[int]:
    return document.tokens[: document.spans[0][0]]


def _of_temperature(run: RunDir, responses: list[Document], temperature: float) -> list[Document]:
    """Those that were written at the temperature, if they are enough to judge by; else all."""
    folder = run / "responses"
    known = read_temperatures(folder, read_manifest(folder))
    same = [d for d in responses if known[d.id] == temperature]
    return same if len(same) >= FEWEST else responses


def _spread(responses: list[Document], count: int) -> list[Document]:
    count = min(count, len(responses))
    return [responses[i * len(responses) // count] for i in range(count)]


def _rows(
    engines: dict[int, SplitBackbone],
    measured: list[dict[str, Any]],
    texts: list[Document],
    sampler: Sampler,
    seed: int,
) -> list[dict[str, Any]]:
    """What was found of each candidate."""
    costs = even({entry["exit_layer"]: entry["costs"] for entry in measured})
    rows = []
    with tqdm(total=len(texts) * len(engines), desc="pilot", unit="text") as bar:
        for entry in measured:
            n = entry["exit_layer"]
            traces = [_trace(engines[n], text, sampler, bar) for text in texts]
            rows.append(_row(entry, traces, costs[n], seed))
    return rows


def _trace(engine: SplitBackbone, text: Document, sampler: Sampler, bar: Any) -> simulation.Trace:
    """What drafting finds at each place of a response, as far as fixed K needs it."""
    answer = text.tokens[slice(*text.spans[0])]
    with torch.inference_mode():
        chance_T = bound.acceptance(engine, prompt_of(text), answer, sampler)
    bar.update()
    # one more than was written, else the last token of a text that was cut off could not be drafted
    return simulation.Trace.of(text.id, len(answer) + 1, chance_T)


def even(costs: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The costs of all candidates with less noise: they differ only by the number of shallow and of deep layers, so
    shallow and verify are linear in N, and head and rest are equal. Two candidates are left as they are."""
    if len(costs) < 3:
        return costs
    layers, all_costs = np.array(list(costs)), list(costs.values())

    def line(values: list[float]) -> dict[int, float]:
        slope, start = np.polyfit(layers, values, 1)
        return {n: float(start + slope * n) for n in costs}

    shallow = line([c["shallow"] for c in all_costs])
    # Other widths than those of K in TRIED occur at the ends of texts alone.
    known = [w for w in all_costs[0]["verify"] if all(w in c["verify"] for c in all_costs)]
    widths = [w for w in known if int(w) in {1, *(k + 1 for k in TRIED)}]
    verify = {w: line([c["verify"][w] for c in all_costs]) for w in widths}
    alike = {name: float(np.mean([c[name] for c in all_costs])) for name in ("head", "rest")}
    return {
        n: {**c, **alike, "shallow": shallow[n], "verify": {w: at[n] for w, at in verify.items()}}
        for n, c in costs.items()
    }


def _row(entry: dict[str, Any], traces: list[simulation.Trace], costs: dict[str, Any], seed: int) -> dict[str, Any]:
    """What was found of one candidate, and the predicted speedup of its best K."""
    accepted = simulation.outcomes(traces, seed)
    predicted = {}
    for k in DRAFTS:
        tokens, time = simulation.play(partial(Fixed, k), traces, accepted, CostModel(costs))
        predicted[k] = float(tokens.sum() / time.sum())
    k = max(predicted, key=predicted.__getitem__)
    fixed = of_fixed(entry["controllers"])
    there = speedups(entry["costs"], fixed[max(TRIED)]["conditional_rates"] or [0.0])
    return {
        "exit_layer": entry["exit_layer"],
        "acceptance": float(np.concatenate([t.acceptance_T[1:] for t in traces]).mean()),
        "costs": costs,
        "k": k,
        "predicted": predicted[k],
        "tried": {k: {"predicted": there[k], "measured": fixed[k]["speedup"]} for k in TRIED},
    }


def _show(summary: dict[str, Any]) -> None:
    """Print the table of the candidates and the choice."""
    rows = []
    for row in summary["candidates"]:
        mark = " <- chosen" if row["exit_layer"] == summary["exit_layer"] else ""
        draft = row["costs"]["shallow"] + row["costs"]["head"]
        rows.append(
            [str(row["exit_layer"]), f"{row['acceptance']:.3f}", f"{draft:.3f}", str(row["k"])]
            + [f"{row['predicted']:.2f}{mark}"]
            + [f"{tried['predicted']:.2f} / {tried['measured']:.2f}" for tried in row["tried"].values()]
        )
    header = ["N", "acceptance", "a draft, in tokens", "best K", "predicted speedup"]
    header += [f"K={k}: predicted / measured" for k in TRIED]
    title = (
        f"Heads of {summary['steps']} steps at temperature {summary['temperature']:g}: acceptance on "
        f"{summary['texts']} held-out responses, costs of {summary['prompts']} prompts; trained in full, they draft "
        "better at every N"
    )
    tables.show([tables.Table(title, header, rows)])
    print(f"pilot: exit layer {summary['exit_layer']} is predicted to pay most; pilot/choice.json has the figures")
