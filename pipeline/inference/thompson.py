"""The cost-aware Thompson-sampling controller, our default: draft while the expected tokens are worth the seconds.

Takes the head's confidence before each draft, and finished rounds with their times; decides whether to draft on.
Tokens per second are largest when every decision raises tokens - rate * seconds, `rate` being what is reached in the
long run (docs/control.md derives it).
"""

import random
from typing import Any

from .costs import PROBES, Costs
from .rounds import LONGEST, Confidence, Round

BINS = 8
PRIOR = 2.0
"""Weight of the prior, in drafts. Until seen, a bin's acceptance is thought to be its confidence x where drafts must
equal the backbone's choice, and (1 + x) / 2 where they need only be likely enough."""
MEMORY = 0.999
"""What a round leaves of the counts of earlier rounds: acceptance changes with the text."""
RATE_MEMORY = 0.995
"""What a round leaves of the earlier ones in the rate."""
REFRESH = 8
"""Rounds that decide by the same draws, costs and rate; one while little is known."""


class Thompson:
    """Sampled acceptances per confidence bin, measured costs, look-ahead over several drafts.

    theta_b ~ Beta(a_b, b_b) is drawn for every bin b of confidence, in every round at first, then for `REFRESH` rounds
    at a time. With P the product of the theta of the drafts made, C(k) the seconds of a round with k drafts, h those of
    a head pass, abar the mean acceptance over bins as they occur, and rate the tokens of recent rounds over what these
    rounds cost by C (never below 1 / C(0), which needs no drafting):
      worth(k, a) = max over j >= 1 of  P a (1 + abar + ... + abar^(j-1)) - rate (C(k+j) - C(k) - h)
      draft, q known, its pass paid:   go on iff worth(k, theta_bin) > 0
      peek, q not known:               look iff  E_b[max(0, worth(k, theta_b))] > rate h
    Refusing the first peek is K = 0, one autoregressive token. It teaches nothing about drafting, so one such round
    in sqrt(100 + n) drafts all the same. The first rounds draft each of PROBES twice, once to warm up and once to
    measure C; later rounds draft that many again when it was not done for long (`Costs.due`).
    """

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
        self.tokens = 0.0
        """Tokens of all rounds, discounted by RATE_MEMORY."""
        self.lengths = [0.0] * (limit + 1)
        """How many of these rounds had each number of drafts."""
        self.idle = 0.0
        """Head passes that no draft came from."""
        self.rounds = self.refreshed = 0
        self.plan = [] if costs else [min(k, limit) for _ in range(2) for k in PROBES]
        """Numbers of drafts of the next rounds, as long as costs are being measured."""
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
        """times[k] = C(k)."""
        self.head = 0.0
        """h."""
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
        needed, most = unseen * self.rate * self.head, self._worth(k, self.product)
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
        self.forced = self.plan.pop(0) if self.plan else self.costs.due(self.limit)
        if not self.times or self.rounds - self.refreshed >= (REFRESH if self.costs.now >= 4 * REFRESH else 1):
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
        self.times, self.head = self.costs.rounds(self.limit), self.costs.head.value()
        self.rate = self._rate()
        self.theta, self.looks = [self.random.betavariate(*count) for count in self.counts], {}
        self.gains = [
            [(g, c - spent - self.head) for g, c in zip(self.chains, self.times[k + 1 :], strict=False)]
            for k, spent in enumerate(self.times[:-1])
        ]
        self.cheapest = [min(seconds / chain for chain, seconds in row) for row in self.gains]
        self.commonest.sort(key=self.seen.__getitem__, reverse=True)

    def _rate(self) -> float:
        """Tokens per second of recent rounds, at what they cost now: when the machine becomes slower, `times` and rate
        change together, and what pays does not."""
        alone = 1 / self.times[0] if self.times[0] > 0 else 0.0
        seconds = sum(n * t for n, t in zip(self.lengths, self.times, strict=True))
        seconds += self.idle * self.head
        return max(alone, self.tokens / seconds if seconds > 0 else 0.0)

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
        self.lengths = [RATE_MEMORY * n for n in self.lengths]
        self.lengths[round.drafted] += 1
        self.idle = RATE_MEMORY * self.idle + round.head_passes - round.drafted

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
