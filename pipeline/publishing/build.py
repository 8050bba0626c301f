"""Builds a published folder from the results of a run: gate, files, parity check, card.

Takes a run folder that was evaluated and the form asked for; writes hub/<N>/ (head) or hub/<N>-draft/ (draft),
atomically.
"""

from pathlib import Path

import pandas as pd

from ..errors import UserError
from ..evaluation import results as evaluated
from ..inference.exit_head import ExitHead
from ..runs.anonymous import anonymous
from ..runs.files import atomic_path, sha256_of
from ..runs.folder import RunDir
from . import card, draft_card, draft_model, gate, head_folder, parity
from .parity import Form

STAGES: dict[Form, str] = {"head": "publish", "draft": "draft"}
"""Form -> the stage under which it is recorded."""
SUFFIXES: dict[Form, str] = {"head": "", "draft": "-draft"}


def write(run: RunDir, form: Form) -> Path:
    """Write the folder of the best head, or of publish.exit_layer, unless it is done already; returns its path.

    Raises GateError for a head that the gate refuses, and UserError for a draft model without a measured fixed:K; no
    folder is left then.
    """
    stage, settings, inputs = STAGES[form], run.config.publish, [run / "eval", run / "heads"]
    done = not run.plan(stage, inputs)
    results = gate.results_of_one(evaluated.read(run / "eval" / "results.json"), settings.exit_layer)
    n, k = results["best"]["exit_layer"], gate.best_fixed(results)
    target = run / "hub" / f"{n}{SUFFIXES[form]}"
    if done:
        print(f"{stage}: done already")
        return target
    head = run / "heads" / f"exit-{n}"
    failed = gate.failures(results, settings.min_speedup, sha256_of(head / "model.safetensors"))
    if failed and not settings.force:
        raise gate.refused(n, failed)
    if k is None and form == "draft":
        raise UserError("a draft model drafts a fixed number of tokens: add fixed:2 or others to evaluate.controllers")
    with run.stage(stage, inputs) as summary, atomic_path(target) as folder:
        rounds = pd.read_parquet(run / "eval" / "rounds.parquet")
        if form == "head":
            head_folder.write(folder, run, results)
        else:
            assert k is not None  # refused above
            draft_model.export(folder, run.config.backbone, ExitHead.load(head), k)
        head_folder.write_pedigree(folder, run)
        head_folder.write_profile(folder, run, results, rounds, SUFFIXES[form])
        figures, more = parity.check(run, results, folder, form, k) if k else (None, [])
        failed += more
        if failed and not settings.force:
            raise gate.refused(n, failed)
        results["gate"] = {"passed": not failed, "reasons": failed, "parity": figures}
        head_folder.write_json(folder / "results.json", anonymous(results))
        (card if form == "head" else draft_card).write(folder, run, results)
        summary |= {"folder": target.relative_to(run.path).as_posix(), "sha256": head_folder.digest_of(folder)}
        summary |= {"gate": results["gate"]}
    return target
