"""Checks that a model is exactly what transformers builds from its config, because of its own families the engine reads
the weights and never calls the modules.

Takes a loaded model; raises ValueError that names the first module which may compute something else: another class
(LoRA and other adapters, quantised or parametrised layers), a hook, a replaced `forward`, a changed attribute, or a
weight of another class, dtype or shape. Two kinds of hooks are known to change no value and are allowed: accelerate's
hooks that move tensors between the devices of a map, and the hooks by which transformers returns hidden states.
"""

import copy
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HOME = ("torch.nn.", "transformers.")
"""Packages that contain the code of every module of a supported backbone."""
MOVES_TENSORS = ("AlignDevicesHook", "SequentialHook")
"""accelerate's hooks for a device map."""
FREE = ("training", "layer_idx", "padding_idx", "gradient_checkpointing")
"""Attributes that do not change what a module computes."""
REMEDY = "give the model as from_pretrained loads it"
ADAPTER = "; an adapter must be merged into the weights (merge_and_unload) and its head trained on the merged model"


def check_unmodified(model: nn.Module) -> None:
    """Raises ValueError unless `model` computes exactly what its class in transformers computes from its config and
    weights. The config must have passed `families.check_config`.
    """
    config: Any = model.config
    kind: Any = type(config)
    expected = as_built(kind, config.to_json_string(use_diff=False))
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    order = list(dict.fromkeys(kinds))
    dtypes: dict[torch.dtype, str] = {}
    _check_module(model, expected, "the model", dtypes, attributes=False)
    _check_module(model.model, expected.model, "model", dtypes, attributes=False)
    _check_module(model.model.rotary_emb, expected.model.rotary_emb, "model.rotary_emb", dtypes, attributes=False)
    if len(model.model.layers) != config.num_hidden_layers:
        raise ValueError(
            f"model.layers: {len(model.model.layers)} of them, config.num_hidden_layers={config.num_hidden_layers}; "
            f"{REMEDY}"
        )
    pairs = [(model.model.embed_tokens, expected.model.embed_tokens, "model.embed_tokens")]
    for i, layer in enumerate(model.model.layers):
        pairs.append((layer, expected.model.layers[order.index(kinds[i])], f"model.layers.{i}"))
    pairs += [(model.model.norm, expected.model.norm, "model.norm"), (model.lm_head, expected.lm_head, "lm_head")]
    for found, wanted, path in pairs:
        _check_tree(found, wanted, path, dtypes)
    _check_functions(type(model.model.layers[0]).__module__)
    _check_attention(config)
    check_calls(model)


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Memory addresses of a module's weights; they change when weights are replaced by other tensors."""
    return tuple(parameter.data_ptr() for parameter in module.parameters())


def changes(module: nn.Module) -> tuple[int, ...]:
    """How often each of a module's weights was changed in place, as torch counts it: not through `.data`."""
    return tuple(0 if p.is_inference() else p._version for p in module.parameters())


@functools.lru_cache(maxsize=4)
def as_built(kind: Any, fields: str) -> Any:
    """transformers' own model of a config on the meta device, with one decoder layer for each type of layer.

    kind, fields: the config's class, and all its fields as JSON. Raises KeyError if transformers has no causal LM of
    this class.
    """
    config: Any = kind(**json.loads(fields))
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = 1
    if kinds:
        config.layer_types = list(dict.fromkeys(kinds))
        config.num_hidden_layers = len(config.layer_types)
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind](copy.deepcopy(config))


def _check_tree(found: nn.Module, wanted: nn.Module, path: str, dtypes: dict[torch.dtype, str]) -> None:
    _check_module(found, wanted, path, dtypes, attributes=True)
    for name, child in wanted.named_children():
        _check_tree(getattr(found, name), child, f"{path}.{name}", dtypes)


def _check_module(
    found: Any, wanted: nn.Module, path: str, dtypes: dict[torch.dtype, str], *, attributes: bool
) -> None:
    kind = type(found)
    if kind is not type(wanted):
        adapter = ADAPTER if isinstance(found, nn.Module) and hasattr(found, "base_layer") else ""
        raise ValueError(f"{path} is a {_name(kind)}, not a {_name(type(wanted))}: {REMEDY}{adapter}")
    for code in (kind, kind.forward):
        if not code.__module__.startswith(HOME):
            raise ValueError(f"{path} runs {_name(code)}, which is neither torch's nor transformers' own: {REMEDY}")
    check_unhooked(found, path)
    if getattr(found, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{path} was compiled: {REMEDY}; the decoder runs its own passes, which need no compiling")
    _check_parameters(found, wanted, path, dtypes)
    if attributes:
        for name, value in vars(wanted).items():
            if name.startswith("_") or name in FREE or not isinstance(value, (int, float, str, tuple, type(None))):
                continue
            if getattr(found, name, None) != value:
                raise ValueError(f"{path}.{name} is {getattr(found, name, None)}, by the config {value}: {REMEDY}")


def _check_parameters(found: nn.Module, wanted: nn.Module, path: str, dtypes: dict[torch.dtype, str]) -> None:
    own, expected = dict(found._parameters), dict(wanted._parameters)
    for name in own | expected:
        w, like = own.get(name), expected.get(name)
        if (w is None) != (like is None):
            what = "missing" if w is None else "there, and by the config there is none"
            raise ValueError(f"{path}.{name} is {what}: {REMEDY}")
        if w is None or like is None:
            continue
        if type(w) is not nn.Parameter or type(w.data) is not Tensor:
            strange = type(w) if type(w) is not nn.Parameter else type(w.data)
            raise ValueError(f"{path}.{name} is a {_name(strange)}, not a plain tensor: {REMEDY}")
        if w.shape != like.shape:
            raise ValueError(f"{path}.{name} is {list(w.shape)}, by the config {list(like.shape)}: {REMEDY}")
        dtypes.setdefault(w.dtype, f"{path}.{name}")
        if w.dtype not in DTYPES or len(dtypes) > 1:
            others = " and ".join(f"{where} is {str(dtype).removeprefix('torch.')}" for dtype, where in dtypes.items())
            raise ValueError(
                f"{others}: all weights must be one of float64, float32, bfloat16, float16; load it with dtype="
            )


def check_unhooked(module: nn.Module, path: str) -> None:
    """Raises ValueError for a hook on a module, or a `forward` of its own, that may change a value."""
    for hook in _hooks(module):
        raise ValueError(f"{path} has a hook, {_name(hook)}: {REMEDY}, and remove the hook")
    _check_forward(module, path)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks that could change a module's inputs or outputs: its own, and those that torch calls for all modules."""
    registry = torch.nn.modules.module
    for hooks in (
        module._forward_pre_hooks, module._forward_hooks,
        getattr(registry, "_global_forward_pre_hooks", {}), getattr(registry, "_global_forward_hooks", {}),
    ):  # fmt: skip
        for hook in hooks.values():
            if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
                yield hook


def _check_forward(module: nn.Module, path: str) -> None:
    """Raises ValueError for a `forward` replaced on the instance, unless accelerate wrapped the class's own to move
    tensors."""
    replaced = vars(module).get("forward")
    if replaced is None:
        return
    hook, inner = getattr(module, "_hf_hook", None), vars(module).get("_old_forward")
    chain = [hook, *getattr(hook, "hooks", ())]
    moves = all(type(h).__module__ == "accelerate.hooks" and type(h).__name__ in MOVES_TENSORS for h in chain)
    by_accelerate = getattr(getattr(replaced, "func", None), "__module__", "") == "accelerate.hooks"
    if not (moves and by_accelerate and getattr(inner, "__func__", None) is type(module).forward):
        what = _name(type(hook)) if by_accelerate and not moves else _name(replaced)
        raise ValueError(f"{path}.forward was replaced by {what}: {REMEDY}")


def _check_functions(modeling: str) -> None:
    """Raises ValueError if a function in the family's modeling module is not transformers' own: libraries of faster
    kernels replace them there."""
    for name, value in vars(sys.modules[modeling]).items():
        if callable(value) and not str(getattr(value, "__module__", None) or "transformers").startswith(
            ("transformers", "torch", "typing", "collections", "huggingface_hub", "builtins", "functools")
        ):
            raise ValueError(f"{modeling}.{name} is {_name(value)}, not transformers' own: do not patch transformers")


def _check_attention(config: Any) -> None:
    name = config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    home = getattr(getattr(function, "func", function), "__module__", "")
    if name not in (None, "eager") and not str(home).startswith("transformers."):
        raise ValueError(f"attn_implementation={name}: not one of transformers' own; load the model with sdpa or eager")


def check_calls(model: Any) -> None:
    """Raises ValueError for what changes the logits of `generate` besides the modules: a replaced input preparation,
    and dropout in training mode. PEFT replaces the former in every call of its own `generate`, but only prompt adapters
    change anything by it."""
    replaced = vars(model).get("prepare_inputs_for_generation")
    adapter = getattr(getattr(replaced, "__self__", None), "active_peft_config", None)
    if replaced is not None and getattr(adapter, "is_prompt_learning", True):
        raise ValueError(
            f"the model's prepare_inputs_for_generation was replaced (virtual tokens of a prompt adapter?): {REMEDY}"
        )
    if model.training and getattr(model.config, "attention_dropout", 0):
        raise ValueError(
            f"attention_dropout={model.config.attention_dropout}: the model is in training mode, which drops attention "
            "at random; call model.eval()"
        )


def _name(what: Any) -> str:
    name = getattr(what, "__qualname__", None) or type(what).__qualname__
    return f"{getattr(what, '__module__', None) or type(what).__module__}.{name}"
