"""OpenAI's API as the servers of language models speak it: what a question becomes, and what a reply says.

Takes a Question and a Way (which path, which fields), gives the JSON body of the request; takes the JSON of the reply,
gives an Answer whose token ids were checked against the backbone's tokenizer.
"""

import json
import re
from typing import Any, NamedTuple

from ...prompts.templates import messages_of
from .interface import Answer, Question

DIALECTS = ("vllm", "transformers", "none")


class Way(NamedTuple):
    """How a server is asked."""

    prompt: str
    """ids and text go to /completions, chat to /chat/completions."""
    dialect: str
    """Which fields it knows beside OpenAI's: those of vllm (SGLang has most of them), of transformers, or none."""

    @property
    def path(self) -> str:
        return "chat/completions" if self.prompt == "chat" else "completions"


class Unreadable(Exception):
    """The reply is no answer of this API."""


class Foreign(Exception):
    """The reply shows another tokenizer, chat template or model than the backbone's: what is wrong, and the remedy."""


def ways(api: str, chat_template: bool) -> list[Way]:
    """Those that `machine.server_api` allows, the best first: with ids there is nothing to misunderstand.

    A text that wears the chat template is not sent to /completions: the server would add the tokens at its beginning
    once more.
    """
    prompts = {
        "completions": ["ids"] if chat_template else ["ids", "text"],
        "chat": ["chat"],
        "auto": ["ids", "chat" if chat_template else "text"],
    }[api]
    return [Way(prompt, dialect) for prompt in prompts for dialect in DIALECTS]


def body_of(
    question: Question, way: Way, top_p: float, max_new_tokens: int, seed: int, ends: list[int]
) -> dict[str, Any]:
    """What is posted to `way.path`, but for the model's name."""
    body: dict[str, Any] = {"max_tokens": max_new_tokens, "seed": seed}
    if way.prompt == "ids":
        body["prompt"] = question.ids
    elif way.prompt == "text":
        body["prompt"] = "\n\n".join(question.conversation)
    else:
        body["messages"] = messages_of(question.conversation, question.system)
    if way.dialect == "transformers":
        return body | {"generation_config": json.dumps(_for_transformers(question, top_p, max_new_tokens, ends))}
    body |= {"temperature": question.temperature, "top_p": top_p}
    if way.dialect == "vllm":
        # All that the checkpoint's generation_config.json may say otherwise: the server takes its defaults from there.
        body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        body |= {"stop_token_ids": ends} if ends else {"ignore_eos": True}
    return body


def _for_transformers(question: Question, top_p: float, max_new_tokens: int, ends: list[int]) -> dict[str, Any]:
    """Of `transformers serve`: its plain field `temperature` does not turn sampling on, the answers would be greedy."""
    fixed = {"max_new_tokens": max_new_tokens, "eos_token_id": ends or -1, "repetition_penalty": 1.0}
    if question.temperature == 0:
        return fixed | {"do_sample": False}
    return fixed | {"do_sample": True, "temperature": question.temperature, "top_p": top_p, "top_k": 0, "min_p": 0.0}


def answer_in(
    reply: Any, question: Question, max_new_tokens: int, ends: list[int], tokenizer: Any
) -> tuple[Answer, str]:
    """The answer, and its text as the server gives it. Raises Unreadable or Foreign."""
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
        # A token that ends answers there, but not for this backbone, has cut this one.
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
    """Exact if the ids are as many as were drawn: text hides special tokens, and how words were cut into tokens."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if finished := stopped and bool(ends):
        ids.append(ends[0])
    return Answer(ids, finished, exact=len(ids) == drawn)


def check_words(answer: Answer, text: str, tokenizer: Any) -> None:
    """Raises Foreign if the server reads other words in its ids than this tokenizer: ids alone fit any model."""
    ours = tokenizer.decode(answer.ids, skip_special_tokens=True)
    if answer.exact and _letters(ours) != _letters(text):
        raise Foreign(
            f"reads {text[:40]!r} where this backbone's tokenizer reads {ours[:40]!r} in the same tokens: it holds "
            "another model. Serve backbone.name_or_path itself."
        )


def _letters(text: str) -> str:
    """Without what decoders disagree upon: blanks, and characters of which only some bytes are there."""
    return re.sub(r"[\s\ufffd]", "", text)
