"""The simulator takes the same rounds as the decoder, and its oracle is what trying everything gives."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load

from pipeline.evaluation import simulation
from pipeline.evaluation.simulation import CostModel, Trace
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed, make_controller
from pipeline.inference.costs import Costs
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.rounds import Round, look_of, memory_of, reads_of, spare_of
from pipeline.inference.sampling import Sampler
from pipeline.inference.thompson import Thompson

COSTS = CostModel({"shallow": 0.1, "head": 0.1, "rest": 0.02, "verify": {1: 0.9, 2: 1.0, 4: 1.1}})
NEW = 40


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    fields = {"num_hidden_layers": 3, "vocab_size": 24, "eos_token_id": None, "pad_token_id": None}
    model = load(tiny_backbone(tmp_path_factory.mktemp("s"), sharpness=4.0, **fields))
    return SplitBackbone(model, head_for(model, 1))


PROMPT24 = [t % 24 for t in PROMPT]


class Timeless:
    """A controller that is told the same time for every round of a shape, by the decoder and by the simulator."""

    def __init__(self, inner):
        self.inner, self.peek, self.draft = inner, inner.peek, inner.draft
        self.reads, self.spare, self.memory = reads_of(inner), spare_of(inner), memory_of(inner)
        if look_of(inner):
            self.look = inner.look

    def observe(self, round) -> None:
        levels = round.levels if round.source == "head" else 0
        seconds, shallow, head, verify = COSTS.round(round.drafted, round.head_passes, levels)
        self.inner.observe(
            replace(round, seconds=seconds, shallow_seconds=shallow, head_seconds=head, verify_seconds=verify)
        )


NAMES = ["fixed:0", "fixed:3", "confidence:0.3", "entropy:0.3", "cumulative:0.2", "beta", "calibration",
         "calibration:shift", "goodput", "logistic", "adaptive_steps", "schedule", "ucb", "tapout",
         "thompson", "thompson+tree", "tree:3", "tree:2x2x1", "tree:1x2x3",
         "thompson+lookup", "none+lookup", "thompson+tree+lookup", "tree:2x2+memory"]  # fmt: skip


class Copies(Fixed):
    """Copies four tokens wherever there is a match, and leaves other rounds to a head that drafts one."""

    def __init__(self):
        super().__init__(1)

    def look(self, match) -> int:
        return 4


def controller_of(name: str):
    return Copies() if name == "copies" else make_controller(name)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_rounds_are_the_decoders_own(engine, name: str) -> None:
    """Off the path too: confidences behind a wrong draft come from a forced replay."""
    text = autoregressive(engine, Request(PROMPT24, NEW), Sampler()).tokens
    trace = simulation.record(engine, "p", PROMPT24, text, Sampler(), NEW)
    assert 0 < trace.acceptance_T[1:].mean() < 1
    real = self_speculative(engine, Request(PROMPT24, NEW), Sampler(), Timeless(make_controller(name)))
    assert real.tokens == text
    outcome = simulation.outcomes([trace], 0)[0]
    rounds = simulation.replay(Timeless(make_controller(name)), trace, outcome, COSTS)
    assert [shape_of(r) for r in rounds] == [shape_of(r) for r in real.rounds]


def shape_of(r: Round) -> tuple:
    return r.source, r.drafted, r.accepted, r.tokens, r.head_passes, r.parents, r.path


def test_a_memory_is_replayed_over_texts_in_their_order(engine) -> None:
    real, simulated = (Timeless(make_controller("fixed:1+memory")) for _ in range(2))
    sources = set()
    for prompt in (PROMPT24, PROMPT24[:-1], PROMPT24):
        text = autoregressive(engine, Request(prompt, NEW), Sampler()).tokens
        out = self_speculative(engine, Request(prompt, NEW), Sampler(), real)
        trace = simulation.record(engine, "p", prompt, text, Sampler(), NEW)
        rounds = simulation.replay(simulated, trace, simulation.outcomes([trace], 0)[0], COSTS)
        assert [shape_of(r) for r in rounds] == [shape_of(r) for r in out.rounds]
        sources |= {r.source for r in rounds}
    assert "memory" in sources


@pytest.mark.parametrize("name", ["fixed:3", "thompson", "thompson+tree", "tree:2x2x1", "tree:1x2x3", "copies"])
def test_a_text_that_ends_by_itself_takes_the_decoders_rounds(engine, name: str) -> None:
    whole = autoregressive(engine, Request(PROMPT24, NEW), Sampler()).tokens
    for at in range(3, NEW, 5):
        text = whole[: whole.index(whole[at]) + 1]
        if len(text) < 2:
            continue
        request = Request(PROMPT24, NEW, frozenset([whole[at]]))
        trace = simulation.record(engine, "p", PROMPT24, text, Sampler(), NEW)
        real = self_speculative(engine, request, Sampler(), Timeless(controller_of(name)))
        assert real.tokens == text
        outcome = simulation.outcomes([trace], 0)[0]
        rounds = simulation.replay(Timeless(controller_of(name)), trace, outcome, COSTS)
        # what follows a wrong draft that is an end token is not known, so a round may have drafted more
        assert [(r.accepted, r.tokens) for r in rounds] == [(r.accepted, r.tokens) for r in real.rounds]


def test_the_replay_of_trees_reaches_other_than_first_candidates(engine) -> None:
    text = autoregressive(engine, Request(PROMPT24, NEW), Sampler()).tokens
    trace = simulation.record(engine, "p", PROMPT24, text, Sampler(), NEW)
    outcome = simulation.outcomes([trace], 0)[0]
    for name in ("tree:3", "tree:2x2x1", "thompson+tree"):
        rounds = simulation.replay(make_controller(name), trace, outcome, COSTS)
        assert any(r.path and r.path != list(range(1, r.accepted + 1)) for r in rounds), name


def sampler(seed: int) -> Sampler:
    return Sampler(1.0, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sampled_traces(engine) -> list[Trace]:
    """Of 25 texts; a trace knows no controller."""
    texts = [autoregressive(engine, Request(PROMPT24, NEW), sampler(1000 + seed)).tokens for seed in range(25)]
    return [simulation.record(engine, "p", PROMPT24, t, sampler(2000 + i), NEW) for i, t in enumerate(texts)]


BRANCHING = ["tree:3", "tree:2x2", "tree:1x3x2", "thompson+tree", "tree:2x1+lookup"]


@pytest.mark.parametrize("name", ["fixed:2", "confidence:0.3", "copies", *BRANCHING])
def test_sampled_rounds_have_the_decoders_law(engine, sampled_traces, name: str) -> None:
    """Means of what 25 texts took each way, within four standard errors. Each text has a controller of its own, so that
    texts are independent."""
    found = []
    for simulated in (False, True):
        totals = []
        for seed, trace in enumerate(sampled_traces):
            controller = Copies() if name == "copies" else Timeless(make_controller(name, seed, greedy=False))
            if simulated:
                rounds = simulation.replay(controller, trace, simulation.outcomes([trace], seed)[0], COSTS)
            else:
                rounds = self_speculative(engine, Request(PROMPT24, NEW), sampler(seed), controller).rounds
            beside = sum(bool(r.path) and r.path != [*range(1, r.accepted + 1)] for r in rounds)
            totals.append([len(rounds), *np.sum([(r.drafted, r.accepted, r.levels) for r in rounds], 0), beside])
        found.append(np.array(totals, float))
    a, b = found
    error = np.sqrt((a.var(0) + b.var(0)) / len(a)) + 1e-9
    assert a[:, 2].mean() > 2
    assert (abs(a.mean(0) - b.mean(0)) < 4 * error).all(), (a.mean(0), b.mean(0), error)
    assert name not in BRANCHING or a[:, 4].mean() > 0.2  # other than first candidates are accepted


@pytest.fixture(scope="module")
def narrow_trace(engine) -> Trace:
    """Sampled where q allows one to three tokens."""
    text = autoregressive(engine, Request(PROMPT24, NEW), narrow(1)).tokens
    return simulation.record(engine, "p", PROMPT24, text, narrow(2), NEW)


def narrow(seed: int) -> Sampler:
    return Sampler(1.0, top_k=3, top_p=0.9, generator=torch.Generator().manual_seed(seed))


def test_no_more_candidates_are_replayed_than_q_allows(engine, narrow_trace) -> None:
    outcome = simulation.outcomes([narrow_trace], 0)[0]
    real = self_speculative(engine, Request(PROMPT24, NEW), narrow(3), make_controller("tree:4")).rounds
    for rounds in (real, simulation.replay(make_controller("tree:4"), narrow_trace, outcome, COSTS)):
        drafted = {r.drafted for r in rounds}
        assert drafted <= {0, 1, 2, 3} and len(drafted & {1, 2, 3}) > 1
    simulation.replay(make_controller("tree:3x1"), narrow_trace, outcome, COSTS)
    with pytest.raises(ValueError, match=r"^drafts that branch behind others than first candidates"):
        simulation.replay(make_controller("tree:2x2"), narrow_trace, outcome, COSTS)


def test_a_trace_without_ranks_has_no_trees() -> None:
    with pytest.raises(ValueError, match=r"^a trace without ranks"):
        simulation.replay(make_controller("tree:2"), toy_trace([0, 1, 1]), np.ones(3, bool), COSTS)


def toy_trace(accepted: list[int]) -> Trace:
    n = len(accepted)
    flat = np.full((n, simulation.RECORDED, 3), 0.5)
    return Trace("toy", n, np.array(accepted, float), np.full((n, 3), 0.5), flat)


def test_oracle_is_the_best_of_all_plans() -> None:
    """All sequences of draft counts tried one by one."""
    trace = toy_trace([0, 1, 1, 0, 1, 1, 0])
    outcome = simulation.outcomes([trace], 0)[0]

    class Plan(Fixed):
        def __init__(self, plan):
            super().__init__(0)
            self.plan, self.at = plan, 0

        def peek(self, k: int) -> bool:
            return k < self.plan[self.at]

        def observe(self, round) -> None:
            self.at += 1

    every = itertools.product(range(5), repeat=6)
    best = min(sum(r.seconds for r in simulation.replay(Plan(p), trace, outcome, COSTS)) for p in every)
    assert simulation.oracle(trace, outcome, COSTS) == pytest.approx(best)


def test_the_oracle_copies_what_is_right(engine) -> None:
    """It is never slower for it, and of a text that repeats itself it copies nearly all."""
    loop = ([5, 6, 7, 8] * 12)[:NEW]
    nothing = np.zeros((NEW, 3))
    off = nothing[:, None].repeat(simulation.RECORDED, 1)
    trace = Trace("loop", NEW, np.zeros(NEW), nothing, off, None, np.array([5, 6, 7, 8, 5, 6, 7, 8]), np.array(loop))
    outcome = np.zeros(NEW, bool)
    alone, copying = (simulation.oracle(trace, outcome, COSTS, copies=copies) for copies in (False, True))
    assert alone == pytest.approx(COSTS.round(0, 0)[0] * (NEW - 1))
    splits = (s for s in itertools.combinations_with_replacement(range(9), 5) if sum(s) == 34)  # 39 tokens, 5 rounds
    assert copying == pytest.approx(min(sum(COSTS.round(n, 0, 0)[0] for n in split) for split in splits))
    rounds = simulation.replay(Copies(), trace, outcome, COSTS)
    assert all(r.source == "lookup" and r.accepted == r.drafted for r in rounds)


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_of_both_sources_is_what_trying_everything_gives(seed: int) -> None:
    dice = np.random.default_rng(seed)
    tokens, right = dice.integers(0, 3, 9), dice.random(9) < 0.5
    unread = Trace.of("toy", 9, right.astype(float))
    trace = replace(unread, ids=dice.integers(0, 3, 5), tokens=tokens)
    copies = simulation._right_copies(trace)

    def least(t: int) -> float:
        if t >= 9:
            return 0.0
        run = next((i for i in range(9 - t) if not right[t + i]), 9 - t)
        heads = [COSTS.round(k, k)[0] + least(t + k + 1) for k in range(min(run, 8 - t) + 1)]
        return min(heads + [COSTS.round(n, 0, 0)[0] + least(t + n + 1) for n in range(1, min(copies[t], 8 - t) + 1)])

    assert simulation.oracle(trace, right, COSTS, copies=True) == pytest.approx(least(1))
    assert least(1) <= simulation.oracle(trace, right, COSTS)


def test_costs_of_a_round_add_up() -> None:
    assert COSTS.round(2, 3)[0] == pytest.approx(3 * 0.1 + 3 * 0.1 + 1.05 + 0.02)
    assert COSTS.verify(7) == pytest.approx(1.1 + 3 * (1.1 - 0.9) / 3)


def test_play_keeps_one_controller_for_all_traces() -> None:
    traces = [toy_trace([0, 1, 1, 0, 1, 1]), toy_trace([0, 1, 0])]
    made = []

    def make():
        made.append(Thompson(costs=Costs()))
        return made[-1]

    tokens, seconds = simulation.play(make, traces, simulation.outcomes(traces, 0), COSTS)
    assert tokens.tolist() == [5, 2] and (seconds > 0).all()
    assert len(made) == 1 and made[0].rounds > 0


def test_files_round_trip_and_know_their_head(tmp_path) -> None:
    traces = [toy_trace([0, 1, 1]), toy_trace([0, 1, 0, 1])]
    simulation.save(tmp_path / "t.npz", traces, "ab" * 32)
    again = simulation.load(tmp_path / "t.npz", "ab" * 32)
    assert [t.acceptance_T.tolist() for t in again] == [t.acceptance_T.tolist() for t in traces]
    assert again[0].off_TJC.shape == traces[0].off_TJC.shape and again[1].max_new_tokens == 4
    with pytest.raises(ValueError, match="recorded with another exit head"):
        simulation.load(tmp_path / "t.npz", "cd" * 32)
    (tmp_path / "bad").write_text("x")
    with pytest.raises(ValueError, match="not a file of traces"):
        simulation.load(tmp_path / "bad", "ab" * 32)
