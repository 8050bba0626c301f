"""speculation_profile.json: how many drafts are accepted, in a format that serving tools and simulators read.

Takes the rounds of evaluate and results; gives the fields of schema 1.0 of NVIDIA's Model-Optimizer (examples/
specdec_bench), which is meant to be published with a draft model.

The schema's accept length of a step is our acceptance length of a round, bonus token included; entry i of a list of
rates belongs to draft i+1.
"""

from typing import Any

import pandas as pd

from ..evaluation.metrics import conditional_rates, of_fixed

SCHEMA = "1.0"
CHAINS = ("draft_model",)
"""Our methods for which NVIDIA's builder derives the accept lengths of smaller K from those of one K."""
TOLERANCE = 0.02


def build(results: dict[str, Any], rounds: pd.DataFrame, method: str, draft: str) -> dict[str, Any] | None:
    """The profile of fixed:K in greedy decoding, for the largest K that was measured; None if none was.

    method: `draft_model` or `exit_head`. draft: the name under which the draft is published.
    """
    n = results["best"]["exit_layer"]
    mine = rounds[(rounds.exit_layer == n) & (rounds.temperature == 0)]
    by_k = of_fixed(dict(iter(mine.groupby("controller"))))
    if not by_k:
        return None
    k = max(by_k)
    part = by_k[k]
    lengths = 1 + part.accepted
    marginal = [float((part.accepted > i).mean()) for i in range(k)]
    measured = conditional_rates(part)
    mean, implied = float(lengths.mean()), 1 + sum(marginal)
    return {
        "schema_version": SCHEMA,
        "measured": True,
        "method": method,
        "draft_checkpoint": {"name": draft},
        "target_model": {key: results["backbone"].get(key) for key in ("name", "revision", "fingerprint")},
        "num_speculative_tokens": k,
        "block_size": None,
        "max_supported_k": k,
        "verification_method": "longest_prefix",
        "conditional_accept_rates": _rounded(measured + [0.0] * (k - len(measured))),
        "marginal_accept_rates": _rounded(marginal),
        "mean_accept_length": round(mean, 6),
        "mean_accept_length_per_request": round(float(lengths.groupby(part.prompt).mean().mean()), 6),
        # The chain model would be right for an exit head too, but the builder has no such method.
        "accept_length_model": "chain_analytic" if method in CHAINS else "measured_per_k",
        "accept_length_by_k": {str(j): round(1 + float(by_k[j].accepted.mean()), 6) for j in sorted(by_k)},
        "acceptance_length_histogram": {str(x): int(count) for x, count in lengths.value_counts().sort_index().items()},
        "per_category": {
            str(task): {"mean_accept_length": round(1 + float(rows.accepted.mean()), 6), "steps": len(rows)}
            for task, rows in part.groupby("task")
        },
        "measurement_conditions": {
            "engine": "exit-heads",
            "dataset": results["prompts"]["source"]["name"],
            "num_requests": results["prompts"]["count"],
            "max_new_tokens": results["prompts"]["max_new_tokens"],
            "temperature": 0.0,
            "concurrency": 1,
            "dtype": results["dtype"],
            "device": results["device"],
        },
        "validation": {
            "mean_consistency": {
                "implied_mean_accept_length": round(implied, 6),
                "reported_mean_accept_length": round(mean, 6),
                "abs_delta": round(abs(implied - mean), 6),
                "tolerance": TOLERANCE,
                "passed": abs(implied - mean) <= TOLERANCE,
            },
            "marginal_monotonicity": {"passed": True, "violations": []},  # true by definition of the rates
        },
    }


def _rounded(rates: list[float]) -> list[float]:
    return [round(rate, 6) for rate in rates]
