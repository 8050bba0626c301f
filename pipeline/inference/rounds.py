"""What happened in a round, what the exit head says of itself, and the interface of a controller.

Takes processed logits of the head, gives numbers that a controller may look at. Knows nothing of how any
controller decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

LONGEST = 8
"""Drafts of a round at most, of every controller that has no length of its own: the same for all, to be compared."""
WIDTHS = (1, 2, 3, 5, LONGEST + 1)
"""Rows of a pass at which kernels are timed, passes recorded and rounding compared; others go with the next of them."""


@dataclass(slots=True)
class Round:
    """What happened in one round."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    """Committed: accepted plus the bonus token, less what an end token or the length limit cut off."""
    head_passes: int = 0
    """Drafted, plus one where the controller saw a distribution and did not draft from it."""
    seconds: float = 0.0
    shallow_seconds: float = 0.0
    head_seconds: float = 0.0
    verify_seconds: float = 0.0


class Confidence:
    """The head's distribution q of the next token, and what it says of itself; computed when it is read."""

    def __init__(self, q_logits_V: Tensor):
        self.logits_V = q_logits_V
        self.read: Callable[[Tensor], float] = float
        """Takes a number [1] off its device. On a GPU that is a wait: `Sampler.propose` lets the draft come along."""

    @cached_property
    def q_V(self) -> Tensor:
        return self.logits_V.softmax(-1)

    @cached_property
    def top(self) -> float:
        """max q: of a greedy draft, the head's own estimate that it is right."""
        return self.read(self.q_V.amax(0, keepdim=True))

    @cached_property
    def collision(self) -> float:
        """sum q^2: the chance that two draws from q are equal."""
        return self.read(self.q_V.dot(self.q_V)[None])

    @cached_property
    def entropy(self) -> float:
        """-sum q log q, in nats."""
        return self.read(torch.special.entr(self.q_V).sum(0, keepdim=True))


class Controller(Protocol):
    """Decides on-line; one object may serve many prompts and keeps what it learns."""

    def peek(self, k: int) -> bool:
        """After k drafts, before the exit head runs: is its next distribution worth computing?"""
        ...

    def draft(self, k: int, confidence: Confidence) -> bool:
        """The distribution of draft k+1 is known, what was drawn from it is not: draft it?"""
        ...

    def observe(self, round: Round) -> None:
        """A round is over; learn from it."""
        ...
