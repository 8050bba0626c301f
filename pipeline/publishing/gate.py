"""The gate: decides whether a head may be published, as far as the results of evaluate alone tell.

Takes the dict of results.json; gives the results of one head and the reasons to refuse it. The checks that need a
published folder are in parity.py.
"""

from typing import Any

from ..errors import GateError, UserError
from ..evaluation import metrics
from ..evaluation.results import ANEW, too_few


def results_of_one(results: dict[str, Any], exit_layer: int | None) -> dict[str, Any]:
    """The results reduced to one head: that of `exit_layer`, or the best.

    Their `best` is the fastest method of that head, with the interval that holds simultaneously for all heads' methods.

    Raises UserError for results without greedy texts, or an exit layer that was not evaluated.
    """
    if results["lossless"]["greedy"] is None:  # sampled texts differ from one decoding to the next: none to compare
        raise UserError(
            "evaluate.temperatures: nothing greedy was evaluated, so nothing says that this head is lossless; "
            f"add 0 and {ANEW}"
        )
    measured = sorted({entry["exit_layer"] for entry in results["heads"]})
    if exit_layer is not None and exit_layer not in measured:
        raise UserError(f"publish.exit_layer={exit_layer}: not evaluated; these were: {', '.join(map(str, measured))}")
    n = exit_layer or results["best"]["exit_layer"]
    kept = [entry for entry in results["heads"] if entry["exit_layer"] == n]
    reduced = results | {"heads": kept, "best": metrics.best(kept, results["best"]["temperature"])}
    if "batches" in results:
        reduced["batches"] = [entry for entry in results["batches"] if entry["exit_layer"] == n]
    return reduced


def failures(results: dict[str, Any], min_speedup: float, head_sha256: str) -> list[str]:
    """The reasons why the head of these results must not be published; an empty list if it may be.

    head_sha256: the hash of the weights that would be published.
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
    together = results["lossless"].get("batches")
    if together is not None and not together["passed"]:
        failed.append("lossless: texts decoded several at once are not the backbone's; report/report.md has which")
    if best["speedup_ci95"] is None:
        if min_speedup > 0:  # min_speedup=0 is met by any speedup
            failed.append(
                f"speedup: {too_few(best)} to judge it; give more of them (evaluate.num_prompts, or another "
                f"evaluate.prompts) and {ANEW}"
            )
    elif (low := best["speedup_ci95"][0]) <= min_speedup:
        failed.append(
            f"speedup: the 95 % interval of {best['controller']}, which holds for all {best['methods']} methods that "
            f"were compared, begins at {low:.3f}, publish.min_speedup={min_speedup} asks for more"
        )
    if best_fixed(results) is None:
        failed.append("parity: no fixed:K was evaluated to compare with; add fixed:2 to evaluate.controllers")
    return failed


def best_fixed(results: dict[str, Any]) -> int | None:
    """K of the fastest fixed:K in greedy decoding, for engines with a fixed draft length; None if none was measured."""
    greedy = (metrics.of_fixed(entry["controllers"]) for entry in results["heads"] if entry["temperature"] == 0)
    speedups = {k: figures["speedup"] for by_k in greedy for k, figures in by_k.items()}
    return max(speedups, key=lambda k: speedups[k]) if speedups else None


def refused(exit_layer: int, failed: list[str]) -> GateError:
    """The error to raise for a head that failed some checks."""
    lines = "\n".join(f"  - {reason}" for reason in failed)
    return GateError(
        f"the gate refused exit layer {exit_layer}:\n{lines}\n"
        "--force (publish.force=true) writes it all the same and says so on the card."
    )
