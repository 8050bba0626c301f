"""What the engine does not compute exactly is refused by name: the config's field, or the module and what it is."""

import copy
from functools import partial

import pytest
import torch
from accelerate import dispatch_model
from helpers import tiny_backbone
from oracles import PROMPT, head_for, load
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from pipeline.inference import custom_generate
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.families import check_config
from pipeline.inference.family_llama import kinds
from pipeline.inference.unmodified import check_unmodified

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("llama"), sharpness=4.0)


@pytest.fixture
def model(folder):
    return load(folder)


class LoraLike(nn.Module):
    """As adapters wrap a linear: it answers to `weight` with the weight that it wraps."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer, self.added = base_layer, nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.added(x)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherTensor(torch.Tensor):
    """As torchao keeps quantised weights: a class of tensors of its own inside a plain Linear."""


def wrap(model) -> None:
    model.set_submodule(Q, LoraLike(model.get_submodule(Q)))


def subclass(model) -> None:
    model.set_submodule(Q, Scaled(32, 32, bias=False))


def parametrise(model) -> None:
    parametrize.register_parametrization(model.get_submodule(Q), "weight", nn.Identity())


def other_tensor(model) -> None:
    projection = model.get_submodule(Q)
    projection.weight = nn.Parameter(projection.weight.data.as_subclass(OtherTensor), requires_grad=False)


def hook(model) -> None:
    model.get_submodule(Q).register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_a_parent(model) -> None:
    model.model.register_forward_pre_hook(lambda module, args: None)


def hook_on_the_activation(model) -> None:
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, args, output: 2 * output)


def patch_forward(model) -> None:
    layer = model.model.layers[1]
    layer.mlp.forward = lambda x: x


def patch_behind_accelerate(model) -> None:
    patch_forward(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def compile_in_place(model) -> None:
    model.model.layers[1].compile()


def other_activation(model) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def other_norm(model) -> None:
    model.model.norm = nn.LayerNorm(32)


def other_scale(model) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def other_epsilon(model) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.1


def other_epsilon_in_the_config(model) -> None:
    model.config.rms_norm_eps = 0.1


def bias_of_the_head(model) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(258))


def bias_of_one_projection(model) -> None:
    model.get_submodule(Q).bias = nn.Parameter(torch.ones(32))


def head_in_another_dtype(model) -> None:
    model.lm_head.bfloat16()


def max_norm(model) -> None:
    model.model.embed_tokens.max_norm = 1.0


def fewer_layers(model) -> None:
    model.model.layers = model.model.layers[:3]


def virtual_tokens(model) -> None:
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {}


def dropout(model) -> None:
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrap, rf"{Q} is a test_unmodified\.LoraLike, not a torch\.nn.*Linear: .*merge_and_unload"),
        (subclass, rf"{Q} is a test_unmodified\.Scaled, not a torch\.nn"),
        (parametrise, rf"{Q} is a .*Parametrized\w*Linear, not a"),
        (other_tensor, rf"{Q}\.weight is a test_unmodified\.OtherTensor, not a plain tensor"),
        (hook, rf"{Q} has a hook, test_unmodified\.hook"),
        (hook_on_a_parent, r"model has a hook, test_unmodified\.hook_on_a_parent"),
        (hook_on_the_activation, r"model\.layers\.1\.mlp\.act_fn has a hook"),
        (patch_forward, r"model\.layers\.1\.mlp\.forward was replaced by test_unmodified\.patch_forward"),
        (patch_behind_accelerate, r"model\.layers\.1\.mlp\.forward was replaced"),
        (compile_in_place, r"model\.layers\.1 was compiled"),
        (other_activation, r"model\.layers\.1\.mlp\.act_fn is a torch\.nn.*GELU, not a"),
        (other_norm, r"model\.norm is a torch\.nn.*LayerNorm, not a .*LlamaRMSNorm"),
        (other_scale, r"model\.layers\.1\.self_attn\.scaling is 0\.7"),
        (other_epsilon, r"model\.layers\.1\.input_layernorm\.variance_epsilon is 0\.1"),
        (
            other_epsilon_in_the_config,
            r"model\.layers\.0\.input_layernorm\.variance_epsilon is 1e-06, by .* 0\.1",
        ),
        (bias_of_the_head, r"lm_head\.bias is there, and by the config there is none"),
        (bias_of_one_projection, rf"{Q}\.bias is there"),
        (head_in_another_dtype, r"model\.embed_tokens\.weight is float32 and lm_head\.weight is bfloat16"),
        (max_norm, r"model\.embed_tokens\.max_norm is 1\.0"),
        (fewer_layers, r"model\.layers: 3 of them, config\.num_hidden_layers=4"),
        (virtual_tokens, r"prepare_inputs_for_generation was replaced"),
        (dropout, r"attention_dropout=0\.1: the model is in training mode"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_model_is_refused_by_name(model, change, message: str) -> None:
    head = head_for(model, 2)
    check_unmodified(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        SplitBackbone(model, head)


def test_hooks_of_all_modules_are_refused(model) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(ValueError, match="the model has a hook, test_unmodified"):
            check_unmodified(model)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(modeling_llama.LlamaMLP, "forward"), (modeling_llama, "apply_rotary_pos_emb"), (modeling_llama, "LlamaMLP")],
)
def test_a_patched_class_of_transformers_is_refused(folder, monkeypatch, owner, name: str) -> None:
    """As libraries of faster kernels do, before the model is made."""
    own = getattr(owner, name)

    class Other(own if isinstance(own, type) else object):  # type: ignore[misc]
        pass

    def other(*args, **kwargs):
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, Other if isinstance(own, type) else other)
    with pytest.raises(ValueError, match="test_unmodified"):
        check_unmodified(load(folder))


def test_an_attention_of_somebody_elses_is_refused(model, monkeypatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="attn_implementation=sdpa: not one of transformers' own"):
        check_unmodified(model)


def test_what_changes_no_value_is_let_through(model, folder) -> None:
    """The hooks of transformers for hidden states, those of accelerate for a device map, padding."""
    head = head_for(model, 2)
    model(torch.tensor([PROMPT]), output_hidden_states=True, output_attentions=True)
    model.config.pad_token_id = 5
    SplitBackbone(model, head)
    for places in ({"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        mapped = dispatch_model(load(folder), places, force_hooks=True)
        SplitBackbone(mapped, head)
    eager = load(folder)
    eager.set_attn_implementation("eager")
    SplitBackbone(eager, head)


def test_an_engine_knows_when_its_model_changes(model) -> None:
    engine = SplitBackbone(model, head_for(model, 2))
    SplitBackbone(model, head_for(model, 1))
    assert engine.still_is(model), "a second head leaves the weights where they are"
    projection = model.get_submodule(Q)
    projection.weight = nn.Parameter(projection.weight.data.clone())
    assert not engine.still_is(model)
    assert SplitBackbone(model, head_for(model, 2)).still_is(model)
    wrap(model)
    with pytest.raises(ValueError, match="LoraLike"):
        engine.still_is(model)


@torch.no_grad()
def test_joined_biases_stay_the_models_own(tmp_path) -> None:
    """Qwen2: training or merging in place is seen by the engine, in weights and biases."""
    model = load(tiny_backbone(tmp_path, "qwen2"))
    engine = SplitBackbone(model, head_for(model, 2))
    model.model.layers[0].self_attn.k_proj.bias.add_(3.0)
    model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    found = engine.logits(engine.full(PROMPT, 0, engine.new_cache(32)))
    torch.testing.assert_close(found, model(torch.tensor([PROMPT])).logits[0], rtol=1e-4, atol=1e-4)


# ---- configs

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "intermediate_size": 64, "vocab_size": 258, "max_position_embeddings": 256}  # fmt: skip
config_of = partial(AutoConfig.for_model, **TINY)
ROPE = {"rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {}, "GPT2LMHeadModel has no model.embed_tokens"),
        ("mamba", {}, "does not make a model"),
        ("qwen3_next", {}, "without self_attn"),
        ("deepseek_v3", {}, "kv_lora_rank=512 is not supported"),
        ("arcee", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported in this family"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("olmo", {}, "OlmoForCausalLM has no norm.weight"),
        ("llama", {"hidden_act": "relu"}, "hidden_act=relu"),
        ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act=gelu_pytorch_tanh"),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: awq"),
        ("llama", {"quantization_config": {"load_in_4bit": True}}, "quantization_config: load_in_4bit"),
        ("llama", {"compression_config": {"format": "x"}}, "compression_config: format"),
        ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "quantization: bits, group_size"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "rope_type=dynamic: its tables depend"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("llama", {"sliding_window": 40}, "sliding_window=40: transformers' llama has no windows"),
        ("llama", {"attention_chunk_size": 64}, "attention_chunk_size=64"),
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
        ("mistral", {"logits_scaling": 8.0}, "logits_scaling=8"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "one type for all layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0: must be positive"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"] * 2}, "linear_attention is not supported"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window=null"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_computed_exactly_is_refused_by_name(family: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(AutoConfig.for_model(family, **(TINY | fields)))


def test_a_config_class_of_somebody_elses_is_refused() -> None:
    class Mine(type(config_of("llama"))):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match=r"its config is a test_unmodified.*Mine, not the one of transformers"):
        check_config(Mine(**TINY))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"hidden_act": "swish", "attention_bias": True, "mlp_bias": True, "pretraining_tp": 2}),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}, "logit_scale": 1.0, "quantization_config": None}),
        ("llama", {"layer_types": ["full_attention"] * 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 40}),
    ],
)
def test_what_is_computed_exactly_is_accepted(family: str, fields: dict) -> None:
    check_config(config_of(family, **fields))


def windows(config) -> list[int | None]:
    return [kind.window for kind in kinds(config)]


def test_windows_are_those_that_transformers_masks_with() -> None:
    sliding = config_of("qwen3", use_sliding_window=True, max_window_layers=2, sliding_window=40)
    assert windows(sliding) == [None, None, 40, 40]
    mistral = config_of("mistral", sliding_window=48)
    assert windows(mistral) == [48] * 4
    named = copy.deepcopy(mistral)
    named.layer_types = ["sliding_attention"] * 4
    assert windows(named) == [48] * 4
    for config in (config_of("llama"), config_of("qwen2"), config_of("mistral", sliding_window=None)):
        assert windows(config) == [None] * 4


# ---- the engine that custom_generate keeps from call to call


def test_custom_generate_follows_its_model(model, folder, tmp_path) -> None:
    """Other weights since the last call are decoded with; an adapter since the last call is refused."""
    head_for(model, 2).save(tmp_path)
    ids = torch.tensor([PROMPT])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    speculative = partial(custom_generate.generate, ids, model=model, exit_head=str(tmp_path), controller="fixed:2")
    assert speculative(**told).tolist() == model.generate(ids, **told).tolist()
    projection = model.model.layers[1].mlp.up_proj  # not among the weights of the fingerprint
    before = model.generate(ids, **told).tolist()
    projection.weight = nn.Parameter(-projection.weight.data, requires_grad=False)
    assert speculative(**told).tolist() == model.generate(ids, **told).tolist() != before
    wrap(model)
    with pytest.raises(ValueError, match="LoraLike"):
        speculative(**told)
