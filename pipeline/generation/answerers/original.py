"""No engine at all: the answers that the prompts' own source gives, to learn from text that is not the backbone's.

Takes a tokenizer, gives the ids of each question's original answer. What the backbone itself would say is the better
teacher (docs/lab-notes.md); this is what it is measured against. Knows nothing of files or shards.
"""

from typing import Any

from .interface import Answer, Question, Report, Sampling


class Original:
    """Each question's own `original`, ended by the tokenizer's end token; without one, an empty answer."""

    reproducible = True

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def answer(self, questions: list[Question], sampling: Sampling, report: Report | None = None) -> list[Answer]:
        answers = []
        for q in questions:
            ids = self.tokenizer(q.original, add_special_tokens=False)["input_ids"] if q.original.strip() else []
            ids = [*ids, self.tokenizer.eos_token_id][: sampling.max_new_tokens]
            answers.append(Answer(ids, ids[-1] == self.tokenizer.eos_token_id))
            if report is not None:
                report(1, len(ids))
        return answers
