"""The answers that the prompts' own source gives, to learn from text that is not the backbone's.

Takes a tokenizer and the end tokens, gives the ids of each question's original answer. What the backbone itself would
say is the better teacher (docs/lab-notes.md); this answerer is what it is measured against.
"""

from typing import Any

from .interface import Answer, Question, Report, Sampling


class Original:
    """Each question's own `original` and an end token; without an original, an empty answer."""

    reproducible = True

    def __init__(self, tokenizer: Any, ends: list[int]):
        """`ends`: the ids that end an answer, of which the first is written; without any, answers have no end."""
        self.tokenizer, self.ends = tokenizer, ends

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        answers = []
        for q in questions:
            ids = self.tokenizer(q.original, add_special_tokens=False)["input_ids"] if q.original.strip() else []
            ids = [*ids, *self.ends[:1]]
            finished = bool(self.ends) and len(ids) <= sampling.max_new_tokens
            answers.append(Answer(ids[: sampling.max_new_tokens], finished))
            if report is not None:
                report(1, len(answers[-1].ids))
        return answers
