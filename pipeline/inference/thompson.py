"""The cost-aware Thompson-sampling controller, our default: draft while it is expected to pay, by the clock.

Takes the head's confidence and finished rounds with their times, gives yes or no. A round is renewed like any
other, so tokens per second are largest when every decision raises tokens - rate * seconds, `rate` being what the
decoder reaches in the long run (docs/control.md derives it). Knows nothing of models or tokens.
"""

import random
from typing import Any

from .rounds import LONGEST, Confidence, Round

BINS = 8
PRIOR = 2.0
"""Weight of the prior, in drafts. Until seen, a bin's acceptance is thought to be its confidence x where drafts must
equal the backbone's choice, and (1 + x) / 2 where they need only be likely enough."""
MEMORY = 0.999
"""What a round leaves of the counts of earlier rounds: acceptance changes with the text."""
RATE_MEMORY = 0.995
"""The same of the running rate."""
FADING = 0.99
"""What a further point leaves of the earlier ones on the line of costs."""
REFRESH = 8
"""Rounds that decide by the same draws, costs and rate; one while little is known."""


class Average:
    """Running mean that turns into an exponential one; a single outlier moves it little."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, x: float) -> None:
        if self.count >= 2 and self.value > 0:
            x = min(x, 3 * self.value)  # the machine was away, not the work longer
        self.count += 1
        self.value += (x - self.value) * max(1 / self.count, 0.03)


class Line:
    """Weighted least squares t = a + b m, b >= 0, over points that fade: a few numbers instead of a noisy table."""

    def __init__(self) -> None:
        self.n = self.m = self.t = self.mm = self.mt = 0.0

    def add(self, m: float, t: float) -> None:
        if self.n >= 3:
            t = min(t, 3 * max(0.0, self.at(m)))
        self.n, self.m, self.t = FADING * self.n + 1, FADING * self.m + m, FADING * self.t + t
        self.mm, self.mt = FADING * self.mm + m * m, FADING * self.mt + m * t

    def at(self, m: float) -> float:
        """0 before the first point; flat until two different m were seen."""
        if self.n == 0:
            return 0.0
        spread = self.n * self.mm - self.m * self.m
        slope = max(0.0, (self.n * self.mt - self.m * self.t) / spread) if spread > 1e-6 * self.n * self.n else 0.0
        return (self.t - slope * self.m) / self.n + slope * m


class Costs:
    """Seconds of each part of a round, measured on the rounds themselves.

    A synthetic benchmark is a third off on CPUs: caches are warm there and cold here. Verification is one number for
    a single token, which has kernels of its own, and a line for more.
    """

    def __init__(self) -> None:
        self.shallow, self.head, self.rest, self.single = Average(), Average(), Average(), Average()
        self.several = Line()

    def observe(self, round: Round) -> None:
        self.shallow.add(round.shallow_seconds / (round.drafted + 1))
        if round.head_passes:
            self.head.add(round.head_seconds / round.head_passes)
        if round.drafted:
            self.several.add(round.drafted + 1, round.verify_seconds)
        else:
            self.single.add(round.verify_seconds)
        parts = round.shallow_seconds + round.head_seconds + round.verify_seconds
        self.rest.add(max(0.0, round.seconds - parts))

    def rounds(self, limit: int) -> list[float]:
        """C(k), seconds of a round of k drafts, for k = 0..limit: k+1 shallow passes, k of the head, one verify."""
        fixed = self.rest.value + self.shallow.value
        step = self.shallow.value + self.head.value
        return [fixed + k * step + self.verify_seconds(k + 1) for k in range(limit + 1)]

    def verify_seconds(self, width: int) -> float:
        """Of a pass over `width` tokens; where only the other kind of pass was seen, that stands for both."""
        if self.several.n == 0 or (width == 1 and self.single.count):
            return self.single.value
        return self.several.at(width)


class Thompson:
    """Sampled acceptances per confidence bin, measured costs, look-ahead over several drafts.

    theta_b ~ Beta(a_b, b_b) is drawn for every bin b of confidence, in every round at first, then for `REFRESH` rounds
    at a time. With P the product of the theta of the drafts made, C(k) the seconds of a round with k drafts, h those of
    a head pass, abar the mean acceptance over bins as they occur, and rate the running tokens per second (never below
    1 / C(0), which needs no drafting):
      worth(k, a) = max over j >= 1 of  P a (1 + abar + ... + abar^(j-1)) - rate (C(k+j) - C(k) - h)
      draft, q known, its pass paid:   go on iff worth(k, theta_bin) > 0
      peek, q not known:               look iff  E_b[max(0, worth(k, theta_b))] > rate h
    Refusing the first peek is K = 0, one autoregressive token. It teaches nothing about drafting, so one such round
    in sqrt(100 + n) drafts all the same. The first rounds walk through the widths to measure C.
    """

    calibration = (1, 0, 2, 4)

    def __init__(self, greedy: bool = True, seed: int = 0, limit: int = LONGEST, costs: Costs | None = None):
        self.greedy, self.limit = greedy, limit
        self.random = random.Random(seed)
        middles = [(b + 0.5) / BINS for b in range(BINS)]
        thought = middles if greedy else [(1 + x) / 2 for x in middles]
        self.prior = [(PRIOR * a, PRIOR * (1 - a)) for a in thought]
        self.counts = [list(p) for p in self.prior]
        self.seen = [1.0] * BINS
        """How often q fell into each bin, discounted."""
        self.costs = costs or Costs()
        self.tokens = self.seconds = 0.0
        self.rounds = self.refreshed = 0
        self.plan = [] if costs else [k for _ in range(2) for k in self.calibration if k <= limit]
        """Lengths of the next rounds, as long as costs are being measured."""
        # of the round at hand
        self.bins: tuple[int, ...] = ()
        self.product = 1.0
        self.forced: int | None = None
        # of the rounds until the next refresh
        self.theta: list[float] = []
        """Sampled acceptance of each bin."""
        self.looks: dict[tuple[int, ...], bool] = {}
        """Whether to peek behind drafts of these bins."""
        self.chains: list[float] = []
        """chains[j] = 1 + abar + ... + abar^j: tokens that j + 1 more drafts bring once the first is accepted."""
        self.times: list[float] = []
        self.gains: list[list[tuple[float, float]]] = []
        """gains[k] has, for every j >= 1 further drafts after k, (chain, seconds) as `_worth` weighs them."""
        self.cheapest: list[float] = []
        """Least seconds / chain of gains[k]."""
        self.commonest = list(range(BINS))
        self.rate = 0.0

    # ---- decisions

    def peek(self, k: int) -> bool:
        if k == 0:
            self._begin()
        if k >= self.limit or self.forced is not None:
            return k < (self.forced if self.forced is not None else self.limit)
        looks = self.looks.get(self.bins)
        if looks is None:
            looks = self.looks[self.bins] = self._pays(k, self.product) and self._hopes(k)
        if looks:
            return True
        if k == 0 and self.random.random() < (100 + self.rounds) ** -0.5:
            self.forced = 1
            return True
        return False

    def _hopes(self, k: int) -> bool:
        """E_b[max(0, worth(k, theta_b))] > rate h, looking at no more bins than decide it: most often one."""
        unseen = sum(self.seen)
        needed, most = unseen * self.rate * self.costs.head.value, self._worth(k, self.product)
        for b in self.commonest:
            reach = self.product * self.theta[b]
            if self._pays(k, reach):
                needed -= self.seen[b] * self._worth(k, reach)
            unseen -= self.seen[b]
            if needed < 0 or needed >= unseen * most:
                break
        return needed < 0

    def draft(self, k: int, confidence: Confidence) -> bool:
        b = min(BINS - 1, int(self.signal(confidence) * BINS))
        self.seen[b] += 1
        reach = self.product * self.theta[b]
        if self.forced is None and not self._pays(k, reach):
            return False
        self.product = reach
        self.bins += (b,)
        return True

    def signal(self, confidence: Confidence) -> float:
        """What predicts acceptance, in [0, 1]: greedy max q; sampling sum q^2, which says more of the overlap of q with
        p (share of the log-loss of acceptance removed on held-out prompts: docs/lab-notes.md)."""
        return confidence.top if self.greedy else confidence.collision

    def _begin(self) -> None:
        self.bins, self.product = (), 1.0
        self.forced = self.plan.pop(0) if self.plan else None
        if not self.times or self.rounds - self.refreshed >= (REFRESH if self.rounds >= 4 * REFRESH else 1):
            self._refresh()

    def _refresh(self) -> None:
        """Every few rounds what decisions rest on, acceptances drawn anew too: they must cost little beside a token."""
        faded = 1 - MEMORY ** (self.rounds - self.refreshed)
        self.refreshed = self.rounds
        for count, prior in zip(self.counts, self.prior, strict=True):
            count[0] += faded * (prior[0] - count[0])
            count[1] += faded * (prior[1] - count[1])
        self.seen = [max(1e-3, (1 - faded) * n) for n in self.seen]
        abar = sum(n * a for n, a in zip(self.seen, self.acceptance(), strict=True)) / sum(self.seen)
        self.chains = [1.0]
        for _ in range(self.limit - 1):
            self.chains.append(1 + abar * self.chains[-1])
        self.times = self.costs.rounds(self.limit)
        alone = 1 / self.times[0] if self.times[0] > 0 else 0.0
        self.rate = max(alone, self.tokens / self.seconds if self.seconds > 0 else 0.0)
        self.theta, self.looks = [self.random.betavariate(*count) for count in self.counts], {}
        head = self.costs.head.value
        self.gains = [
            [(g, c - spent - head) for g, c in zip(self.chains, self.times[k + 1 :], strict=False)]
            for k, spent in enumerate(self.times[:-1])
        ]
        self.cheapest = [min(seconds / chain for chain, seconds in row) for row in self.gains]
        self.commonest.sort(key=self.seen.__getitem__, reverse=True)

    def _pays(self, k: int, reach: float) -> bool:
        """worth > 0, without the maximum: some j has reach * chain > rate * seconds."""
        return reach > self.rate * self.cheapest[k]

    def _worth(self, k: int, reach: float) -> float:
        rate = self.rate
        return max([reach * chain - rate * seconds for chain, seconds in self.gains[k]])

    # ---- learning

    def observe(self, round: Round) -> None:
        for i, b in enumerate(self.bins[: round.accepted + 1]):  # behind the first rejected draft nothing was tested
            self.counts[b][i >= round.accepted] += 1
        self.bins = ()
        self.rounds += 1
        self.costs.observe(round)
        self.tokens = RATE_MEMORY * self.tokens + round.tokens
        self.seconds = RATE_MEMORY * self.seconds + round.seconds

    # ---- to look at, to keep

    def acceptance(self) -> list[float]:
        """Posterior mean of each bin, from the least confident to the most."""
        return [a / (a + b) for a, b in self.counts]

    def state_dict(self) -> dict[str, Any]:
        """What was learned about the head, as plain JSON. Times are left out: they belong to a machine."""
        return {"kind": "thompson", "greedy": self.greedy, "counts": [list(c) for c in self.counts],
                "seen": list(self.seen), "rounds": self.rounds}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that is not of this kind of controller."""
        same = state.get("kind") == "thompson" and state.get("greedy") == self.greedy
        if not same or len(state.get("counts", [])) != BINS or len(state.get("seen", [])) != BINS:
            raise ValueError(
                f"controller state of kind={state.get('kind')}, greedy={state.get('greedy')}: thompson with "
                f"greedy={self.greedy} and {BINS} bins is needed"
            )
        self.counts = [list(map(float, c)) for c in state["counts"]]
        self.seen, self.rounds = list(map(float, state["seen"])), int(state["rounds"])
        self.refreshed = self.rounds
