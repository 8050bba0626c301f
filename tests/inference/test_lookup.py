"""Copied drafts: the index against a search by brute force, and the control over two sources."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import make_run, plant_heads

from pipeline.backbones.load import load_model
from pipeline.evaluation import simulation
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed, learned_controller, make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.lookup import LONGEST_MATCH, NGRAM, Copying, Lookup, Match, Memory
from pipeline.inference.rounds import Round
from pipeline.inference.sampling import Sampler
from pipeline.inference.sources import BINS, WithLookup, bin_of
from pipeline.inference.thompson import Thompson


def brute_force(text: list[int]) -> tuple[int, int]:
    """(length, index after it) of the longest end of the text that occurred before; the latest of equally long ones, by
    its last NGRAM tokens."""
    end = len(text)
    for n in range(min(NGRAM, end - 1), 0, -1):
        for at in range(end - 1, n - 1, -1):
            if text[at - n : at] == text[end - n :]:
                while n < min(LONGEST_MATCH, at) and text[at - n - 1] == text[end - n - 1]:
                    n += 1
                return n, at
    return 0, end


@pytest.mark.parametrize("letters", [1, 2, 3, 9])
def test_the_match_is_the_longest_and_latest(letters: int) -> None:
    draw = random.Random(letters)
    text = [draw.randrange(letters) for _ in range(4)]
    index = Lookup(text)
    for _ in range(120):
        assert index.match() == brute_force(text)
        new = [draw.randrange(letters) for _ in range(draw.randrange(1, 4))]
        index.extend(new)
        text = text + new


def test_a_period_goes_on_for_ever() -> None:
    index = Lookup([7, 1, 2, 3, 1, 2, 3])
    matched, at = index.match()
    assert (matched, at) == (3, 4) and index.copy(at, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert Lookup([5, 5]).copy(Lookup([5, 5]).match()[1], 4) == [5, 5, 5, 5]
    assert Lookup([1, 2, 3]).match() == (0, 3) and Lookup([]).match() == (0, 0)


def test_bins() -> None:
    assert [bin_of(n) for n in BINS] == list(range(len(BINS)))
    assert bin_of(5) == bin_of(4) and bin_of(1000) == len(BINS) - 1


def rounds_of(controller: WithLookup, chance: float, count: int, seed: int = 0) -> list[Round]:
    """Rounds of a simulated decoder: a match of 8 is always there, its tokens are right with this chance; the head's
    single draft is right half of the time. A verified row costs 0.05, a verification 1, a head pass and its row 0.2."""
    draw, rounds = random.Random(seed), []
    for _ in range(count):
        n = controller.look(Match(8, "lookup", Lookup([]), 0))
        if n:
            accepted = next((i for i in range(n) if draw.random() >= chance), n)
            made = Round(n, accepted, accepted + 1, 0, 1.15 + 0.05 * n, 0.1, 0.0, 1.05 + 0.05 * n, source="lookup")
        else:
            accepted = int(draw.random() < 0.5)
            made = Round(1, accepted, accepted + 1, 1, 1.45, 0.2, 0.15, 1.10)
        controller.observe(made)
        rounds.append(made)
    return rounds


@pytest.mark.parametrize(("chance", "least", "most"), [(0.9, 0.9, 1.0), (0.02, 0.0, 0.1)])
def test_it_learns_whether_copying_pays(chance: float, least: float, most: float) -> None:
    rounds = rounds_of(WithLookup(make_controller("fixed:1")), chance, 400)[100:]
    assert least <= sum(r.source == "lookup" for r in rounds) / len(rounds) <= most


def test_the_heads_rounds_come_first_and_what_is_always_right_is_copied_in_full() -> None:
    controller = WithLookup(make_controller("fixed:1"))
    assert controller.look(Match(32, "lookup", Lookup([]), 0)) == 0, "nothing is known of the head's rounds yet"
    lengths = {r.drafted for r in rounds_of(controller, 1.0, 200)[50:] if r.source == "lookup"}
    assert max(lengths) == controller.limit, "what is always right is copied as far as allowed"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> SplitBackbone:
    run = make_run(tmp_path_factory.mktemp("lookup"))
    plant_heads(run, 2)
    model = load_model(run.config.backbone, torch.device("cpu"))
    return SplitBackbone(model, ExitHead.load(run / "heads" / "exit-2"))


@pytest.mark.parametrize("name", ["thompson+lookup", "fixed:2+lookup", "none+lookup"])
def test_greedy_text_is_the_backbones_and_loops_are_copied(engine, name: str) -> None:
    request = Request([5, 6, 7, 8] * 6, 80)
    plain = autoregressive(engine, request, Sampler())
    out = self_speculative(engine, request, Sampler(), make_controller(name))
    assert out.tokens == plain.tokens
    copied = [r for r in out.rounds if r.source == "lookup"]
    assert copied and all(r.drafts and r.head_passes == 0 for r in copied)
    assert sum(r.tokens for r in out.rounds) == len(out.tokens) - 1


def test_nothing_is_copied_beyond_an_end_token(engine) -> None:
    class Always:
        def look(self, match: Match) -> int:
            return 6

        def peek(self, k: int) -> bool:
            return False

        def observe(self, round: Round) -> None:
            assert 9 not in round.drafts[:-1]

    prompt = [1, 2, 3, 9, 4, 1, 2, 3, 9, 4, 1, 2]
    plain = autoregressive(engine, Request(prompt, 40, frozenset({9})), Sampler())
    out = self_speculative(engine, Request(prompt, 40, frozenset({9})), Sampler(), Always())
    assert out.tokens == plain.tokens and out.finish_reason == plain.finish_reason


def test_what_thompson_learned_of_a_head_is_taken_over() -> None:
    state = Thompson().state_dict() | {"rounds": 77}
    controller = learned_controller("thompson+lookup", {"states": {"greedy": state}})
    assert isinstance(controller, WithLookup) and controller.head.rounds == 77
    for name in ("often+lookup", "fixed:1+lookup+lookup", "fixed:1+lookup+memory", "fixed:1+memory+lookup"):
        with pytest.raises(ValueError, match="controller="):
            make_controller(name)


def test_the_longest_match_is_copied_and_of_equal_ones_the_nearest() -> None:
    memory = Memory()
    memory.add([1, 2, 3, 4, 50, 51])
    memory.add([2, 3, 4, 60, 61])
    texts = Copying([9, 2, 3, 4, 70, 8, 2, 3, 4], memory)
    match = texts.match([])
    assert (match.source, match.length, match.copy(2)) == ("lookup", 3, [70, 8])
    for prompt, found in (([8, 2, 3, 4], (3, [60, 61])), ([8, 1, 2, 3, 4], (4, [50, 51]))):
        match = Copying(prompt, memory).match([])
        assert (match.source, match.length, match.copy(9)) == ("memory", *found)
    assert Copying([5, 5], None).match([]).source == "lookup" and Copying([77], memory).match([]).length == 0


def test_nothing_is_copied_across_two_texts() -> None:
    memory = Memory()
    memory.add([1, 2, 3])
    memory.add([4, 5, 6])
    assert memory.tables[0].match([3, 4, 5])[0] == 2, "a match does not go back into the text before"
    assert Copying([9, 2], memory).match([]).copy(4) == [3]
    assert Copying([2, 3], memory).match([]).length == 0, "nothing followed"


def test_a_full_memory_forgets_the_oldest_and_says_so_once() -> None:
    memory = Memory(limit=40)
    with pytest.warns(UserWarning, match="forgets the oldest texts") as said:
        for i in range(20):
            memory.add([100 + i, 200 + i, 300 + i])
    assert len(said) == 1 and 16 <= len(memory) <= 40
    assert Copying([119, 219], memory).match([]).copy(1) == [319]
    assert Copying([100, 200], memory).match([]).length == 0
    with pytest.warns(UserWarning, match="only its last 19 are remembered"):
        memory.add(list(range(50)))
    assert len(memory) <= 40
    with pytest.raises(ValueError, match="at least 4"):
        Memory(3)
    small = Memory(4)
    with pytest.warns(UserWarning):
        for _ in range(3):
            small.add([1, 2, 3, 4])
    assert len(small) <= 4


def test_the_end_of_a_text_does_not_hide_what_followed_its_words_in_another() -> None:
    memory = Memory()
    memory.add([1, 2, 3, 4, 5])
    memory.add([8, 1, 2, 3])
    match = Copying([1, 2, 3], memory).match([])
    assert (match.length, match.copy(2)) == (3, [4, 5])


def test_a_remembered_token_takes_about_a_kilobyte() -> None:
    draw = random.Random(0)
    tokens = [draw.randrange(50_000) for _ in range(8000)]
    memory = Memory()
    tracemalloc.start()
    try:
        memory.add(tokens)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 500 < held / len(tokens) < 1500


class Copies(Fixed):
    """Copies four tokens wherever there is a match, whatever the clock says, and leaves other rounds to a head."""

    def __init__(self):
        super().__init__(1)
        self.memory = Memory()

    def look(self, match) -> int:
        return 4


def test_what_was_said_before_is_copied(engine) -> None:
    controller = Copies()
    request = Request([5, 6, 7, 8, 9, 10, 11, 12], 40)
    plain = autoregressive(engine, request, Sampler())
    rounds = []
    for _ in range(6):
        out = self_speculative(engine, request, Sampler(), controller)
        assert out.tokens == plain.tokens
        rounds.append(out.rounds)
    assert all(r.source != "memory" for r in rounds[0])
    remembered = [r for r in rounds[-1] if r.source == "memory"]
    assert remembered and all(r.accepted == r.drafted for r in remembered), "the text is there, word for word"
    assert sum(r.accepted for r in rounds[-1]) > sum(r.accepted for r in rounds[0])


def test_a_trace_without_tokens_cannot_be_replayed_with_copies() -> None:
    nothing = np.zeros((3, 0))
    trace = simulation.Trace("p", 8, np.ones(3), nothing, nothing)
    with pytest.raises(ValueError, match="without tokens cannot be replayed"):
        simulation.replay(make_controller("fixed:1+lookup"), trace, np.ones(3, bool), None)
