"""Encodes prompts to the backbone's token ids, and drops those that are too short or too long.

Takes Prompts, a tokenizer and the `prompts` section; gives each prompt with its ids. Special tokens that must not
surround a prompt (an end token, a second begin token) are removed, with a printed line.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..config import Prompts
from ..errors import UserError
from .origins import section_of
from .prompt import Prompt
from .templates import check_template, messages_of, render

Encoded = list[tuple[Prompt, list[int]]]

BLOCK = 1024
"""Prompts that are encoded together; blocks after the last wanted prompt are not encoded."""


def encode(
    prompts: list[Prompt],
    tokenizer: Any,
    settings: Prompts,
    context: int,
    max_new_tokens: int,
    wanted: int = 0,
    **room: str,
) -> Encoded:
    """As `fitting`, after a check of the chat template; also raises UserError if some are given and none is left."""
    return list(encoding(prompts, tokenizer, settings, context, max_new_tokens, wanted, **room))


def encoding(
    prompts: list[Prompt],
    tokenizer: Any,
    settings: Prompts,
    context: int,
    max_new_tokens: int,
    wanted: int = 0,
    *,
    stage: str = "generate",
) -> Iterator[tuple[Prompt, list[int]]]:
    """`encode` as an iterator, since the ids of many prompts take more memory than their texts."""
    section = section_of(settings)
    systems = sum(bool(prompt.system) for prompt in prompts)
    if settings.chat_template != "none":
        check_template(tokenizer, settings, with_system=systems > 0)
    elif systems:
        print(f"{section}.chat_template=none: {systems} system messages are left out, plain text has no place for them")
    if settings.chat_template == "none" and (behind := added_by(tokenizer).behind):
        tokens = " ".join(tokenizer.convert_ids_to_tokens(behind))
        print(f"{section}: the tokenizer ends every text with {tokens}; behind a prompt, which goes on, it is left out")
    any_kept = False
    for kept in fitting(prompts, tokenizer, settings, context, max_new_tokens, wanted, stage=stage):
        any_kept = True
        yield kept
    if prompts and not any_kept:
        limits = [f"too_long={settings.too_long}"] if settings.too_long == "drop" else []
        limits += [f"{n}={getattr(settings, n)}" for n in ("min_tokens", "max_tokens") if getattr(settings, n)]
        key = f"{section}.{', '.join(limits)}" if limits else section
        raise UserError(
            f"{key}: no prompt is left; let other lengths in or ask for fewer new tokens ({stage}.max_new_tokens)."
        )


def fitting(
    prompts: list[Prompt],
    tokenizer: Any,
    settings: Prompts,
    context: int,
    max_new_tokens: int,
    wanted: int = 0,
    *,
    stage: str = "generate",
) -> Iterator[tuple[Prompt, list[int]]]:
    """The first `wanted` prompts (0: all) with the token ids of their conversations, up to the turn to be answered.

    The ids are those of the rendered chat template, or without one those of tokenizer(text), turns and answers joined
    by blank lines. A prompt whose ids and `max_new_tokens` together exceed `context` tokens raises UserError, or is
    dropped if `settings.too_long` is drop. Prompts without tokens are dropped, and those whose first turn is below
    min_tokens or above max_tokens. One line is printed for each reason with the number dropped. The order is kept.

    Messages name the keys of `stage`.
    """
    room, kept = context - max_new_tokens, 0
    section = section_of(settings)
    too_long_key = "evaluate.prompts.too_long" if stage == "evaluate" else f"{section}.too_long"
    dropped: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for prompt, ids in contexts(prompts, tokenizer, settings, found):
        reason = _reason_to_drop(prompt, len(ids), settings, room)
        if reason is None:
            yield prompt, ids
            kept += 1
        elif reason == "too_long" and settings.too_long == "error":
            raise UserError(
                f"prompt {prompt.id} ({_start(prompt.text)}) has {len(ids)} tokens; with {max_new_tokens} new ones it "
                f"does not fit into the context of {context}. Set {too_long_key}=drop"
                + (f" or {stage}.max_new_tokens={context - len(ids)}" if len(ids) < context else "")
                + "."
                + (" Other stages stay done." if stage == "evaluate" else "")
            )
        else:
            dropped[reason] += 1
        if kept == wanted > 0:
            break
    looked_at = kept + dropped.total()
    if empty := dropped.pop("empty", 0):
        print(f"{section}: {empty} of {looked_at} prompts have no token of their own and are skipped")
    lines = {
        "min_tokens": f"{section}.min_tokens={settings.min_tokens}: {{}} (shorter than {settings.min_tokens} tokens)",
        "max_tokens": f"{section}.max_tokens={settings.max_tokens}: {{}} (longer than {settings.max_tokens} tokens)",
        "too_long": f"{too_long_key}={settings.too_long}: {{}} (longer than {room} tokens)",
    }
    for reason, count in sorted(dropped.items()):
        print(lines[reason].format(f"{count} of {looked_at} prompts dropped"))
    _say(found, tokenizer, settings)


def _reason_to_drop(prompt: Prompt, length: int, settings: Prompts, room: int) -> str | None:
    """Why a context of `length` tokens is dropped: empty, min_tokens, max_tokens or too_long; None if it is kept."""
    if length == 0:
        return "empty"
    first = not prompt.answers
    if first and length < settings.min_tokens:
        return "min_tokens"
    if first and 0 < settings.max_tokens < length:
        return "max_tokens"
    return None if length <= room else "too_long"


# ---- special tokens around a prompt


class Added(NamedTuple):
    """The ids that a tokenizer adds before and after every text."""

    before: list[int]
    behind: list[int]

    def taken_off(self, ids: list[int], found: Counter[str]) -> list[int]:
        """The ids of a prompt with one beginning and no end tokens, as an answer follows; [] if it has no own ids."""
        before, behind = self
        if behind and ids[-len(behind) :] == behind:
            ids = ids[: -len(behind)]
        if before and ids[len(before) : 2 * len(before)] == before:
            found["begun twice"] += 1
            while ids[len(before) : 2 * len(before)] == before:
                ids = ids[len(before) :]
        return ids if len(ids) > len(before) else []


def added_by(tokenizer: Any) -> Added:
    """The ids that the tokenizer adds, found by encoding a text: its settings do not always tell."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    at = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), None)
    return Added([], []) if at is None else Added(whole[:at], whole[at + len(plain) :])


def contexts(
    prompts: list[Prompt], tokenizer: Any, settings: Prompts, found: Counter[str] | None = None
) -> Iterator[tuple[Prompt, list[int]]]:
    """Each prompt with the ids of its conversation up to the turn to be answered, of any length.

    `found` counts oddities, which `_say` prints.
    """
    found = Counter() if found is None else found
    added = added_by(tokenizer)
    marks = tuple(str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    for at in range(0, len(prompts), BLOCK):
        block = prompts[at : at + BLOCK]
        if settings.chat_template == "none":
            texts = tokenizer(["\n\n".join(p.conversation) for p in block], verbose=False)["input_ids"]
            block_ids = [added.taken_off(list(ids), found) for ids in texts]
        else:
            messages = [messages_of(p.conversation, p.system) for p in block]
            rendered = render(
                messages, tokenizer, settings, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            block_ids = list(map(list, rendered))
        for prompt, ids in zip(block, block_ids, strict=True):
            found["ended"] += bool(ids) and ids[-1] == tokenizer.eos_token_id
            found["rendered"] += settings.chat_template != "none" and prompt.text.lstrip().startswith(marks)
            yield prompt, ids


def _say(found: Counter[str], tokenizer: Any, settings: Prompts) -> None:
    """Print one line for each kind of oddity that was found."""
    section = section_of(settings)
    if count := found["begun twice"]:
        print(f"{section}: {count} prompts begin with the token that the tokenizer begins every text with; it is given "
              "once")  # fmt: skip
    if count := found["ended"]:
        print(f"{section}: warning: {count} prompts end with {tokenizer.eos_token}, which ends a text: what the "
              "backbone says behind it answers nothing. Take it out of the prompts")  # fmt: skip
    if count := found["rendered"]:
        print(f"{section}.chat_template={settings.chat_template}: warning: {count} prompts begin with a special token, "
              "as if a template had been applied already; chat_template=none takes them as they are")  # fmt: skip


def _start(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
