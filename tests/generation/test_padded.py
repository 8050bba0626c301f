"""What `padded` does to be fast leaves its answers as they are: common beginnings, faster products, other attention."""

import random

import pytest
import torch
from helpers import tiny_backbone
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.generation.answerers import padded
from pipeline.generation.answerers.grouped_attention import attend, grouped_attention
from pipeline.generation.answerers.interface import Question, Sampling
from pipeline.generation.answerers.padded import Padded, RoomyLayer
from pipeline.generation.answerers.products import fast_products

END = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_backbone(tmp_path_factory.mktemp("backbone"))).eval()


def _alone(model, ids: list[int], count: int) -> list[int]:
    one = torch.tensor([ids])
    out = model.generate(
        one, attention_mask=torch.ones_like(one), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("most", [512, 20], ids=["one pass", "several passes"])
@pytest.mark.parametrize("shared", [0, 12, 13])
def test_prompts_with_a_common_beginning_are_answered_as_alone(model, monkeypatch, shared, most):
    """13: one prompt is the common beginning itself, so that one token less is shared."""
    r = random.Random(3)
    rests = [[r.randrange(256) for _ in range(r.randrange(2, 30))] for _ in range(6)]
    beginning = [7] * 12
    prompts = [[*beginning[:shared], i, *ids] for i, ids in enumerate(rests)] + [beginning] * (shared == 13)
    monkeypatch.setattr(padded, "MOST", most)
    computed: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: computed.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = Padded(model, [END]).answer([Question(ids, []) for ids in prompts], Sampling(20, 1.0, 8, seed=1))
    hook.remove()
    assert [answer.ids for answer in found] == [_alone(model, ids, 20) for ids in prompts]
    common = {0: 0, 12: 12, 13: 11}[shared]
    if common:
        assert computed.pop(0) == (1, common), "the common beginning is computed once"
    passes = computed[: next(at for at, shape in enumerate(computed) if shape[1] == 1 and shape[0] > 1)]
    assert sum(rows for rows, _ in passes) == len(prompts)
    assert max(tokens for _, tokens in passes) == max(map(len, prompts)) - common
    assert (len(passes) == 1) == (most == 512)


def test_the_last_rows_take_the_places_of_finished_ones():
    layer = RoomyLayer(7, 3)
    layer.aim(slice(None), 0)
    layer.update(torch.arange(7.0).view(7, 1, 1, 1), torch.zeros(7, 1, 1, 1))
    kept = padded._without([True, False, False, True, False, True, False])
    layer.keep_rows(kept)
    assert kept == [6, 1, 2, 4]
    assert layer.buffers[0, :, 0, 0, 0].tolist() == kept


def test_a_draw_never_has_probability_zero(monkeypatch):
    """The smallest uniform number, and one so large that it reaches the last sum by rounding."""
    p_BV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(1000, 1)
    drawn = padded.draw(p_BV, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}
    for u, expected in ((0.0, 1), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **_: torch.full(size, u, dtype=torch.float64))
        assert padded.draw(p_BV, torch.Generator()).eq(expected).all()


class Scaled(nn.Linear):
    """A layer of another class, as adapters and quantised layers are."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("pack", [False, True])
def test_fast_products_are_those_of_the_layers(pack):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(48, 2731), nn.Linear(2731, 48, bias=False), Scaled(48, 2731), nn.Linear(2731, 48).double(),
        nn.Linear(48, 2730),
    )  # fmt: skip
    called: list[int] = []
    layers[0].register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(3, 50, 48)
    with torch.inference_mode():
        expected = layers[:3](x)
        with pytest.raises(KeyError), fast_products(layers, pack=pack):
            changed = ["forward" in vars(layer) for layer in layers]
            torch.testing.assert_close(layers[:3](x), expected)
            torch.testing.assert_close(layers[:3](x[:1, :1]), expected[:1, :1])
            raise KeyError
        assert torch.equal(layers[:3](x), expected), "the layers compute as before"
    assert changed == [True, True, False, False, False], "only torch's own layers in float32, and large ones"
    assert len(called) == 4 and not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_grouped_attention_is_transformers_own(mask):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = 3
    query, cache = torch.randn(4, 6, 1, 16), torch.randn(2, 5, 2, 40, 16)
    key, value = cache[:, :4, :, :30]  # views, as the answerer's cache gives them
    attends = torch.rand(4, 1, 1, 30) > 0.3
    masks = {
        "none": None,
        "boolean": attends,
        "additive": torch.zeros(attends.shape).masked_fill(~attends, torch.finfo(torch.float32).min),
    }
    for scaling in (None, 0.3):
        found, _ = attend(module, query, key, value, masks[mask], scaling=scaling)
        torch.testing.assert_close(
            found, sdpa_attention_forward(module, query, key, value, masks[mask], scaling=scaling)[0]
        )


def test_the_model_attends_as_before_afterwards(model):
    with pytest.raises(KeyError), grouped_attention(model):
        assert model.config._attn_implementation != "sdpa"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
