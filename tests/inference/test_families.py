"""Every family that runs through transformers' layers computes what transformers computes, at every split and width.

The models are random and tiny; their texts are several times as long as their windows.
"""

import re
from pathlib import Path

import pytest
import torch
from family_cases import GENERIC, REFUSED
from helpers import tiny_backbone
from oracles import head_for, load
from transformers import AutoConfig

from pipeline.inference import family_generic
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.canary import compare, rounding
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.families import FAMILIES, check_config
from pipeline.inference.sampling import Sampler

LONG = [(7 * i * i + 3 * i) % 250 + 3 for i in range(48)]
NEW = 24


def model_of(tmp_path, family: str):
    """A random model whose norms, biases and other vectors matter too."""
    model = load(tiny_backbone(tmp_path, family, sharpness=2.0, eos_token_id=None, **GENERIC[family]))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return model


@pytest.mark.parametrize("family", GENERIC)
def test_it_is_what_transformers_computes(tmp_path, family: str) -> None:
    model = model_of(tmp_path, family)
    engine = SplitBackbone(model, head_for(model, 2))
    assert not engine.family.is_fast
    assert compare(engine, model, LONG).largest < 2e-5
    ids = torch.tensor([LONG[:11]])
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, 11:].tolist()
        request = Request(LONG[:11], NEW)
        assert autoregressive(engine, request, Sampler()).tokens == expected
        drafted = self_speculative(engine, request, Sampler(), make_controller("fixed:3"))
    assert drafted.tokens == expected
    assert sum(round.drafted for round in drafted.rounds) > 20


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3", "cohere2", "qwen3_moe"])
def test_drafts_of_a_head_that_is_the_rest_of_the_model_are_all_accepted(tmp_path, family: str) -> None:
    """With N = L - 1 and the last layer as the head, a draft is what the backbone says: windows, missing rotary
    embeddings and experts of the exit layer are those of layer L."""
    model = model_of(tmp_path, family)
    engine = SplitBackbone(model, head_for(model, 3))
    with torch.inference_mode():
        out = self_speculative(engine, Request(LONG[:11], NEW), Sampler(), make_controller("fixed:3"))
    assert all(round.accepted == round.drafted for round in out.rounds)
    assert len(out.rounds) <= NEW // 4 + 1


def test_arguments_of_another_pass_are_found(tmp_path, monkeypatch) -> None:
    """A cheat: every pass gets the positions and masks of a pass that begins one position earlier."""
    model = model_of(tmp_path, "gemma3_text")
    engine = SplitBackbone(model, head_for(model, 2))
    honest = family_generic.Passes._run
    monkeypatch.setattr(family_generic.Passes, "_run", lambda self, ids, base: honest(self, ids, max(0, base - 1)))
    with pytest.raises(RuntimeError):
        compare(engine, model, LONG)


def test_a_forgotten_scale_of_the_logits_is_found(tmp_path) -> None:
    model = model_of(tmp_path, "granite")
    engine = SplitBackbone(model, head_for(model, 2))
    engine.shape = engine.shape.__class__(**(vars(engine.shape) | {"logit_scale": 1.0}))
    assert compare(engine, model, LONG).largest > rounding(torch.float32, 4)


def test_layers_that_are_called_with_the_tokens_are_refused(tmp_path, monkeypatch) -> None:
    model = model_of(tmp_path, "granite")
    honest = type(model.model).forward

    def forward(self, input_ids=None, **arguments):
        return honest(self, input_ids=input_ids, per_layer=input_ids, **arguments)

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(ValueError, match="its layers are called with the tokens"):
        SplitBackbone(model, head_for(model, 2))


@pytest.mark.parametrize(("family", "message"), REFUSED.items())
def test_others_are_refused_by_name(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"model_type={family}: .*{message}"):
        check_config(AutoConfig.for_model(family))


def test_the_readmes_table_is_that_of_these_tests() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([\w' ]+?), (?:fastest|one by one) \| (.+) \|$", readme, re.M))
    (refused,) = re.findall(r"^\| refused by name \| quantised weights; (.+) \|$", readme, re.M)
    assert rows["our own layers"].split(", ") == list(FAMILIES)
    listed = rows["transformers' layers"].partition("Tested are: ")[2].replace(" (not in distill)", "")
    dense, experts = (part.split(", ") for part in listed.split("; mixtures of experts: "))
    assert dense + experts == sorted(dense) + sorted(experts) and set(dense + experts) == GENERIC.keys()
    assert refused.split(", ") == list(REFUSED)
