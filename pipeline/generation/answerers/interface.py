"""The interface of answerers: questions, sampling parameters, and answers as token ids.

It defines the types that the answerers of this folder share with their callers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Report = Callable[[int, int], None]
"""Called from time to time with (finished answers, new tokens) since the last call."""


@dataclass(frozen=True, slots=True)
class Question:
    """One context that is to be answered."""

    ids: list[int]
    """Token ids of the whole context, including the chat template if there is one."""
    conversation: list[str]
    """The same context as text: messages of user and backbone in turn, the user's last."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    system: str = ""
    """The system message; `ids` contain it only if the chat template has a place for it."""
    original: str = ""
    """The answer that the prompt's source gives for this turn; empty if it gives none."""


@dataclass(frozen=True, slots=True)
class Answer:
    ids: list[int]
    """New token ids; the end token is the last of them if the answer is finished."""
    finished: bool
    """True if it ended with an end token, False if it was cut off."""
    exact: bool = True
    """True if these ids were sampled; False if they were re-encoded from text and may differ from the sampled ones."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one call; the temperature is part of each question."""

    max_new_tokens: int
    top_p: float
    batch_size: int
    """Number of questions that are answered at once."""
    seed: int


class Answerer(Protocol):
    """Answers questions. Raises UserError for a fault outside the program, such as a server that does not answer."""

    reproducible: bool
    """True if equal calls on equal machines give equal answers, independently of earlier calls."""

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        """The answers, one for each question and in their order."""
        ...
