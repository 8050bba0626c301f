"""Cost-aware Thompson sampling for several texts at once: each draft is worth the tokens that may follow from it, and
costs its share of the rows that all texts share.

Takes the laws of the texts' next drafts, and finished rounds with their times; decides, level by level, for which texts
the exit head runs and which of them draft. docs/control.md derives the rule of one text, which this extends.
"""

import random
from typing import Any

from .batch_costs import BatchCosts
from .batch_costs import between
from .batch_rounds import BatchRound
from .rounds import LONGEST, Confidence
from .thompson import BINS, PRIOR, REFRESH, fade

MEMORY = 0.98
"""Discount factor of earlier rounds in the gain over autoregressive decoding, per round."""
PROBES = (1, 0)
"""Numbers of drafts of all texts in the first rounds of each doubling of their number: they measure the costs there."""
AHEAD = (1, 2, 3, 5, LONGEST)
"""Numbers of levels that are looked ahead."""


class BatchThompson:
    """Drafts for the texts whose drafts are worth more than their rows cost; for none where that pays best.

    theta_b ~ Beta(a_b, b_b) is the sampled acceptance of each bin b of confidence. reach_i is the product of the theta of
    the drafts that text i made in this round, s, h, v the seconds of a shallow, head and verification pass by their rows,
    r the rows to verify so far, chain_j = 1 + abar + ... + abar^(j-1) as in thompson.py. If the n texts of the largest
    reach_i draft j more levels,

      worth(n, j) = chain_j sum_i reach_i - rate (s(n) + v(r + n j) - v(r) + (j - 1) (h(n) + s(n)))

    After the laws are known, reach_i includes theta of the offered draft, and those n texts draft that maximise worth, if
    it is above 0. Before, the exit head runs for m texts where the expected worth of drafting for those whose confidence
    then falls into the best bins is above rate h(m). So rows are given to texts by what each is expected to yield, until
    the next would cost more: the greedy solution of a knapsack whose weights are equal.

    rate is B / C(0), the tokens per second of B texts without drafts, times the gain over it in recent rounds, at least
    1: a number of texts for which drafting never paid is so judged by its own costs.

    A round without drafts teaches nothing about drafting, so with probability 1 / sqrt(1000 + n) after n rounds a few
    texts, 1 to all of them in proportion to 1 / their number, draft one token nevertheless: that also finds the widths
    up to which rows are free.
    """

    limit = LONGEST

    def __init__(self, greedy: bool = True, seed: int = 0):
        self.greedy, self.random = greedy, random.Random(seed)
        middles = [(b + 0.5) / BINS for b in range(BINS)]
        self.prior = [(PRIOR * a, PRIOR * (1 - a)) for a in (middles if greedy else [(1 + x) / 2 for x in middles])]
        self.counts = [list(p) for p in self.prior]
        self.seen = [1.0] * BINS
        """How often q fell into each bin, discounted like the counts."""
        self.costs = BatchCosts()
        self.tokens = self.plain = 0.0
        """Tokens of recent rounds, and what rounds without drafts would have given in the same seconds."""
        self.rounds = self.refreshed = 0
        """Finished rounds; those at the last refresh."""
        self.plans: dict[int, list[int]] = {}
        # State of the round.
        self.count = self.rows = 0
        self.forced: int | None = None
        self.probe = 0
        """Number of texts that draft one token whatever it is worth, if none would."""
        self.reach: list[float] = []
        self.bins: list[list[int]] = []
        # Valid until the next refresh.
        self.tables: tuple[list[float], ...] = ()
        self.theta: list[float] = []
        self.chains: list[float] = []
        self.rate = 0.0
        self.hopes: list[tuple[float, float]] = []
        """(share of drafts in the best bins, their share of the drafts that are accepted), from the best bin on."""

    # ---- decisions

    def begin(self, count: int) -> None:
        changed = count != self.count
        self.count, self.rows = count, count
        self.reach, self.bins = [1.0] * count, [[] for _ in range(count)]
        plan = self.plans.setdefault(count.bit_length(), list(PROBES))
        self.forced = plan.pop(0) if plan else None
        rarely = self.random.random() < (1000 + self.rounds) ** -0.5
        self.probe = int(count ** self.random.random() + 0.5) if rarely else 0
        if changed or self.rounds - self.refreshed >= REFRESH or self.rounds < REFRESH:
            self._refresh()

    def peek(self, level: int, places: list[int]) -> list[int]:
        if level >= self.limit:
            return []
        if self.forced is not None:
            return places if level < self.forced else []
        order = sorted(places, key=lambda place: -self.reach[place])
        most, chosen, total = 0.0, 0, 0.0
        _, head, _ = self.tables
        for m, place in enumerate(order, start=1):
            total += self.reach[place]
            if m & (m - 1) and m != len(order):  # 1, 2, 4, ... and all
                continue
            worth = max(self._worth(total * accepted, m * share, level) for share, accepted in self.hopes)
            if worth - self.rate * head[m] > most:
                most, chosen = worth - self.rate * head[m], m
        if chosen or level > 0:
            self.probe = 0
        return order[:chosen] if chosen else self.random.sample(places, min(self.probe, len(places)))

    def draft(self, level: int, laws: dict[int, Confidence]) -> list[int]:
        reach = {}
        for place, law in laws.items():
            b = min(BINS - 1, int((law.top if self.greedy else law.collision) * BINS))
            self.seen[b] += 1
            self.bins[place].append(b)
            reach[place] = self.reach[place] * self.theta[b]
        chosen = order = sorted(laws, key=lambda place: -reach[place])
        if self.forced is None and not self.probe:
            most, count, total = 0.0, 0, 0.0
            for n, place in enumerate(order, start=1):
                total += reach[place]
                worth = self._worth(total, n, level)
                if worth > most:
                    most, count = worth, n
            chosen = order[:count]
        for place in chosen:
            self.reach[place] = reach[place]
        for place in order[len(chosen) :]:
            self.bins[place].pop()  # it was not tested
        self.rows += len(chosen)
        return chosen

    def _worth(self, total: float, n: float, level: int) -> float:
        """The largest worth(n, j) over j, where the reach of the n drafts adds up to `total`."""
        shallow, head, verify = self.tables
        once, again, so_far = between(shallow, n), between(head, n) + between(shallow, n), verify[self.rows]
        best = 0.0
        for j in AHEAD:
            if level + j > self.limit:
                break
            seconds = once + between(verify, self.rows + n * j) - so_far + (j - 1) * again
            best = max(best, total * self.chains[j] - self.rate * seconds)
        return best

    def _refresh(self) -> None:
        """Discount counts, draw new acceptances, and recompute costs and the rate."""
        faded = fade(self.counts, self.prior, self.rounds - self.refreshed)
        self.refreshed = self.rounds
        self.seen = [max(1e-3, (1 - faded) * n) for n in self.seen]
        self.theta = [self.random.betavariate(*count) for count in self.counts]
        seen = sum(self.seen)
        abar = sum(n * a for n, a in zip(self.seen, self.acceptance(), strict=True)) / seen
        self.chains = [0.0, 1.0]
        for _ in range(self.limit - 1):
            self.chains.append(1 + abar * self.chains[-1])
        self.costs.forget()
        parts, most = (self.costs.shallow, self.costs.head, self.costs.verify), self.count * (self.limit + 1)
        self.tables = tuple(part.table(most) for part in parts)
        self.rate = max(1.0, self.gain()) * self._plain_rate()
        share = accepted = 0.0
        self.hopes = []
        for theta, n in sorted(zip(self.theta, self.seen, strict=True), reverse=True):
            share, accepted = share + n / seen, accepted + theta * n / seen
            self.hopes.append((share, accepted))

    def _plain_rate(self) -> float:
        """B / C(0): tokens per second without drafts; 0 before the first times."""
        shallow, _, verify = self.tables
        seconds = shallow[self.count] + verify[self.count] + self.costs.rest.table(self.count)[self.count]
        return self.count / seconds if seconds > 0 else 0.0

    def gain(self) -> float:
        """Tokens of recent rounds over those that rounds without drafts would have given in the same time."""
        return self.tokens / self.plain if self.plain > 0 else 1.0

    # ---- learning

    def observe(self, round: BatchRound) -> None:
        for bins, text in zip(self.bins, round.texts, strict=True):
            for b, (_, accepted) in zip(bins, text.tested(), strict=False):
                self.counts[b][accepted != 0] += 1
        self.costs.observe(round)
        self.rounds += 1
        if self.forced is None:  # probes are what learning costs, not what drafting gives
            self.tokens = MEMORY * self.tokens + round.tokens
            self.plain = MEMORY * self.plain + round.seconds * self._plain_rate()

    # ---- inspecting and loading

    def acceptance(self) -> list[float]:
        """Posterior mean acceptance of each bin, from the least confident to the most."""
        return [a / (a + b) for a, b in self.counts]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the acceptances of a `thompson.Thompson.state_dict`. Raises ValueError for another state."""
        same = state.get("kind") == "thompson" and state.get("greedy") == self.greedy
        if not same or len(state.get("counts", [])) != BINS or len(state.get("seen", [])) != BINS:
            raise ValueError(f"controller state of kind={state.get('kind')}, greedy={state.get('greedy')}: not thompson's")
        self.counts = [list(map(float, c)) for c in state["counts"]]
        self.seen = list(map(float, state["seen"]))
