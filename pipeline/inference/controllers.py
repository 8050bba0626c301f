"""Who decides how many tokens to draft. One small interface, one class a rule.

Takes what the condition of losslessness allows, gives yes or no: whether to draft token k+1 may depend on
committed text, earlier rounds, this round's drafted tokens and their q, q of token k+1, and random numbers of
its own; never on token k+1 itself, an accept draw of this round, or the deep layers' view of it. Knows
nothing of models.
"""

import random
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(slots=True)
class Round:
    """What happened in one round."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    """Committed: accepted plus the bonus token, less what an end token or the length limit cut off."""
    seconds: float = 0.0
    shallow_seconds: float = 0.0
    head_seconds: float = 0.0
    verify_seconds: float = 0.0


class Controller(Protocol):
    """Decides on-line; one object may serve many prompts and keeps what it learns."""

    def peek(self, k: int) -> bool:
        """After k drafts, before the exit head runs: is its next distribution worth computing?"""
        ...

    def draft(self, k: int, q_logits_V: Tensor) -> bool:
        """The distribution of draft k+1 is known, nothing is sampled yet: draft it?"""
        ...

    def observe(self, round: Round) -> None:
        """A round is over; learn from it."""
        ...


class Fixed:
    """Always K drafts. K = 0 drafts nothing: one token a round, as autoregressive decoding."""

    def __init__(self, k: int):
        self.k = k

    def peek(self, k: int) -> bool:
        return k < self.k

    def draft(self, k: int, q_logits_V: Tensor) -> bool:
        return True

    def observe(self, round: Round) -> None:
        pass


class Beta:
    """EESD's Beta-TS as far as it can be read (Liu et al., 2024, figure 2; priors and limit are ours).

    theta ~ Beta(1 + accepted, 1 + rejected); after each draft chi ~ Bernoulli(theta) with a fresh theta: 1 goes
    on drafting, 0 stops and verifies. At least one draft a round. Drafts behind the first rejected one were
    never tested and count for nothing.
    """

    def __init__(self, limit: int = 16, seed: int = 0):
        self.accepted, self.rejected, self.limit = 1, 1, limit
        self.random = random.Random(seed)

    def peek(self, k: int) -> bool:
        if k == 0:
            return True
        theta = self.random.betavariate(self.accepted, self.rejected)
        return k < self.limit and self.random.random() < theta

    def draft(self, k: int, q_logits_V: Tensor) -> bool:
        return True

    def observe(self, round: Round) -> None:
        self.accepted += round.accepted
        self.rejected += round.accepted < round.drafted


def make_controller(name: str, seed: int = 0) -> Controller:
    """`fixed:K`, `beta`, or `none` (drafts nothing). Raises ValueError for another name."""
    kind, _, argument = name.partition(":")
    if kind == "fixed" and argument.isdecimal():
        return Fixed(int(argument))
    if name == "none":
        return Fixed(0)
    if name == "beta":
        return Beta(seed=seed)
    raise ValueError(f"controller={name}: must be fixed:K (such as fixed:3), beta or none")
