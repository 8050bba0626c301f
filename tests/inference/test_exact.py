"""Losslessness in closed form: every way a decode can go is run, and the law of the text must be the backbone's.

The real decoder, sampler and controllers run on random tables in place of a network. The sampler's draws, those of
unwanted drafts too, and its coins are taken from a script; running all scripts with their probabilities gives the exact
joint of the first tokens. A controller's own randomness is fixed by its seed: what holds for every stream holds for
their mean.
"""

import copy
import itertools

import pytest
import torch
from cheats import Discards, LooksAtAcceptDraw, with_pending

from pipeline.inference import decoding
from pipeline.inference.controllers import make_controller
from pipeline.inference.costs import Costs, Recent
from pipeline.inference.decoding import Request, self_speculative
from pipeline.inference.law import DraftVocabulary, Law
from pipeline.inference.lookup import Memory
from pipeline.inference.sampling import Sampler
from pipeline.inference.sources import WithLookup
from pipeline.inference.stopwatch import Stopwatch
from pipeline.inference.thompson import Thompson

PROMPT = [1]


class Tables:
    """Stands for SplitBackbone: p and q of every prefix are random logits; a hidden state is the prefix itself.

    can_draft: the tokens of a draft vocabulary.
    """

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, seed: int, can_draft: list[int] | None = None):
        self.v, self.seed, self.known = vocabulary, seed, {}
        self.draft_vocabulary = DraftVocabulary(torch.tensor(can_draft), vocabulary) if can_draft else None

    def table(self, kind: int, prefix: tuple[int, ...]):
        if (kind, prefix) not in self.known:
            generator = torch.Generator().manual_seed(hash((self.seed, kind, prefix)) % 2**40)
            self.known[kind, prefix] = 1.5 * torch.randn(self.v, generator=generator, dtype=torch.float64)
        return self.known[kind, prefix]

    def new_cache(self, length: int, spare: int = 0):
        self.text = []
        return Positions(self)

    def shallow(self, ids, base, cache, tree=None) -> None:
        self.text[base:] = ids
        cache.tree = tree

    def prefix(self, slot, cache) -> tuple[int, ...]:
        """The tokens up to that in a slot, along its path."""
        if cache.tree is None or slot <= cache.length:
            return tuple(self.text[: slot + 1])
        path = cache.tree.path(slot - cache.length)
        return (*self.text[: cache.length + 1], *(self.text[cache.length + row] for row in path))

    def deep(self, base, end, cache, tree=None):
        return [self.prefix(slot, cache) for slot in range(base, end)]

    def logits(self, prefixes):
        return torch.stack([self.table(0, prefix) for prefix in prefixes])

    def draft_logits(self, slots, cache, tree=None):
        q_MV = torch.stack([self.table(1, self.prefix(slot, cache)) for slot in slots])
        return q_MV if self.draft_vocabulary is None else q_MV[:, self.draft_vocabulary.ids_W]


class Positions:
    length, tree = 0, None

    def __init__(self, tables):
        self.tables = tables

    def commit(self, length: int) -> None:
        self.length, self.tree = length, None

    def keep(self, path: list[int]) -> None:
        text, base = self.tables.text, self.length
        text[base + 1 :] = [text[base + row] for row in path]
        self.commit(base + 1 + len(path))


class Scripted(Sampler):
    """Takes each decision from `script`, the first possible one beyond it; notes how many there were."""

    def start(self, script: list[int]) -> None:
        self.script, self.taken, self.options, self.probability = script, [], [], 1.0

    def _choose(self, chances: list[float]) -> int:
        possible = [i for i, c in enumerate(chances) if c > 0]
        at = len(self.taken)
        choice = self.script[at] if at < len(self.script) else 0
        self.taken.append(choice)
        self.options.append(len(possible))
        self.probability *= chances[possible[choice]]
        return possible[choice]

    def _pick(self, weights_V):
        return torch.tensor([self._choose((weights_V / weights_V.sum()).tolist())])

    def _coins(self, chance_K):
        """What matters is the first coin that shows False."""
        chances, reached = [], 1.0
        for a in chance_K.clamp(max=1).tolist():
            chances.append(reached * (1 - a))
            reached *= a
        first = self._choose([*chances, reached])
        return torch.arange(len(chance_K)) != first  # those behind it decide nothing


def joint(decode, sampler, length: int) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the first `length` tokens over all scripts of `decode()`."""
    total: dict[tuple[int, ...], float] = {}
    script: list[int] | None = []
    while script is not None:
        sampler.start(script)
        text = tuple(decode()[:length])
        total[text] = total.get(text, 0.0) + sampler.probability
        script = None
        for at in reversed(range(len(sampler.taken))):  # the next script in order, like the digits of a counter
            if sampler.taken[at] + 1 < sampler.options[at]:
                script = [*sampler.taken[:at], sampler.taken[at] + 1]
                break
    return total


@torch.inference_mode()
def backbones_own(tables: Tables, sampler: Sampler, length: int) -> dict[tuple[int, ...], float]:
    law = {}
    for text in itertools.product(range(tables.v), repeat=length):
        law[text] = 1.0
        for i in range(length):
            row = tables.table(0, (*PROMPT, *text[:i]))[None]
            law[text] *= float(sampler.shape(row, PROMPT, list(text[:i])).softmax(-1)[0, text[i]])
    return law


def distance(tables, sampler, controller, new: int, compared: int) -> float:
    """Largest difference of any text's probability; the controller starts each text as it is given."""

    def decode():
        mine = controller if hasattr(controller, "sampler") else copy.deepcopy(controller)
        return self_speculative(tables, Request(PROMPT, new), sampler, mine).tokens

    found = joint(decode, sampler, compared)
    assert abs(sum(found.values()) - 1) < 1e-9
    return max(abs(found.get(text, 0.0) - p) for text, p in backbones_own(tables, sampler, compared).items())


@pytest.fixture(autouse=True)
def counting_clock(monkeypatch):
    """Time enters thompson's decisions; here it must be the same in every replay."""
    monkeypatch.setattr(decoding, "_stopwatch", lambda backbone: Stopwatch(itertools.count().__next__))


def experienced(seed: int) -> Thompson:
    """Past its calibration, with something learned: peeks and drafts are both refused at times."""
    costs = Costs()
    costs.shallow.add(0.5), costs.head.add(0.5), costs.rest.add(1)
    for width, seconds in ((1, 6), (2, 7), (4, 9)):
        costs.verify[width] = Recent()
        costs.verify[width].add(seconds)
    controller = Thompson(greedy=False, seed=seed, costs=costs)
    controller.counts = [[2.0, 6.0] if b < 6 else [8.0, 2.0] for b in range(8)]
    return controller


CONTROLLERS = {
    **{f"fixed:{k}": lambda k=k: make_controller(f"fixed:{k}") for k in range(5)},
    "confidence": lambda: make_controller("confidence:0.6"),
    "entropy": lambda: make_controller("entropy:0.68"),
    **{f"{n}, seed {s}": lambda n=n, s=s: make_controller(n, s)
       for n in ("beta", "calibration", "calibration:shift") for s in (0, 1)},
    **{n: lambda n=n: make_controller(n, 0, greedy=False)
       for n in ("goodput", "logistic", "adaptive_steps", "schedule", "ucb", "tapout", "cumulative:0.3")},
    "thompson, calibrating": lambda: make_controller("thompson", 0, greedy=False),
    **{f"thompson, seed {s}": lambda s=s: experienced(s) for s in (0, 1, 2)},
}  # fmt: skip


class Copies:
    """Copies K drafts wherever the text's end occurred before, and leaves other rounds to a controller of the head."""

    def __init__(self, k: int, head: str):
        self.k, self.head = k, make_controller(head)
        self.peek, self.draft, self.observe = self.head.peek, self.head.draft, self.head.observe

    def look(self, match) -> int:
        return self.k


def remembered() -> Memory:
    """Earlier texts with everything that may follow the prompt."""
    memory = Memory()
    for text in ([1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 0]):
        memory.add(text)
    return memory


class Remembers(Copies):
    def __init__(self, k: int, head: str):
        super().__init__(k, head)
        self.memory = remembered()


COPYING = {
    **{f"{k} copied, else {head}": lambda k=k, head=head: Copies(k, head)
       for k, head in ((1, "none"), (3, "none"), (2, "fixed:2"), (3, "confidence:0.6"))},
    **{f"{n}+lookup": lambda n=n: make_controller(f"{n}+lookup", greedy=False)
       for n in ("fixed:1", "beta", "goodput", "logistic")},
    **{f"thompson+lookup, seed {s}": lambda s=s: WithLookup(experienced(s), False, s) for s in (0, 1, 2)},
    "3 copied from an earlier text": lambda: Remembers(3, "none"),
    **{f"thompson+memory, seed {s}": lambda s=s: WithLookup(experienced(s), False, s, memory=remembered())
       for s in (0, 1)},
}  # fmt: skip
SHAPES = {"plain": {}, "T=0.7, top-p 0.8": {"temperature": 0.7, "top_p": 0.8}, "top-k 2": {"top_k": 2}}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_five_tokens_have_the_backbones_joint_law(name: str) -> None:
    sampler = Scripted(temperature=1.0)
    assert distance(Tables(2, seed=3), sampler, CONTROLLERS[name](), new=5, compared=5) < 1e-6


BLOCKS = ["fixed:1", "fixed:3", "fixed:4", "confidence", "entropy", "thompson, calibrating", "thompson, seed 1"]


@pytest.mark.parametrize("name", BLOCKS)
def test_block_verification_has_the_backbones_joint_law(name: str) -> None:
    sampler = Scripted(temperature=1.0, block=True)
    assert distance(Tables(2, seed=3), sampler, CONTROLLERS[name](), new=5, compared=5) < 1e-6


@pytest.mark.parametrize("shape", [*SHAPES, "processors", "draft vocabulary"])
@pytest.mark.parametrize("name", ["fixed:2", "confidence", "2 copied, else fixed:2", "thompson+lookup, seed 1"])
def test_block_verification_of_shaped_laws_and_copied_drafts(name: str, shape: str) -> None:
    settings = {"processors": forbids_and_allows} if shape == "processors" else SHAPES.get(shape, {})
    sampler = Scripted(**({"temperature": 1.0, "block": True} | settings))
    tables = Tables(3, seed=5, can_draft=[0, 2] if shape == "draft vocabulary" else None)
    assert distance(tables, sampler, {**CONTROLLERS, **COPYING}[name](), new=4, compared=4) < 1e-6


def test_block_verification_accepts_more_and_never_fewer() -> None:
    """Mean accepted drafts of a round of 3, by both rules, over random p and q; with one draft they are the same."""
    dice = torch.Generator().manual_seed(0)
    means = []
    for _ in range(40):
        p_MV, q_MV = (torch.randn(4, 3, generator=dice, dtype=torch.float64).softmax(-1) for _ in range(2))
        q_MV[-1] = 0
        expected = {"each": 0.0, "block": 0.0}
        for draft in itertools.product(range(3), repeat=3):
            x_K = torch.tensor(draft)
            chance = float(q_MV[:3].gather(1, x_K[:, None]).prod())
            ratio_K = (p_MV[:3].gather(1, x_K[:, None]) / q_MV[:3].gather(1, x_K[:, None]))[:, 0]
            expected["each"] += chance * float(ratio_K.clamp(max=1).cumprod(0).sum())
            reach, total = 1.0, 0.0
            for ratio in ratio_K.tolist():
                reach = min(1.0, reach * ratio)
                total += reach
            expected["block"] += chance * total
        found = accepted_by_block(p_MV, q_MV)
        assert found == pytest.approx(expected["block"], abs=1e-9)
        means.append((expected["each"], found))
    assert all(block >= each - 1e-12 for each, block in means) and any(block > each + 0.05 for each, block in means)


def accepted_by_block(p_MV, q_MV) -> float:
    """Expected accepted drafts of a round, over all drafts and all picks of the rule itself."""
    total = 0.0
    for draft in itertools.product(range(3), repeat=3):
        x_K1 = torch.tensor(draft)[:, None]
        chance = float(q_MV[:3].gather(1, x_K1).prod())
        seen = []

        class Weighs(Sampler):
            def _pick(self, weights_V, seen=seen):
                seen.append(weights_V)
                return torch.zeros(1, dtype=torch.long)

        ratio_K = (p_MV[:3].gather(1, x_K1) / q_MV[:3].gather(1, x_K1))[:, 0]
        Weighs(temperature=1.0)._accept_block(ratio_K, p_MV, q_MV)
        assert float(seen[0].sum()) == pytest.approx(1)
        total += chance * float(seen[0] @ torch.arange(4, dtype=torch.float64))
    return total


def test_a_block_whose_bonus_token_forgets_what_was_lost_is_caught() -> None:
    class Forgets(Scripted):
        def _accept_block(self, ratio_K, p_MV, q_MV):
            accepted_1, _ = super()._accept_block(ratio_K, p_MV, q_MV)
            rest_V = (p_MV - q_MV).clamp(min=0).index_select(0, accepted_1)[0]
            return accepted_1, rest_V

    sampler = Forgets(temperature=1.0, block=True)  # with two tokens only one is left, whatever is forgotten
    assert distance(Tables(3, seed=5), sampler, make_controller("fixed:2"), new=4, compared=4) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["fixed:2", "confidence", "calibration:shift, seed 1", "thompson, seed 1"])
def test_three_token_vocabulary_and_processors(name: str, shape: str) -> None:
    sampler = Scripted(**({"temperature": 1.0} | SHAPES[shape]))
    assert distance(Tables(3, seed=5), sampler, CONTROLLERS[name](), new=4, compared=4) < 1e-6


def forbids_and_allows(ids_1T, logits_1V):
    """A processor that forbids one token after each text; after some it leaves nothing of the draft vocabulary."""
    logits_1V = logits_1V.clone()
    logits_1V[0, [1] if ids_1T.shape[1] % 2 else [0, 2]] = float("-inf")
    return logits_1V


@pytest.mark.parametrize("shape", [*SHAPES, "processors"])
@pytest.mark.parametrize("name", ["fixed:2", "confidence", "thompson, seed 1"])
def test_a_head_that_cannot_draft_every_token(name: str, shape: str) -> None:
    sampler = Scripted(**({"temperature": 1.0} | (SHAPES | {"processors": {"processors": forbids_and_allows}})[shape]))
    tables = Tables(3, seed=5, can_draft=[0, 2])
    assert distance(tables, sampler, CONTROLLERS[name](), new=4, compared=4) < 1e-6


@pytest.mark.parametrize("name", COPYING)
def test_copied_drafts_keep_the_law(name: str) -> None:
    tables = Tables(2, seed=3)
    assert distance(tables, Scripted(temperature=1.0), COPYING[name](), new=5, compared=5) < 1e-6


@pytest.mark.parametrize("shape", [*SHAPES, "processors"])
@pytest.mark.parametrize("name", ["2 copied, else fixed:2", "thompson+lookup, seed 1"])
def test_copied_drafts_keep_the_law_of_a_shaped_p(name: str, shape: str) -> None:
    sampler = Scripted(**({"temperature": 1.0} | (SHAPES | {"processors": {"processors": forbids_and_allows}})[shape]))
    tables = Tables(3, seed=5, can_draft=[0, 2])
    assert distance(tables, sampler, COPYING[name](), new=4, compared=4) < 1e-6


def test_the_enumeration_copies_and_thompson_uses_its_freedom() -> None:
    tables, found = Tables(2, seed=3), set()
    for seed in range(20):
        sampler = Sampler(1.0, generator=torch.Generator().manual_seed(seed))
        out = self_speculative(tables, Request(PROMPT, 24), sampler, WithLookup(experienced(seed), False, seed))
        found |= {(r.source, r.drafted > 1, r.accepted < r.drafted) for r in out.rounds}
    assert {("lookup", True, True), ("lookup", True, False), ("head", True, True)} <= found


def test_a_copied_draft_that_is_judged_by_the_heads_q_is_caught(monkeypatch) -> None:
    def uniform(token_1, like_V):
        return Law(torch.zeros_like(like_V))

    monkeypatch.setattr(decoding, "Point", uniform)
    tables = Tables(2, seed=3)
    assert distance(tables, Scripted(temperature=1.0), Copies(2, "none"), new=5, compared=5) > 1e-3


def test_a_q_that_stands_at_other_tokens_is_caught(monkeypatch) -> None:
    def shifted(vocabulary, x, fill):
        return x.new_full((*x.shape[:-1], vocabulary.size), fill).index_copy_(-1, vocabulary.ids_W - 1, x)

    monkeypatch.setattr(DraftVocabulary, "spread", shifted)
    tables = Tables(3, seed=5, can_draft=[1, 2])
    assert distance(tables, Scripted(temperature=1.0), make_controller("fixed:2"), new=4, compared=4) > 1e-3


def test_four_drafts_in_one_round() -> None:
    sampler = Scripted(temperature=1.0)
    assert distance(Tables(2, seed=4), sampler, make_controller("fixed:4"), new=6, compared=5) < 1e-6


def test_experienced_thompson_uses_all_its_freedom() -> None:
    """The proof above would be empty if it always drafted the same number."""
    tables, sampler, drafted = Tables(2, seed=3), Sampler(1.0, generator=torch.Generator().manual_seed(0)), set()
    for seed in range(30):
        out = self_speculative(tables, Request(PROMPT, 12), sampler, experienced(seed))
        drafted |= {(r.drafted, r.head_passes > r.drafted) for r in out.rounds}
    assert {k for k, _ in drafted} >= {0, 1, 2} and {refused for _, refused in drafted} == {True, False}


def test_a_controller_that_discards_a_sampled_token_is_caught() -> None:
    sampler = with_pending(Scripted)(temperature=1.0)
    assert distance(Tables(2, seed=3), sampler, Discards(sampler, 0.4), new=5, compared=5) > 1e-3


def test_a_controller_that_looks_at_the_accept_draw_is_caught() -> None:
    tables, sampler = Tables(2, seed=3), with_pending(Scripted)(temperature=1.0)
    cheat = LooksAtAcceptDraw(sampler, lambda: tables.table(0, tuple(tables.text)).softmax(-1))
    assert distance(tables, sampler, cheat, new=5, compared=5) > 1e-3
