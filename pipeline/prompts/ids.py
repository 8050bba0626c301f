"""Prompts -> the token ids that the backbone is given, those that are too short or too long left out.

Takes Prompts, a tokenizer and the `prompts` section, gives each prompt with its ids. Knows nothing of where prompts
come from.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..config import Prompts
from ..errors import UserError
from .origins import section_of
from .prompt import Prompt
from .templates import check_template, messages_of, render

Encoded = list[tuple[Prompt, list[int]]]

BLOCK = 1024
"""Prompts given to the tokenizer together; where only so many are wanted, no block after them is encoded."""


def encode(
    prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int, wanted: int = 0
) -> Encoded:
    """As `fitting`, once the chat template is known to be right; it is a UserError if no prompt is left of some."""
    return list(encoding(prompts, tokenizer, settings, context, max_new_tokens, wanted))


def encoding(
    prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int, wanted: int = 0
) -> Iterator[tuple[Prompt, list[int]]]:
    """`encode`, one after the other: the ids of many prompts take more memory than their texts."""
    section = section_of(settings)
    systems = sum(bool(prompt.system) for prompt in prompts)
    if settings.chat_template != "none":
        check_template(tokenizer, settings, with_system=systems > 0)
    elif systems:
        print(f"{section}.chat_template=none: {systems} system messages are left out, plain text has no place for them")
    any_kept = False
    for kept in _fitting(prompts, tokenizer, settings, context, max_new_tokens, wanted):
        any_kept = True
        yield kept
    if prompts and not any_kept:
        limits = [f"too_long={settings.too_long}"] if settings.too_long == "drop" else []
        limits += [f"{n}={getattr(settings, n)}" for n in ("min_tokens", "max_tokens") if getattr(settings, n)]
        raise UserError(
            f"{section}.{', '.join(limits)}: no prompt is left; let other lengths in or ask for fewer new tokens "
            "(max_new_tokens)."
        )


def fitting(
    prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int, wanted: int = 0
) -> Encoded:
    """Each prompt with the token ids of its conversation, up to the turn to be answered; the first `wanted`, 0 = all.

    The ids are those of the chat template around it, or what tokenizer(text) gives, turns and answers joined by
    blank lines. A prompt whose ids and max_new_tokens exceed `context` (in tokens) is a UserError, or is dropped if
    `settings.too_long` is drop; one whose first turn is below min_tokens or above max_tokens is dropped. What is
    dropped is counted, one printed line for each reason. The order is kept.
    """
    return list(_fitting(prompts, tokenizer, settings, context, max_new_tokens, wanted))


def _fitting(
    prompts: list[Prompt], tokenizer: Any, settings: Prompts, context: int, max_new_tokens: int, wanted: int
) -> Iterator[tuple[Prompt, list[int]]]:
    room, kept = context - max_new_tokens, 0
    dropped: Counter[str] = Counter()
    for prompt, ids in contexts(prompts, tokenizer, settings):
        reason = _reason_to_drop(prompt, len(ids), settings, room)
        if reason is None:
            yield prompt, ids
            kept += 1
        elif reason == "too_long" and settings.too_long == "error":
            raise UserError(
                f"prompt {prompt.id} ({_start(prompt.text)}) has {len(ids)} tokens; with {max_new_tokens} new ones it "
                f"does not fit into the context of {context}. Set {section_of(settings)}.too_long=drop or ask for "
                "fewer new tokens (max_new_tokens)."
            )
        else:
            dropped[reason] += 1
        if kept == wanted > 0:
            break
    looked_at = kept + dropped.total()
    bounds = {"min_tokens": f"shorter than {settings.min_tokens}", "max_tokens": f"longer than {settings.max_tokens}",
              "too_long": f"longer than {room}"}  # fmt: skip
    for reason, count in sorted(dropped.items()):
        key = f"{section_of(settings)}.{reason}={getattr(settings, reason)}"
        print(f"{key}: {count} of {looked_at} prompts dropped ({bounds[reason]} tokens)")


def _reason_to_drop(prompt: Prompt, length: int, settings: Prompts, room: int) -> str | None:
    """The key that keeps a context of this length out."""
    first = not prompt.answers
    if first and length < settings.min_tokens:
        return "min_tokens"
    if first and 0 < settings.max_tokens < length:
        return "max_tokens"
    return None if 0 < length <= room else "too_long"


def contexts(prompts: list[Prompt], tokenizer: Any, settings: Prompts) -> Iterator[tuple[Prompt, list[int]]]:
    """Each prompt with the ids of all that is said up to the turn to be answered, whatever their number."""
    for at in range(0, len(prompts), BLOCK):
        block = prompts[at : at + BLOCK]
        if settings.chat_template == "none":
            ids = tokenizer(["\n\n".join(p.conversation) for p in block], verbose=False)["input_ids"]
        else:
            messages = [messages_of(p.conversation, p.system) for p in block]
            ids = render(messages, tokenizer, settings, add_generation_prompt=True, tokenize=True, return_dict=False)
        yield from zip(block, map(list, ids), strict=True)


def _start(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
