"""Chat templates: renders the tokenizer's own or a .jinja file, and checks that the backbone can answer after it.

Takes the `prompts` section, a tokenizer and messages; gives the result of apply_chat_template. An unusable template
raises UserError before anything is answered; a template after whose answers no end token follows gives a warning.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..config import Prompts
from ..errors import UserError, reason, warn
from .origins import section_of

SYSTEM, QUESTION, ANSWER = "Speak plainly.", "Which colour has the sky?", "Blue, as a rule."
"""A conversation on which a template is tested; the texts are arbitrary."""


def template_file(settings: Prompts) -> Path | None:
    """The file that `chat_template` names; None for none and tokenizer. Raises UserError if it does not exist."""
    if settings.chat_template in ("none", "tokenizer"):
        return None
    path = Path(settings.chat_template)
    if not path.is_file():
        raise UserError(f"{_key(settings)}: no such file; give a .jinja file, tokenizer or none")
    return path


def messages_of(conversation: list[str], system: str = "") -> list[dict[str, str]]:
    """The messages as chat templates take them; `conversation` begins with the user."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(conversation)]
    return [{"role": "system", "content": system}, *said] if system else said


def render(messages: list[Any], tokenizer: Any, settings: Prompts, **how: Any) -> Any:
    """apply_chat_template with the template of `settings`; `how` is passed on. Raises UserError if it fails."""
    file = template_file(settings)
    if file is None and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{_key(settings)}: this tokenizer has no chat template; give none, or a .jinja file")
    try:
        text = file.read_text("utf-8") if file else None
        return tokenizer.apply_chat_template(messages, chat_template=text, **how)
    except Exception as error:  # a template is a program: it may raise anything
        said = reason(error).rstrip(".")
        raise UserError(f"{_key(settings)}: the template cannot be rendered: {said}. Mend it.") from None


def check_template(tokenizer: Any, settings: Prompts, *, with_system: bool) -> None:
    """Raises UserError unless the rendered prompt ends where the backbone has to answer.

    The test: a question rendered for generation must be a prefix of question and answer rendered together, and the rest
    must contain the answer. If add_generation_prompt adds nothing, as in templates that close the user's turn with
    [/INST], the answer must follow directly. If it adds something and there is no common prefix (as with an empty block
    of thought), a warning is printed.
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
    """Warn if the template writes none of the end tokens `ends` after an answer: answers would not stop there."""
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
