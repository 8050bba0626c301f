"""Losslessness of several texts at once: greedy texts are those decoded alone, in every order of events; sampled texts
have the backbone's law, whatever their neighbours do.

The real loop, sampler and controllers run on random tables in place of a network (test_exact.py), so that thousands of
schedules and every script of draws can be run; test_batches.py has the real passes.
"""

import copy
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from test_exact import PROMPT, Scripted, Tables, backbones_own, forbids_and_allows, joint
from test_exact_trees import (
    Doubtful,
    ForgetsTheResidual,
    ForgetsWhatWasDrawn,
    OnceMore,
    RanksBySibling,
    TakesTheBest,
)

from pipeline.inference import batch_decoding, decoding
from pipeline.inference.batch_controllers import Each, make_batch_controller
from pipeline.inference.batch_decoding import decode_batch
from pipeline.inference.batch_thompson import BatchThompson
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, self_speculative
from pipeline.inference.sampling import Sampler
from pipeline.inference.stopwatch import Stopwatch

CONTROLLERS = [
    "fixed:0",
    "fixed:1",
    "fixed:3",
    "confidence:0.6",
    "entropy:0.68",
    "table:1=3,2=1,3=0",
    "goodput",
    "thompson",
]
TREES = ["tree:2", "tree:3", "tree:2x1", "tree:1x2", "tree:2x2", "tree:3x2x1"]
RULES = {
    **{name: lambda name=name: make_controller(name) for name in TREES},
    "doubtful": Doubtful,  # of some levels not all rows are followed, and which branch follows from q
    "once more": OnceMore,  # whether a round branches follows from q
}
"""Rules of one text without memory, whose drafts branch."""


def branching(name: str) -> Each:
    """The rule of this name, asked for every text."""
    return make_batch_controller(name) if name in TREES else Each(RULES[name](), limit=3)


class Cache:
    """The text of a place, committed up to `length`."""

    def __init__(self, prompt: list[int]):
        self.text, self.length = list(prompt), 0

    def commit(self, length: int) -> None:
        self.length = length
        del self.text[length:]

    def keep(self, path: list[int]) -> None:
        base = self.length
        self.text[base + 1 :] = [self.text[base + row] for row in path]
        self.length = base + 1 + len(path)


class TableEngine:
    """Stands for BatchEngine; a row's hidden state is its prefix."""

    def __init__(self, tables: Tables):
        self.tables, self.caches, self.unread = tables, [], False
        self.backbone = SimpleNamespace(blocks=[], draft_vocabulary=tables.draft_vocabulary)
        self.places = SimpleNamespace(caches=self.caches)

    def check(self, prompt, length):
        if length > 200:
            raise ValueError(f"{length} positions are needed, the backbone's context is 200")

    def enter(self, prompts):
        entering = [Cache(prompt) for prompt in prompts]
        for cache, prompt in zip(entering, prompts, strict=True):
            cache.commit(len(prompt))
        self.caches += entering
        return entering, self.logits([tuple(prompt) for prompt in prompts])

    def leave(self, place):
        last = self.caches.pop()
        if place < len(self.caches):
            self.caches[place] = last

    def leave_all(self):
        self.caches.clear()

    def reserve(self, more):
        assert more >= 1

    def shallow(self, ids, spans):
        tokens = iter(ids)
        for span in spans:
            text = self.caches[span.place].text
            assert span.base == len(text)
            text += itertools.islice(tokens, span.rows)
        assert next(tokens, None) is None

    def prefix(self, place, slot, tree, root):
        """The tokens up to that in a slot, along its path."""
        text = self.caches[place].text
        if tree is None:
            return tuple(text[: slot + 1])
        return (*text[: root + 1], *(text[root + row] for row in tree.path(slot - root)))

    def full(self, ids, spans, store=False):
        self.shallow(ids, spans)
        self.unread = not store
        return self.deep(spans)

    def deep(self, spans):
        return [self.prefix(s.place, s.base + i, s.tree, s.root) for s in spans for i in range(s.rows)]

    def logits(self, prefixes):
        return self.tables.logits(prefixes)

    def catch_up(self, places):
        pass

    def draft_logits(self, asked):
        assert not self.unread, "the exit head reads what no pass has stored"
        roots = [self.caches[place].length for place, _, _ in asked]
        found = [
            self.prefix(place, root + row, tree, root)
            for (place, tree, rows), root in zip(asked, roots, strict=True)
            for row in rows
        ]
        q_MV = torch.stack([self.tables.table(1, prefix) for prefix in found])
        return q_MV if self.tables.draft_vocabulary is None else q_MV[:, self.tables.draft_vocabulary.ids_W]


@pytest.fixture(autouse=True)
def counting_clock(monkeypatch):
    for module, name in ((batch_decoding, "stopwatch"), (decoding, "_stopwatch")):
        monkeypatch.setattr(module, name, lambda what: Stopwatch(itertools.count().__next__))


def alone(tables: Tables, request: Request, sampler: Sampler, k: int = 0) -> list[int]:
    return self_speculative(tables, request, sampler, make_batch_controller(f"fixed:{k}").rule).tokens


def requests_of(seed: int) -> tuple[Tables, list[Request]]:
    """Random prompts, lengths and ends; some are cancelled from outside after some tokens, some are too long."""
    dice = random.Random(seed)
    tables = Tables(dice.randint(2, 6), seed=seed)
    end = frozenset(dice.sample(range(tables.v), dice.randint(0, 1)))

    def cancelled(after: int):
        tokens = itertools.count(1)
        return lambda token: next(tokens) == after

    def request() -> Request:
        long = dice.random() < 0.1
        prompt = [dice.randrange(tables.v) for _ in range(190 if long else dice.randint(1, 12))]
        return Request(prompt, dice.randint(1, 20), end, cancelled(dice.choice([0, 0, dice.randint(1, 9)])))

    return tables, [request() for _ in range(dice.randint(0, 9))]


def schedule(seed: int) -> None:
    """Every text of a random schedule gives what it gives alone."""
    dice = random.Random(-seed)
    name, places = dice.choice([None, *CONTROLLERS, *RULES]), dice.randint(1, 5)
    controller = branching(name) if name in RULES else None if name is None else make_batch_controller(name, seed)
    (tables, requests), (_, again) = requests_of(seed), requests_of(seed)
    found = {}
    for text in decode_batch(TableEngine(tables), ((r, Sampler()) for r in requests), controller, places):
        assert text.number not in found
        found[text.number] = text
    assert sorted(found) == list(range(len(requests)))
    for i, request in enumerate(again):
        text = found[i]
        if len(request.prompt) + request.max_new_tokens > 200:
            assert "context is 200" in str(text.error) and not text.generation.tokens
        else:
            assert text.error is None and text.generation.tokens == alone(tables, request, Sampler()), (seed, i)
            assert sum(r.tokens for r in text.generation.rounds) in (0, len(text.generation.tokens) - 1)


def test_200_schedules_give_each_text_what_it_gives_alone() -> None:
    for seed in range(200):
        schedule(seed)


@pytest.mark.slow
def test_5000_schedules() -> None:
    for seed in range(200, 5200):
        schedule(seed)


def in_company(tables: Tables, sampler: Sampler, controller, new: int) -> list[int]:
    """A text among three whose draws are fixed; one enters when another has ended, and leaves before it."""
    made = [([0, 1], 3), (PROMPT, new), ([1, 1], 2), ([0], 9)]
    dice = [Sampler(1.0, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    dice[1] = sampler
    jobs = [(Request(*one), its) for one, its in zip(made, dice, strict=True)]
    texts = {text.number: text for text in decode_batch(TableEngine(tables), jobs, controller, 3)}
    assert texts[1].error is None
    return texts[1].generation.tokens


def learned(seed: int) -> BatchThompson:
    """With something learned, so that it drafts for some texts and not for others."""
    controller = BatchThompson(greedy=False, seed=seed)
    controller.counts = [[2.0, 6.0] if b < 6 else [8.0, 2.0] for b in range(8)]
    controller.plans = {n: [] for n in range(4)}
    for rows, seconds in ((1, 6.0), (3, 7.0), (6, 9.0), (12, 20.0)):
        controller.costs.verify.add(rows, seconds, 0)
    for part in (controller.costs.shallow, controller.costs.head):
        part.add(1, 0.2, 0)
    return controller


SAMPLED = (
    {name: lambda name=name: make_batch_controller(name, 0, greedy=False) for name in CONTROLLERS}
    | {f"thompson, seed {s}": lambda s=s: learned(s) for s in (0, 1, 2)}
    | {name: lambda name=name: branching(name) for name in ("tree:2", "tree:2x1", "doubtful", "once more")}
)


def distance(tables: Tables, sampler: Sampler, make, new: int) -> float:
    controller = make()

    def decode():
        mine = controller if hasattr(controller, "sampler") else copy.deepcopy(controller)
        return in_company(tables, sampler, mine, new)

    found = joint(decode, sampler, new)
    assert abs(sum(found.values()) - 1) < 1e-9
    return max(abs(found.get(text, 0.0) - p) for text, p in backbones_own(tables, sampler, new).items())


@pytest.mark.parametrize("name", SAMPLED)
def test_four_tokens_have_the_backbones_joint_law(name: str) -> None:
    assert distance(Tables(2, seed=3), Scripted(temperature=1.0), SAMPLED[name], 4) < 1e-6


@pytest.mark.parametrize("name", ["goodput", *(f"thompson, seed {s}" for s in (0, 1, 2))])
def test_these_controllers_draft_for_the_text_in_some_rounds_and_not_in_others(name: str) -> None:
    """So the law above is that of choices."""
    drafted = set()
    for seed in range(20):
        dice = Sampler(1.0, generator=torch.Generator().manual_seed(seed))
        jobs = [(Request([0, 1], 9), Sampler()), (Request(PROMPT, 9), dice), (Request([0], 9), Sampler())]
        texts = {text.number: text for text in decode_batch(TableEngine(Tables(2, seed=3)), jobs, SAMPLED[name](), 3)}
        drafted |= {min(1, round.drafted) for round in texts[1].generation.rounds[:3]}
    assert drafted == {0, 1}


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("name", ["fixed:3", "thompson, seed 1", "tree:2x1", "doubtful"])
def test_shaped_laws_blocks_and_draft_vocabularies(name: str, block: bool) -> None:
    sampler = Scripted(temperature=0.7, top_p=0.8, block=block)
    assert distance(Tables(3, seed=5, can_draft=[0, 2]), sampler, SAMPLED[name], 3) < 1e-6


@pytest.mark.parametrize("name", ["tree:2", "doubtful"])
def test_processors_are_given_the_path_of_each_row(name: str) -> None:
    sampler = Scripted(temperature=1.0, processors=forbids_and_allows)
    assert distance(Tables(3, seed=5), sampler, SAMPLED[name], 3) < 1e-6


@pytest.mark.parametrize("seed", [3, 5])
@pytest.mark.parametrize("name", ["tree:2x1", "doubtful", "once more"])
def test_rounds_that_may_branch_are_verified_one_by_one(name: str, seed: int) -> None:
    sampler = Scripted(temperature=1.0, block=True)
    assert distance(Tables(2, seed=seed), sampler, SAMPLED[name], 4) < 1e-6


def test_a_block_of_drafts_that_might_have_branched_is_caught(monkeypatch) -> None:
    honest = Scripted.verify
    monkeypatch.setattr(Scripted, "verify", lambda self, tree, p, may_branch=False: honest(self, tree, p))
    sampler = Scripted(temperature=1.0, block=True)
    assert distance(Tables(2, seed=5), sampler, SAMPLED["once more"], 5) > 1e-3


@pytest.mark.parametrize("cheat", [ForgetsTheResidual, ForgetsWhatWasDrawn, TakesTheBest, RanksBySibling])
def test_a_rule_of_siblings_that_cheats_is_caught(cheat) -> None:
    assert distance(Tables(4, seed=6), cheat(temperature=1.0), SAMPLED["tree:2"], 3) > 1e-3


def test_siblings_that_are_dropped_by_their_token_are_caught(monkeypatch) -> None:
    honest = Scripted.siblings

    def only_small(self, q, first, count):
        return [draft for draft in honest(self, q, first, count) if draft.token != 2]

    assert distance(Tables(4, seed=6), Scripted(temperature=1.0), SAMPLED["tree:2"], 3) < 1e-6
    monkeypatch.setattr(Scripted, "siblings", only_small)
    assert distance(Tables(4, seed=6), Scripted(temperature=1.0), SAMPLED["tree:2"], 3) > 1e-3


class Peeks:
    """Violates the condition: drafts a token for a text only if it is a likely one."""

    limit = 3

    def __init__(self, sampler):
        self.sampler = sampler

    def begin(self, count):
        pass

    def peek(self, level, places):
        return places if level < 3 else []

    def draft(self, level, laws):
        found = [place for place in laws if place != self.sampler.place]
        if (law := laws.get(self.sampler.place)) and float(law.law.q_V[self.sampler.unseen.token]) > 0.5:
            found.append(self.sampler.place)
        return found

    def observe(self, round):
        pass


def test_a_controller_that_sees_the_token_is_caught() -> None:
    class Seen(Scripted):
        place = 0  # the text's: the one before it leaves first

        def propose(self, q):
            self.unseen = super().propose(q)
            return self.unseen

    sampler = Seen(temperature=1.0)

    def decode():
        engine = TableEngine(Tables(2, seed=3))
        jobs = [(Request(PROMPT, 4), sampler), (Request([0], 9), Sampler())]
        texts = {text.number: text for text in decode_batch(engine, jobs, Peeks(sampler), 2)}
        return texts[0].generation.tokens

    found = joint(decode, sampler, 4)
    law = backbones_own(Tables(2, seed=3), sampler, 4)
    assert max(abs(found.get(text, 0.0) - p) for text, p in law.items()) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_a_text_of_a_seed_draws_and_drafts_what_it_does_alone(name: str) -> None:
    """Rounds too are those of one text: drafts, where they branch, and which were accepted."""
    tables, branched = Tables(5, seed=7), 0
    make = lambda seed: Sampler(1.0, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    requests = [Request([i % 5], 6 + i, frozenset([4])) for i in range(10)]
    ones = [self_speculative(tables, r, make(i), RULES[name]()) for i, r in enumerate(requests)]
    for places in (1, 3, 10):
        jobs = [(request, make(i)) for i, request in enumerate(requests)]
        for text in decode_batch(TableEngine(tables), jobs, branching(name), places):
            found, one = text.generation, ones[text.number]
            assert found.tokens == one.tokens
            for mine, its in zip(found.rounds, one.rounds, strict=True):
                assert (mine.drafts, mine.parents, mine.path) == (its.drafts, its.parents, its.path)
                assert (mine.accepted, mine.head_passes) == (its.accepted, its.head_passes)
            branched += sum(bool(r.path) and r.path[-1] != r.accepted for r in found.rounds)
    assert branched > 3 or name == "once more", "no path but the first one was ever accepted"


def test_a_text_of_a_seed_does_not_depend_on_its_neighbours() -> None:
    tables = Tables(5, seed=7)
    make = lambda seed: Sampler(1.0, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    requests = [Request([i % 5], 12) for i in range(12)]
    for places in (1, 3, 12):
        jobs = [(request, make(i)) for i, request in enumerate(requests)]
        texts = {t.number: t for t in decode_batch(TableEngine(tables), jobs, make_batch_controller("fixed:2"), places)}
        for i, request in enumerate(requests):
            assert texts[i].generation.tokens == alone(tables, request, make(i), 2)
