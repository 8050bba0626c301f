"""Drafts that branch: passes over trees, the text they give, what is recorded of a round, and their controllers."""

import pytest
import torch
from family_cases import BRANCHING
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load

from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.branching import CANDIDATES, Branching, FixedTree
from pipeline.inference.controllers import Fixed, make_controller
from pipeline.inference.costs import Costs, Recent
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.rounds import LONGEST, Round
from pipeline.inference.sampling import Sampler
from pipeline.inference.tree import Draft, Tree

TREES = [
    "tree:3",
    "tree:2x2x1",
    "tree:1x3x2",
    "tree:2x1x1x1x1",
    "tree:3x1+lookup",
    "thompson+tree",
    "thompson+tree+lookup",
]


@pytest.fixture(scope="module", params=BRANCHING)
def model(request, tmp_path_factory):
    folder = tiny_backbone(
        tmp_path_factory.mktemp(request.param), request.param, sharpness=4.0, **BRANCHING[request.param]
    )
    return load(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tiny_backbone(tmp_path_factory.mktemp("llama"), sharpness=4.0))


def grown(pending: int, parents: list[int], seed: int) -> Tree:
    """A tree of random tokens. parents: of rows 1, 2, ..."""
    dice, tree = torch.Generator().manual_seed(seed), Tree(pending)
    for parent in parents:
        tree.add(parent, Draft(torch.randint(0, 200, (1,), generator=dice)), None)
    return tree


SHAPES = {
    "two chains": [0, 0, 1, 2, 3, 4],
    "a comb": [0, 0, 0, 1, 1, 4, 4, 4],
    "2x2x2": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6],
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_of_a_tree_is_computed_as_the_end_of_its_path(model, shape: str) -> None:
    """Shallow, deep and head passes over all rows at once, and level by level, against a text that is only the path."""
    engine = SplitBackbone(model, head_for(model, 2))
    tree, base = grown(PROMPT[-1], SHAPES[shape], seed=1), len(PROMPT) - 1
    found = {}
    for way in ("at once", "level by level"):
        cache = engine.new_cache(40, spare=8)
        engine.shallow(PROMPT[:base], 0, cache)
        engine.deep(0, base, cache)
        cache.commit(base)
        levels = {depth: [row for row in range(len(tree)) if tree.depths[row] == depth] for depth in set(tree.depths)}
        head = []
        for rows in [list(range(len(tree)))] if way == "at once" else levels.values():
            engine.shallow([tree.tokens[row] for row in rows], base + rows[0], cache, tree)
            if way != "at once":
                head.append(engine.draft_logits([base + row for row in rows], cache, tree))
        if way == "at once":
            head = [
                engine.draft_logits([base], cache),
                engine.draft_logits(list(range(base + 1, base + len(tree))), cache, tree),
            ]
        found[way] = engine.logits(engine.deep(base, base + len(tree), cache, tree)), torch.cat(head)
    for row in range(len(tree)):
        text = [*PROMPT, *(tree.tokens[i] for i in tree.path(row))]
        alone = engine.new_cache(40)
        engine.shallow(text, 0, alone)
        own = engine.logits(engine.deep(0, len(text), alone)[-1:])[0], engine.draft_logits([len(text) - 1], alone)[0]
        for logits_RV, drafts_RV in found.values():
            torch.testing.assert_close(logits_RV[row], own[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(drafts_RV[row], own[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("path", [[1, 4, 5], [2], [1, 3], [], [1, 4, 7]])
def test_a_kept_path_leaves_the_cache_of_a_text_that_never_branched(model, path: list[int]) -> None:
    engine = SplitBackbone(model, head_for(model, 2))
    tree, base = grown(PROMPT[-1], [0, 0, 1, 1, 4, 4, 4], seed=2), len(PROMPT) - 1
    cache = engine.new_cache(40, spare=8)
    engine.shallow(PROMPT[:base], 0, cache)
    engine.deep(0, base, cache)
    cache.commit(base)
    engine.shallow(tree.tokens[:1], base, cache, tree)
    engine.draft_logits([base], cache, tree)
    engine.shallow(tree.tokens[1:], base + 1, cache, tree)
    engine.draft_logits([base + 1, base + 3, base + 4], cache, tree)
    engine.deep(base, base + len(tree), cache, tree)
    cache.keep(path)
    text = [*PROMPT, *(tree.tokens[row] for row in path)]
    assert cache.length == len(text)
    assert cache.head_length == base + 1 + sum(row <= 4 for row in path)  # what it read; the rest it reads when asked
    plain = engine.new_cache(40)
    engine.shallow(text, 0, plain)
    engine.deep(0, len(text), plain)
    plain.commit(len(text))
    for mine, own in zip([*cache.keys, *cache.values], [*plain.keys, *plain.values], strict=True):
        if mine is not cache.keys[-1] and mine is not cache.values[-1]:
            torch.testing.assert_close(mine[:, :, :, : len(text)], own[:, :, :, : len(text)], rtol=1e-4, atol=1e-4)
    following = [17, 3]
    for one in (cache, plain):
        engine.shallow(following, len(text), one)
    drafts = [engine.draft_logits([len(text) + 1], one) for one in (cache, plain)]
    torch.testing.assert_close(*drafts, rtol=1e-4, atol=1e-4)
    deep = [engine.logits(engine.deep(len(text), len(text) + 2, one)) for one in (cache, plain)]
    torch.testing.assert_close(*deep, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_the_backbones(model) -> None:
    request, branched = Request(PROMPT, 40), 0
    for n in (1, 3):
        engine = SplitBackbone(model, head_for(model, n))
        expected = autoregressive(engine, request, Sampler()).tokens
        for name in TREES:
            out = self_speculative(engine, request, Sampler(), make_controller(name))
            assert out.tokens == expected, name
            branched += sum(bool(r.path) and r.path[-1] != r.accepted for r in out.rounds)
    assert branched > 3, "no path but the first one was ever accepted"


def test_passes_of_fixed_shapes_give_the_same_text(model) -> None:
    engine, request = SplitBackbone(model, head_for(model, 2), fixed_shapes=True), Request(PROMPT, 40)
    expected = autoregressive(engine, request, Sampler()).tokens
    for name in ("tree:3", "tree:2x2x1", "tree:4x3x2", "thompson+tree+lookup"):
        assert self_speculative(engine, request, Sampler(), make_controller(name)).tokens == expected
    cache = engine.new_cache(60, spare=40)
    assert autoregressive(engine, request, Sampler()).tokens == expected and engine.new_cache(60) is cache


def test_the_right_token_is_always_the_heads_second_choice(llama, monkeypatch) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))  # perfect drafts, but for what follows
    honest = engine.draft_logits

    def second(*args):
        logits_MV = honest(*args).clone()
        values, at = logits_MV.topk(2)
        return logits_MV.scatter_(1, at, values.flip(1))

    monkeypatch.setattr(engine, "draft_logits", second)
    request = Request(PROMPT, 1 + 4 * 3)
    chain = self_speculative(engine, request, Sampler(), Fixed(2))
    assert all(r.accepted == 0 for r in chain.rounds)
    out = self_speculative(engine, request, Sampler(), make_controller("tree:2x2"))
    assert [(r.drafted, r.levels, r.head_passes, r.path, r.tokens) for r in out.rounds] == [(6, 2, 2, [2, 6], 3)] * 4
    assert all(r.parents == [0, 0, 1, 2, 1, 2] and r.tested() == [(2, 1), (2, 1)] for r in out.rounds)
    assert out.tokens == chain.tokens


def test_a_round_tells_which_candidates_were_tested() -> None:
    assert Round(drafted=3, accepted=1).tested() == [(1, 0), (1, 1)] and Round(drafted=3, accepted=1).levels == 3
    assert Round(drafted=2, accepted=2).tested() == [(1, 0), (1, 0)] and Round().tested() == []
    branched = Round(drafted=5, accepted=1, parents=[0, 0, 1, 1, 1], path=[1])
    assert branched.tested() == [(2, 0), (3, 3)] and branched.levels == 2
    leaf = Round(drafted=4, accepted=1, parents=[0, 0, 1, 1], path=[2])
    assert leaf.tested() == [(2, 1)]


def test_nothing_follows_a_drafted_end_token(llama) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))
    text = autoregressive(engine, Request(PROMPT, 16), Sampler()).tokens
    for end in set(text):
        expected = text[: text.index(end) + 1]
        for name in ("tree:2x2x2", "thompson+tree"):
            out = self_speculative(engine, Request(PROMPT, 16, frozenset([end])), Sampler(), make_controller(name))
            assert out.tokens == expected and out.finish_reason == "stop"
            for r in out.rounds:
                assert not any(parent and r.drafts[parent - 1] == end for parent in r.parents)


def test_the_length_limit_and_the_context_hold_with_branches(llama) -> None:
    engine = SplitBackbone(llama, head_for(llama, 3))
    new = llama.config.max_position_embeddings - len(PROMPT)
    for length in (1, 2, 3, new):
        out = self_speculative(engine, Request(PROMPT, length), Sampler(), make_controller("tree:4x2x2"))
        assert len(out.tokens) == length
    assert out.tokens == autoregressive(engine, Request(PROMPT, new), Sampler()).tokens


def test_sampled_drafts_that_branch_are_never_doubled(llama) -> None:
    engine = SplitBackbone(llama, head_for(llama, 2))
    sampler = Sampler(1.0, top_k=3, generator=torch.Generator().manual_seed(0))
    out = self_speculative(engine, Request(PROMPT, 60), sampler, make_controller("tree:4x4"))
    for r in out.rounds:
        for parent in set(r.parents):
            ids = [token for token, p in zip(r.drafts, r.parents, strict=True) if p == parent]
            assert len(set(ids)) == len(ids) <= 3  # top-k leaves three
    assert any(len(r.drafts) == 12 for r in out.rounds)


@pytest.mark.parametrize("name", ["tree:", "tree:0", "tree:2x0", "tree:2x-1", "tree:axb", "tree:8x8", "tree:2x2+tree"])
def test_shapes_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^controller={name.replace('+', '[+]')}: "):
        make_controller(name)
    assert make_controller("tree:4x4x2").spare == 4 + 16 + 32 - 3


def test_a_backbone_whose_layers_are_transformers_own_drafts_no_trees(tmp_path) -> None:
    model = load(tiny_backbone(tmp_path, "olmo2"))
    engine = SplitBackbone(model, head_for(model, 2))
    engine.check_controller(Fixed(2))
    with pytest.raises(ValueError, match="its drafts branch, which needs a family"):
        engine.check_controller(make_controller("thompson+tree+lookup"))
    with pytest.raises(ValueError, match="its drafts branch"):
        self_speculative(engine, Request(PROMPT, 8), Sampler(), make_controller("tree:2"))


class Said:
    def __init__(self, top: float):
        self.top = self.collision = top


def rounds_of(controller: Branching, row: float, rank, rounds: int) -> list[int]:
    """Plays rounds in which the right candidate has index `rank(level)`, a row costs `row` tokens and a level 0.1.
    Returns how many leaves each round had."""
    leaves = []
    for _ in range(rounds):
        k, parents, path, passes, right = 0, [], [], 0, True
        at, following = 0, True
        while following and k < LONGEST and controller.peek(k):
            passes += 1
            count = int(controller.draft(k, Said(0.5)))
            if not count:
                break
            first = len(parents) + 1
            parents += [at] * count
            if right:
                index = rank(k)
                path += [first + index] if index < count else []
                right = index == 0
            at, k = first, k + 1
        drafted = len(parents)
        verify = 1 + row * drafted
        seconds = 0.05 * (k + 1) + 0.05 * passes + verify
        chain = drafted == k
        made = Round(drafted, len(path), len(path) + 1, passes, seconds, 0.05 * (k + 1), 0.05 * passes, verify)
        made.parents, made.path = ([], []) if chain else (parents, path)
        controller.observe(made)
        leaves.append(drafted - k)
    return leaves


def test_leaves_are_drafted_where_rows_are_cheap_and_they_are_right() -> None:
    free = rounds_of(Branching(seed=0), row=0.0005, rank=lambda k: 1, rounds=300)
    assert sum(free[150:]) > 100
    useless = rounds_of(Branching(seed=0), row=0.02, rank=lambda k: CANDIDATES, rounds=600)
    assert sum(useless[300:]) < 30
    dear = rounds_of(Branching(seed=0), row=1.0, rank=lambda k: 1, rounds=300)
    assert sum(dear[150:]) == 0


def test_what_it_learned_can_be_saved_and_thompsons_state_is_a_beginning() -> None:
    mine = Branching(seed=0)
    rounds_of(mine, row=0.0005, rank=lambda k: 1, rounds=100)
    again = Branching(seed=1)
    again.load_state_dict(mine.state_dict())
    assert again.beside == mine.beside and again.counts == mine.counts
    fresh = Branching(seed=1)
    fresh.load_state_dict({k: v for k, v in mine.state_dict().items() if k != "beside"})
    assert fresh.counts == mine.counts and fresh.beside != mine.beside


def test_the_time_of_a_row_is_the_slope_of_verification() -> None:
    costs = Costs()
    for width, seconds in ((1, 1.0), (2, 1.1), (5, 1.4)):
        costs.verify[width] = Recent()
        for _ in range(3):
            costs.verify[width].add(seconds)
    costs.shallow.add(0.11)
    assert costs.row() == pytest.approx(0.1 * 1.1)


def test_fixed_shapes_have_as_many_drafts_as_they_say(llama) -> None:
    engine = SplitBackbone(llama, head_for(llama, 2))
    out = self_speculative(engine, Request(PROMPT, 30), Sampler(), FixedTree([3, 2, 1]))
    assert out.rounds[0].drafted == 3 + 6 + 6 and out.rounds[0].levels == 3
