"""The default controller: cost-aware Thompson sampling, which drafts while the expected tokens are worth the seconds.

Takes the head's confidence before each draft, and finished rounds with their times; decides whether to draft another
token. Tokens per second are maximal when every decision maximises tokens - rate * seconds, where `rate` is the tokens
per second reached in the long run (docs/control.md derives it).
"""

import random
from typing import Any

from .costs import Costs, first_probes
from .rounds import LONGEST, Confidence, Round

BINS = 8
PRIOR = 2.0
"""Weight of the prior, in drafts. The prior mean of a bin's acceptance is its confidence x in greedy decoding, where a
draft must equal the backbone's choice, and (1 + x) / 2 in sampling, where acceptance is more likely."""
MEMORY = 0.999
"""Discount factor of earlier rounds in the acceptance counts, per round, because acceptance changes with the text."""
RATE_MEMORY = 0.995
"""Discount factor of earlier rounds in the rate, per round."""
REFRESH = 8
"""Number of rounds that use the same sampled acceptances, costs and rate. In the first rounds it is 1."""


def fade(counts: list[list[float]], prior: list[tuple[float, float]], rounds: int) -> float:
    """Move the counts of each bin towards the prior, as far as `rounds` rounds discount them;
    gives that share."""
    faded = 1 - MEMORY**rounds
    for count, start in zip(counts, prior, strict=True):
        count[0] += faded * (start[0] - count[0])
        count[1] += faded * (start[1] - count[1])
    return faded


class Beliefs:
    """What is believed of the acceptance of drafts, by bins of the head's confidence: Beta counts, and how often q
    falls into each bin. greedy: whether the text is decoded greedily."""

    def __init__(self, greedy: bool):
        self.greedy = greedy
        middles = [(b + 0.5) / BINS for b in range(BINS)]
        thought = middles if greedy else [(1 + x) / 2 for x in middles]
        self.prior = [(PRIOR * a, PRIOR * (1 - a)) for a in thought]
        self.counts = [list(p) for p in self.prior]
        self.seen = [1.0] * BINS
        """How often q fell into each bin, discounted by MEMORY."""

    def signal(self, confidence: Confidence) -> float:
        """The figure in [0, 1] that predicts acceptance: max q in greedy decoding, sum q^2 in sampling, where it
        predicts the overlap of q with p better (docs/lab-notes.md has the log-loss of both on held-out prompts)."""
        return confidence.top if self.greedy else confidence.collision

    def note(self, confidence: Confidence) -> int:
        """The bin of a confidence, which is counted."""
        b = min(BINS - 1, int(self.signal(confidence) * BINS))
        self.seen[b] += 1
        return b

    def discount(self, rounds: int) -> None:
        """Let `rounds` rounds pass."""
        faded = fade(self.counts, self.prior, rounds)
        self.seen = [max(1e-3, (1 - faded) * n) for n in self.seen]

    def acceptance(self) -> list[float]:
        """Posterior mean acceptance of each bin, from the least confident to the most."""
        return [a / (a + b) for a, b in self.counts]

    def mean_acceptance(self) -> float:
        """The mean over the bins, weighted by how often they occur."""
        return sum(n * a for n, a in zip(self.seen, self.acceptance(), strict=True)) / sum(self.seen)

    def load_beliefs(self, state: dict[str, Any]) -> None:
        """Continue from the counts of a `Thompson.state_dict`. Raises ValueError for the state of another kind of
        controller."""
        same = state.get("kind") == "thompson" and state.get("greedy") == self.greedy
        if not same or len(state.get("counts", [])) != BINS or len(state.get("seen", [])) != BINS:
            raise ValueError(
                f"controller state of kind={state.get('kind')}, greedy={state.get('greedy')}: thompson with "
                f"greedy={self.greedy} and {BINS} bins is needed"
            )
        self.counts = [list(map(float, c)) for c in state["counts"]]
        self.seen = list(map(float, state["seen"]))


class Thompson(Beliefs):
    """Decides by an acceptance sampled for each confidence bin, measured costs, and look-ahead over several drafts.

    theta_b ~ Beta(a_b, b_b) is drawn for every bin b of confidence, in every round at first, later every `REFRESH`
    rounds. P is the product of the theta of the drafts made, C(k) the seconds of a round with k drafts, h the seconds
    of a head pass, abar the mean acceptance over the bins, weighted by how often they occur, and rate the number of
    tokens of recent rounds divided by their cost according to C (at least 1 / C(0), the rate without drafting):
      worth(k, a) = max over j >= 1 of  P a (1 + abar + ... + abar^(j-1)) - rate (C(k+j) - C(k) - h)
      draft (q is known, the head pass is spent):  draft iff  worth(k, theta_bin) > 0
      peek (q is not known yet):                   run the head iff  E_b[max(0, worth(k, theta_b))] > rate h
    A refused first peek means K = 0, one autoregressive token. Such a round teaches nothing about drafting, so with
    probability 1 / sqrt(100 + n) after n rounds it drafts one token nevertheless. The first rounds draft each number in
    PROBES twice, once to warm up and once to measure C; later rounds repeat one that was not timed for a long while
    (`Costs.due`).
    """

    def __init__(self, greedy: bool = True, seed: int = 0, limit: int = LONGEST, costs: Costs | None = None):
        super().__init__(greedy)
        self.limit, self.random = limit, random.Random(seed)
        self.costs = costs or Costs()
        self.tokens = 0.0
        """Number of tokens of all rounds, discounted by RATE_MEMORY."""
        self.lengths = [0.0] * (limit + 1)
        """lengths[k]: number of rounds with k drafts in a chain, discounted alike."""
        self.idle = 0.0
        """Number of head passes after which nothing was drafted, discounted alike."""
        self.elsewhere = 0.0
        """Tokens per second of all rounds, where others than those of the head are among them (sources.py)."""
        self.rounds = self.refreshed = 0
        self.plan = [] if costs else first_probes(limit)
        """Prescribed numbers of drafts of the next rounds, in which costs are first measured."""
        # State of the current round.
        self.bins: tuple[int, ...] = ()
        self.product = 1.0
        self.forced: int | None = None
        # Valid until the next refresh.
        self.theta: list[float] = []
        """Sampled acceptance of each bin."""
        self.looks: dict[tuple[int, ...], bool] = {}
        """Bins of the drafts made in a round -> whether to peek after them."""
        self.chains: list[float] = []
        """chains[j] = 1 + abar + ... + abar^j: expected tokens of j + 1 more drafts once the first is accepted."""
        self.times: list[float] = []
        """times[k] = C(k), in seconds."""
        self.head = 0.0
        """h: seconds of a head pass."""
        self.gains: list[list[tuple[float, float]]] = []
        """gains[k][j-1] = (chain, seconds) of j >= 1 further drafts after k, the two terms of `worth`."""
        self.cheapest: list[float] = []
        """cheapest[k]: the minimum of seconds / chain in gains[k]."""
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
        """Whether E_b[max(0, worth(k, theta_b))] > rate h. It visits bins from the most frequent one on until the
        answer is certain, usually after one."""
        unseen = sum(self.seen)
        needed, most = unseen * self.rate * self.head, self._worth(k, self.product)
        for b in self.commonest:
            needed -= self.seen[b] * self._value(k, b)
            unseen -= self.seen[b]
            if needed < 0 or needed >= unseen * most:
                break
        return needed < 0

    def draft(self, k: int, confidence: Confidence) -> int:
        b = self.note(confidence)
        if self.forced is None and self._value(k, b) <= 0:
            return False
        self.product *= self.theta[b]
        self.bins += (b,)
        return True

    def _begin(self) -> None:
        self.bins, self.product = (), 1.0
        self.forced = self.plan.pop(0) if self.plan else self.costs.due(self.limit)
        if not self.times or self.rounds - self.refreshed >= (REFRESH if self.costs.now >= 4 * REFRESH else 1):
            self._refresh()

    def _refresh(self) -> None:
        """Discount counts, draw new acceptances, and recompute costs, rate and the tables that decisions use. It is
        done every few rounds only, because its time must be small compared with that of a token."""
        self.discount(self.rounds - self.refreshed)
        self.refreshed = self.rounds
        abar = self.mean_acceptance()
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
        """Tokens per second of recent rounds at current costs. When the machine becomes slower, `times` and the rate
        change by the same factor, so decisions do not."""
        alone = 1 / self.times[0] if self.times[0] > 0 else 0.0
        seconds = self._seconds()
        return max(alone, self.elsewhere, self.tokens / seconds if seconds > 0 else 0.0)

    def _seconds(self) -> float:
        """What recent rounds cost at current costs."""
        return sum(n * t for n, t in zip(self.lengths, self.times, strict=True)) + self.idle * self.head

    def _value(self, k: int, b: int) -> float:
        """max(0, worth) of a draft of bin b after k drafts."""
        reach = self.product * self.theta[b]
        return self._worth(k, reach) if self._pays(k, reach) else 0.0

    def _pays(self, k: int, reach: float) -> bool:
        """Whether worth > 0, without computing the maximum: some j has reach * chain > rate * seconds."""
        return reach > self.rate * self.cheapest[k]

    def _worth(self, k: int, reach: float) -> float:
        rate = self.rate
        return max([reach * chain - rate * seconds for chain, seconds in self.gains[k]])

    # ---- learning

    def observe(self, round: Round) -> None:
        for b, (_, accepted) in zip(self.bins, round.tested(), strict=False):
            self.counts[b][accepted != 0] += 1
        self.bins = ()
        self.rounds += 1
        self.costs.observe(round)
        self.tokens = RATE_MEMORY * self.tokens + round.tokens
        self.lengths = [RATE_MEMORY * n for n in self.lengths]
        self.lengths[round.levels] += 1
        self.idle = RATE_MEMORY * self.idle + round.head_passes - round.levels

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """What was learned about the head, ready for JSON. Times are left out because they depend on the machine."""
        return {"kind": "thompson", "greedy": self.greedy, "counts": [list(c) for c in self.counts],
                "seen": list(self.seen), "rounds": self.rounds}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Raises ValueError for the state of another kind of controller."""
        self.load_beliefs(state)
        self.rounds = self.refreshed = int(state["rounds"])
