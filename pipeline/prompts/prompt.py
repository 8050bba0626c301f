"""One prompt: what is said, what it is called, when two are the same; and how many there are of which kind.

Takes texts, gives Prompts, their ids and normal forms.
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
    """First 16 hex digits of a sha256 (`prompt_id`). `.2`, `.3` ... follow for later turns."""
    turns: tuple[str, ...]
    """What the user says, in order; most prompts have one turn."""
    task: str
    """What kind of prompt it is, from the `task` or else the `category` column; empty if there is none."""
    answers: tuple[str, ...] = ()
    """What was answered to the first turns: the turn after them is the one to be answered now."""
    system: str = ""
    """What stands before the first turn; only a chat template has a place for it."""
    originals: tuple[str, ...] = ()
    """What the source itself answers to the first turns; not all of them need have such an answer."""
    source: str = field(default="", compare=False)
    """Public name of where it comes from (a file without its folders, a datasets id, pocket): no part of what it is."""

    @property
    def text(self) -> str:
        """The turn to be answered."""
        return self.turns[len(self.answers)]

    @property
    def original(self) -> str:
        """What the source itself answers to that turn; empty if nothing."""
        return self.originals[len(self.answers)] if len(self.answers) < len(self.originals) else ""

    @property
    def conversation(self) -> list[str]:
        """All that is said up to the turn to be answered, user and backbone in turn."""
        answered = zip(self.turns, self.answers, strict=False)
        return [text for pair in answered for text in pair] + [self.text]


def prompt_id(turns: tuple[str, ...], system: str = "") -> str:
    """Of the turns, and of the system message if there is one: equal texts are one prompt."""
    said = f"system:{system}\0\0{joined(turns)}" if system else joined(turns)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def conversation_of(prompt: str) -> str:
    """The id of the first turn, which all turns of a conversation share: ids of later turns end in `.2`, `.3` ..."""
    return prompt.partition(".")[0]


def joined(turns: tuple[str, ...]) -> str:
    """One text for all turns; of a single turn, itself."""
    return "\0".join(turns)


def normal_form(text: str) -> str:
    """What near-equal texts have in common: no difference of case, white space or Unicode's compatible characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def count_tasks(prompts: list[Prompt]) -> dict[str, int]:
    """Task -> how many prompts; Spec-Bench's tasks first and in its order, others as they come."""
    counts = Counter(p.task for p in prompts)
    place = {task: i for i, task in enumerate(SPEC_BENCH)}
    return {task: counts[task] for task in sorted(counts, key=lambda task: place.get(task, len(place)))}


def count_sources(prompts: list[Prompt]) -> dict[str, int]:
    """Source -> how many prompts, the most first: what came of the weights of a mixture."""
    return dict(Counter(p.source for p in prompts).most_common())
