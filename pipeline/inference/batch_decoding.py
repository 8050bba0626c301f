"""Decodes several texts at once: every pass is over the rows of all of them, each text has a length, drafts and an end
of its own, and a waiting text takes the place of a finished one between two rounds (continuous batching: Yu et al.,
Orca, OSDI 2022).

Takes requests with a sampler each and a `BatchController`, or none for autoregressive decoding; gives each text's
`Generation` when it ends. A text is distributed as when it is decoded alone (decoding.py): its drafts branch in the
same way, and the same rule accepts them, with draws of its own sampler. An error in a text's own processors, criteria
or prompt ends that text only.

M rows of a pass, R rows of one text, V vocabulary, W tokens that the head can draft
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .batch_engine import BatchEngine
from .batch_rounds import BatchController, BatchRound
from .decoding import Generation, Request, read_all
from .kv_cache import KVCache
from .passes import Span
from .rounds import Confidence, Confidences, Round, reads_of, spare_of
from .sampling import Sampler, followed
from .stopwatch import stopwatch
from .tree import Draft, Tree


@dataclass
class Finished:
    """A text that ended. `error` is what its own processors, criteria or prompt raised; then `generation` has the
    tokens that were committed before."""

    number: int
    """Its index among the requests."""
    generation: Generation
    error: Exception | None = None


@dataclass
class _Text:
    """A text in one of the places."""

    number: int
    request: Request
    sampler: Sampler
    cache: KVCache
    entered: float = 0.0
    out: Generation = field(default_factory=Generation)
    error: Exception | None = None
    place: int = 0
    tree: Tree = field(default_factory=lambda: Tree(0))
    round: Round = field(default_factory=Round)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What this text's own functions raise ends this text, not the others."""
        try:
            yield
        except Exception as error:
            self.error = error

    @property
    def goes_on(self) -> bool:
        return self.error is None and self.out.goes_on(self.request)

    def span(self, first: int = 0) -> Span:
        """The rows of the round from this one on."""
        root = self.cache.length
        return Span.of(self.place, root + first, len(self.tree) - first, self.tree, root)

    def read(self, count: int) -> list[int]:
        """After which of the first `count` rows of the last level a draft could be of use (a bonus token follows the
        drafts)."""
        room = self.request.max_new_tokens - len(self.out.tokens) - 1
        if self.error is not None or self.tree.depths[-1] >= room:
            return []
        return self.tree.read(count, self.request.end_tokens)


Job = tuple[Request, Sampler]
"""A sampler belongs to one text: with a random stream of its own, a text does not depend on its neighbours' draws."""


def decode_batch(
    engine: BatchEngine, jobs: Iterable[Job], controller: BatchController | None, places: int,
    observe: Callable[[BatchRound], None] = lambda round: None,
) -> Iterator[Finished]:  # fmt: skip
    """Decode texts, at most `places` at once, and give each when it ends. `jobs` is read as places become free.

    controller: None decodes autoregressively, one token per pass through all layers: the baseline of every speedup.
    observe: called with every round, also with those without a controller. Raises ValueError for places < 1, and while
    other texts are decoded by this engine.
    """
    with closing(step_by_step(engine, jobs, controller, places, observe)) as steps:
        yield from (found for found in steps if found is not None)


@torch.inference_mode()
def step_by_step(
    engine: BatchEngine, jobs: Iterable[Job], controller: BatchController | None, places: int,
    observe: Callable[[BatchRound], None] = lambda round: None,
) -> Iterator[Finished | None]:  # fmt: skip
    """The same, with a None after every round, so that several engines can take turns round by round."""
    drafts = 0 if controller is None else controller.limit + spare_of(controller)  # the most of a text in a round
    if places < 1:
        raise ValueError(f"places={places}: at least 1")
    if engine.places.caches:
        raise ValueError("this engine is decoding other texts: end them first, or make another BatchEngine")
    waiting, texts = enumerate(jobs), list[_Text]()
    parts = stopwatch(block.device for block in engine.backbone.blocks)
    try:
        while True:
            while jobs_now := list(islice(waiting, places - len(texts))):
                yield from _enter(engine, jobs_now, texts)
                yield from _leave(engine, texts)
            if not texts:
                return
            for place, text in enumerate(texts):
                text.place, text.tree, text.round = place, Tree(text.out.tokens[-1]), Round()
            engine.reserve(1 + drafts)
            parts.start()
            record = BatchRound(len(texts))
            _round(engine, texts, controller, record, parts)
            record.texts = [text.round for text in texts]
            parts.mark("rest")
            record.time(parts)
            if controller is not None:
                controller.observe(record)
            observe(record)
            yield None
            yield from _leave(engine, texts)
    finally:  # also of a caller that wants no more texts
        engine.leave_all()


def _enter(engine: BatchEngine, jobs: list[tuple[int, Job]], texts: list[_Text]) -> Iterator[Finished]:
    """Give texts the next places and draw the first token of each; those that cannot be decoded end here. Each has an
    equal share of the seconds in which their prompts were read."""
    began, new = time.perf_counter(), []
    for number, job in jobs:
        request, _ = job
        try:
            engine.check(request.prompt, len(request.prompt) + request.max_new_tokens)
        except ValueError as error:
            yield Finished(number, Generation(), error)
        else:
            new.append((number, *job))
    if not new:
        return
    caches, logits_PV = engine.enter([request.prompt for _, request, _ in new])
    entering = [_Text(*one, cache) for one, cache in zip(new, caches, strict=True)]
    texts += entering
    for text, logits_1V in zip(entering, logits_PV.split(1), strict=True):
        _commit_drawn(text, logits_1V)  # reads the token, so a GPU has ended the prefill
    entered = time.perf_counter()
    for text in entering:
        text.entered, text.out.prefill_seconds = entered, (entered - began) / len(new)


def _leave(engine: BatchEngine, texts: list[_Text]) -> Iterator[Finished]:
    """The finished ones of the texts, whose places are freed."""
    for place in reversed(range(len(texts))):
        text = texts[place]
        if not text.goes_on:
            engine.leave(place)
            texts[place] = texts[-1]
            texts.pop()
            text.out.seconds = time.perf_counter() - text.entered
            yield Finished(text.number, text.out, text.error)


def _commit_drawn(text: _Text, logits_1V: Tensor) -> None:
    with text.alone():
        shaped_1V = text.sampler.shape(logits_1V, text.request.prompt, text.out.tokens)
        text.out.commit([text.sampler.draw(shaped_1V[0])], text.request)


def _is_plain(text: _Text) -> bool:
    """Whether a text's tokens are the largest logits as they are, so that those of all such texts are read at once."""
    return text.sampler.greedy and text.sampler.processors is None


def _targets(texts: list[_Text], logits_MV: Tensor) -> list[int]:
    """The largest logit's token of each row, if any text needs it."""
    return logits_MV.argmax(-1).tolist() if any(map(_is_plain, texts)) else [0] * len(logits_MV)


def _round(engine, texts, controller, record, parts) -> None:
    """One round of all texts: without drafts one pass through all layers, as in autoregressive decoding."""
    asked = []
    if controller is not None:
        controller.begin(len(texts))
        asked = _asked(texts, texts, controller, 0)
    parts.mark("rest")
    if asked:
        _draft(engine, texts, asked, controller, record, parts)
    spans = [text.span() for text in texts]
    record.rows = sum(span.rows for span in spans)
    if asked:
        hidden_MD = engine.deep(spans)
    else:
        hidden_MD = engine.full([text.tree.tokens[0] for text in texts], spans, store=controller is not None)
    logits_MV = engine.logits(hidden_MD)
    parts.mark("verify")
    targets = _targets(texts, logits_MV)
    first = 0
    for text, logits_RV in zip(texts, logits_MV.split([span.rows for span in spans]), strict=True):
        if text.error is None:
            with text.alone():
                _verify(text, logits_RV, targets[first : first + len(logits_RV)], spare_of(controller) > 0)
        if controller is not None:
            text.out.rounds.append(text.round)
        first += len(logits_RV)


def _asked(texts: list[_Text], live: list[_Text], controller: BatchController, level: int) -> list[_Text]:
    """For which of the live texts the exit head runs."""
    places = [text.place for text in live if text.read(reads_of(controller)(level))]
    if not places or level >= controller.limit:  # there are slots for so many drafts
        return []
    chosen = controller.peek(level, places)
    _check(chosen, dict.fromkeys(places, 1))
    return [texts[place] for place in chosen]


def _draft(engine, texts, able, controller, record, parts) -> None:
    """Draft for all texts, level by level, as `decoding._draft` for one. Their hidden states of all rows to verify are
    stored then.

    able: those for which the exit head runs first."""
    live, level = texts, 0
    while live:
        ids = [text.tree.tokens[row] for text in live for row in text.tree.level]
        engine.shallow(ids, [text.span(text.tree.level[0]) for text in live])
        parts.mark(f"shallow {level}")
        record.shallow.append(len(ids))
        able = able if level == 0 else _asked(texts, live, controller, level)
        if not able:
            return
        engine.catch_up([text.place for text in able])
        parts.mark("rest")
        read = [(text, text.read(reads_of(controller)(level))) for text in able]
        logits_MW = engine.draft_logits([(text.place, text.tree, rows) for text, rows in read])
        record.head.append(len(logits_MW))
        for text in able:
            text.round.head_passes += 1
        laws = _laws([(text, row) for text, rows in read for row in rows], logits_MW, engine.backbone.draft_vocabulary)
        read = [(text, rows) for text, rows in read if text.error is None]
        if not read:  # the processors of each of them raised
            return
        wanted = _wanted(texts, read, laws, controller, level)
        read_all([draft for of_rows in wanted.values() for drafts in of_rows for _, draft, _ in drafts])
        for place, of_rows in wanted.items():
            texts[place].tree.grow(of_rows)  # a token that is read must be verified: as in decoding.py
        live = [texts[place] for place in wanted]
        parts.mark(f"head {level}")
        level += 1


Wanted = list[tuple[int, Draft, Confidence]]
"""The candidates after a row, in the order in which they were drawn."""


def _wanted(
    texts: list[_Text], read: list[tuple[_Text, list[int]]], laws: dict[tuple[int, int], Confidence],
    controller: BatchController, level: int,
) -> dict[int, list[Wanted]]:  # fmt: skip
    """Place -> of each row that is followed, what is drafted after it; places with drafts only. Of each text, one row
    after the other, so that it draws in the order of a text alone."""
    wanted: dict[int, list[Wanted]] = {}
    for rank in range(max(len(rows) for _, rows in read)):
        asked = {text.place: rows[rank] for text, rows in read if rank < len(rows)}
        offered = {place: laws[place, row] for place, row in asked.items()}
        # drawn before the controller decides, as one text does; no token is read before that
        drafts = {place: texts[place].sampler.propose(law) for place, law in offered.items()}
        chosen = controller.draft(level, offered)
        most = level + 2 + spare_of(controller)  # by now: rows for which there are slots
        taken = {place: len(texts[place].tree) + sum(map(len, wanted.get(place, []))) for place in offered}
        _check(chosen, {place: most - rows for place, rows in taken.items()})
        for place, count in Counter(chosen).items():
            law = offered[place]
            found = texts[place].sampler.candidates(law, drafts[place], count)
            wanted.setdefault(place, []).append([(asked[place], draft, law) for draft in found])
    return wanted


def _check(chosen: list[int], offered: dict[int, int]) -> None:
    """Raises ValueError for places that the controller was not asked about, and for one more often than is offered."""
    if any(count > offered.get(place, 0) for place, count in Counter(chosen).items()):
        raise ValueError(
            f"the controller chose the places {chosen} of {list(offered)}: no other, each at most once, and "
            "where drafts branch as often as its `spare` allows"
        )


def _laws(rows: list[tuple[_Text, int]], logits_MW: Tensor, vocabulary) -> dict[tuple[int, int], Confidence]:
    """(place, row) -> the law of the drafts after each of these rows of the texts' trees. Those of texts with equal
    settings are computed together."""
    alike: dict[Any, list[int]] = {}
    for i, (text, row) in enumerate(rows):
        alike.setdefault(text.sampler.settings or (text.place, row), []).append(i)
    laws = {}
    for some in alike.values():
        first, row = rows[some[0]]
        with first.alone():
            logits_RW = logits_MW if len(some) == len(rows) else logits_MW[some]
            before = first.tree.drafted(row)
            law = first.sampler.law(logits_RW, vocabulary, first.request.prompt, first.out.tokens, before)
            if not first.sampler.greedy:
                _ = law.q_W  # each text draws from its own row: they are computed at once
            several = Confidences(law)
            for n, i in enumerate(some):
                text, row = rows[i]
                laws[text.place, row] = several.of(n)
    return laws


def _verify(text: _Text, logits_RV: Tensor, targets: list[int], may_branch: bool) -> None:
    """Accept drafts of one text, commit them and the bonus token. targets: the largest logits' tokens. may_branch: as
    in `Sampler.verify`."""
    sampler, tree, round, out = text.sampler, text.tree, text.round, text.out
    if _is_plain(text):
        path, bonus = followed(tree, targets)
    else:
        p_logits_RV = sampler.shape_tree(logits_RV, text.request.prompt, out.tokens, tree)
        path, bonus = sampler.verify(tree, p_logits_RV, may_branch)
    round.note(tree, path)
    text.cache.keep(path)
    round.tokens = out.commit([*(tree.tokens[row] for row in path), bonus], text.request)
