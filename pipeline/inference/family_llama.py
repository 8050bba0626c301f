"""The decoder layer of Llama, Mistral, Qwen2 and Qwen3, and what else the engine has to know of these families.

Takes a transformers model or config of one of them; gives the functions of their `Family`. The four differ only in what
their checkpoints hold: Qwen2 has biases, Qwen3 normalises queries and keys.

M rows of a pass, D hidden, H query heads, G key/value heads, C channels of a head, T positions of the cache
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .family import Family
from .kernels import Kernels, Product
from .layers import LayerKind, Rows, Shape, attend, rms_norm, rotate, write
from .passes import Passes
from .unmodified import addresses, check_unmodified


class LayerWeights(NamedTuple):
    """Weights of one decoder layer. Projections of the same input are joined, so that they are one matrix product."""

    attention_norm_D: Tensor
    qkv: Product
    q_norm_C: Tensor | None
    k_norm_C: Tensor | None
    out: Product
    mlp_norm_D: Tensor
    gate_up: Product
    down: Product

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    def products(self) -> list[Product]:
        return [part for part in self if isinstance(part, Product)]

    def fitted(self, kernels: Kernels) -> "LayerWeights":
        parts = {name: kernels.fit(part) for name, part in self._asdict().items() if isinstance(part, Product)}
        return self._replace(**parts)


def gather(layer: nn.Module) -> LayerWeights:
    """The weights of a decoder layer. They are joined once and kept on the layer for other heads."""
    attention, mlp = layer.self_attn, layer.mlp
    known, where = layer.__dict__.get("_joined", (None, None))
    if known is not None and where == addresses(layer):
        return known
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    joined = LayerWeights(
        attention_norm_D=layer.input_layernorm.weight.data,
        qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm_C=q_norm.weight.data if q_norm is not None else None,
        k_norm_C=k_norm.weight.data if k_norm is not None else None,
        out=Product(attention.o_proj.weight.data.t(), attention.o_proj.bias),
        mlp_norm_D=layer.post_attention_layernorm.weight.data,
        gate_up=_join([mlp.gate_proj, mlp.up_proj]),
        down=Product(mlp.down_proj.weight.data.t(), mlp.down_proj.bias),
    )
    layer.__dict__["_joined"] = joined, addresses(layer)
    return joined


def _join(linears: list[nn.Linear]) -> Product:
    """One product for linear layers that read the same input.

    The layers' own parameters become views of the joined tensors, so the model keeps working and no memory is used
    twice.
    """
    weight = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, weight.split([x.out_features for x in linears]), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return Product(weight.t())
    bias = torch.cat([linear.bias.data for linear in linears])
    for linear, part in zip(linears, bias.split([x.out_features for x in linears]), strict=True):
        linear.bias.data = part
    return Product(weight.t(), bias)


def decoder_layer(
    hidden_MD: Tensor, w: LayerWeights, shape: Shape, rows: Rows,
    keys: Any, values: Any, to_keys: Any, to_values: Any, last_row: bool = False,
) -> Tensor:  # fmt: skip
    """One layer, [M, D] -> [M, D]: attention over keys and values [1, G, T, C] (of several texts: see
    `layers.attend`), then the MLP.

    The rows' own keys and values are first written to to_keys and to_values (see `layers.write`), which are views of
    them. last_row: compute the output of the last row only, [1, D]; the other rows only leave their keys and values.
    """
    heads, groups, channels = shape.heads, shape.kv_heads, shape.head_dim
    normed_MD = rms_norm(hidden_MD, w.attention_norm_D, shape.eps)
    qkv = w.qkv(normed_MD).view(len(hidden_MD), -1, channels)
    qk, v_MGC = qkv.split_with_sizes((heads + groups, groups), 1)
    if w.q_norm_C is not None:
        q_MHC, k_MGC = qk.split_with_sizes((heads, groups), 1)
        qk = torch.cat([rms_norm(q_MHC, w.q_norm_C, shape.eps), rms_norm(k_MGC, w.k_norm_C, shape.eps)], 1)
    q_MHC, k_MGC = rotate(qk, rows).split_with_sizes((heads, groups), 1)
    write(to_keys, rows, k_MGC)
    write(to_values, rows, v_MGC)
    if last_row:
        hidden_MD, q_MHC, rows = hidden_MD[-1:], q_MHC[-1:], rows.last(shape.repeats)
    attended = attend(q_MHC, keys, values, rows, groups)
    hidden_MD = w.out(attended, hidden_MD)
    gate, up = w.gate_up(rms_norm(hidden_MD, w.mlp_norm_D, shape.eps)).chunk(2, -1)
    return w.down(F.silu(gate).mul_(up), hidden_MD)


def final_norm(model: nn.Module, shape: Shape, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The norm before the LM head, on hidden states [M, D] on the device."""
    body: Any = model.model
    return partial(rms_norm, weight=body.norm.weight.data.to(device), eps=shape.eps)


def kinds(config: Any) -> list[LayerKind]:
    """The kind of every decoder layer.

    Windows follow transformers' masks: mistral's `sliding_window` applies to every layer, qwen's to those that
    `layer_types` names.
    """
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if config.model_type == "mistral":
        return [LayerKind(config.sliding_window)] * config.num_hidden_layers
    return [LayerKind(config.sliding_window if kind == "sliding_attention" else None) for kind in types]


def passes(model: nn.Module, shape: Shape) -> Passes:
    """What makes the rows of every pass of an engine."""
    return Passes(model, kinds(model.config), shape)


def samples(config: Any) -> list[str]:
    """Names of the weights of which rows are in the fingerprint."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1):
        names += [f"model.layers.{i}.self_attn.q_proj.weight", f"model.layers.{i}.mlp.down_proj.weight"]
    return names


LLAMA = Family(gather, passes, decoder_layer, final_norm, samples, check_unmodified)
