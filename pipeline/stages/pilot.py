"""Chooses the exit layer, for distill.exit_layers=auto.

Takes the responses and the teacher's cache, which then holds the hidden states of every candidate; gives
pilot/choice.json. `prepare` makes a run folder pilot/ in the run folder, where cli.py trains a head for each candidate
for a few steps, by the stage distill. `run` decodes prompts of held-out responses with each of these heads, and
predicts the speedup of fixed K from the acceptance and the costs measured there. The exit layer of the largest wins.
"""

import itertools
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..backbones.ends import end_tokens
from ..backbones.load import device_of, engine_options, load_model, load_tokenizer
from ..backbones.source import load_config
from ..config import Config
from ..errors import UserError
from ..evaluation import threads
from ..evaluation.measuring import Measured, measure
from ..evaluation.metrics import of_fixed, summarise
from ..inference.backbone import SplitBackbone
from ..inference.exit_head import ExitHead
from ..launchers import launched
from ..planning import tables
from ..planning.gain import candidates, speedups, with_exit_layers
from ..prompts.ids import Encoded
from ..prompts.prompt import Prompt
from ..runs.files import atomic_write
from ..runs.folder import RunDir
from ..training import packing

STEPS = 150
"""Optimizer steps of the pilot's heads. The order of the exit layers shows long before the heads are good."""
PROMPTS, FEWEST = 6, 4
"""Held-out responses whose prompts are decoded, and the fewest of them by which a choice is made."""
TOKENS = 40
"""Largest number of tokens of a decoded text."""
TRIED = (1, 4)
"""The K that are measured: their rounds time verifications of 2 and of 5 tokens, between which costs are interpolated.
The rates of acceptance are those of the larger K."""


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
    encoded = _held_out(run)
    tokenizer = load_tokenizer(config.backbone)
    model = load_model(config.backbone, device_of(config.machine.device), config.machine.device_map)
    heads = [ExitHead.load(folder) for folder in sorted((run / "pilot" / "heads").glob("exit-*"))]
    heads.sort(key=lambda head: head.exit_layer)
    temperature = min(config.evaluate.temperatures)
    e = replace(
        config.evaluate, controllers=[f"fixed:{k}" for k in TRIED], temperatures=[temperature], max_new_tokens=TOKENS,
        rivals=[], repeats=1,
    )  # fmt: skip
    with run.stage("pilot", inputs) as summary:
        with threads.threads(e.threads or threads.fastest(SplitBackbone(model, heads[0], timed_kernels=False))):
            options = engine_options(config.machine, model.device)
            try:
                engines = {head.exit_layer: SplitBackbone(model, head, **options) for head in heads}
            except ValueError as error:  # of the places of its layers, or a backbone that was modified
                raise UserError(f"{run / 'pilot' / 'heads'}: {error}") from None
            room = next(iter(engines.values())).max_context - max(len(ids) for _, ids in encoded)
            e = replace(e, max_new_tokens=min(TOKENS, room))
            ends = frozenset(end_tokens(config.backbone, tokenizer))
            found = Measured.of(measure(model, engines, encoded, ends, e, config.seed, {}, {}), encoded, {})
            rows = [_row(entry) for entry in summarise(found.generations, found.rounds)]
            summary |= {
                "exit_layer": max(rows, key=lambda row: row["predicted"])["exit_layer"],
                "candidates": rows, "temperature": temperature, "prompts": len(encoded), "tokens": TOKENS,
                "threads": torch.get_num_threads(), "steps": min(STEPS, config.distill.max_steps),
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


def _held_out(run: RunDir) -> Encoded:
    """Prompts of held-out responses, as token ids: nothing is trained on them, nor do they serve to evaluate."""
    *_, validation, _ = packing.read_packed(run / "responses", run.config.distill)
    found: Encoded = []
    for ids_T, positions_T, mask_T, length in zip(
        validation.ids_ST, validation.positions_ST, validation.mask_ST, validation.lengths_S.tolist(), strict=True
    ):
        starts = [*(positions_T[:length] == 0).nonzero().flatten().tolist(), length]
        for start, end in itertools.pairwise(starts):
            answer = mask_T[start:end].nonzero().flatten()
            if len(answer):  # the row before an answer's first token is the prompt's last one
                ids = ids_T[start : start + int(answer[0]) + 1].tolist()
                found.append((Prompt(f"{len(found):016x}", ("",), ""), ids))
    if len(found) < FEWEST:
        raise UserError(
            f"distill.exit_layers=auto: {len(found)} held-out responses are too few to choose by; {FEWEST} are needed. "
            "Raise generate.num_prompts or distill.held_out, or name the exit layer, such as distill.exit_layers=[2]."
        )
    count = min(PROMPTS, len(found))
    return [found[i * len(found) // count] for i in range(count)]  # spread, as documents are packed by length


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """What was measured of one candidate, and the predicted speedup of its best K."""
    fixed = of_fixed(entry["controllers"])
    rates = fixed[max(TRIED)]["conditional_rates"] or [0.0]
    predicted = speedups(entry["costs"], rates)
    k = max(predicted, key=predicted.__getitem__)
    return {
        "exit_layer": entry["exit_layer"],
        "rates": rates,
        "costs": entry["costs"],
        "k": k,
        "predicted": predicted[k],
        "tried": {k: {"predicted": predicted[k], "measured": fixed[k]["speedup"]} for k in TRIED},
    }


def _show(summary: dict[str, Any]) -> None:
    """Print the table of the candidates and the choice."""
    rows = []
    for row in summary["candidates"]:
        mark = " <- chosen" if row["exit_layer"] == summary["exit_layer"] else ""
        rates, costs = " ".join(f"{rate:.2f}" for rate in row["rates"]), row["costs"]
        rows.append(
            [str(row["exit_layer"]), rates, f"{costs['shallow'] + costs['head']:.3f}", str(row["k"])]
            + [f"{row['predicted']:.2f}{mark}"]
            + [f"{tried['predicted']:.2f} / {tried['measured']:.2f}" for tried in row["tried"].values()]
        )
    header = ["N", "draft i accepted", "a draft, in tokens", "best K", "predicted speedup"]
    header += [f"K={k}: predicted / measured" for k in TRIED]
    title = (
        f"Heads of {summary['steps']} steps, {summary['prompts']} held-out prompts, temperature "
        f"{summary['temperature']:g}: trained in full, they draft better at every N"
    )
    tables.show([tables.Table(title, header, rows)])
    print(f"pilot: exit layer {summary['exit_layer']} is predicted to pay most; pilot/choice.json has the figures")
