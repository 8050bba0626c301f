"""Requests to OpenAI-compatible servers: the paths and fields of their APIs.

Takes a Question and a Way (which path, which fields); gives the JSON body of the request.
"""

import json
from typing import Any, NamedTuple

from ...prompts.templates import messages_of
from .interface import Question

DIALECTS = ("vllm", "transformers", "none")


class Way(NamedTuple):
    """The form of the requests to a server."""

    prompt: str
    """The form of the prompt: `ids` and `text` are sent to /completions, `chat` to /chat/completions."""
    dialect: str
    """Fields beside OpenAI's: those of vLLM (SGLang has most of them), of `transformers serve`, or none."""

    @property
    def path(self) -> str:
        return "chat/completions" if self.prompt == "chat" else "completions"


def ways(api: str, chat_template: bool) -> list[Way]:
    """The ways that `machine.server_api` allows, the best first; token ids are best, as they need no encoding.

    Text with the chat template around it is not sent to /completions, where the server would add the begin token once
    more.
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
    """The body of a POST to `way.path`, without the model's name."""
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
        # The server takes its defaults from the checkpoint's generation_config.json: override all that may differ.
        body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        body |= {"stop_token_ids": ends} if ends else {"ignore_eos": True}
    return body


def _for_transformers(question: Question, top_p: float, max_new_tokens: int, ends: list[int]) -> dict[str, Any]:
    """generation_config for `transformers serve`, whose plain field `temperature` does not turn sampling on."""
    fixed = {"max_new_tokens": max_new_tokens, "eos_token_id": ends or -1, "repetition_penalty": 1.0}
    if question.temperature == 0:
        return fixed | {"do_sample": False}
    return fixed | {"do_sample": True, "temperature": question.temperature, "top_p": top_p, "top_k": 0, "min_p": 0.0}
