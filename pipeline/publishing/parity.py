"""Checks that the published folder decodes as evaluated: the part of the gate that needs the folder itself.

Takes the tables of evaluate and a folder; decodes a few of the same prompts through it in a fresh process; gives the
figures and the reasons to refuse it.
"""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from ..backbones.load import device_of, load_model
from ..backbones.source import source_of
from ..config import Config
from ..errors import UserError
from ..evaluation import losslessness
from ..evaluation.intervals import interval
from ..inference.backbone import SplitBackbone
from ..inference.controllers import Fixed
from ..inference.decoding import Request, self_speculative
from ..inference.exit_head import ExitHead
from ..inference.sampling import Sampler
from ..runs.folder import RunDir

CHILD = Path(__file__).parent / "fresh_process.py"
PROMPTS = 4
"""How many of evaluate's prompts, from the first on, are decoded again."""
OWN = {"default": None, "thompson": "thompson"}
"""Name in the report -> `controller=` by which the folder's own controllers are tested: its default, and thompson with
its stored state."""
MARGIN = 1e-9  # for rounding: the interval over a single prompt, or over equal ones, is a point

Form = Literal["head", "draft"]


def check(run: RunDir, results: dict[str, Any], folder: Path, form: Form, k: int) -> tuple[dict[str, Any], list[str]]:
    """(figures, reasons to refuse): compare greedy texts of fixed:K through `folder` with those that evaluate recorded.

    In float32 the ids must be equal; in bfloat16 a text may diverge from the recorded one where the two tokens are
    nearly tied, as in evaluate (`losslessness.explain`). The mean tokens per round must lie within the 95 % interval of
    evaluate's rounds over the same prompts. The first prompt is also decoded with a head's own controllers, which must
    give the same ids, in any number of rounds.

    Raises UserError if the machine has too little memory for the check.
    """
    asked = recorded(run / "eval", results["best"]["exit_layer"], k)
    if form == "draft":
        asked = with_every_token(run, results, k, asked)
    try:
        said = decode_afresh(run.config, results, folder, form, k, asked)
    except subprocess.CalledProcessError as error:
        return {}, [f"parity: the folder does not work in a fresh process: {_reason(run.config, error)}"]
    failed = [f"parity: in a fresh process it was warned: {warning}" for warning in said["warnings"]]
    behind = _behind(form)
    texts = [row["tokens"][:behind] + text["tokens"] for row, text in zip(asked, said["texts"], strict=True)]
    decoded = [*zip(asked, texts, strict=True), *((asked[0], text) for text in said["own"].values())]
    differ = [(row, text) for row, text in decoded if text != row["tokens"]]
    if unexplained := _unexplained(run, results, form, differ):
        failed.append(
            f"parity: {len(unexplained)} of {len(decoded)} texts decoded through the folder in a fresh process are not "
            f"those that evaluate recorded: {', '.join(unexplained)}"
        )
    # the first token comes from the prefill, the others from rounds
    length = sum(len(text) - 1 for text in texts) / sum(text["rounds"] for text in said["texts"])
    tokens, rounds = np.array([[len(row["tokens"]) - 1, row["rounds"]] for row in asked]).T
    expected, (low, high) = interval(lambda t, r: t / r, tokens, rounds)
    if not low - MARGIN <= length <= high + MARGIN:
        failed.append(
            f"parity: {length:.3f} tokens a round through the folder in a fresh process; evaluate had {expected:.3f} "
            f"({low:.3f}-{high:.3f}) on the same prompts"
        )
    figures = {"controller": f"fixed:{k}", "texts": len(decoded), "identical": len(decoded) - len(differ),
               "tokens_per_round": length, "evaluated": expected, "evaluated_ci95": [low, high]}  # fmt: skip
    return figures, failed


def recorded(folder: Path, exit_layer: int, k: int) -> list[dict[str, Any]]:
    """prompt, ids, tokens and number of rounds of the first greedy texts of fixed:K that have any round."""
    mine = f"exit_layer == {exit_layer} and controller == 'fixed:{k}' and temperature == 0 and repeat == 0"
    prompts = pd.read_parquet(folder / "prompts.parquet").set_index("prompt")
    counts = pd.read_parquet(folder / "rounds.parquet").query(mine).groupby("prompt").size()
    texts = pd.read_parquet(folder / "generations.parquet").query(mine).set_index("prompt").tokens
    return [
        {"prompt": name, "ids": prompts.ids[name].tolist(), "tokens": texts[name].tolist(), "rounds": int(counts[name])}
        for name in [name for name in prompts.index if name in counts][:PROMPTS]
    ]


def with_every_token(run: RunDir, results: dict[str, Any], k: int, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `recorded` with the rounds that the head takes with the whole LM head, which a draft model has.

    evaluate's own rounds are those with the head's draft vocabulary; without one they are the same.
    """
    head = _head(run, results)
    if head.draft_ids_W is None:
        return asked
    model = load_model(run.config.backbone, device_of(run.config.machine.device), run.config.machine.device_map)
    engine = SplitBackbone(model, dataclasses.replace(head, draft_ids_W=None))
    new, ends = results["prompts"]["max_new_tokens"], frozenset(results["ends"])
    rows = []
    for row in asked:
        out = self_speculative(engine, Request(row["ids"], new, ends), Sampler(), Fixed(k))
        rows.append(row | {"rounds": len(out.rounds)})
    return rows


def _head(run: RunDir, results: dict[str, Any]) -> ExitHead:
    return ExitHead.load(run / "heads" / f"exit-{results['best']['exit_layer']}")


def decode_afresh(
    config: Config, results: dict[str, Any], folder: Path, form: Form, k: int, asked: list[dict[str, Any]]
) -> dict[str, Any]:
    """The output of fresh_process.py. Raises CalledProcessError, which has the output, if it fails.

    For a draft model the first token is given with the prompt, so that its rounds begin where the exit head's did.
    """
    new, behind = results["prompts"]["max_new_tokens"], _behind(form)
    prompts = [{"ids": row["ids"] + row["tokens"][:behind], "max_new_tokens": new - behind} for row in asked]
    backbone, machine, source = config.backbone, config.machine, Path(source_of(config.backbone))
    job = {
        "backbone": str(source.resolve() if source.is_dir() else source),
        "revision": backbone.revision,
        "trust_remote_code": backbone.trust_remote_code,
        "dtype": backbone.dtype,
        "device": str(device_of(machine.device)),
        "device_map": machine.device_map,
        "threads": results["threads"],
        "folder": str(folder.resolve()),
        "form": form,
        "k": k,
        "ends": results["ends"],
        "prompts": prompts,
        "own": OWN if form == "head" else {},
    }
    gc.collect()  # the stages before this one may have left a backbone on the GPU, and the child loads another
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as elsewhere:  # a module cache of its own, without code of earlier folders
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD)], input=json.dumps(job), env=os.environ | {"HF_MODULES_CACHE": elsewhere},
            cwd=elsewhere, text=True, capture_output=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _reason(config: Config, error: subprocess.CalledProcessError) -> str:
    """Why the process failed, in a form that can be published: the error's class and the return code. Its own messages
    are printed to stderr.

    Raises UserError if it ran out of memory.
    """
    print(error.stderr, file=sys.stderr)
    last = (error.stdout.splitlines() or [""])[-1]
    said = json.loads(last) if last.startswith('{"error"') else {}
    if error.returncode == -signal.SIGKILL or said.get("lacks_memory"):
        raise UserError(
            f"machine.device={config.machine.device}: no memory here for the backbone in a process of its own, which "
            f"tries the published folder (it ended with return code {error.returncode}); end what else runs here, or "
            "run `exit-heads publish` on a machine with more"
        )
    return f"{said.get('error', 'no word')}, return code {error.returncode}"


def _behind(form: Form) -> int:
    """How many recorded tokens are given with the prompt."""
    return int(form == "draft")


def _unexplained(
    run: RunDir, results: dict[str, Any], form: Form, differ: list[tuple[dict[str, Any], list[int]]]
) -> list[str]:
    """Names of the prompts among the (row, new tokens) of `differ` whose divergence rounding cannot explain."""
    if not differ or results["dtype"] == "float32":
        return [row["prompt"] for row, _ in differ]
    model = load_model(run.config.backbone, device_of(run.config.machine.device), run.config.machine.device_map)
    engine = SplitBackbone(model, _head(run, results))

    def by_transformers(ids: list[int]) -> list[torch.Tensor]:
        """Logits [V] of transformers' own forward pass, which verifies the drafts of a draft model."""
        return [model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1]]

    others = by_transformers if form == "draft" else None
    found = ((row, losslessness.explain(engine, row["ids"], row["tokens"], tokens, others)) for row, tokens in differ)
    return [row["prompt"] for row, divergence in found if divergence is not None and not divergence.explained]
