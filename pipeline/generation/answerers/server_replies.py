"""Reads replies of OpenAI-compatible servers, and checks them against the backbone's tokenizer.

Takes the JSON of a reply and its question; gives an Answer. Raises Unreadable if the reply does not follow the API, and
Foreign if it shows another tokenizer, chat template or model.
"""

import re
from typing import Any

from .interface import Answer, Question


class Unreadable(Exception):
    """The reply does not follow OpenAI's API."""


class Foreign(Exception):
    """The reply shows another tokenizer, chat template or model than the backbone's; the message names the remedy."""


def answer_in(
    reply: Any, question: Question, max_new_tokens: int, ends: list[int], tokenizer: Any
) -> tuple[Answer, str]:
    """The answer, and its text as the server decoded it. Raises Unreadable or Foreign."""
    try:
        return _answer_in(reply, question, max_new_tokens, ends, tokenizer)
    except (LookupError, TypeError, AttributeError) as error:
        raise Unreadable(f"no answer as OpenAI's API has it ({type(error).__name__}: {error})") from None


def _answer_in(
    reply: Any, question: Question, max_new_tokens: int, ends: list[int], tokenizer: Any
) -> tuple[Answer, str]:
    choice, usage = reply["choices"][0], reply["usage"]
    reason, ids = choice["finish_reason"], choice.get("token_ids")
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    text = message.get("content") or ""
    prompt_ids = choice.get("prompt_token_ids") or reply.get("prompt_token_ids") or question.ids
    if usage["prompt_tokens"] != len(question.ids) or prompt_ids != question.ids:
        raise Foreign(
            f"makes {usage['prompt_tokens']} tokens of a prompt that has {len(question.ids)} for this backbone: its "
            "tokenizer or its chat template is another one. Serve backbone.name_or_path itself; of a server that takes "
            "token ids (vLLM), the template does not matter."
        )
    if reason not in ("stop", "length"):
        raise Unreadable(f"finish_reason {reason}")
    if ids is not None:
        # If the server stopped at a token that is no end token of this backbone, the answer counts as cut off.
        answer = Answer(list(ids), finished=reason == "stop" and bool(ids) and ids[-1] in ends)
    elif message.get("reasoning_content") or message.get("reasoning"):
        raise Foreign(
            "parts the reasoning from the answer and gives no token ids, so the two cannot be joined again. Start it "
            "without a reasoning parser, or use vLLM, which gives ids."
        )
    else:
        answer = _encoded_anew(text, reason == "stop", usage["completion_tokens"], ends, tokenizer)
    if len(answer.ids) > max_new_tokens:
        answer = Answer(answer.ids[:max_new_tokens], finished=False, exact=False)
    return answer, text


def _encoded_anew(text: str, stopped: bool, drawn: int, ends: list[int], tokenizer: Any) -> Answer:
    """Ids re-encoded from text; they count as exact if there are as many as were sampled.

    Text does not show special tokens, nor where words were split into tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if finished := stopped and bool(ends):
        ids.append(ends[0])
    return Answer(ids, finished, exact=len(ids) == drawn)


def check_words(answer: Answer, text: str, tokenizer: Any) -> None:
    """Raises Foreign if the server's text differs from what this tokenizer decodes: ids alone would fit any model."""
    ours = tokenizer.decode(answer.ids, skip_special_tokens=True)
    if answer.exact and _letters(ours) != _letters(text):
        raise Foreign(
            f"reads {text[:40]!r} where this backbone's tokenizer reads {ours[:40]!r} in the same tokens: it holds "
            "another model. Serve backbone.name_or_path itself."
        )


def _letters(text: str) -> str:
    """The text without what decoders treat differently: white space, and incomplete UTF-8 characters."""
    return re.sub(r"[\s\ufffd]", "", text)
