"""Several sources of drafts under one control: the exit head, the text itself, and earlier texts (lookup.py).

`WithLookup` wraps a controller of the head. At the start of a round it may copy drafts instead. It decides by the
length of the match and where it is, which are functions of committed text, so decoding stays lossless
(docs/control.md).
"""

import random

from .costs import Costs
from .lookup import Match, Memory
from .rounds import LONGEST, Confidence, Controller, Round, reads_of, spare_of
from .thompson import RATE_MEMORY, REFRESH, Thompson, fade

BINS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Lengths of a match at which a bin of its own begins: the longer, the more often the next token is copied rightly."""
SPREAD = 1.0
"""Standard deviation of the tokens of a round of the head, roughly."""
PRIOR = 2.0
"""Weight of the prior, in drafts."""


class WithLookup:
    """Copies drafts where that is worth more than a round of the head.

    With theta of a match's length, sampled from its Beta posterior, n copied drafts have the value
        v(n) = 1 + theta_m + theta_m theta_{m+1} + ... (n terms) - rate * C(n)
    as an accepted draft lengthens the match m by one; rate is the tokens per second of all rounds, C(n) the measured
    seconds of a round of n copied drafts. They are copied iff the largest v(n) exceeds the value of a round of the
    head at the same rate. That is sampled from a normal distribution around the mean of those seen: after few of them,
    or long after the last, it is uncertain, and the head gets its turn. The head's controller learns from its own
    rounds only, and is told the rate.
    """

    def __init__(
        self, head: Controller, greedy: bool = True, seed: int = 0, limit: int = LONGEST, memory: Memory | None = None
    ):
        self.head, self.limit, self.random, self.memory = head, limit, random.Random(seed), memory
        self.reads, self.spare = reads_of(head), spare_of(head)
        self.costs = head.costs if isinstance(head, Thompson) else Costs()
        chances = [n / (n + (4 if greedy else 16)) for n in BINS]
        self.prior = [(PRIOR * a, PRIOR * (1 - a)) for a in chances]
        copied = ["lookup"] if memory is None else ["lookup", "memory"]
        self.counts = {source: [list(p) for p in self.prior] for source in copied}
        """counts[source][b]: accepted and rejected tokens that were copied from there, by bin of the match's length."""
        self.matched = 0
        """Length of the match whose continuation is drafted in this round; 0 in a round of the head."""
        self.tokens = dict.fromkeys(["head", *copied], 0.0)
        """Tokens of the rounds of each source, discounted."""
        self.lengths = {name: [0.0] * (limit + 1) for name in self.tokens}
        """lengths[source][k]: number of rounds with k drafts in a chain, discounted."""
        self.leaves = 0.0
        """Number of drafts beside these chains, discounted."""
        self.rounds = self.refreshed = 0
        # Valid until the next refresh.
        self.theta: dict[str, list[float]] = {}
        """Sampled acceptance of each bin, by source."""
        self.prices: list[float] = []
        """prices[n]: rate * C(n), what the time of n copied drafts is worth in tokens."""
        self.rival = 0.0
        """Sampled value of a round of the head."""

    # ---- decisions

    def look(self, match: Match) -> int:
        """How many tokens to copy behind a match; 0 leaves the round to the head."""
        self.matched = 0
        if not self.prices or self.rounds - self.refreshed >= (REFRESH if self.rounds >= 4 * REFRESH else 1):
            self._refresh()
        expected = reach = 1.0
        best, count, matched, theta = self.rival, 0, match.length, self.theta[match.source]
        for n, price in enumerate(self.prices[1:], 1):
            reach *= theta[bin_of(matched + n - 1)]
            expected += reach
            if expected - price > best:
                best, count = expected - price, n
        self.matched = matched if count else 0
        return count

    def _refresh(self) -> None:
        """Discount counts, draw acceptances and the value of a round of the head, recompute costs and rate. It is done
        every few rounds only, because its time must be small compared with that of a token."""
        for counts in self.counts.values():
            fade(counts, self.prior, self.rounds - self.refreshed)
        self.refreshed = self.rounds
        self.theta = {
            source: [self.random.betavariate(*count) for count in counts] for source, counts in self.counts.items()
        }
        copied = self.costs.copied_rounds(self.limit)
        times = {"head": self.costs.rounds(self.limit)} | dict.fromkeys(self.counts, copied)
        seconds = {name: sum(n * t for n, t in zip(self.lengths[name], times[name], strict=True)) for name in times}
        seconds["head"] += self.leaves * self.costs.row() if self.leaves else 0.0
        own = sum(self.lengths["head"])
        if not own or not seconds["head"]:
            return  # the head's rounds are timed first
        rate = sum(self.tokens.values()) / sum(seconds.values())
        self.prices = [rate * t for t in copied]
        self.rival = self.random.gauss((self.tokens["head"] - rate * seconds["head"]) / own, SPREAD / own**0.5)
        if isinstance(self.head, Thompson):
            self.head.elsewhere = rate

    def peek(self, k: int) -> bool:
        return self.head.peek(k)

    def draft(self, k: int, confidence: Confidence) -> int:
        return self.head.draft(k, confidence)

    # ---- learning

    def observe(self, round: Round) -> None:
        source = round.source
        if source != "head":
            self.costs.observe(round)
            for i in range(min(round.accepted + 1, round.drafted)):  # drafts behind a rejected one were not tested
                self.counts[source][bin_of(self.matched + i)][i >= round.accepted] += 1
        else:
            if not isinstance(self.head, Thompson):
                self.costs.observe(round)
            self.head.observe(round)
        self.rounds += 1
        for name in self.tokens:
            self.tokens[name] *= RATE_MEMORY
            self.lengths[name] = [RATE_MEMORY * n for n in self.lengths[name]]
        self.tokens[source] += round.tokens
        self.lengths[source][min(round.levels, self.limit)] += 1
        self.leaves = RATE_MEMORY * self.leaves + round.drafted - round.levels
        self.matched = 0


def bin_of(matched: int) -> int:
    """Index of the bin of a match of this length, from 1 on."""
    return sum(matched >= first for first in BINS) - 1
