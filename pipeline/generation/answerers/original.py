"""The answerer `original`: the answers that come with the prompts, as training text that the backbone did not write.

Takes a tokenizer and the end tokens; gives the ids of each question's original answer. The backbone's own answers
train better heads (docs/lab-notes.md); this answerer is the baseline of that comparison.
"""

from typing import Any

from .interface import Answer, Question, Report, Sampling


class Original:
    """Answers with each question's `original` and an end token; a question without one gets the end token alone."""

    reproducible = True

    def __init__(self, tokenizer: Any, ends: list[int]):
        """`ends`: the ids that end an answer; the first is appended. With [] answers have no end token."""
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
