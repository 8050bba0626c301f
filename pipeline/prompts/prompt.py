"""Prompts: their texts, ids and normal forms, and counts by task and source.

Takes texts; gives Prompts, their ids and normal forms.
"""

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["distill", "evaluate"]

SPEC_BENCH = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
"""The tasks of Spec-Bench (Xia et al., Findings of ACL 2024) in the order of its tables."""


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    """First 16 hex digits of a SHA-256 (`prompt_id`), followed by `.2`, `.3` ... for later turns."""
    turns: tuple[str, ...]
    """The user's messages, in order; most prompts have one turn."""
    task: str
    """The kind of prompt, from the `task` or else the `category` column; empty if there is none."""
    answers: tuple[str, ...] = ()
    """The answers to the first turns so far; the next turn is the one to be answered."""
    system: str = ""
    """The system message; only a chat template has a place for it."""
    originals: tuple[str, ...] = ()
    """The source's own answers to the first turns; there may be fewer than turns."""
    source: str = field(default="", compare=False)
    """Public name of its source (a file without folders, a datasets id, pocket); ignored when prompts are compared."""

    @property
    def text(self) -> str:
        """The turn to be answered."""
        return self.turns[len(self.answers)]

    @property
    def original(self) -> str:
        """The source's own answer to that turn; empty if there is none."""
        return self.originals[len(self.answers)] if len(self.answers) < len(self.originals) else ""

    @property
    def conversation(self) -> list[str]:
        """All messages up to the turn to be answered, alternating between user and backbone."""
        answered = zip(self.turns, self.answers, strict=False)
        return [text for pair in answered for text in pair] + [self.text]


def prompt_id(turns: tuple[str, ...], system: str = "") -> str:
    """The id of a prompt: a hash of its turns, and of the system message if there is one."""
    said = f"system:{system}\0\0{joined(turns)}" if system else joined(turns)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def conversation_of(prompt: str) -> str:
    """The id without a later turn's suffix `.2`, `.3` ...: all turns of a conversation share it."""
    return prompt.partition(".")[0]


def joined(turns: tuple[str, ...]) -> str:
    """One text that stands for all turns; a single turn stands for itself."""
    return "\0".join(turns)


def normal_form(text: str) -> str:
    """The text without differences of case, white space and Unicode compatibility, to find nearly equal texts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def count_tasks(prompts: list[Prompt]) -> dict[str, int]:
    """Task -> number of prompts; Spec-Bench's tasks first and in its order, others in order of appearance."""
    counts = Counter(p.task for p in prompts)
    place = {task: i for i, task in enumerate(SPEC_BENCH)}
    return {task: counts[task] for task in sorted(counts, key=lambda task: place.get(task, len(place)))}


def count_sources(prompts: list[Prompt]) -> dict[str, int]:
    """Source -> number of prompts, the largest first: the actual composition of a mixture."""
    return dict(Counter(p.source for p in prompts).most_common())
