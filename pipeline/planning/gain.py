"""Predicts the speedup that an exit head will give, for every exit layer and fixed draft length K.

It takes the costs of a round, computed from the backbone's architecture or measured by a pilot run, and an expected
draft acceptance rate; it gives the speedups and the acceptance rate that a speedup needs. The unit of costs is the time
of one autoregressive token, as in metrics.CostModel.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError
from ..evaluation.metrics import of_fixed, predicted_speedup
from .architecture import WORTH_CUTTING, Architecture

DRAFTS = range(1, 9)
"""The draft lengths K that are tried: controllers draft no more."""
ROUND = 0.05
"""Cost of a round beside its passes, in autoregressive tokens: sampling, the controller, reads by the host. Assumed;
measured 0.01 for the pocket backbone on a CPU, and it can be several times 0.05 for a small backbone on a fast GPU."""
TARGETS = (1.0, 1.3)
"""Speedups for which the needed acceptance rate is computed."""
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Exit layers that distill.exit_layers=auto tries."""
SIZES = tuple(4096 * 2**i for i in range(8))
"""Sizes W from which distill.draft_vocabulary=auto chooses, besides the whole vocabulary."""
USUAL_RATE = 0.6
"""Acceptance rate for that choice, if every token can be drafted."""


def candidates(layers: int) -> list[int]:
    """The exit layers among which distill.exit_layers=auto chooses for a backbone of so many layers.

    None lies beyond a third of them: even if every draft were accepted, 3 shallow layers in 10 for each of 4 drafts
    leave little to gain.
    """
    return [n for n in CANDIDATES if n <= layers // 3] or [1]


def with_exit_layers(config: Config, exit_layers: list[int]) -> Config:
    """A copy of the config with these exit layers in place of auto."""
    config = deepcopy(config)
    config.distill.exit_layers = exit_layers
    return config


@dataclass(frozen=True)
class Expected:
    """The expected draft acceptance of one exit layer."""

    exit_layer: int
    temperature: float | None
    """Temperature at which the pilot measured; None for a rate given in plan.acceptance."""
    rates: list[float]
    """Conditional rates: draft i is accepted if all before it were. The last rate also holds for later drafts."""
    costs: dict[str, Any] | None = None
    """Costs that the pilot measured; None: `costs_by_weight`."""


@dataclass(frozen=True)
class Prediction:
    exit_layer: int
    costs: dict[str, Any]
    measured: bool
    """True if the pilot measured the costs."""
    needed: dict[float, float | None]
    """Speedup -> the acceptance rate, the same for every draft, at which the best K reaches it; None: 1 is too low."""
    ceiling: float
    """Speedup of the best K if every draft were accepted."""
    expected: Expected | None = None
    speedups: dict[int, float] = field(default_factory=dict)
    """K -> predicted speedup; empty without an expected acceptance."""

    @property
    def draft(self) -> float:
        """Cost of one draft, in autoregressive tokens."""
        return self.costs["shallow"] + self.costs["head"]

    @property
    def best(self) -> int:
        """K of the largest speedup."""
        return max(self.speedups, key=self.speedups.__getitem__)


def costs_by_weight(a: Architecture, exit_layer: int, draft_vocabulary: int) -> dict[str, Any]:
    """Costs of a round if a pass takes as long as reading its weights, however many tokens it computes.

    An autoregressive token reads L P + V D weights, the shallow layers N P, the head P' + W D, and verification
    (L - N) P + V D, where W is the size of the draft vocabulary, V without one, and P' = P where the head is a layer.
    In a mixture of experts P is what the rows of the pass read, so that wider verifications take longer.
    """
    one = a.read()
    whole = a.layers * one + a.embedding
    widths = range(1, max(DRAFTS) + 2) if one < a.layer else [1]
    return {
        "shallow": exit_layer * one / whole,
        "head": (a.head_read + draft_vocabulary * a.hidden) / whole,
        "verify": {m: ((a.layers - exit_layer) * a.read(m) + a.embedding) / whole for m in widths},
        "rest": ROUND,
    }


def target_efficiency(a: Architecture, exit_layer: int, rows: int) -> float:
    """The cost of verifying one token over that of `rows`, as MoESD (arXiv 2505.19645) defines it: 1 if further tokens
    are free. Drafting pays only as far as acceptance outweighs it."""
    one, wide = ((a.layers - exit_layer) * a.read(m) + a.embedding for m in (1, rows))
    return one / wide


def speedups(costs: dict[str, Any], rates: list[float]) -> dict[int, float]:
    """K -> predicted speedup with fixed K, for each K of DRAFTS."""
    lasting = [*rates, *[rates[-1]] * len(DRAFTS)]
    return {k: predicted_speedup(k, lasting, costs) for k in DRAFTS}


def choose_draft_vocabulary(a: Architecture, exit_layers: list[int], coverage: Callable[[int], float]) -> int:
    """The size W of the largest predicted speedup, a mean over the exit layers; 0 if that is the whole vocabulary.

    coverage: W -> the share of the answers' tokens that such a vocabulary can draft. The acceptance rate falls with it.
    """
    if a.vocabulary < WORTH_CUTTING:
        return 0

    def gain(w: int) -> float:
        rate = USUAL_RATE * (coverage(w) if w < a.vocabulary else 1.0)
        return sum(max(speedups(costs_by_weight(a, n, w), [rate]).values()) for n in exit_layers)

    best = max([a.vocabulary, *(w for w in SIZES if w < a.vocabulary)], key=gain)
    return 0 if best == a.vocabulary else best


def needed(costs: dict[str, Any], target: float) -> float | None:
    """The lowest acceptance rate, the same for every draft, at which some K reaches the speedup `target`; None if no
    rate does. Found by bisection."""
    low, high = 0.0, 1.0
    if max(speedups(costs, [high]).values()) < target:
        return None
    for _ in range(30):  # for every K, the speedup rises with the acceptance rate
        middle = (low + high) / 2
        low, high = (low, middle) if max(speedups(costs, [middle]).values()) >= target else (middle, high)
    return high


def predict(a: Architecture, config: Config) -> list[Prediction]:
    """The predictions of each exit layer: one, or one for each temperature of the pilot. Raises UserError for a wrong
    plan.acceptance or plan.pilot."""
    everything = expectations(a, config)
    predictions = []
    for n in config.distill.exit_layers:
        mine: list[Expected | None] = [e for e in everything if e.exit_layer == n] or [None]
        for expected in mine:
            measured = expected is not None and expected.costs is not None
            draftable = a.draft_vocabulary(config.distill.draft_vocabulary)
            costs = expected.costs if measured else costs_by_weight(a, n, draftable)  # type: ignore[union-attr]
            assert costs is not None
            ceiling = max(speedups(costs, [1.0]).values())
            targets = {target: needed(costs, target) for target in TARGETS}
            found = speedups(costs, expected.rates) if expected else {}
            predictions.append(Prediction(n, costs, measured, targets, ceiling, expected, found))
    return predictions


def expectations(a: Architecture, config: Config) -> list[Expected]:
    """What plan.acceptance or plan.pilot says; [] without either.

    Raises UserError if both are given or one is wrong.
    """
    p, layers = config.plan, config.distill.exit_layers
    if p.acceptance and p.pilot:
        raise UserError(f"plan.acceptance={p.acceptance}: plan.pilot={p.pilot} is given too; remove one of them")
    if p.pilot:
        return read_pilot(Path(p.pilot), a, on_cpu=p.gpu == "cpu")
    if p.acceptance and len(p.acceptance) != len(layers):
        raise UserError(f"plan.acceptance={p.acceptance}: one rate for each of distill.exit_layers={layers} is needed")
    return [Expected(n, None, [rate]) for n, rate in zip(layers, p.acceptance, strict=False)]


def read_pilot(run: Path, a: Architecture, on_cpu: bool) -> list[Expected]:
    """What the pilot run in folder `run` measured at each exit layer and temperature.

    The pilot's costs are used only if its backbone has the same number of layers and parameters as this one and ran on
    the same kind of device. The acceptance rates are those of the fixed controller with the largest K: a controller
    that chooses when to go on drafting is accepted more often than one with a fixed K.
    Raises UserError if the run has no such results.
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
