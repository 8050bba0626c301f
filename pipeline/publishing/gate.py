"""Which head may be published, and why not: the lines of the gate that need nothing but results.

Takes results.json, gives those of one head, and reasons to refuse it. What needs a published folder is in parity.py.
Knows nothing of how anything was measured.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import GateError, UserError
from ..evaluation import metrics


def read(path: Path) -> dict[str, Any]:
    """The results of an evaluation. Raises UserError where the file holds none."""
    try:
        results = json.loads(path.read_text())
        found = bool(results["heads"])
    except (OSError, ValueError, KeyError, TypeError):
        found = False
    if not found:
        raise UserError(f"{path}: holds no results of an exit head; evaluate anew, with --redo evaluate")
    return results


def results_of_one(results: dict[str, Any], exit_layer: int | None) -> dict[str, Any]:
    """The results with one head in them: that of `exit_layer`, or the best.

    Raises UserError for results of another schema or without greedy texts, or an exit layer that was not evaluated.
    """
    if results["schema"] != metrics.SCHEMA:
        raise UserError(
            f"eval/results.json is of schema {results['schema']}, this version knows schema {metrics.SCHEMA}: "
            "evaluate anew, with --redo evaluate"
        )
    if results["lossless"]["greedy"] is None:  # sampled texts differ from one decoding to the next: none to compare
        raise UserError(
            "evaluate.temperatures: nothing greedy was evaluated, so nothing says that this head is lossless; "
            "add 0 and evaluate anew, with --redo evaluate"
        )
    measured = sorted({entry["exit_layer"] for entry in results["heads"]})
    if exit_layer is not None and exit_layer not in measured:
        raise UserError(f"publish.exit_layer={exit_layer}: not evaluated; these were: {', '.join(map(str, measured))}")
    n = exit_layer or results["best"]["exit_layer"]
    kept = [entry for entry in results["heads"] if entry["exit_layer"] == n]
    return results | {"heads": kept, "best": metrics.best(kept, results["best"]["temperature"])}


def failures(results: dict[str, Any], min_speedup: float, head_sha256: str) -> list[str]:
    """The reasons why the head of these results must not be published; none if it may.

    head_sha256: of the weights that would be.
    """
    failed = []
    greedy, sampling, best = results["lossless"]["greedy"], results["lossless"]["sampling"], results["best"]
    if head_sha256 != results["heads"][0]["head_sha256"]:
        failed.append("weights: these are not those that were evaluated; evaluate them, with --redo evaluate")
    if not greedy["passed"]:
        failed.append(
            f"lossless: {greedy['identical']} of {greedy['texts']} greedy texts are identical to autoregressive "
            f"decoding in {results['dtype']}"
            + ("" if results["dtype"] == "float32" else ", and not every difference is a near tie")
        )
    if sampling is not None and not sampling["passed"]:
        failed.append(f"lossless: sampled tokens are not distributed as the backbone's, p = {sampling['p_value']:.2g}")
    low = best["speedup_ci95"][0]
    if low <= min_speedup:
        failed.append(
            f"speedup: the 95 % interval of {best['controller']} begins at {low:.3f}, "
            f"publish.min_speedup={min_speedup} asks for more"
        )
    if best_fixed(results) is None:
        failed.append("parity: no fixed:K was evaluated to compare with; add fixed:2 to evaluate.controllers")
    return failed


def best_fixed(results: dict[str, Any]) -> int | None:
    """K of the fastest fixed:K in greedy decoding: the draft length for engines that fix it. None if there is none."""
    greedy = (metrics.of_fixed(entry["controllers"]) for entry in results["heads"] if entry["temperature"] == 0)
    speedups = {k: figures["speedup"] for by_k in greedy for k, figures in by_k.items()}
    return max(speedups, key=lambda k: speedups[k]) if speedups else None


def refused(exit_layer: int, failed: list[str]) -> GateError:
    """What to raise for a head that failed some lines."""
    lines = "\n".join(f"  - {reason}" for reason in failed)
    return GateError(
        f"the gate refused exit layer {exit_layer}:\n{lines}\n"
        "--force (publish.force=true) writes it all the same and says so on the card."
    )
