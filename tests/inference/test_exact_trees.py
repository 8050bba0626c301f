"""The law of the text where drafts branch, in closed form: the enumeration of test_exact.py over trees, and cheats."""

import pytest
import torch
from test_exact import (
    PROMPT,
    SHAPES,
    Copies,
    Scripted,
    Tables,
    counting_clock,
    distance,
    experienced,
    forbids_and_allows,
    joint,
    remembered,
)

from pipeline.evaluation import simulation
from pipeline.inference.branching import Branching
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, self_speculative
from pipeline.inference.law import Law
from pipeline.inference.rounds import Confidence, reads_of, spare_of
from pipeline.inference.sampling import Sampler, residual
from pipeline.inference.sources import WithLookup
from pipeline.inference.tree import Draft, Tree

__all__ = ["counting_clock"]  # the fixture of that file is used here too


def branching(seed: int) -> Branching:
    """Past its calibration, with something learned: leaves are drafted at times."""
    learned = experienced(seed)
    controller = Branching(greedy=False, seed=seed, costs=learned.costs)
    controller.counts = learned.counts
    controller.beside = [[4.0, 4.0] for _ in controller.beside]
    return controller


class Doubtful:
    """Several candidates where the head is in doubt, of which it reads as many as the level is deep: decisions by q,
    and levels of which only some rows are read."""

    spare = 8

    def reads(self, k: int) -> int:
        return max(1, k)

    def peek(self, k: int) -> bool:
        return k < 2

    def draft(self, k: int, confidence) -> int:
        return 2 if confidence.top < 0.6 else int(confidence.top < 0.9)

    def observe(self, round) -> None:
        pass


class CopiesOrBranches(Copies):
    def __init__(self, k: int, head: str):
        super().__init__(k, head)
        self.reads, self.spare = reads_of(self.head), spare_of(self.head)


TREES = {
    **{
        name: lambda name=name: make_controller(name)
        for name in ("tree:2", "tree:2x1", "tree:1x2", "tree:2x2", "tree:1x2x1")
    },
    "doubtful": Doubtful,
    **{f"thompson+tree, seed {s}": lambda s=s: branching(s) for s in (0, 1, 2)},
    "thompson+tree, calibrating": lambda: make_controller("thompson+tree", 0, greedy=False),
    "2 copied, else tree:2x1": lambda: CopiesOrBranches(2, "tree:2x1"),
    **{f"thompson+tree+lookup, seed {s}": lambda s=s: WithLookup(branching(s), False, s) for s in (0, 1)},
    "thompson+tree+memory": lambda: WithLookup(branching(0), False, 0, memory=remembered()),
}


@pytest.mark.parametrize("name", TREES)
def test_five_tokens_have_the_backbones_joint_law(name: str) -> None:
    assert distance(Tables(2, seed=3), Scripted(temperature=1.0), TREES[name](), new=5, compared=5) < 1e-6


class OnceMore:
    """One draft, another, and then two or one by q: whether the round branches depends on its tokens."""

    spare = 1

    def reads(self, k: int) -> int:
        return 1

    def peek(self, k: int) -> bool:
        return k < 3

    def draft(self, k: int, confidence) -> int:
        return 1 if k < 2 else 2 - (confidence.top < 0.75)

    def observe(self, round) -> None:
        pass


@pytest.mark.parametrize("seed", [3, 5])
@pytest.mark.parametrize("name", [*TREES, "once more"])
def test_block_verification_of_rounds_that_may_branch(name: str, seed: int) -> None:
    """Only copied drafts are verified as a block; else the rule would follow from the drafts."""
    controller = OnceMore() if name == "once more" else TREES[name]()
    assert distance(Tables(2, seed=seed), Scripted(temperature=1.0, block=True), controller, new=5, compared=5) < 1e-6


def test_a_block_of_drafts_that_might_have_branched_is_caught(monkeypatch) -> None:
    honest = Scripted.verify
    monkeypatch.setattr(Scripted, "verify", lambda self, tree, p, may_branch=False: honest(self, tree, p))
    sampler = Scripted(temperature=1.0, block=True)
    assert distance(Tables(2, seed=5), sampler, OnceMore(), new=5, compared=5) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["tree:2", "tree:3", "tree:2x1", "tree:1x2", "doubtful", "thompson+tree, seed 1"])
def test_three_token_vocabulary_and_processors(name: str, shape: str) -> None:
    sampler = Scripted(**({"temperature": 1.0} | SHAPES[shape]))
    controller = make_controller(name) if name.startswith("tree") else TREES[name]()
    assert distance(Tables(3, seed=5), sampler, controller, new=3, compared=3) < 1e-6


@pytest.mark.parametrize("shape", [*SHAPES, "processors"])
@pytest.mark.parametrize("name", ["tree:2", "tree:2x1", "doubtful", "thompson+tree, seed 1"])
def test_a_head_that_cannot_draft_every_token(name: str, shape: str) -> None:
    sampler = Scripted(**({"temperature": 1.0} | (SHAPES | {"processors": {"processors": forbids_and_allows}})[shape]))
    tables = Tables(3, seed=5, can_draft=[0, 2])
    assert distance(tables, sampler, TREES[name](), new=3, compared=3) < 1e-6


def test_the_enumeration_branches() -> None:
    """The proofs would be empty if nothing but the first candidates were ever accepted, or no leaf drafted."""
    tables, found = Tables(3, seed=5), set()
    for seed in range(30):
        sampler = Sampler(1.0, generator=torch.Generator().manual_seed(seed))
        for controller in (branching(seed), Doubtful()):
            out = self_speculative(tables, Request(PROMPT, 12), sampler, controller)
            found |= {
                (type(controller).__name__, bool(r.path) and r.path[-1] != r.accepted) for r in out.rounds if r.parents
            }
    assert found == {("Branching", True), ("Branching", False), ("Doubtful", True), ("Doubtful", False)}


class ForgetsTheResidual(Scripted):
    """Judges every candidate by p, as if none had been rejected before it."""

    def _accept_one_of(self, tree, row, p_V):
        law = tree.laws[row].law if tree.children[row] else None
        for child in tree.children[row]:
            x_1 = tree.drafts[child - 1].token_1
            if bool(self._coins(p_V[x_1] / law.q_V[x_1])):
                return child, p_V
        return 0, residual(p_V, law.q_V) if law else p_V


class ForgetsWhatWasDrawn(Scripted):
    """Draws siblings without replacement, and judges them as if drawn with it."""

    def _accept_one_of(self, tree, row, left_V):
        for child in tree.children[row]:
            x_1, q_V = tree.drafts[child - 1].token_1, tree.laws[row].law.q_V
            if bool(self._coins(left_V[x_1] / q_V[x_1])):
                return child, left_V
            left_V = residual(left_V, q_V)
            left_V = left_V / left_V.sum()
        return 0, left_V


class TakesTheBest(Scripted):
    """Tries the candidate that the backbone likes most first, whatever the order in which they were drawn."""

    def _accept_one_of(self, tree, row, left_V):
        tree.children[row].sort(key=lambda child: -float(left_V[tree.drafts[child - 1].token_1]))
        return super()._accept_one_of(tree, row, left_V)


class RanksBySibling(Scripted):
    """Takes the next best tokens as siblings, as in greedy decoding, and judges them as drawn."""

    def siblings(self, q, first, count):
        left_W = q.law.q_W.index_fill(0, first.index_1, 0.0)
        return [Draft(i_1) for i_1 in left_W.topk(count).indices[:, None]]


@pytest.mark.parametrize("cheat", [ForgetsTheResidual, ForgetsWhatWasDrawn, TakesTheBest, RanksBySibling])
def test_a_rule_that_cheats_is_caught(cheat) -> None:
    tables = Tables(4, seed=6)
    assert distance(tables, Scripted(temperature=1.0), make_controller("tree:2"), new=3, compared=2) < 1e-6
    assert distance(tables, cheat(temperature=1.0), make_controller("tree:2"), new=3, compared=2) > 1e-3


def test_a_controller_that_drops_a_sibling_by_its_token_is_caught(monkeypatch) -> None:
    honest = Scripted.siblings

    def only_small(self, q, first, count):
        return [draft for draft in honest(self, q, first, count) if draft.token != 2]

    monkeypatch.setattr(Scripted, "siblings", only_small)
    assert distance(Tables(4, seed=6), Scripted(temperature=1.0), make_controller("tree:2"), new=3, compared=2) > 1e-3


@pytest.mark.parametrize("allowed", [[0, 1, 2, 3], [0, 2, 3], [1, 3]])
@pytest.mark.parametrize("candidates", [2, 3])
def test_the_simulation_of_candidates_has_the_decoders_law(candidates: int, allowed: list[int]) -> None:
    """Of the first candidate, how many were tried in vain, and the token: the decoder draws candidates and the token
    follows, the simulation draws the token and the candidates follow. Some tokens have no q, some no p."""
    dice = torch.Generator().manual_seed(candidates)
    p_V, q_V = (1.5 * torch.randn(2, 4, generator=dice, dtype=torch.float64)).softmax(-1)
    p_V[0], q_V = 0.0, q_V * torch.zeros(4, dtype=torch.float64).index_fill_(0, torch.tensor(allowed), 1.0)
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    sampler = Scripted(temperature=1.0)

    def decoded() -> list[int]:
        tree, law = Tree(1), Confidence(Law(q_V.log()))
        first = sampler.propose(law)
        for draft in (first, *sampler.siblings(law, first, candidates - 1)):
            tree.add(0, draft, law)
        path, bonus = sampler.verify(tree, p_V.log().expand(len(tree), -1), may_branch=True)
        return [tree.tokens[1], path[0] - 1 if path else candidates, tree.tokens[path[0]] if path else bonus]

    def simulated() -> list[int]:
        token = sampler.draw(p_V.log())
        if bool(sampler._coins((q_V[token] / p_V[token])[None])):
            return [token, 0, token]
        first = sampler._draw(residual(q_V, p_V))
        return [first, min(simulation.tried_in_vain(p_V, q_V, token, first, sampler), candidates), token]

    expected, found = joint(decoded, sampler, 3), joint(simulated, sampler, 3)
    assert len({row[1] for row in expected}) == min(candidates, len(allowed)) + 1
    assert expected.keys() >= {row for row, chance in found.items() if chance > 1e-12}
    assert all(abs(chance - found.get(row, 0.0)) < 1e-9 for row, chance in expected.items()), (expected, found)
