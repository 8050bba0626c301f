"""What the plugin decides before vLLM has loaded anything: refusals by name, and the fingerprint, which is the
pipeline's."""

import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exit_heads_vllm import support
from exit_heads_vllm.config import ExitHeadConfig
from exit_heads_vllm.cpu_sampling import spread
from exit_heads_vllm.fingerprint import check_fits, fingerprint
from exit_heads_vllm.support import Refused, check_served, check_varying, check_version, piecewise_for_adapting
from helpers import tiny_backbone
from oracles import head_for, load
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from pipeline.backbones.weight_files import fingerprint_of_files
from pipeline.config import Backbone
from pipeline.inference.exit_head import READABLE, SCHEMA
from pipeline.pocket.paths import BACKBONE

HEAD = {
    "schema": 2,
    "exit_layer": 2,
    "num_layers": 4,
    "backbone": {"name": "tiny", "fingerprint": "f" * 64, "model_type": "llama"},
    "backbone_config": {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 258},
}


@pytest.fixture
def tried(monkeypatch):
    """As if a vLLM were installed that was tried."""
    monkeypatch.setattr("exit_heads_vllm.config.found_version", lambda: "0.32.0")


def test_another_release_of_vllm_is_refused_with_those_that_were_tried(monkeypatch) -> None:
    check_version("0.32.0")
    with pytest.raises(Refused, match=r"tried with vLLM 0\.32\.0, and this is 0\.99\.1: install"):
        check_version("0.99.1")
    monkeypatch.setattr("exit_heads_vllm.config.found_version", lambda: "0.99.1")
    with pytest.raises(Refused, match=r"this is 0\.99\.1"):
        ExitHeadConfig(**HEAD)


def test_a_published_config_shows_one_layer_of_the_backbone(tried) -> None:
    config = ExitHeadConfig(**HEAD | {"architectures": ["ExitHeadModel"], "auto_map": {"AutoModel": "x.Y"}})
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers, config.exit_layer) == (32, 258, 1, 2)
    assert config.model_type == "exit_head" and config.architectures == ["ExitHeadForCausalLM"]
    assert not hasattr(config, "auto_map")
    ExitHeadConfig()  # as transformers makes one to compare with


def test_the_heads_that_are_published_now_are_read(tried, tmp_path) -> None:
    model = load(tiny_backbone(tmp_path))
    head_for(model, 2).save(tmp_path / "head")
    made = json.loads((tmp_path / "head" / "config.json").read_text())
    made["backbone"]["model_type"] = "llama"
    assert ExitHeadConfig(**made | {"backbone_config": HEAD["backbone_config"]}).exit_layer == 2
    assert support.SCHEMAS == READABLE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": SCHEMA + 1}, "schema=4: this plugin reads exit heads of schema 1, 2, 3"),
        ({"head": {"kind": "dense", "width": 8}}, "a head of kind=dense"),
        ({"backbone": None}, "config.json lacks backbone.fingerprint"),
        (
            {"backbone": {"model_type": "gemma3_text", "fingerprint": "f"}},
            "gemma3_text; tried with this plugin are",
        ),
        ({"backbone_config": None}, "config.json lacks backbone_config: publish the head"),
    ],
)
def test_another_head_is_refused(tried, fields, message) -> None:
    with pytest.raises(Refused, match=message):
        ExitHeadConfig(**HEAD | fields)


def served(**changes) -> SimpleNamespace:
    """A vLLM config that passes, with dotted names changed."""
    head = SimpleNamespace(backbone=HEAD["backbone"], num_layers=4, backbone_config=HEAD["backbone_config"])
    text = SimpleNamespace(
        model_type="llama", num_hidden_layers=4, layer_types=None, sliding_window=None, hidden_size=32, vocab_size=258
    )
    config = SimpleNamespace(
        use_v2_model_runner=False,
        quant_config=None,
        lora_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
        model_config=SimpleNamespace(hf_text_config=text, hf_config=text, is_multimodal_model=False, quantization=None),
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=head, quantization=None), attention_backend=None,
            kv_cache_dtype=None, moe_backend=None, parallel_drafting=False, use_heterogeneous_vocab=False,
            use_local_argmax_reduction=False, disable_padded_drafter_batch=False,
        ),
    )  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        at = config
        for part in path:
            at = getattr(at, part)
        setattr(at, last, value)
    return config


def test_what_was_tried_passes() -> None:
    check_served(served())
    check_served(served(model_config__hf_text_config__layer_types=["full_attention"] * 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"parallel_config__data_parallel_size": 2}, "data_parallel_size=2"),
        ({"model_config__hf_text_config__model_type": "qwen3"}, "trained for a llama, tiny: serve that"),
        ({"model_config__is_multimodal_model": True}, "trained for a llama"),
        ({"model_config__hf_text_config__num_hidden_layers": 6}, "has 6 layers, this exit head was trained for 4"),
        (
            {"model_config__hf_text_config__hidden_size": 64},
            "has hidden_size=64, this exit head was trained for 32 .tiny",
        ),
        ({"quant_config": object(), "model_config__quantization": "fp8"}, "quantization=fp8"),
        ({"speculative_config__draft_model_config__quantization": "fp8"}, "quantization in --speculative-config"),
        ({"lora_config": object()}, "LoRA"),
        ({"model_config__hf_text_config__layer_types": ["sliding_attention", "full_attention"]}, "sliding windows"),
        ({"speculative_config__parallel_drafting": True}, "parallel_drafting"),
        ({"speculative_config__use_heterogeneous_vocab": True}, "use_heterogeneous_vocab"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"speculative_config__kv_cache_dtype": "fp8"}, "kv_cache_dtype in --speculative-config"),
    ],
)
def test_what_was_not_tried_is_refused_by_name(changes, message) -> None:
    with pytest.raises(Refused, match=message):
        check_served(served(**changes))


def test_graphs_that_wrap_the_drafter_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    check_served(served())
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(Refused, match="VLLM_USE_BREAKABLE_CUDAGRAPH=1"):
        check_served(served())


class Graphs(Enum):
    """vLLM's modes of CUDA graphs, as far as they matter here."""

    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (2, 1)

    def has_full_cudagraphs(self) -> bool:
        return self is not Graphs.PIECEWISE


@pytest.mark.parametrize("mode", [Graphs.FULL, Graphs.FULL_AND_PIECEWISE])
def test_lengths_that_adapt_get_piecewise_graphs_or_are_refused(mode) -> None:
    """vLLM's config is changed where it is made; where that did not happen, the scheduler refuses."""

    def config(scheduler: object) -> SimpleNamespace:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(scheduler_cls=scheduler), use_v2_model_runner=False,
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
        )  # fmt: skip

    as_class = type("AdaptiveScheduler", (), {"__module__": "exit_heads_vllm.scheduler"})
    for scheduler in (support.ADAPTIVE, as_class):
        adapting = config(scheduler)
        with pytest.raises(Refused, match=f"cudagraph_mode={mode.name}: .*PIECEWISE"):
            check_varying(adapting)
        piecewise_for_adapting(adapting)
        check_varying(adapting)
        assert adapting.compilation_config.cudagraph_mode is Graphs.PIECEWISE
        adapting.use_v2_model_runner = True
        with pytest.raises(Refused, match="VLLM_USE_V2_MODEL_RUNNER=1"):
            check_varying(adapting)
    for scheduler in (None, "vllm.v1.core.sched.scheduler.Scheduler", dict):
        other = config(scheduler)
        piecewise_for_adapting(other)
        assert other.compilation_config.cudagraph_mode is mode


def of_pipeline(folder: Path) -> str:
    return fingerprint_of_files(Backbone(name_or_path=str(folder), dtype="float32"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_fingerprint_is_that_of_the_pipeline(tmp_path, family, tied) -> None:
    folder = tiny_backbone(tmp_path, family, tie_word_embeddings=tied)
    found = fingerprint(str(folder), AutoConfig.from_pretrained(folder))
    assert found == of_pipeline(folder)
    weights = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tied
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(folder), AutoConfig.from_pretrained(folder)) == of_pipeline(folder) != found


def test_several_files_and_the_pocket(tmp_path) -> None:
    config = AutoConfig.from_pretrained(BACKBONE)
    found = fingerprint(str(BACKBONE), config)
    assert found == of_pipeline(BACKBONE)
    weights = load_file(BACKBONE / "model.safetensors")
    names = sorted(weights)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: weights[n] for n in names if places[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert fingerprint(str(tmp_path), config) == found


def test_another_model_is_refused_and_one_without_safetensors(tmp_path) -> None:
    folder = tiny_backbone(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    head = SimpleNamespace(backbone=HEAD["backbone"] | {"fingerprint": fingerprint(str(folder), config)})
    check_fits(head, str(folder), config)
    head.backbone["fingerprint"] = "0" * 64
    with pytest.raises(Refused, match=r"belongs to tiny .fingerprint 000000000000., the served model .* has"):
        check_fits(head, str(folder), config)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refused, match="no safetensors files"):
        check_fits(head, str(folder), config)


def test_temperatures_are_spread_over_the_drafts_of_their_requests() -> None:
    """Requests of 2, 0, 3 and 1 drafts; a temperature of 0 becomes 1, as greedy requests are verified by the argmax."""
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    found = spread(torch.tensor([0.7, 0.5, 0.0, 1.3]), ends, 6, replace_from=0, replace_to=1)
    assert torch.equal(found, torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0, 1.3]))
    top_k = spread(torch.tensor([5, 9, 0, 2], dtype=torch.int32), ends, 6)
    assert top_k.tolist() == [5, 5, 0, 0, 0, 2] and top_k.dtype == torch.int32
