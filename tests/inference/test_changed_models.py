"""Models of our own families that were changed: quantised, or with an adapter. Their own layers run, where the user
says that the head may draft for another backbone than the one it was trained for."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from pipeline.inference import custom_generate
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.canary import compare
from pipeline.inference.fingerprint import fingerprint

NEW = 24


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp(request.param), request.param, sharpness=4.0, hidden_size=64)


@pytest.fixture
def head(folder, tmp_path):
    """A head of the unchanged model, as a folder."""
    model = load(folder)
    made = head_for(model, 2)
    replace(made, backbone=made.backbone | {"model_type": model.config.model_type}).save(tmp_path)
    return str(tmp_path)


def lora(folder):
    model = load(folder)
    targets = ["q_proj", "o_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


def int8(folder):
    """torch's own quantisation: packed weights in layers of another class, which also round their inputs."""
    model = load(folder)
    torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear}, inplace=True)
    return model


def base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def test_the_text_is_that_of_the_changed_model(folder, head) -> None:
    model = lora(folder)
    ids = torch.tensor([PROMPT])
    expected = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        assert (base(model)(ids).logits - load(folder)(ids).logits).abs().max() > 1e-3, "it computes something else"
    speculative = partial(
        custom_generate.generate, ids, model=base(model), exit_head=head, max_new_tokens=NEW, do_sample=False
    )
    with pytest.raises(ValueError, match=r"allow_other_backbone=True\) decodes through the layers"):
        speculative()
    for controller in ("fixed:3", "thompson"):
        assert torch.equal(speculative(allow_other_backbone=True, controller=controller), expected)
    with pytest.raises(ValueError, match="its drafts branch"):
        speculative(allow_other_backbone=True, controller="tree:2")


def test_its_logits_are_the_changed_models(folder) -> None:
    head, model = head_for(load(folder), 2), base(lora(folder))
    engine = SplitBackbone(model, head, check=False)
    assert not engine.family.is_fast
    assert compare(engine, model, [7 * i % 200 for i in range(24)]).largest < 1e-4


def test_a_model_whose_rows_depend_on_each_other_is_refused(folder, head) -> None:
    """One scale is chosen for all inputs of a pass, so verifying several tokens is not what decoding them one by one
    gives."""
    model = int8(folder)
    with pytest.raises(ValueError, match="the decoder's logits differ from this model's"):
        custom_generate.generate(
            torch.tensor([PROMPT]), model=model, exit_head=head, allow_other_backbone=True, max_new_tokens=8
        )


def test_a_default_that_branches_is_replaced_where_drafts_cannot(folder, head) -> None:
    config = Path(head) / "config.json"
    ids = torch.tensor([PROMPT])
    for name in ("thompson+tree+lookup", "tree:2x2", "thompson+tree+memory"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"controller": name}))
        model = lora(folder)
        expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        out = custom_generate.generate(
            ids, model=base(model), exit_head=head, allow_other_backbone=True, max_new_tokens=8, do_sample=False
        )
        assert torch.equal(out, expected)


def test_what_changes_between_two_calls_is_seen(folder, head) -> None:
    model = base(lora(folder))
    speculative = partial(
        custom_generate.generate, torch.tensor([PROMPT]), model=model, exit_head=head, allow_other_backbone=True,
        max_new_tokens=4, do_sample=False,
    )  # fmt: skip
    speculative()
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="lm_head has a hook"):
        speculative()
    hook.remove()
    model.prepare_inputs_for_generation = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="prepare_inputs_for_generation was replaced"):
        speculative()
    del model.prepare_inputs_for_generation
    model.config.attention_dropout = 0.5
    model.train()
    with pytest.raises(ValueError, match=r"attention_dropout=0\.5"):
        speculative()


def test_layers_with_packed_buffers_and_a_config_that_says_so(folder) -> None:
    """As GPTQ and AWQ keep them."""
    model, head = load(folder), head_for(load(folder), 2)
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 8}
    with pytest.raises(ValueError, match="gptq"):
        SplitBackbone(model, head)
    engine = SplitBackbone(model, head, check=False)
    assert compare(engine, model, [7 * i % 200 for i in range(24)]).largest < 1e-4


class Packed(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.float() * self.scales).t()


def test_an_adapter_may_come_and_go_between_calls(folder, head) -> None:
    model = load(folder)
    ids = torch.tensor([PROMPT])
    speculative = partial(
        custom_generate.generate, ids, exit_head=head, allow_other_backbone=True, max_new_tokens=NEW, do_sample=False
    )
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(speculative(model=model), plain)
    (fast,) = (known[0] for known in model.__dict__["_exit_heads"].values())
    assert fast.family.is_fast
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    changed = adapted.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(plain, changed)
    assert torch.equal(speculative(model=adapted.get_base_model()), changed)
    with adapted.disable_adapter():
        assert torch.equal(speculative(model=adapted.get_base_model()), plain)
    assert torch.equal(speculative(model=adapted.unload()), plain)


def test_peft_itself_can_call_it(folder, head) -> None:
    """`PeftModel.generate` puts an input preparation of its own on the model, which changes nothing for LoRA."""
    model = lora(folder)
    ids = torch.tensor([PROMPT])
    expected = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)

    def drafted(model, *_, **kwargs):
        return custom_generate.generate(ids, model=model, exit_head=head, allow_other_backbone=True, **kwargs)

    original = type(base(model)).generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(base(model)), "generate", lambda self, **kw: original(self, **kw) if "custom_generate" in kw
                      else drafted(self, max_new_tokens=NEW, do_sample=False))  # fmt: skip
        assert torch.equal(model.generate(input_ids=ids), expected)


def test_virtual_tokens_are_refused(folder, head) -> None:
    model = get_peft_model(load(folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    inner = model.get_base_model()
    inner.prepare_inputs_for_generation = model.prepare_inputs_for_generation  # as PEFT's generate does
    with pytest.raises(ValueError, match="virtual tokens"):
        SplitBackbone(inner, head_for(load(folder), 2), check=False)


def test_a_changed_lm_head_is_refused(folder) -> None:
    adapted = get_peft_model(load(folder), LoraConfig(r=4, target_modules=["lm_head"])).eval()
    with pytest.raises(ValueError, match="lm_head is a peft"):
        SplitBackbone(adapted.get_base_model(), head_for(load(folder), 2), check=False)


def test_a_version_with_plain_weights_is_still_computed_here(folder) -> None:
    """allow_other_backbone alone costs nothing."""
    model, other = load(folder), load(folder)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    assert fingerprint(model) != fingerprint(other)
    assert SplitBackbone(other, head_for(model, 2), check=False).family.is_fast
