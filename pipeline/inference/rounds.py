"""The record of a round, the exit head's confidence in its next token, and the interface of a controller.

`Confidence` takes the law of the head's next draft and gives the numbers that a controller may read.

W tokens that the head can draft; q: the exit head's distribution
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .law import Law
from .tree import Tree

LONGEST = 8
"""The most drafts in a round for every controller without a length of its own, so that they can be compared."""
WIDTHS = (1, 2, 3, 5, LONGEST + 1)
"""Numbers of rows for which kernels are timed, passes recorded and rounding compared. Other numbers of rows use the
next of these."""


@dataclass(slots=True)
class Round:
    """What happened in one round; times are wall time in seconds."""

    drafted: int = 0
    """Drafted tokens, all of which were verified."""
    accepted: int = 0
    tokens: int = 0
    """Committed tokens: the accepted ones and the bonus token, without those after an end token or the length limit."""
    head_passes: int = 0
    """Passes of the exit head: one for each draft, and one more if the controller then decided not to draft."""
    seconds: float = 0.0
    shallow_seconds: float = 0.0
    head_seconds: float = 0.0
    verify_seconds: float = 0.0
    drafts: list[int] = field(default_factory=list)
    """Ids of the drafted tokens."""
    parents: list[int] = field(default_factory=list)
    """Where drafts branch: for each, the number of the draft before it, from 1 on; 0 is the pending token."""
    path: list[int] = field(default_factory=list)
    """Where drafts branch: the numbers of the accepted ones."""
    source: str = "head"
    """Where the drafts came from: head, lookup or memory (lookup.Match)."""

    def note(self, tree: Tree, path: list[int]) -> None:
        """Record the drafts and which rows of them were accepted."""
        self.drafted, self.accepted, self.drafts = len(tree) - 1, len(path), tree.tokens[1:]
        if not tree.is_chain:
            self.parents, self.path = tree.parents[1:], path

    @property
    def levels(self) -> int:
        """The most drafts that could have been accepted: all where none branch, else those of the longest path."""
        if not self.parents:
            return self.drafted
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return max(depths)

    def tested(self) -> list[tuple[int, int]]:
        """For each place for which drafts were tested: (number of candidates, index of the accepted one). The index is
        the number of candidates where none was accepted, which is the last place."""
        if not self.parents:
            return [(1, 0)] * self.accepted + [(1, 1)] * (self.accepted < self.drafted)
        found, row = [], 0
        for accepted in (*self.path, 0):
            candidates = [i for i, parent in enumerate(self.parents, 1) if parent == row]
            if candidates:
                found.append((len(candidates), candidates.index(accepted) if accepted else len(candidates)))
            row = accepted
        return found


class Confidence:
    """Figures of the law q of the next draft, each computed when it is first read."""

    def __init__(self, law: Law):
        self.law = law
        self.read: Callable[[Tensor], float] = float
        """Copies a number [1] to the host, which waits for a GPU. `Sampler.propose` replaces it by a function that
        copies the drafted token in the same transfer."""

    @cached_property
    def top(self) -> float:
        """max q: for a greedy draft, the head's own estimate of the chance that it is right."""
        return self.read(self.law.q_W.amax(0, keepdim=True))

    @cached_property
    def collision(self) -> float:
        """sum q^2: the probability that two draws from q are equal."""
        return self.read(self.law.q_W.dot(self.law.q_W)[None])

    @cached_property
    def entropy(self) -> float:
        """H(q) = -sum q log q, in nats."""
        return self.read(torch.special.entr(self.law.q_W).sum(0, keepdim=True))


class Confidences:
    """Figures of laws of several texts, of which each is computed and read for all of them when it is first read for
    one, so that a GPU is waited for once."""

    def __init__(self, law: Law):
        self.law = law

    @cached_property
    def tops(self) -> list[float]:
        return self.law.q_W.amax(-1).tolist()

    @cached_property
    def collisions(self) -> list[float]:
        return self.law.q_W.square().sum(-1).tolist()

    def of(self, number: int) -> Confidence:
        return _OneOf(self, number)


class _OneOf(Confidence):
    def __init__(self, several: Confidences, number: int):
        super().__init__(several.law.row(number))
        self.several, self.number = several, number

    @cached_property
    def top(self) -> float:
        return self.several.tops[self.number]

    @cached_property
    def collision(self) -> float:
        return self.several.collisions[self.number]


class Controller(Protocol):
    """Decides during decoding how many tokens to draft. One object may serve many prompts and keeps what it learns.

    A controller that also copies drafts from texts has a further method, `look(match) -> int`: at the start of a
    round, given a `lookup.Match`, how many tokens to copy; 0 leaves the round to the head. An attribute `memory`, if it
    has one, holds the earlier texts (lookup.Memory) that are copied from too, and is given each text at its end.

    One whose drafts branch has an attribute `spare`, the most drafts that a round has beside those of its longest
    path, and a method `reads(k) -> int`: after how many of the drafts of level k (0: the pending token), in the order
    in which they were drawn, the head is asked for what follows. Its `draft` is called for each of these.
    """

    def peek(self, k: int) -> bool:
        """After k drafts, before the exit head runs: whether to compute its next distribution."""
        ...

    def draft(self, k: int, confidence: Confidence) -> int:
        """Given the distribution of draft k+1, but no token drawn from it: how many candidates for it to draft. A bool
        does where drafts do not branch."""
        ...

    def observe(self, round: Round) -> None:
        """Learn from a finished round."""
        ...


def look_of(controller: Controller) -> Callable[[Any], int] | None:
    """The method `look` of a controller that may copy drafts from texts; None of any other."""
    return getattr(controller, "look", None)


def memory_of(controller: Controller) -> Any:
    """The `lookup.Memory` of a controller that copies from earlier texts; None of any other."""
    return getattr(controller, "memory", None)


def spare_of(controller: object) -> int:
    """The attribute `spare` of a controller whose drafts branch; 0 of any other."""
    return getattr(controller, "spare", 0)


def reads_of(controller: object) -> Callable[[int], int]:
    """The method `reads` of a controller whose drafts branch; of any other, one that follows its only draft."""
    return getattr(controller, "reads", lambda k: 1)
