"""Conversations for evaluate: every turn of a prompt becomes an entry, after the backbone's answers to earlier turns.

Takes prompts, a tokenizer and a function that answers token ids; gives every turn with the ids of its whole context.
Each earlier turn is answered once, so that all measurements start from the same ids.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ..config import Prompts
from .ids import Encoded, encode, fitting
from .prompt import Prompt, conversation_of


def every_turn(
    prompts: list[Prompt],
    tokenizer: Any,
    settings: Prompts,
    context: int,
    max_new_tokens: int,
    answer: Callable[[list[int]], list[int]],
) -> Encoded:
    """The first turns as `encode` gives them, each followed by its later turns with the ids `<id>.2`, `<id>.3` ...

    `settings.too_long` decides whether a turn that does not fit the context raises UserError or is dropped together
    with the turns after it. `answer` takes the ids of a context and gives the ids of the answer.
    """
    turns = encode(prompts, tokenizer, settings, context, max_new_tokens, stage="evaluate")
    order = {prompt.id: i for i, (prompt, _) in enumerate(turns)}
    found = list(turns)
    earlier = sum(len(prompt.turns) - 1 for prompt, _ in turns)
    with tqdm(total=earlier, desc="earlier turns", unit="text", disable=not earlier) as bar:
        while turns:
            later = []
            for prompt, ids in turns:
                if len(prompt.answers) + 1 < len(prompt.turns):
                    later.append(next_turn(prompt, tokenizer.decode(answer(ids), skip_special_tokens=True)))
                    bar.update()
            turns = list(fitting(later, tokenizer, settings, context, max_new_tokens, stage="evaluate"))
            found += turns
    return sorted(found, key=lambda entry: order[conversation_of(entry[0].id)])  # stable: turns stay in their order


def next_turn(prompt: Prompt, answer: str) -> Prompt:
    """The prompt with its current turn answered; its next turn is the one to be answered."""
    answers = (*prompt.answers, answer.strip())  # as Spec-Bench does: templates add white space themselves
    return replace(prompt, id=f"{conversation_of(prompt.id)}.{len(answers) + 1}", answers=answers)
