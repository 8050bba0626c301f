"""A conversation: messages in, the backbone's answers out as a stream of text, decoded with drafts of an exit head.

Takes an engine, a controller, a tokenizer and the chat section; gives each answer piece by piece while it is decoded,
and its rounds and times. The ids of a context are those that `generate` and `evaluate` would make of the same
messages, and the controller keeps what it learns from answer to answer.

V vocabulary
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Chat, Prompts
from ..errors import UserError
from ..inference.backbone import SplitBackbone
from ..inference.controllers import make_controller
from ..inference.decoding import Generation, Request, autoregressive, self_speculative
from ..inference.rounds import Confidence, Controller, Round, look_of, memory_of, reads_of, spare_of
from ..inference.sampling import Sampler
from ..prompts.ids import contexts
from ..prompts.prompt import Prompt
from ..prompts.turns import next_turn
from ..prompts.vocabulary import check_ids
from .streaming import TextStream

Show = Callable[[str, bool], None]
"""Takes a piece of an answer's text, and whether the token that completes it is an accepted draft. Any other token is
the backbone's own: the bonus token of a round, or the first token of an answer."""

WARM_UP = 8
"""Tokens decoded before the first answer, whose passes would otherwise be slower than all others."""


@dataclass(frozen=True)
class Answered:
    """One answer; `out.seconds` does not contain the time in which its text was shown."""

    ids: list[int]
    """The context that was answered."""
    out: Generation
    full: bool
    """Whether it was cut off because no position is left in the backbone's context."""


class Conversation:
    """The messages and answers so far."""

    def __init__(
        self,
        engine: SplitBackbone,
        controller: Controller,
        tokenizer: Any,
        ends: frozenset[int],
        prompts: Prompts,
        settings: Chat,
        seed: int = 0,
    ):
        self.engine, self.controller, self.tokenizer, self.ends = engine, controller, tokenizer, ends
        self.prompts, self.settings = prompts, settings
        self.generator = torch.Generator(engine.device).manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Forget all messages; what the controller has learned stays."""
        self.past = Prompt("chat", (), "", system=self.settings.system)
        self.last: Answered | None = None

    def warm_up(self) -> None:
        """Decode a few tokens both ways, and forget them."""
        ids = self._ids(replace(self.past, turns=("Hello",)))
        request = Request(ids, max(1, min(WARM_UP, self.engine.max_context - len(ids))), self.ends)
        autoregressive(self.engine, request, Sampler())
        self_speculative(self.engine, request, Sampler(), make_controller("fixed:2"))

    def answer(self, message: str, show: Show, stop: Callable[[], bool] = lambda: False) -> Answered:
        """Answer a message, and add both to the conversation.

        It ends with the first token at which `stop` gives True. If something is raised, the conversation is as before.
        Raises UserError for a message without tokens, and if the context has no room for an answer.
        """
        asked = replace(self.past, turns=(*self.past.turns, message))
        ids = self._ids(asked)
        context = self.engine.max_context
        if len(ids) >= context:
            remedy = "/reset begins a new conversation" if asked.answers else "give a shorter one"
            what = "the conversation" if asked.answers else "this message"
            raise UserError(
                f"{what} has {len(ids)} tokens, the backbone's context is {context}: no answer fits. {remedy}."
            )
        sampler = Sampler(self.settings.temperature, self.settings.top_k, self.settings.top_p, self.generator)
        streamed = _Streamed(self.controller, TextStream(self.tokenizer), show, stop)
        new = min(self.settings.max_new_tokens, context - len(ids))
        out = self_speculative(self.engine, Request(ids, new, self.ends, streamed.token), sampler, streamed)
        streamed.end()
        out.seconds -= streamed.seconds
        self.past = next_turn(asked, self.tokenizer.decode(out.tokens, skip_special_tokens=True))
        full = out.finish_reason == "length" and len(ids) + len(out.tokens) == context
        self.last = Answered(ids, out, full)
        return self.last

    def compare(self) -> tuple[Generation, int]:
        """Decode the last answer autoregressively on the same engine; returns its times, and how many of its tokens
        differ from those that this decoding would choose itself (greedy; when sampling, draws differ anyway).

        Raises UserError if there is no answer yet, or one without a round.
        """
        if self.last is None or not self.last.out.rounds:
            raise UserError("/compare: there is no answer of two tokens or more yet that could be decoded again.")
        tokens = self.last.out.tokens
        s = self.settings
        # a generator of its own: a comparison must not change what is drawn next in the conversation
        generator = torch.Generator(self.engine.device).manual_seed(0)
        sampler = _Again(s.temperature, s.top_k, s.top_p, generator, text=tokens)
        out = autoregressive(self.engine, Request(self.last.ids, len(tokens), self.ends), sampler)
        return out, sum(own != token for own, token in zip(sampler.own, tokens, strict=True))

    def _ids(self, asked: Prompt) -> list[int]:
        ((_, ids),) = contexts([asked], self.tokenizer, self.prompts)
        if not ids:
            raise UserError("the message has no token of its own; give another one.")
        check_ids(ids, self.tokenizer, len(self.engine.embedding_VD), "the message")
        return ids


class _Streamed:
    """A controller that shows the text of every round as soon as the round is verified."""

    def __init__(self, controller: Controller, stream: TextStream, show: Show, stop: Callable[[], bool]):
        self.controller, self.stream, self.show, self.stop = controller, stream, show, stop
        if look := look_of(controller):  # the decoder asks this object instead
            self.look = look
        self.memory = memory_of(controller)
        self.reads, self.spare = reads_of(controller), spare_of(controller)
        self.new: list[int] = []
        """Committed tokens that were not shown yet."""
        self.begun = False
        self.seconds = 0.0
        """How long showing took, which is no part of decoding."""

    def token(self, token: int) -> bool:
        """Called by the decoder with each committed token."""
        self.new.append(token)
        if not self.begun:  # the first token follows the prefill: it belongs to no round
            self.begun = True
            self._flush(accepted=0)
        return self.stop()

    def peek(self, k: int) -> bool:
        return self.controller.peek(k)

    def draft(self, k: int, confidence: Confidence) -> int:
        return self.controller.draft(k, confidence)

    def observe(self, round: Round) -> None:
        self.controller.observe(round)
        self._flush(round.accepted)

    def end(self) -> None:
        """Show what the text stream holds back."""
        if piece := self.stream.end():
            self.show(piece, False)

    def _flush(self, accepted: int) -> None:
        start = time.perf_counter()
        for i, token in enumerate(self.new):
            if piece := self.stream.put(token):
                self.show(piece, i < accepted)
        self.new.clear()
        self.seconds += time.perf_counter() - start


@dataclass
class _Again(Sampler):
    """Draws from the logits as a Sampler does, in the same time, but gives the tokens of a text that is there
    already."""

    text: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    """What was drawn."""

    def draw(self, logits_V: Tensor) -> int:
        self.own.append(super().draw(logits_V))
        return self.text[len(self.own) - 1]
