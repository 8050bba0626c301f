"""Controllers whose drafts branch: fixed shapes, and `thompson` with further candidates beside its drafts.

Takes the head's confidence before each draft, as every controller does; decides how many candidates to draft for a
place. Where the first candidate is wrong and another one is right, the round still yields that one and a bonus token.
"""

from math import prod
from typing import Any

from .rounds import Confidence, Round
from .thompson import BINS, PRIOR, RATE_MEMORY, Thompson, fade
from .tree import WIDEST

CANDIDATES = 4
"""The most candidates for a place."""
LEAVES = 16
"""The most candidates of a round beside its chain."""


class FixedTree:
    """Always drafts a tree of one shape: the pending token has widths[0] candidates after it, each draft of level k has
    widths[k]. EESD's tree attention drafts trees of a fixed shape (Liu et al., 2024), and so does Medusa.

    Raises ValueError for a width below 1, or more than `tree.WIDEST` drafts.
    """

    def __init__(self, widths: list[int]):
        rows = [prod(widths[: k + 1]) for k in range(len(widths))]
        if min(widths, default=0) < 1 or sum(rows) > WIDEST:
            raise ValueError(
                f"a tree of {'x'.join(map(str, widths))}: every width must be 1 or more, and a round has at most "
                f"{WIDEST} drafts"
            )
        self.widths, self.spare = widths, sum(rows) - len(rows)

    def reads(self, k: int) -> int:
        return prod(self.widths[:k])

    def peek(self, k: int) -> bool:
        return k < len(self.widths)

    def draft(self, k: int, confidence: Confidence) -> int:
        return self.widths[k]

    def observe(self, round: Round) -> None:
        pass


class Branching(Thompson):
    """Drafts the chain that `thompson` drafts, and beside each of its drafts further candidates while they pay.

    Such a candidate is a leaf: it needs no pass of the head and none of its own, only one more row in the passes of the
    round. psi_{b,s} ~ Beta is the chance that the s-th candidate beside a draft of bin b is accepted, where that draft
    and the candidates before it are rejected. With P the chance that the place is reached, and theta as in `thompson`:
      draft candidate s  iff  P (1 - theta_b) (1 - psi_{b,1}) ... (1 - psi_{b,s-1}) psi_{b,s} > rate * r
    as it is worth one token; r is the time of one more row (Costs.row). What the leaves of a place are worth is added
    to the worth of its draft. Rounds that measure costs draft no leaves.
    """

    spare = LEAVES

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        chance = 0.25 if self.greedy else 0.15
        self.beside_prior = [(PRIOR * chance, PRIOR * (1 - chance))] * (BINS * (CANDIDATES - 1))
        self.beside = [list(p) for p in self.beside_prior]
        """Accepted and rejected candidates: of bin b, that of index s = 1.. is at b (CANDIDATES - 1) + s - 1."""
        self.leaves = 0.0
        """Number of all leaves, discounted by RATE_MEMORY."""
        self.left = LEAVES
        """How many more leaves this round may have."""
        self.psi: list[float] = []
        self.row = 0.0
        """r: seconds of one more row."""
        self.faded = 0
        """The round in which `beside` was discounted last."""

    def reads(self, k: int) -> int:
        return 1  # the chain goes on from the first candidate

    def draft(self, k: int, confidence: Confidence) -> int:
        reached = self.product
        if not super().draft(k, confidence):
            return 0
        if self.forced is not None:
            return 1
        count, _ = self._leaves(self.bins[-1], reached)
        self.left -= count
        return 1 + count

    def _value(self, k: int, b: int) -> float:
        return max(0.0, self._worth(k, self.product * self.theta[b]) + self._leaves(b, self.product)[1])

    def _leaves(self, b: int, reached: float) -> tuple[int, float]:
        """How many candidates beside a draft of bin b to draft at a place reached with this chance, and their worth."""
        missed, price, count, worth = reached * (1 - self.theta[b]), self.rate * self.row, 0, 0.0
        for psi in self.psi[b * (CANDIDATES - 1) : (b + 1) * (CANDIDATES - 1)]:
            if count >= self.left or missed * psi <= price:
                break
            worth += missed * psi - price
            missed *= 1 - psi
            count += 1
        return count, worth

    def _begin(self) -> None:
        super()._begin()
        self.left = LEAVES

    def _refresh(self) -> None:
        fade(self.beside, self.beside_prior, self.rounds - self.faded)
        self.faded, self.row = self.rounds, self.costs.row()
        self.psi = [self.random.betavariate(*count) for count in self.beside]
        super()._refresh()

    def _seconds(self) -> float:
        return super()._seconds() + self.leaves * self.row

    def observe(self, round: Round) -> None:
        for b, (candidates, accepted) in zip(self.bins, round.tested(), strict=False):
            for s in range(1, min(candidates - 1, accepted) + 1):
                self.beside[b * (CANDIDATES - 1) + s - 1][s != accepted] += 1
        self.leaves = RATE_MEMORY * self.leaves + round.drafted - round.levels
        super().observe(round)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"beside": [list(c) for c in self.beside]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also that of `thompson`, which knows of no candidates beside its drafts."""
        super().load_state_dict(state)
        if len(state.get("beside", [])) == len(self.beside):
            self.beside = [list(map(float, c)) for c in state["beside"]]
        self.faded = self.rounds
