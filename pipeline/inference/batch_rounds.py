"""The record of a round of several texts, and the interface of what decides how many tokens each of them drafts.

A `BatchController` sees the laws of all texts' next drafts and none of the drafted tokens that these laws offer. What a
text drafts may so depend on its neighbours, whose tokens say nothing about its own, and decoding stays lossless under
the condition of controllers.py.
"""

from dataclasses import dataclass, field
from typing import Protocol

from .rounds import Confidence, Round
from .stopwatch import Stopwatch


@dataclass
class BatchRound:
    """What happened in one round of several texts; times are wall time in seconds."""

    count: int
    """Number of texts."""
    texts: list[Round] = field(default_factory=list)
    """What happened to each, in the order of their places. Their times are not measured."""
    rows: int = 0
    """Rows verified: drafts and pending tokens of all texts."""
    shallow: list[int] = field(default_factory=list)
    """Rows of each pass of the shallow layers; none in a round without drafts, which is one pass through all layers."""
    head: list[int] = field(default_factory=list)
    """Tokens after which each pass of the exit head was asked for the next."""
    shallow_seconds: list[tuple[int, float]] = field(default_factory=list)
    """(rows, seconds) of these passes."""
    head_seconds: list[tuple[int, float]] = field(default_factory=list)
    verify_seconds: float = 0.0
    """Of the pass of the deep layers, or of all layers in a round without drafts."""
    rest_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Committed tokens of all texts."""
        return sum(text.tokens for text in self.texts)

    @property
    def seconds(self) -> float:
        passes = (*self.shallow_seconds, *self.head_seconds)
        return sum(seconds for _, seconds in passes) + self.verify_seconds + self.rest_seconds

    def time(self, parts: Stopwatch) -> None:
        """Take the times from a stopwatch, whose marks are "shallow 0", "head 0", "shallow 1", ..., "verify",
        "rest"."""
        seconds = parts.read()
        self.shallow_seconds = [(rows, seconds[f"shallow {i}"]) for i, rows in enumerate(self.shallow)]
        self.head_seconds = [(rows, seconds[f"head {i}"]) for i, rows in enumerate(self.head)]
        self.verify_seconds, self.rest_seconds = seconds["verify"], seconds["rest"]


class BatchController(Protocol):
    """Decides for all texts of a batch, which are named by their places.

    One whose drafts branch has the attribute `spare` and the method `reads` of `rounds.Controller`, which hold for each
    text. Where the head is asked after several drafts of a text, `draft` is called several times for a level: with the
    laws of the texts' first ones, of their second ones, ...
    """

    limit: int
    """The most drafts of a text in a round; where they branch, of one path."""

    def begin(self, count: int) -> None:
        """A round of `count` texts, in places 0..count-1, begins."""
        ...

    def peek(self, level: int, places: list[int]) -> list[int]:
        """After `level` drafts of each of these texts, before the exit head runs: for which of them it runs. If for
        none at level 0, the round is one pass through all layers."""
        ...

    def draft(self, level: int, laws: dict[int, Confidence]) -> list[int]:
        """Given the law of the next draft of each of these texts, but no token drawn from it: which of them draft
        it. Where drafts branch, a place as often as it gets candidates."""
        ...

    def observe(self, round: BatchRound) -> None:
        """Learn from a finished round."""
        ...
