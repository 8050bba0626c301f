"""Cost-aware Thompson sampling for several texts at once: each draft is worth the tokens that may follow from it, and
costs its share of the rows that all texts share.

Takes the laws of the texts' next drafts, and finished rounds with their times; decides, level by level, for which texts
the exit head runs and which of them draft. docs/control.md derives the rule of one text, which this extends.
"""

import math
import random
from dataclasses import dataclass

from .batch_costs import BatchCosts, between
from .batch_rounds import BatchRound
from .rounds import LONGEST, Confidence
from .thompson import BINS, REFRESH, Beliefs

MEMORY = 0.98
"""Discount factor of earlier rounds in the gain over autoregressive decoding, per round."""
PROBES = (1, 0, 1, 0, 0)
"""Numbers of drafts of all texts in the first rounds of each doubling of their number: they measure the costs there,
from the second time of each on. Rounds without drafts, with which all others are compared, are measured twice."""
AHEAD = (0, 1, 2, 4)
"""Numbers of levels behind the next that are looked ahead."""
TRIALS = 31
"""Discounted number of rounds with drafts (it takes 32) before what they gave as a whole can stop drafting."""
FADING = 0.998
"""Discount factor of what they gave, per round."""
SPREAD = 0.05
"""Standard deviation of what a single round gives, as it is thought to be before any."""


@dataclass
class Yields:
    """What recent rounds gave, each over what rounds without drafts give in its seconds according to the tables."""

    count: float = 0.0
    """Rounds, discounted as the sums are."""
    sum: float = 0.0
    squares: float = 0.0

    def fade(self) -> None:
        self.count, self.sum, self.squares = (FADING * x for x in (self.count, self.sum, self.squares))

    def add(self, x: float) -> None:
        self.count, self.sum, self.squares = self.count + 1, self.sum + x, self.squares + x * x

    def sample(self, dice: random.Random) -> float:
        """A draw of their mean: normal, with the standard error of so many rounds and one more, which gave what the
        tables say, within `SPREAD`."""
        count = self.count + 1
        mean = (self.sum + 1) / count
        return dice.gauss(mean, math.sqrt(((self.squares + 1 + SPREAD * SPREAD) / count - mean * mean) / count))


class BatchThompson(Beliefs):
    """Drafts for the texts whose drafts are worth more than their rows cost; for none where that pays best.

    theta_b ~ Beta(a_b, b_b) is the sampled acceptance of each bin b of confidence. reach_i is the product of the theta
    of the drafts that text i made in this round; s, h, v are the seconds of a shallow pass, of a head pass, and of a
    verification with all else, by their rows; r are the rows to verify so far, abar is as in thompson.py, and chain_j =
    1 + abar + ... + abar^(j-1). With m texts that may go on, a further row of each would cost c = (v(r + m) - v(r) +
    h(m) + s(m)) / m. The token offered to text i is worth itself and what may follow from it,

      gain_i = reach_i + max over j >= 0 of  reach_i (chain_{j+1} - 1) - rate j c

    where reach_i includes theta of the offered token, and those n texts of the largest reach_i draft that maximise

      worth(n) = sum_i gain_i - rate (s(n) + v(r + n) - v(r))

    if it is above 0. Before the laws are known, the exit head runs for those m texts for which the expected worth of
    drafting where the confidence then falls into the best bins is most above rate h(m). So rows go to texts by what
    each is expected to yield, until the next would cost more: the greedy solution of a knapsack of equal weights.

    rate is B / C(0), the tokens per second of B texts without drafts, times the gain over it in recent rounds, at least
    1: a number of texts for which drafting never paid is so judged by its own costs.

    The estimates that are added up here may all be too favourable: seconds are those of undisturbed passes, and of
    several sampled acceptances the largest are followed. So what rounds with drafts and rounds without gave as a whole
    is measured too, by number of texts: after 32 of the former both means are sampled at every refresh, and if the
    latter is larger, nobody drafts until the next. What was measured fades, so that both are tried again.

    A round without drafts teaches nothing about drafting, so with probability 1 / sqrt(10000 + n) after n rounds some
    texts, a number drawn log-uniformly from 1 to all, draft one token nevertheless, if fewer would: that also finds the
    widths up to which rows are free. What such rounds and the first ones gave is not counted as what drafting gives.
    """

    limit = LONGEST

    def __init__(self, greedy: bool = True, seed: int = 0):
        super().__init__(greedy)
        self.random = random.Random(seed)
        self.costs = BatchCosts()
        self.tokens = self.plain = 0.0
        """Tokens of recent rounds, and what rounds without drafts would have given in the same seconds."""
        self.rounds = self.refreshed = 0
        """Finished rounds; those at the last refresh."""
        self.plans: dict[int, list[int]] = {}
        self.yields: dict[tuple[int, bool], Yields] = {}
        """By doublings of the number of texts, as `plans` is, and by whether any drafted."""
        # State of the round.
        self.count = self.rows = 0
        self.forced: int | None = None
        self.probe = 0
        """Number of texts that draft one token whatever it is worth, if fewer would."""
        self.tried = False
        """Whether they did."""
        self.reach: list[float] = []
        self.bins: list[list[int]] = []
        # Valid until the next refresh.
        self.tables: tuple[list[float], ...] = ()
        self.theta: list[float] = []
        self.chains: list[float] = []
        self.rate = 0.0
        self.pauses = False
        """Whether nobody drafts, as drafting gave less than it cost."""
        self.best: list[tuple[float, float]] = []
        """(sampled acceptance, share of the drafts) of each bin, from the best on."""

    # ---- decisions

    def begin(self, count: int) -> None:
        changed = count != self.count
        self.count, self.rows = count, count
        self.reach, self.bins = [1.0] * count, [[] for _ in range(count)]
        plan = self.plans.setdefault(count.bit_length(), list(PROBES))
        self.forced = plan.pop(0) if plan else None
        rarely = self.random.random() < (10_000 + self.rounds) ** -0.5
        self.probe = int(count ** self.random.random() + 0.5) if rarely else 0
        self.tried = False
        if changed or self.rounds - self.refreshed >= REFRESH or self.rounds < REFRESH:
            self._refresh()

    def peek(self, level: int, places: list[int]) -> list[int]:
        if level >= self.limit:
            return []
        if self.forced is not None:
            return places if level < self.forced else []
        order = sorted(places, key=lambda place: -self.reach[place])
        chosen = 0 if self.pauses else self._worth_asking(level, order)
        if level > 0 or chosen >= self.probe:
            self.probe = 0
            return order[:chosen]
        self.tried = True
        return self.random.sample(places, min(self.probe, len(places)))

    def _worth_asking(self, level: int, order: list[int]) -> int:
        """For how many of these places, whose drafts so far are ever less likely to be accepted, the head runs."""
        most, chosen, price = 0.0, 0, self._price(len(order))
        _, head, _ = self.tables
        sums, known = [0.0] * BINS, dict[float, list[float]]()
        for m, place in enumerate(order, start=1):
            reach = self.reach[place]
            if reach not in known:
                known[reach] = [self._gain(reach * theta, level, price) for theta, _ in self.best]
            sums = [total + gain for total, gain in zip(sums, known[reach], strict=True)]
            if m & (m - 1) and m != len(order):  # 1, 2, 4, ... and all
                continue
            share = gains = 0.0
            for (_, often), total in zip(self.best, sums, strict=True):
                share, gains = share + often, gains + often * total
                worth = gains - self.rate * (self._rows(share * m) + head[m])
                if worth > most:
                    most, chosen = worth, m
        return chosen

    def draft(self, level: int, laws: dict[int, Confidence]) -> list[int]:
        reach = {}
        for place, law in laws.items():
            b = self.note(law)
            self.bins[place].append(b)
            reach[place] = self.reach[place] * self.theta[b]
        chosen = order = sorted(laws, key=lambda place: -reach[place])
        if self.forced is None and not self.probe:
            most, count, gains, price = 0.0, 0, 0.0, self._price(len(order))
            for n, place in enumerate(order, start=1):
                gains += self._gain(reach[place], level, price)
                worth = gains - self.rate * self._rows(n)
                if worth > most:
                    most, count = worth, n
            chosen = order[:count]
        for place in chosen:
            self.reach[place] = reach[place]
        for place in order[len(chosen) :]:
            self.bins[place].pop()  # it was not tested
        self.rows += len(chosen)
        return chosen

    def _rows(self, n: float) -> float:
        """The seconds of n more rows in this round, without the head pass that offered them."""
        shallow, _, verify = self.tables
        return between(shallow, n) + between(verify, self.rows + n) - verify[self.rows]

    def _price(self, m: int) -> float:
        """c: the seconds of a further row of each of m texts, by text."""
        return (self._rows(m) + self.tables[1][m]) / m

    def _gain(self, reach: float, level: int, price: float) -> float:
        """Expected tokens of a draft that is accepted with the chance `reach` and of what may follow, less the cost of
        what follows."""
        later = [reach * (self.chains[j + 1] - 1) - self.rate * price * j for j in AHEAD if level + j < self.limit]
        return reach + max(later, default=0.0)

    def _refresh(self) -> None:
        """Discount counts, draw new acceptances, and recompute costs and the rate."""
        self.discount(self.rounds - self.refreshed)
        self.refreshed = self.rounds
        self.theta = [self.random.betavariate(*count) for count in self.counts]
        seen, abar = sum(self.seen), self.mean_acceptance()
        self.chains = [0.0, 1.0]
        for _ in range(self.limit - 1):
            self.chains.append(1 + abar * self.chains[-1])
        self.costs.forget()
        parts, most = (self.costs.shallow, self.costs.head, self.costs.verify), self.count * (self.limit + 1)
        self.tables = tuple(part.table(most) for part in parts)
        self.rate = max(1.0, self.gain()) * self._plain_rate()
        without, drafted = (self.yields.get((self.count.bit_length(), some), Yields()) for some in (False, True))
        self.pauses = drafted.count >= TRIALS and drafted.sample(self.random) < without.sample(self.random)
        self.best = sorted(((theta, n / seen) for theta, n in zip(self.theta, self.seen, strict=True)), reverse=True)

    def _plain_rate(self) -> float:
        """B / C(0): tokens per second without drafts; 0 before the first times."""
        shallow, _, verify = self.tables
        seconds = shallow[self.count] + verify[self.count]
        return self.count / seconds if seconds > 0 else 0.0

    def gain(self) -> float:
        """Tokens of recent rounds over those that rounds without drafts would have given in the same time."""
        return self.tokens / self.plain if self.plain > 0 else 1.0

    # ---- learning

    def observe(self, round: BatchRound) -> None:
        for bins, text in zip(self.bins, round.texts, strict=True):
            for b, (_, accepted) in zip(bins, text.tested(), strict=False):
                self.counts[b][accepted != 0] += 1
        known = self.costs.observe(round)
        self.rounds += 1
        plain = round.seconds * self._plain_rate()
        kinds = [self.yields.setdefault((round.count.bit_length(), some), Yields()) for some in (False, True)]
        for kind in kinds:
            kind.fade()
        if self.forced is not None or self.tried:  # what learning costs is not what drafting gives
            return
        if known and plain > 0:
            kinds[bool(round.head)].add(round.tokens / plain)
        self.tokens, self.plain = MEMORY * self.tokens + round.tokens, MEMORY * self.plain + plain
