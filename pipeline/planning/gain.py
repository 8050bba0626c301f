"""What a head will be worth: speedup of every exit layer and fixed K, from costs and an expected acceptance.

Takes an architecture, or the results of a pilot run; gives predictions and the acceptance that would be needed. Costs
are those of metrics.CostModel, in autoregressive tokens. Knows nothing of memory or training.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError
from ..evaluation.metrics import of_fixed, predicted_speedup
from .architecture import Architecture

DRAFTS = range(1, 9)
"""K that are looked at: controllers draft no more."""
ROUND = 0.05
"""What a round costs beside its passes, in autoregressive tokens: draws, the controller, reads by the host. Assumed;
the pocket backbone has 0.01 on a CPU, a small backbone on a fast GPU can have several times as much."""
TARGETS = (1.0, 1.3)
"""Speedups whose acceptance is asked for."""


@dataclass(frozen=True)
class Expected:
    """What is expected of one exit layer's drafts."""

    exit_layer: int
    temperature: float | None
    """Of the pilot's measurement; None of a rate that was typed in."""
    rates: list[float]
    """Conditional rates: draft i is accepted when those before it were. Beyond the last one that holds on."""
    costs: dict[str, Any] | None = None
    """Measured on the pilot; None: by weights."""


@dataclass(frozen=True)
class Prediction:
    exit_layer: int
    costs: dict[str, Any]
    measured: bool
    """Whether the costs were measured by the pilot."""
    needed: dict[float, float | None]
    """Speedup -> acceptance, the same for every draft, that the best K reaches it with; None: not even 1."""
    ceiling: float
    """Speedup of the best K if every draft is accepted."""
    expected: Expected | None = None
    speedups: dict[int, float] = field(default_factory=dict)
    """K -> predicted; empty where nothing is expected."""

    @property
    def draft(self) -> float:
        """Time of a draft, in autoregressive tokens."""
        return self.costs["shallow"] + self.costs["head"]

    @property
    def best(self) -> int:
        """K of the largest speedup."""
        return max(self.speedups, key=self.speedups.__getitem__)


def costs_by_weight(a: Architecture, exit_layer: int) -> dict[str, Any]:
    """Costs of a round where every pass takes as long as reading its weights, and verifying some tokens as long as one.

    An autoregressive token reads L P + V D; shallow N P, head P + V D, verification (L - N) P + V D of it.
    """
    whole = a.layers * a.layer + a.embedding
    return {
        "shallow": exit_layer * a.layer / whole,
        "head": (a.layer + a.embedding) / whole,
        "verify": {1: ((a.layers - exit_layer) * a.layer + a.embedding) / whole},
        "rest": ROUND,
    }


def speedups(costs: dict[str, Any], rates: list[float]) -> dict[int, float]:
    """Of fixed K for each K of DRAFTS."""
    lasting = [*rates, *[rates[-1]] * len(DRAFTS)]
    return {k: predicted_speedup(k, lasting, costs) for k in DRAFTS}


def needed(costs: dict[str, Any], target: float) -> float | None:
    """The least acceptance, the same for every draft, with which some K reaches `target`; None if 1 does not."""
    low, high = 0.0, 1.0
    if max(speedups(costs, [high]).values()) < target:
        return None
    for _ in range(30):  # speedup rises with acceptance, for every K
        middle = (low + high) / 2
        low, high = (low, middle) if max(speedups(costs, [middle]).values()) >= target else (middle, high)
    return high


def predict(a: Architecture, config: Config) -> list[Prediction]:
    """Of each exit layer, by what plan.acceptance or plan.pilot expect. Raises UserError for either being wrong."""
    everything = expectations(a, config)
    predictions = []
    for n in config.distill.exit_layers:
        mine: list[Expected | None] = [e for e in everything if e.exit_layer == n] or [None]
        for expected in mine:
            measured = expected is not None and expected.costs is not None
            costs = expected.costs if measured else costs_by_weight(a, n)  # type: ignore[union-attr]
            assert costs is not None
            ceiling = max(speedups(costs, [1.0]).values())
            targets = {target: needed(costs, target) for target in TARGETS}
            found = speedups(costs, expected.rates) if expected else {}
            predictions.append(Prediction(n, costs, measured, targets, ceiling, expected, found))
    return predictions


def expectations(a: Architecture, config: Config) -> list[Expected]:
    """From plan.acceptance or plan.pilot; [] if neither is given."""
    p, layers = config.plan, config.distill.exit_layers
    if p.acceptance and p.pilot:
        raise UserError(f"plan.acceptance={p.acceptance}: plan.pilot={p.pilot} is there too; take one of them out")
    if p.pilot:
        return read_pilot(Path(p.pilot), a, on_cpu=p.gpu == "cpu")
    if p.acceptance and len(p.acceptance) != len(layers):
        raise UserError(f"plan.acceptance={p.acceptance}: one rate for each of distill.exit_layers={layers} is needed")
    return [Expected(n, None, [rate]) for n, rate in zip(layers, p.acceptance, strict=False)]


def read_pilot(run: Path, a: Architecture, on_cpu: bool) -> list[Expected]:
    """What the pilot measured at each exit layer and temperature.

    Its costs are taken if its backbone has as many layers and parameters as this one and ran on the same kind of
    device, else only how often its drafts were accepted. Rates are those of the fixed controller that drafted most: one
    that chooses when to draft on is accepted more often than one that has no choice.
    Raises UserError if there are no such results.
    """
    path = run / "eval" / "results.json"
    try:
        results = json.loads(path.read_text())
        same = (results["num_layers"], results["parameters"]) == (a.layers, a.parameters)
        same = same and results["device"].startswith("cpu") == on_cpu
        found = []
        for entry in results["heads"]:
            fixed = {
                k: figures["conditional_rates"]
                for k, figures in of_fixed(entry["controllers"]).items()
                if figures["conditional_rates"]
            }
            if fixed:
                costs = entry["costs"] if same else None
                found.append(Expected(entry["exit_layer"], entry["temperature"], fixed[max(fixed)], costs))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"plan.pilot={run}: {path} cannot be read as results of an evaluation ({type(error).__name__}); give the "
            "folder of a run that was evaluated"
        ) from None
    if not found:
        raise UserError(f"plan.pilot={run}: no controller fixed:K was measured there; add one to evaluate.controllers")
    return found
