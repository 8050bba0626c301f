"""Drafts with the shallow layers and the exit head, verifies with the deep layers; and plain autoregressive decoding.

Takes a request (prompt ids, limits), a sampler and a controller; gives the new tokens and a record of every round.

In a round, the pending token, which is committed but was processed by no layer yet, goes through the shallow layers.
The exit head drafts tokens level by level while the controller says so: one after the other, or several candidates for
the same place, so that drafts branch (tree.py). Each of them goes through the shallow layers too. The deep layers then
verify all of them in one pass over the stored hidden states and yield one bonus token, which is the pending token of
the next round (Liu et al., ACL Findings 2024, figure 2).

M rows of a pass, R rows of a round's tree, D hidden, V vocabulary, W tokens that the head can draft
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .backbone import SplitBackbone
from .kv_cache import KVCache
from .lookup import Copying, Point
from .rounds import Confidence, Controller, Round, look_of, memory_of, reads_of, spare_of
from .sampling import Sampler
from .stopwatch import Stopwatch, stopwatch
from .tree import Draft, Tree


@dataclass
class Request:
    """One prompt and when to stop. Raises ValueError for an empty prompt or max_new_tokens below 1."""

    prompt: list[int]
    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    on_token: Callable[[int], bool | None] | None = None
    """Called with each committed token in order; if it returns True, the generation ends after that token."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")


@dataclass
class Generation:
    """The new tokens of one request and how they were decoded; `seconds` is wall time without the prefill."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    rounds: list[Round] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    def commit(self, tokens: list[int], request: Request) -> int:
        """Append tokens up to the first that ends the request; returns how many were appended."""
        for taken, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            stop = request.on_token is not None and request.on_token(token)
            if token in request.end_tokens or stop:
                self.finish_reason = "stop"
                return taken
        return len(tokens)

    def goes_on(self, request: Request) -> bool:
        return self.finish_reason != "stop" and len(self.tokens) < request.max_new_tokens


@torch.inference_mode()
def autoregressive(backbone: SplitBackbone, request: Request, sampler: Sampler) -> Generation:
    """Decode one token per pass through all layers, on the same engine: the baseline of every speedup.

    Raises ValueError if prompt and new tokens exceed the backbone's context.
    """
    watch = _stopwatch(backbone)
    cache, out = _start(backbone, request)
    hidden_1D = backbone.full(request.prompt, 0, cache)[-1:]
    watch.mark("prefill")
    base = len(request.prompt)
    while True:
        logits_1V = sampler.shape(backbone.logits(hidden_1D), request.prompt, out.tokens)
        out.commit([sampler.draw(logits_1V[0])], request)
        if not out.goes_on(request):
            break
        hidden_1D = backbone.full(out.tokens[-1:], base, cache)
        base += 1
    return _finish(out, watch)


@torch.inference_mode()
def self_speculative(backbone: SplitBackbone, request: Request, sampler: Sampler, controller: Controller) -> Generation:
    """Decode the same text (greedy) or from the same distribution (sampling) as `autoregressive`, in fewer deep passes.

    Raises ValueError if prompt and new tokens exceed the backbone's context.
    """
    watch, parts = _stopwatch(backbone), _stopwatch(backbone)
    cache, out = _start(backbone, request, spare_of(controller))
    backbone.shallow(request.prompt, 0, cache)
    hidden_MD = backbone.deep(0, len(request.prompt), cache)
    cache.commit(len(request.prompt))
    watch.mark("prefill")
    texts = Copying(request.prompt, memory_of(controller)) if look_of(controller) else None
    # The first token comes from the prefill: a round starts from a pending token.
    first_1V = sampler.shape(backbone.logits(hidden_MD[-1:]), request.prompt, out.tokens)
    out.commit([sampler.draw(first_1V[0])], request)
    while out.goes_on(request):
        parts.start()
        round, base = Round(), cache.length
        # A bonus token follows the drafts, so no more drafts than the remaining tokens minus one are of use.
        room = request.max_new_tokens - len(out.tokens) - 1
        tree = None if texts is None else _copy(backbone, request, controller, texts, out, cache, room, round, parts)
        if tree is None:
            tree = _draft(backbone, request, sampler, controller, out, cache, room, round, parts)
        parts.mark("rest")
        logits_RV = backbone.logits(backbone.deep(base, base + len(tree), cache, tree))
        p_logits_RV = sampler.shape_tree(logits_RV, request.prompt, out.tokens, tree)
        if round.source != "head":
            tree.laws[:-1] = [Confidence(Point(draft.token_1, p_logits_RV[0])) for draft in tree.drafts]
        path, bonus = sampler.verify(tree, p_logits_RV, may_branch=round.source == "head" and spare_of(controller) > 0)
        parts.mark("verify")
        round.note(tree, path)
        round.tokens = out.commit([*(tree.tokens[row] for row in path), bonus], request)
        cache.keep(path)
        parts.mark("rest")
        _time(round, parts)
        out.rounds.append(round)
        controller.observe(round)
    if texts is not None:
        texts.end(out.tokens)
    return _finish(out, watch)


def _copy(backbone, request, controller, texts, out, cache, room, round, parts) -> Tree | None:
    """Draft a round by copying from a text, or not at all. All rows to verify pass through the shallow layers
    together; the exit head reads them when it is asked the next time."""
    match = texts.match(out.tokens)
    tokens = match.copy(min(controller.look(match), room)) if match.length else []
    end = next((i for i, token in enumerate(tokens) if token in request.end_tokens), len(tokens))
    tokens = tokens[: end + 1]  # nothing follows a drafted end token
    if not tokens:
        return None
    parts.mark("rest")
    tree = Tree(out.tokens[-1])
    for row, id_1 in enumerate(torch.tensor(tokens, device=backbone.device)[:, None]):
        draft = Draft(id_1)
        draft.token = tokens[row]  # known here, so it is not read back
        tree.add(row, draft, None)
    backbone.shallow(tree.tokens, cache.length, cache)
    parts.mark("shallow")
    round.source = match.source
    return tree


def _draft(backbone, request, sampler, controller, out, cache, room, round, parts) -> Tree:
    """Draft one round with the exit head, level by level. The hidden states of all rows to verify are in the cache."""
    tree, reads, vocabulary = Tree(out.tokens[-1]), reads_of(controller), backbone.draft_vocabulary
    while tree.level:
        k = tree.depths[-1]
        backbone.shallow([tree.tokens[row] for row in tree.level], cache.length + tree.level[0], cache, tree)
        parts.mark("shallow")
        read = tree.read(reads(k), request.end_tokens)
        if k >= room or not read or not controller.peek(k):
            return tree
        parts.mark("rest")
        logits_MW = backbone.draft_logits([cache.length + row for row in read], cache, tree)
        round.head_passes += 1
        wanted: list[list[tuple[int, Draft, Confidence]]] = []  # of each row, its candidates in the order drawn
        for row, logits_W in zip(read, logits_MW, strict=True):
            law = sampler.law(logits_W[None], vocabulary, request.prompt, out.tokens, tree.drafted(row))
            confidence = Confidence(law.row(0))
            draft = sampler.propose(confidence)  # no token must be read before the controller has decided
            count = controller.draft(k, confidence)
            wanted.append([(row, one, confidence) for one in sampler.candidates(confidence, draft, count)])
        read_all([draft for candidates in wanted for _, draft, _ in candidates])
        tree.grow(wanted)  # once its token is read, a draft must be verified: discarding it would change the law
        parts.mark("head")
    return tree


def read_all(drafts: list[Draft]) -> None:
    """Read the tokens that were not read with a confidence, all at once: a GPU is waited for once."""
    unread = [draft for draft in drafts if "token" not in vars(draft)]
    if len(unread) > 1:
        for draft, token in zip(unread, torch.cat([draft.token_1 for draft in unread]).tolist(), strict=True):
            draft.token = token


def _start(backbone: SplitBackbone, request: Request, spare: int = 0) -> tuple[KVCache, Generation]:
    return backbone.new_cache(len(request.prompt) + request.max_new_tokens, spare), Generation()


def _stopwatch(backbone: SplitBackbone) -> Stopwatch:
    return stopwatch(block.device for block in backbone.blocks)


def _time(round: Round, parts: Stopwatch) -> None:
    seconds = parts.read()
    round.seconds = sum(seconds.values())
    round.shallow_seconds, round.head_seconds = seconds["shallow"], seconds["head"]
    round.verify_seconds = seconds["verify"]


def _finish(out: Generation, watch: Stopwatch) -> Generation:
    watch.mark("decoding")
    seconds = watch.read()
    out.prefill_seconds, out.seconds = seconds["prefill"], seconds["decoding"]
    return out
