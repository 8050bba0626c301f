"""The proofs that evaluate makes pass honest texts and catch dishonest ones."""

import pandas as pd
import pytest
import torch
from cheats import Discards, with_pending
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load

from pipeline.evaluation import losslessness
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.sampling import Sampler

PROMPT24 = [t % 24 for t in PROMPT]
NEW = 120


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("l")
    fields = {"num_hidden_layers": 2, "vocab_size": 24, "eos_token_id": None, "pad_token_id": None}
    model = load(tiny_backbone(folder, sharpness=2.0, **fields))
    return SplitBackbone(model, head_for(model, 1))


def texts(engine, controller, sampler, count: int) -> pd.DataFrame:
    """`count` sampled texts as rows of generations."""
    rows = []
    for _ in range(count):
        request = Request(PROMPT24, NEW)
        made = controller(sampler) if controller else None
        out = self_speculative(engine, request, sampler, made) if made else autoregressive(engine, request, sampler)
        rows.append({"prompt": "p", "repeat": 0, "exit_layer": 2 if made else 0, "temperature": sampler.temperature,
                     "controller": "c" if made else "autoregressive", "tokens": out.tokens})  # fmt: skip
    return pd.DataFrame(rows)


def verdict(engine, generations, **shape):
    def sampler_of(temperature: float) -> Sampler:
        return Sampler(temperature, **shape)

    return losslessness.sampling({2: engine}, {"p": PROMPT24}, generations, sampler_of)


SHAPES = [{}, {"top_p": 0.8}, {"top_k": 5}]


@pytest.mark.parametrize("shape", SHAPES)
def test_honest_texts_pass(engine, shape) -> None:
    sampler = Sampler(1.0, generator=torch.Generator().manual_seed(3), **shape)
    honest = [texts(engine, None, sampler, 12)]
    honest.append(texts(engine, lambda s: make_controller("confidence:0.3"), sampler, 12))
    found = verdict(engine, pd.concat(honest), **shape)
    assert found["passed"] and len(found["tests"]) == 2 and found["tests"][0]["tokens"] == 12 * (NEW - 1)
    assert found["largest_p_difference"] < 1e-5


@pytest.mark.parametrize("shape", [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES[1:])])
def test_the_discarding_stub_is_caught(engine, shape) -> None:
    sampler = with_pending(Sampler)(1.0, generator=torch.Generator().manual_seed(3), **shape)
    found = verdict(engine, texts(engine, lambda s: Discards(s, 0.2), sampler, 20), **shape)
    assert not found["passed"] and found["p_value"] < 1e-4


def test_text_of_another_temperature_is_caught(engine) -> None:
    sampler = Sampler(0.7, generator=torch.Generator().manual_seed(3))
    generations = texts(engine, None, sampler, 12).assign(temperature=1.0)
    assert not verdict(engine, generations)["passed"]


def test_transform_by_hand(engine) -> None:
    """u = P(tokens with more q) + U P(y)."""
    tokens = [5, 7, 2]
    p, q = losslessness.teacher_forced(engine, PROMPT24, tokens, Sampler(1.0))
    uniforms = torch.rand(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [
        float(p[t].double()[q[t] > q[t][tokens[t]]].sum() + uniforms[t - 1] * p[t].double()[tokens[t]]) for t in (1, 2)
    ]
    found = losslessness.transform(engine, PROMPT24, tokens, Sampler(1.0), torch.Generator().manual_seed(0))
    assert found.tolist() == pytest.approx(expected)


def test_chunks_change_nothing(engine, monkeypatch) -> None:
    tokens = autoregressive(engine, Request(PROMPT24, 50), Sampler(1.0, top_p=0.9)).tokens

    def transform() -> list[float]:
        draw = torch.Generator().manual_seed(0)
        return losslessness.transform(engine, PROMPT24, tokens, Sampler(1.0, top_p=0.9), draw).tolist()

    chunked = transform()
    monkeypatch.setattr(losslessness, "CHUNK", len(tokens))
    assert len(chunked) == 49 and chunked == pytest.approx(transform(), abs=1e-5)


def test_teacher_forced_q_is_the_decoders(engine) -> None:
    tokens = [5, 7, 2, 9]
    _, q = losslessness.teacher_forced(engine, PROMPT24, tokens, Sampler(1.0))
    cache = engine.new_cache(32)
    engine.shallow(PROMPT24 + tokens, 0, cache)
    one_by_one = [engine.draft_logits([len(PROMPT24) + t - 1], cache)[0].softmax(-1) for t in range(4)]
    torch.testing.assert_close(q, torch.stack(one_by_one), rtol=1e-4, atol=1e-6)


def test_p_value_of_a_known_statistic() -> None:
    """chi-square with 19 degrees of freedom exceeds 30.14 with probability 5 %."""
    counts = torch.full((20,), 100.0)
    counts[0], counts[1] = counts[0] + 38.82, counts[1] - 38.82  # statistic 2 * 38.82^2 / 100 = 30.14
    u = torch.cat([torch.full((round(float(c)),), (i + 0.5) / 20) for i, c in enumerate(counts)])
    found = losslessness.uniform(u.double())
    assert found["freedom"] == 19 and found["statistic"] == pytest.approx(30.14, rel=0.02)
    assert found["p_value"] == pytest.approx(0.05, abs=0.005)


def rows_of(texts: dict[int, list[int]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"prompt": "p", "repeat": 0, "exit_layer": n, "temperature": 0.0, "controller": f"c{n}", "tokens": tokens}
            for n, tokens in texts.items()
        ]
    )


def test_greedy_in_float32_allows_no_difference(engine) -> None:
    text = autoregressive(engine, Request(PROMPT24, 20), Sampler()).tokens
    changed = [*text[:10], (text[10] + 1) % 24, *text[11:]]
    assert losslessness.greedy(engine, {"p": PROMPT24}, rows_of({0: text, 2: text}))["passed"]
    found = losslessness.greedy(engine, {"p": PROMPT24}, rows_of({0: text, 2: changed}))
    assert not found["passed"] and found["divergences"][0]["first_divergence"] == 10
    assert losslessness.greedy(engine, {"p": PROMPT24}, rows_of({0: text, 2: text}).assign(temperature=1.0)) is None


def test_greedy_in_bfloat16_allows_near_ties_only(tmp_path) -> None:
    model = load(tiny_backbone(tmp_path, sharpness=4.0, vocab_size=24, eos_token_id=None, pad_token_id=None)).bfloat16()
    model.model.rotary_emb.float()
    engine = SplitBackbone(model, head_for(model, 2), check=False)
    text = autoregressive(engine, Request(PROMPT24, 20), Sampler()).tokens
    best, twin, third = text[10], (text[10] + 1) % 24, (text[10] + 2) % 24
    # two LM-head rows alike are an exact tie, but of those two tokens only
    model.lm_head.weight.data[twin] = model.lm_head.weight.data[best]

    def judged(emitted: list[int]) -> dict:
        return losslessness.greedy(engine, {"p": PROMPT24}, rows_of({0: text, 2: emitted}))

    tied = judged([*text[:10], twin, *text[11:]])
    (divergence,) = tied["divergences"]
    assert (divergence["first_divergence"], divergence["wanted"], divergence["emitted"]) == (10, best, twin)
    assert divergence["logit_gap"] == 0 and divergence["logit_noise"] > 0 and tied["passed"]
    wrong = judged([*text[:10], third, *text[11:]])
    assert wrong["divergences"][0]["logit_gap"] > wrong["divergences"][0]["logit_noise"] and not wrong["passed"]
    for short in (text[:10], [*text, third]):  # no rounding ends a text whose tokens so far are the same
        ended = judged(short)
        assert not ended["passed"] and ended["divergences"][0]["logit_gap"] is None


def test_honest_bfloat16_texts_leave_each_other_at_ties_of_their_own_tokens(tmp_path) -> None:
    model = load(tiny_backbone(tmp_path, sharpness=4.0, eos_token_id=None, pad_token_id=None)).bfloat16()
    model.model.rotary_emb.float()
    engine = SplitBackbone(model, head_for(model, 2), check=False, products="plain")
    draw, found = torch.Generator().manual_seed(11), []  # of which the first and the fourth text do
    for _ in range(100):  # about one text in ten leaves the baseline's; which ones, depends on the processor
        prompt = torch.randint(10, 200, (12,), generator=draw).tolist()
        wanted = autoregressive(engine, Request(prompt, 64), Sampler()).tokens
        emitted = self_speculative(engine, Request(prompt, 64), Sampler(), make_controller("fixed:4")).tokens
        if (divergence := losslessness.explain(engine, prompt, wanted, emitted)) is not None:
            found.append(divergence)
            if len(found) == 2:
                break
    assert found and all(divergence.explained for divergence in found)


def test_a_tie_is_of_two_tokens_within_their_own_noise() -> None:
    """Of 8 and above bfloat16 has a spacing of 1/16, below 8 one of 1/32; half of it is each token's least noise."""
    gap, noise = losslessness.tie(torch.tensor([[8.5, 8.4375], [8.5, 8.4375]]), torch.bfloat16)
    assert (gap, noise) == (0.0625, 0.0625)
    gap, noise = losslessness.tie(torch.tensor([[8.5, 7.0], [8.25, 7.0], [8.5, 7.5]]), torch.bfloat16)
    assert (gap, noise) == (1.5, 0.75)
