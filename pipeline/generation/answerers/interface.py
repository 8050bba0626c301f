"""What every answerer takes and gives: questions, how to draw, and answers as token ids.

Takes nothing, gives the types that the answerers of this folder and those who call them share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Report = Callable[[int, int], None]
"""Told after a while: (finished answers, new tokens) since the last call."""


@dataclass(frozen=True, slots=True)
class Question:
    """One context that is to be answered."""

    ids: list[int]
    """The whole context, with the chat template around it if there is one."""
    conversation: list[str]
    """The same in words: what user and backbone said in turn, the last word the user's."""
    temperature: float = 0.0
    """0 is greedy."""
    system: str = ""
    """What stands before the conversation; in `ids` only if the chat template has a place for it."""
    original: str = ""
    """What the source of the prompt itself answers here, if it does."""


@dataclass(frozen=True, slots=True)
class Answer:
    ids: list[int]
    """New token ids; the end token is the last of them if the answer is finished."""
    finished: bool
    """It ended by itself; else it was cut at max_new_tokens."""
    exact: bool = True
    """These are the very ids that were drawn; False: encoded anew from text, and they may be others."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the temperature comes with each question."""

    max_new_tokens: int
    top_p: float
    batch_size: int
    """Questions in flight at once."""
    seed: int


class Answerer(Protocol):
    """Answers questions; raises UserError when something outside (a server, the memory) will not do."""

    reproducible: bool
    """Called again with equal arguments on an equal machine, it gives equal answers, whatever ran before."""

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        """The answer of each question, in their order."""
        ...
