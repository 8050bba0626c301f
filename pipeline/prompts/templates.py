"""Chat templates: the tokenizer's own or a .jinja file, and whether the backbone would answer after it.

Takes the `prompts` section, a tokenizer and messages, gives what apply_chat_template makes of them; a template that
cannot be right is a UserError before anything is answered, and one whose answers would not end is warned of.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..config import Prompts
from ..errors import UserError, reason, warn
from .origins import section_of

SYSTEM, QUESTION, ANSWER = "Speak plainly.", "Which colour has the sky?", "Blue, as a rule."
"""A conversation to try a template on; any texts would do."""


def template_file(settings: Prompts) -> Path | None:
    """The file that `chat_template` names, if it names one. Raises UserError if it is not there."""
    if settings.chat_template in ("none", "tokenizer"):
        return None
    path = Path(settings.chat_template)
    if not path.is_file():
        raise UserError(f"{_key(settings)}: no such file; give a .jinja file, tokenizer or none")
    return path


def messages_of(conversation: list[str], system: str = "") -> list[dict[str, str]]:
    """As chat templates take them; the user begins."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(conversation)]
    return [{"role": "system", "content": system}, *said] if system else said


def render(messages: list[Any], tokenizer: Any, settings: Prompts, **how: Any) -> Any:
    """apply_chat_template with the template that is asked for."""
    file = template_file(settings)
    if file is None and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{_key(settings)}: this tokenizer has no chat template; give none, or a .jinja file")
    try:
        text = file.read_text("utf-8") if file else None
        return tokenizer.apply_chat_template(messages, chat_template=text, **how)
    except Exception as error:  # a template is a program, and may fail as any program does
        said = reason(error).rstrip(".")
        raise UserError(f"{_key(settings)}: the template cannot be rendered: {said}. Mend it.") from None


def check_template(tokenizer: Any, settings: Prompts, *, with_system: bool) -> None:
    """UserError unless the template ends where the backbone has to answer.

    That is so if a question rendered for generation is the beginning of question and answer rendered together, and
    the answer is in the rest. Where add_generation_prompt adds nothing, as in templates that close the user's turn
    with [/INST], the answer must come next. Where it adds something and then the beginnings differ (a block of
    thought that is shown only while answering, say), that is told and no more.
    """

    def text(system: str = "", answer: tuple[str, ...] = (), generate: bool = False) -> str:
        messages = messages_of([QUESTION, *answer], system)
        return render(messages, tokenizer, settings, add_generation_prompt=generate, tokenize=False)

    asked, asked_to_generate, whole = text(), text(generate=True), text(answer=(ANSWER,))
    if QUESTION not in asked_to_generate:
        raise UserError(f"{_key(settings)}: the template leaves out what the user says. Mend it.")
    if ANSWER not in whole:
        raise UserError(f"{_key(settings)}: the template has no assistant turn. Give one that has: a .jinja file.")
    begins_so = whole.startswith(asked_to_generate)
    if asked == asked_to_generate:
        if not begins_so or not whole[len(asked) :].lstrip().startswith(ANSWER):
            raise UserError(
                f"{_key(settings)}: add_generation_prompt adds nothing, so nothing tells the backbone to answer. "
                "Give a template that opens the assistant's turn: a .jinja file."
            )
    elif not begins_so or ANSWER not in whole[len(asked_to_generate) :]:
        print(f"{_key(settings)}: warning: an answered question does not begin as a question to be answered "
              f"({asked_to_generate[-40:]!r}); later turns differ from what was generated")  # fmt: skip
    if with_system:
        _check_system(text, settings)


def _check_system(text: Any, settings: Prompts) -> None:
    try:
        shown = SYSTEM in text(system=SYSTEM)
    except UserError as error:
        said = str(error).partition(": ")[2]
        raise UserError(
            f"{_key(settings)}: some prompts have a system message, which this template does not take ({said}) "
            "Give a .jinja file that does, or take the system messages out of the prompts."
        ) from None
    if not shown:
        print(f"{_key(settings)}: warning: this template leaves the prompts' system messages out")


def warn_of_turn_end(stage: str, tokenizer: Any, settings: Prompts, ends: Collection[int]) -> None:
    """Say so if none of the `ends` is in what the template writes behind an answer: then answers run on behind it."""
    if settings.chat_template == "none":
        return
    messages = messages_of([QUESTION, ANSWER])
    whole = render(messages, tokenizer, settings, add_generation_prompt=False, tokenize=False)
    behind = whole.rpartition(ANSWER)[2]
    ids = [i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if tokenizer.decode([i]).strip()]
    if not ids or not set(ends).isdisjoint(ids):
        return
    known = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)} (id {end})" for end in ends) or "none"
    if ids[0] in getattr(tokenizer, "added_tokens_decoder", {}):
        token = tokenizer.convert_ids_to_tokens(ids[0])
        warn(
            stage,
            f"{_key(settings)}: warning: the template ends an answer with {token} (id {ids[0]}), which ends no text "
            f"of this backbone (end tokens: {known}), so answers run on behind it. Add it: "
            f"backbone.end_tokens=['{token}']",
        )
    else:
        warn(
            stage,
            f"{_key(settings)}: warning: the template writes {behind.strip()!r} behind an answer, {len(ids)} tokens of "
            f"this tokenizer and none that ends a text (end tokens: {known}), so answers may run on behind it. Is it "
            "the template of this backbone? backbone.end_tokens adds a token that ends texts",
        )


def _key(settings: Prompts) -> str:
    return f"{section_of(settings)}.chat_template={settings.chat_template}"
