"""Finds token ids without a row in the backbone's embedding: tokens were added, but the embedding was not resized.

Takes ids or prompts, a tokenizer and the backbone's vocab_size; raises UserError that names the id and the token.
"""

from collections.abc import Iterable
from typing import Any

from ..config import Prompts
from ..errors import UserError
from .ids import contexts
from .prompt import Prompt


def check_ids(ids: Iterable[int], tokenizer: Any, vocab_size: int, where: str) -> None:
    """Raises UserError for an id that has no row in the backbone's embedding; `where` names the text it is in."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{where} has the token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the backbone's "
            f"vocab_size is {vocab_size}: tokens were added to the tokenizer and the embedding was not resized. Give "
            "the tokenizer that belongs to the backbone, or a chat template without that token"
        )


def has_ids_beyond(tokenizer: Any, vocab_size: int) -> bool:
    """Whether the tokenizer has ids without a row in the backbone's embedding. They do no harm unless they occur."""
    return max(tokenizer.get_vocab().values(), default=0) >= vocab_size


def check_prompts(prompts: list[Prompt], tokenizer: Any, settings: Prompts, vocab_size: int) -> None:
    """`check_ids` for the first turn of every prompt, with its chat template."""
    for prompt, ids in contexts(prompts, tokenizer, settings):
        check_ids(ids, tokenizer, vocab_size, f"prompt {prompt.id}")
