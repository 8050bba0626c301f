"""The accept rule is exact, the processors are transformers' own, the sampled text has the backbone's law."""

import itertools

import pytest
import torch
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load, transformers_greedy
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.inference import decoding
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import Fixed, make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.law import Law
from pipeline.inference.rounds import Confidence
from pipeline.inference.sampling import Draft, Sampler, residual
from pipeline.inference.stopwatch import Stopwatch


def test_accept_or_residual_gives_exactly_p() -> None:
    """sum over drafts x of q(x) [min(1, p/q) at x, else the residual] = p, in closed form, zeros included."""
    torch.manual_seed(0)
    for _ in range(50):
        p, q = torch.rand(2, 6, dtype=torch.float64)
        p[0], q[1] = 0, 0
        p, q = p / p.sum(), q / q.sum()
        accepted = torch.minimum(p, q)
        rest = residual(p, q.clone())
        emitted = accepted + (1 - accepted.sum()) * rest / rest.sum()
        torch.testing.assert_close(emitted, p, rtol=1e-12, atol=1e-12)


def test_residual_of_equal_distributions_is_p() -> None:
    p = torch.tensor([0.2, 0.8])
    assert torch.equal(residual(p, p.clone()), p)


def test_accept_follows_its_uniform_numbers() -> None:
    """q certain of token 0, p gives it 1/4: a quarter of the drafts is accepted, the rest becomes token 1."""
    q = Confidence(Law(torch.tensor([0.0, float("-inf")])))
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    sampler = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(0))
    outcomes = [sampler.accept([Draft(torch.tensor([0]))], [q], p) for _ in range(2000)]
    assert all(bonus == 1 for accepted, bonus in outcomes if accepted == 0)
    share = sum(accepted for accepted, _ in outcomes) / len(outcomes)
    assert abs(share - 0.25) < 0.04  # 4 standard deviations


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.7), (5, 0.8)])
def test_processors_equal_transformers(top_k: int, top_p: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 20) * 3
    theirs = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = Sampler(temperature=0.7, top_k=top_k, top_p=top_p).shape(logits, [1], [])
    torch.testing.assert_close(ours, theirs)


def test_processors_see_the_prefix_of_their_own_row(tmp_path) -> None:
    """A repetition penalty depends on every token before it: greedy text must equal transformers' own."""
    model = load(tiny_backbone(tmp_path, sharpness=4.0))
    expected = transformers_greedy(model, 24, repetition_penalty=1.5)
    engine = SplitBackbone(model, head_for(model, 2))
    sampler = Sampler(processors=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]))
    assert expected != transformers_greedy(model, 24)
    for k in (0, 1, 3):
        assert self_speculative(engine, Request(PROMPT, 24), sampler, Fixed(k)).tokens == expected


@torch.no_grad()
def joint_of_three(model, temperature: float, top_p: float) -> torch.Tensor:
    """Exact probabilities [V, V, V] of the first three tokens, enumerated with transformers alone."""
    v = model.config.vocab_size
    shape = Sampler(temperature=temperature, top_p=top_p).shape

    def p(suffixes: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([torch.tensor([PROMPT3]).expand(len(suffixes), -1), suffixes], 1)
        return shape(model(ids).logits[:, -1], [], [0]).softmax(-1).double()

    one = p(torch.empty(1, 0, dtype=torch.long))[0]
    two = p(torch.arange(v)[:, None])
    three = p(torch.tensor(list(itertools.product(range(v), repeat=2)))).view(v, v, v)
    return one[:, None, None] * two[:, :, None] * three


PROMPT3 = [1, 4, 2]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), pytest.param(0.7, 0.9, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "controller",
    [
        "autoregressive",
        "fixed:1",
        "fixed:3",
        "confidence:0.4",
        "entropy:0.5",
        "beta",
        "calibration",
        "thompson",
        "fixed:3, block",
    ],
)
def test_sampled_text_has_the_backbones_law(
    tmp_path, monkeypatch, temperature: float, top_p: float, controller: str
) -> None:
    """Chi-square of the joint of three tokens, vocabulary 5; fixed seeds; 0.1 % Bonferroni over the 18 cases."""
    # thompson reads the clock: one that counts makes its decisions, and so this text, the same every time
    monkeypatch.setattr(decoding, "_stopwatch", lambda backbone: Stopwatch(itertools.count().__next__))
    model = load(tiny_backbone(tmp_path, vocab_size=5, num_hidden_layers=3, eos_token_id=None, pad_token_id=None))
    engine = SplitBackbone(model, head_for(model, 1))
    exact = joint_of_three(model, temperature, top_p).flatten()
    name, _, block = controller.partition(", ")
    decide = None if name == "autoregressive" else make_controller(name, greedy=False)
    sampler = Sampler(temperature, top_p=top_p, generator=torch.Generator().manual_seed(7), block=bool(block))
    counts = torch.zeros(5**3, dtype=torch.float64)
    draws, rejected = 1500, 0
    for _ in range(draws):
        # Five tokens, so that no draft of the first three is cut short by the length limit.
        request = Request(PROMPT3, 5)
        if decide is None:
            out = autoregressive(engine, request, sampler)
        else:
            out = self_speculative(engine, request, sampler, decide)
            rejected += sum(r.accepted < r.drafted for r in out.rounds)
        a, b, c = out.tokens[:3]
        counts[a * 25 + b * 5 + c] += 1
    assert decide is None or rejected > draws / 10, "a head that is never rejected would prove nothing"
    assert counts[exact == 0].sum() == 0, "a token outside the nucleus was emitted"
    expected = exact * draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).clamp(min=1e-9)
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    freedom = len(observed) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5  # Wilson-Hilferty
    assert z < 3.84, f"chi-square {statistic:.1f} of {freedom} degrees of freedom"
