"""Makes the shards of responses: from the prompts of a shard to its rows and counts, turn by turn.

Takes an answerer, a tokenizer and the config; gives the rows that responses.py writes. A shard depends only on config,
weights, prompts and its number, so a killed process loses no more than its current shard.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config import Config
from ..prompts.ids import contexts
from ..prompts.prompt import Prompt
from ..prompts.turns import next_turn
from ..prompts.vocabulary import check_ids
from ..runs.shard_worker import Report, ShardWorker
from .answerers.interface import Answer, Answerer, Question, Sampling
from .repetition import repeated_share
from .responses import COUNTS, Responses

Asked = list[tuple[Prompt, list[int]]]
"""Prompts with the ids of their first turns."""


@dataclass(frozen=True)
class Turn:
    """One turn to be answered: its prompt with the answers so far, and the token ids of its context."""

    place: int
    """Index of its conversation in the shard."""
    prompt: Prompt
    ids: list[int]


class AnswerWorker(ShardWorker):
    """Answers the prompts of a responses folder, shard by shard."""

    unit = "prompt"

    def __init__(
        self,
        config: Config,
        responses: Responses,
        answerer: Answerer,
        tokenizer: Any,
        context: int,
        vocab_size: int,
        by: dict[str, Any],
    ):
        """`context`: the most tokens of a prompt and its answer together; `by`: see ShardWorker.

        `answer_shard` raises UserError for token ids that are not below `vocab_size`.
        """
        super().__init__(responses, by)
        self.config, self.responses, self.answerer = config, responses, answerer
        self.tokenizer, self.context, self.vocab_size = tokenizer, context, vocab_size

    def total(self) -> int:
        manifest = self.responses.manifest()
        assert manifest is not None
        return manifest["asked"]["prompts"]

    def units(self, entry: dict[str, Any]) -> int:
        return entry["counts"]["prompts"]

    def make(self, index: int, name: str, report: Report) -> Callable[[dict[str, Any]], None]:
        asked = [(prompt_of(text), ids) for text, ids in self.responses.asked(index)]
        rows, counts = self.answer_shard(asked, index, report)
        return partial(self.responses.put, name, rows, counts)

    def answer_shard(
        self, asked: Asked, index: int, report: Report | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The rows of the shard `index`, and its counts.

        All first turns are answered together, then all second turns, and so on. A conversation ends early after an
        empty answer, and if the context has no room for the next answer. It continues after an answer that was cut off:
        distill decides whether such answers are learned from.
        """
        counts: Counter[str] = Counter(prompts=len(asked), turns=sum(len(p.turns) for p, _ in asked))
        rows: list[tuple[int, dict[str, Any]]] = []
        turns = [Turn(place, prompt, ids) for place, (prompt, ids) in enumerate(asked)]
        number = 1
        while turns:
            seed = shard_seed(self.config.seed, index, number)
            answered: list[tuple[Turn, Answer]] = []
            for turn, question, answer in self._answers(turns, index, seed, report):
                check_ids(answer.ids, self.tokenizer, self.vocab_size, f"the answer to prompt {turn.prompt.id}")
                counts["tokens"] += len(answer.ids)
                has_text = len(answer.ids) > (1 if answer.finished else 0)  # an end token is no text
                if not has_text:
                    counts.update(empty=1, unanswered=_turns_left(turn.prompt))
                    continue
                rows.append((turn.place, self._row(turn.prompt, question, answer, seed)))
                counts.update(rows=1, inexact=not answer.exact, looping=repeated_share(answer.ids) > 0)
                counts["stop" if answer.finished else "length"] += 1
                answered.append((turn, answer))
            turns = self._next_turns(answered, counts)
            number += 1
        rows.sort(key=lambda entry: entry[0])  # stable: the turns of a conversation stay in their order
        return [row for _, row in rows], {name: int(counts[name]) for name in COUNTS}

    def _answers(
        self, turns: list[Turn], index: int, seed: int, report: Report | None
    ) -> list[tuple[Turn, Question, Answer]]:
        """Each turn with its question and answer. The prompts of all shards get the temperatures in rotation."""
        g = self.config.generate
        first = index * g.shard_size
        questions = [
            Question(
                list(turn.ids),
                turn.prompt.conversation,
                g.temperatures[(first + turn.place) % len(g.temperatures)],
                turn.prompt.system,
                turn.prompt.original,
            )
            for turn in turns
        ]
        sampling = Sampling(g.max_new_tokens, g.top_p, g.batch_size, seed)
        last = not any(_turns_left(turn.prompt) for turn in turns)
        told = None if report is None else lambda answers, tokens: report(tokens, answers if last else 0)
        return list(zip(turns, questions, self.answerer.answer(questions, sampling, told), strict=True))

    def _next_turns(self, answered: list[tuple[Turn, Answer]], counts: Counter[str]) -> list[Turn]:
        """The next turns that exist and leave room for an answer; turns without room are counted as unanswered."""
        later = [
            (turn.place, next_turn(turn.prompt, self.tokenizer.decode(answer.ids, skip_special_tokens=True)))
            for turn, answer in answered
            if _turns_left(turn.prompt)
        ]
        room = self.context - self.config.generate.max_new_tokens
        with_ids = contexts([prompt for _, prompt in later], self.tokenizer, self.config.prompts)
        turns = []
        for (place, _), (prompt, ids) in zip(later, with_ids, strict=True):
            check_ids(ids, self.tokenizer, self.vocab_size, f"prompt {prompt.id}")
            if len(ids) <= room:
                turns.append(Turn(place, prompt, ids))
            else:
                counts["unanswered"] += _turns_left(prompt) + 1
        return turns

    def _row(self, prompt: Prompt, question: Question, answer: Answer, seed: int) -> dict[str, Any]:
        return {
            "id": prompt.id,
            "prompt": prompt.text,
            "prompt_ids": question.ids,
            "response_ids": answer.ids,
            "finish_reason": "stop" if answer.finished else "length",
            "temperature": question.temperature,
            "seed": seed,
            "source": prompt.source,
            "exact": answer.exact,
            "reproducible": self.answerer.reproducible,
        }


def shard_seed(seed: int, index: int, turn: int = 1) -> int:
    """Sampling seed of one turn of one shard; below 2^53, so that every JSON reader keeps it exactly."""
    later = f" turn {turn}" if turn > 1 else ""
    return int.from_bytes(hashlib.sha256(f"generate {seed} {index}{later}".encode()).digest()[:8]) >> 11


def prompt_of(text: str) -> Prompt:
    """The prompt of its JSON text in a responses folder."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    return Prompt(**fields)


def _turns_left(prompt: Prompt) -> int:
    """Number of turns after the one to be answered."""
    return len(prompt.turns) - len(prompt.answers) - 1
