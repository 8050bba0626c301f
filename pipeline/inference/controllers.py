"""The controllers, which decide how many tokens to draft, and the name of each. The default one is in thompson.py.

A controller answers yes or no to whether token k+1 is drafted. For decoding to stay lossless, the answer may depend on
committed text, earlier rounds, this round's drafted tokens and their q, q of token k+1, and random numbers of its own.
It must not depend on token k+1 itself, on an accept draw of this round, or on what the deep layers compute in it. Then
the next token has the backbone's distribution whatever the controller's state (docs/control.md).
"""

import math
import random
from collections.abc import Callable
from typing import Any

from .rounds import LONGEST, Confidence, Controller, Round
from .sources import WithLookup
from .thompson import Thompson


class Fixed:
    """Always drafts K tokens. K = 0 drafts nothing: a round yields one token, as in autoregressive decoding."""

    def __init__(self, k: int):
        self.k = k

    def peek(self, k: int) -> bool:
        return k < self.k

    def draft(self, k: int, confidence: Confidence) -> bool:
        return True

    def observe(self, round: Round) -> None:
        pass


class ConfidenceStop:
    """Drafts while max q is at least a threshold (Kangaroo: Liu et al., NeurIPS 2024, section 3).

    Kangaroo keeps the first token below the threshold; here that token is not drafted, which makes verification one
    token narrower. Looking at the token before discarding it would change the distribution of the text.
    """

    def __init__(self, threshold: float, limit: int = LONGEST):
        self.threshold, self.limit = threshold, limit

    def peek(self, k: int) -> bool:
        return k < self.limit

    def draft(self, k: int, confidence: Confidence) -> bool:
        return confidence.top >= self.threshold

    def observe(self, round: Round) -> None:
        pass


class EntropyStop(ConfidenceStop):
    """Drafts while 1 - sqrt(gamma * H(q)), a lower bound of acceptance in the style of AdaEDL (Agrawal et al.,
    2024, arXiv 2410.18351), is at least a threshold. gamma = 0.2. AdaEDL also adapts the threshold; this does not."""

    gamma = 0.2

    def draft(self, k: int, confidence: Confidence) -> bool:
        return 1 - math.sqrt(self.gamma * max(0.0, confidence.entropy)) >= self.threshold


class Beta:
    """EESD's Beta-TS as we understand the paper (Liu et al., ACL Findings 2024, figure 2). It states neither the priors
    nor a limit; both are our choice.

    theta ~ Beta(1 + accepted, 1 + rejected). After each draft, chi ~ Bernoulli(theta) with a newly drawn theta: 1 goes
    on drafting, 0 stops and verifies. Every round has at least one draft. Drafts after the first rejected one were
    never tested and are not counted.
    """

    def __init__(self, limit: int = LONGEST, seed: int = 0):
        self.accepted, self.rejected, self.limit = 1, 1, limit
        self.random = random.Random(seed)

    def peek(self, k: int) -> bool:
        if k == 0:
            return True
        theta = self.random.betavariate(self.accepted, self.rejected)
        return k < self.limit and self.random.random() < theta

    def draft(self, k: int, confidence: Confidence) -> bool:
        return True

    def observe(self, round: Round) -> None:
        self.accepted += round.accepted
        self.rejected += round.accepted < round.drafted


class Calibration:
    """EESD's Calibration-TS: as Beta, but theta combines the head's own confidence with the observed acceptance.

    theta ~ N(mu, v) clipped to [0, 1], with p = max q of the last draft, n tested drafts of mean acceptance r and mean
    confidence p', prior variance s0^2 = 0.04 and noise s^2 = 0.25 (our choice). The paper's text allows two readings:
      pull:  mu = (n s0^2 r + s^2 p) / (n s0^2 + s^2), the posterior of a Gaussian with prior mean p, in which the
             weight of p vanishes as n grows;
      shift: mu = p + n / (n + n0) (r - p'), n0 = s^2 / s0^2, the confidence corrected by its mean error, in which p
             keeps its weight.
    In both, v = s^2 s0^2 / (n s0^2 + s^2).
    """

    prior, noise = 0.04, 0.25

    def __init__(self, shift: bool = False, limit: int = LONGEST, seed: int = 0):
        self.shift, self.limit, self.random = shift, limit, random.Random(seed)
        self.tested = 0
        self.accepted = self.predicted = 0.0
        self.drafts: list[float] = []

    def peek(self, k: int) -> bool:
        if k == 0:
            self.drafts = []
            return True
        mean, variance = self.posterior(self.drafts[-1])
        theta = min(1.0, max(0.0, self.random.gauss(mean, math.sqrt(variance))))
        return k < self.limit and self.random.random() < theta

    def draft(self, k: int, confidence: Confidence) -> bool:
        self.drafts.append(confidence.top)
        return True

    def observe(self, round: Round) -> None:
        tested = min(round.accepted + 1, round.drafted)
        self.tested += tested
        self.accepted += round.accepted
        self.predicted += sum(self.drafts[:tested])

    def posterior(self, p: float) -> tuple[float, float]:
        """Mean and variance of theta for a draft of confidence p."""
        n, s0, s = self.tested, self.prior, self.noise
        weight = n * s0 / (n * s0 + s)
        observed = self.accepted / n if n else 0.0
        centre = self.predicted / n if n else 0.0
        mean = p + weight * (observed - centre) if self.shift else weight * observed + (1 - weight) * p
        return mean, s * s0 / (n * s0 + s)


NAMES = (
    "thompson, fixed:K, confidence:T, entropy:T (0 < T < 1), beta, calibration, calibration:shift or none, alone or "
    "with +lookup behind it"
)
COPYING = "+lookup"
"""Ending of a name: drafts may also be copied from the text."""


def fixed_length(name: str) -> int | None:
    """K of a controller named `fixed:K`; None for any other name."""
    kind, _, argument = name.partition(":")
    return int(argument) if kind == "fixed" and argument.isdecimal() else None


def make_controller(name: str, seed: int = 0, greedy: bool = True) -> Controller:
    """The controller of a name such as `thompson`, `fixed:3` or `confidence:0.6`; `none` drafts nothing.

    greedy: whether the text is decoded greedily or sampled, because a different quantity predicts acceptance in each.
    Raises ValueError for an unknown name or a parameter out of range.
    """
    if name.endswith(COPYING) and not name.endswith(2 * COPYING):
        return WithLookup(make_controller(name.removesuffix(COPYING), seed, greedy), greedy, seed)
    kind, _, argument = name.partition(":")
    k = fixed_length(name)
    if k is not None:
        return Fixed(k)
    if kind in ("confidence", "entropy"):
        try:
            threshold = float(argument)
        except ValueError:
            threshold = math.nan
        if 0 < threshold < 1:
            return (ConfidenceStop if kind == "confidence" else EntropyStop)(threshold)
    plain: dict[str, Callable[[], Controller]] = {
        "thompson": lambda: Thompson(greedy=greedy, seed=seed),
        "beta": lambda: Beta(seed=seed),
        "calibration": lambda: Calibration(seed=seed),
        "calibration:shift": lambda: Calibration(shift=True, seed=seed),
        "none": lambda: Fixed(0),
    }
    if name in plain:
        return plain[name]()
    raise ValueError(f"controller={name}: must be {NAMES}")


def thompson_in(controller: Controller) -> Thompson | None:
    """The controller's part that learns of the head and keeps it from text to text, if it has one."""
    head = controller.head if isinstance(controller, WithLookup) else controller
    return head if isinstance(head, Thompson) else None


def learned_controller(name: str, config: dict[str, Any], seed: int = 0, greedy: bool = True) -> Controller:
    """`make_controller`, but thompson starts from what it had learned of this head when the head was measured.

    config: that of the head's folder; only a published one holds a state. Raises ValueError as `make_controller`, and
    for the state of another kind of controller.
    """
    controller = make_controller(name, seed, greedy)
    state = config.get("states", {}).get("greedy" if greedy else "sampled")
    if (head := thompson_in(controller)) and state is not None:
        head.load_state_dict(state)
    return controller
