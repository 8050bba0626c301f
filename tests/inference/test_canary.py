"""The engine against transformers' own logits: equal as it is, clearly different after a change of arithmetic."""

import pytest
import torch
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load

from pipeline.inference import family_llama, layers, passes
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.canary import compare, rounding
from pipeline.inference.layers import LayerKind

LONG = (PROMPT * 9)[:90]
WINDOWED = {"sliding_window": 40}


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def model(request, tmp_path_factory):
    extra = {"mistral": WINDOWED, "qwen2": {"tie_word_embeddings": True}}.get(request.param, {})
    return load(tiny_backbone(tmp_path_factory.mktemp(request.param), request.param, sharpness=4.0, **extra))


def engine_of(model, **kwargs) -> SplitBackbone:
    return SplitBackbone(model, head_for(model, 2), check=False, products="plain", **kwargs)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_an_honest_engine_differs_by_rounding_alone(model, length: int, fixed_shapes: bool) -> None:
    found = compare(engine_of(model, fixed_shapes=fixed_shapes), model, LONG[:length])
    assert found.largest < 1e-5 and found.positions >= min(length, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_its_rounding(model, dtype: torch.dtype) -> None:
    low = load(model.config._name_or_path).to(dtype)
    limit = rounding(dtype, 4)
    assert 0 < compare(engine_of(low), low, LONG[:40]).largest < limit < 0.1


def scale(monkeypatch, engine) -> None:
    honest = layers.F.scaled_dot_product_attention
    scaled = lambda q, *args, **kwargs: honest(q * 1.1, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(layers, "F", Functions(scaled_dot_product_attention=scaled))


def activation(monkeypatch, engine) -> None:
    monkeypatch.setattr(family_llama, "F", Functions(silu=torch.nn.functional.gelu))


def epsilon(monkeypatch, engine) -> None:
    engine.shape = layers.Shape(engine.shape.heads, engine.shape.kv_heads, engine.shape.head_dim, 1e-2)


def order_of_norms(monkeypatch, engine) -> None:
    """The norm behind attention instead of before it."""
    honest = layers.rms_norm

    def swapped(x, weight, eps):
        return x if x.ndim == 2 and len(x) <= 9 else honest(x, weight, eps)

    monkeypatch.setattr(family_llama, "rms_norm", swapped)


def rope(monkeypatch, engine) -> None:
    engine.passes._rotary.inv_freq = engine.passes._rotary.inv_freq * 0.9


def mask(monkeypatch, engine) -> None:
    """Rows of one verification that see each other's future."""
    blind = lambda *args: layers.causal_mask(*args) * 0  # noqa: E731
    monkeypatch.setattr(passes, "causal_mask", lambda *args: torch.nan_to_num(blind(*args)))


class Functions:
    """torch.nn.functional as the engine sees it, some functions replaced."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name: str):
        return getattr(torch.nn.functional, name)


@pytest.mark.parametrize("mutate", [scale, activation, epsilon, order_of_norms, rope, mask], ids=lambda m: m.__name__)
def test_every_change_of_the_arithmetic_is_found(model, monkeypatch, mutate) -> None:
    engine = engine_of(model)
    kept = model.model.rotary_emb.inv_freq
    mutate(monkeypatch, engine)
    if mutate is rope:  # the engine's tables are made once, so transformers keeps the right ones
        engine.new_cache(40)
        model.model.rotary_emb.inv_freq = kept
    assert compare(engine, model, LONG[:40]).largest > rounding(torch.float32, 4)


def test_a_window_that_is_ignored_is_found(tmp_path) -> None:
    model = load(tiny_backbone(tmp_path, "mistral", sharpness=4.0, **WINDOWED))
    engine = engine_of(model)
    assert compare(engine, model, LONG).largest < rounding(torch.float32, 4)
    engine.passes.kinds = [LayerKind()] * 5
    found = compare(engine, model, LONG)
    assert found.largest > 0.05 and found.position >= 40
