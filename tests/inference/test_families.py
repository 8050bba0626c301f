"""Every family that runs through transformers' layers computes what transformers computes, at every split and width.

The models are random and tiny; their texts are several times as long as their windows.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from family_cases import ALL, DENSE_WHOLE, GENERIC, MIXTURES, REFUSED, WHOLE
from helpers import tiny_backbone
from oracles import head_for, load
from torch.utils._pytree import tree_map
from transformers import AutoConfig

from pipeline.backbones.load import load_model
from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.config import Backbone
from pipeline.inference import family_generic
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.canary import compare, rounding
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, autoregressive, self_speculative
from pipeline.inference.dense_mlp import FAMILIES as DENSE
from pipeline.inference.families import FAMILIES, check_config
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.outline import Call, Recorder
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


@pytest.mark.parametrize("name", ["position_embeddings", "attention_mask"])
def test_arguments_of_another_pass_are_found(tmp_path, monkeypatch, name: str) -> None:
    """A cheat: every pass of several rows gets one argument as if its rows stood in the opposite order."""
    model = model_of(tmp_path, "gemma3_text")
    engine = SplitBackbone(model, head_for(model, 2))
    honest = family_generic.Passes.run

    def turned(self, ids, base):
        hidden, calls = honest(self, ids, base)
        if base == 0 or len(ids) == 1:
            return hidden, calls
        turn = lambda x: x.flip(-2) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return hidden, [Call(call.positional, call.named | {name: tree_map(turn, call.named[name])}) for call in calls]

    monkeypatch.setattr(family_generic.Passes, "run", turned)
    assert compare(engine, model, LONG).largest > 100 * rounding(torch.float32, 4)


def test_work_between_the_layers_is_refused(tmp_path, monkeypatch) -> None:
    model = model_of(tmp_path, "granite")
    honest = Recorder.forward
    monkeypatch.setattr(Recorder, "forward", lambda self, *args, **kwargs: honest(self, *args, **kwargs) * 1)
    with pytest.raises(ValueError, match="computes something between its layers"):
        SplitBackbone(model, head_for(model, 2))


def test_a_module_that_was_changed_later_is_followed(tmp_path) -> None:
    """Here the modules themselves run, so an adapter or another activation is simply computed."""
    model = model_of(tmp_path, "granite")
    head = head_for(model, 2)
    engine = SplitBackbone(model, head)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    assert engine.still_is(model) is False, "its weights are others"
    assert compare(SplitBackbone(model, head, check=False), model, LONG).largest < 2e-5


class Adapter(torch.nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base_layer: torch.nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora = torch.nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora(x)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_lower_precision_stays_within_its_rounding(tmp_path, family: str, dtype: torch.dtype) -> None:
    model = model_of(tmp_path, family).to(dtype)
    assert 0 < compare(SplitBackbone(model, head_for(model, 2)), model, LONG[:30]).largest < rounding(dtype, 4)


@pytest.mark.parametrize("family", ["phi3", "olmo3", "stablelm"])
def test_rotations_that_depend_on_the_length_are_refused(family: str) -> None:
    kind = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = AutoConfig.for_model(family)
    config.rope_parameters = {"full_attention": kind, "sliding_attention": kind} if family == "olmo3" else kind
    with pytest.raises(ValueError, match="rope_type=dynamic: its rotation may depend on the length"):
        check_config(config)


def test_a_bias_of_the_lm_head_and_an_unknown_scale_of_the_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="its LM head has a bias"):
        check_config(AutoConfig.for_model("phimoe", lm_head_bias=True))
    with pytest.raises(ValueError, match=r"logits_scaling=0.5 is not supported in this family"):
        check_config(AutoConfig.for_model("phi3", logits_scaling=0.5))


@pytest.mark.parametrize("family", GENERIC)
def test_every_stage_can_load_it(tmp_path, family: str) -> None:
    """Headers, names of experts and fingerprint, from the files that transformers itself writes."""
    backbone = Backbone(str(tiny_backbone(tmp_path, family, **GENERIC[family])), dtype="float32")
    model = load_model(backbone, torch.device("cpu"))
    assert fingerprint_of_files(backbone) == fingerprint(model)


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
    (refused,) = re.findall(r"^\| refused by name \| quantised checkpoints; (.+) \|$", readme, re.M)
    assert rows["our own layers"].split(", ") == list(FAMILIES)
    listed = rows["transformers' layers"].partition("Tested are: ")[2]
    dense, experts = (part.split(", ") for part in listed.split("; mixtures of experts: "))
    assert dense + experts == sorted(dense) + sorted(experts) and set(dense + experts) == GENERIC.keys()
    assert refused.split(", ") == list(REFUSED)
    assert "| the text part, one by one too | gemma3 " in readme and list(MIXTURES) == list(DENSE) == sorted(experts)


def test_the_table_of_families_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "update_families.py"
    spec = importlib.util.spec_from_file_location("update_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text()
    assert module.page(text) == text, "run python docs/update_families.py"
    assert {*WHOLE, *DENSE_WHOLE, *MIXTURES} <= {*FAMILIES, *GENERIC} == {*ALL}
