"""One decoder layer, and several in sequence, as plain functions on tensors. Every pass of the engine uses them.

Takes hidden states of rows at absolute positions, returns those after the layers, and writes the rows' keys and values
into the tensors of a cache. backbone.py decides which layers are run, and on which device.

M rows of this pass, D hidden, H query heads, G key/value heads, R = H/G, C channels of a head, T positions of the cache
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unmodified import addresses


class LayerWeights(NamedTuple):
    """Weights of one decoder layer. Projections of the same input are joined, so that they are one matrix product.

    Matrices are [in, out], transposed views of the [out, in] weights of the model's linear layers.
    """

    attention_norm_D: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    q_norm_C: Tensor | None
    k_norm_C: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    mlp_norm_D: Tensor
    gate_up_weight: Tensor
    gate_up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


def join(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Joined weight [in, out] and bias of linear layers that read the same input.

    The layers' own parameters become views of the joined tensors, so the model keeps working and no memory is used
    twice.
    """
    weight = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, weight.split([x.out_features for x in linears]), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight.t(), None
    bias = torch.cat([linear.bias.data for linear in linears])
    for linear, part in zip(linears, bias.split([x.out_features for x in linears]), strict=True):
        linear.bias.data = part
    return weight.t(), bias


def gather(layer: nn.Module) -> LayerWeights:
    """The weights of a Llama, Mistral, Qwen2 or Qwen3 decoder layer. They are joined once and kept on the layer for
    other heads."""
    attention, mlp = layer.self_attn, layer.mlp
    known, where = layer.__dict__.get("_joined", (None, None))
    if known is not None and where == addresses(layer):
        return known
    qkv_weight, qkv_bias = join([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up_weight, gate_up_bias = join([mlp.gate_proj, mlp.up_proj])
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    joined = LayerWeights(
        attention_norm_D=layer.input_layernorm.weight.data,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        q_norm_C=q_norm.weight.data if q_norm is not None else None,
        k_norm_C=k_norm.weight.data if k_norm is not None else None,
        out_weight=attention.o_proj.weight.data.t(),
        out_bias=attention.o_proj.bias,
        mlp_norm_D=layer.post_attention_layernorm.weight.data,
        gate_up_weight=gate_up_weight,
        gate_up_bias=gate_up_bias,
        down_weight=mlp.down_proj.weight.data.t(),
        down_bias=mlp.down_proj.bias,
    )
    layer.__dict__["_joined"] = joined, addresses(layer)
    return joined


@dataclass(frozen=True)
class Shape:
    """Sizes that all layers of a backbone have in common, and the epsilon of their norms."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @property
    def repeats(self) -> int:
        """R: how many query heads share one key/value head."""
        return self.heads // self.kv_heads


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x @ weight + bias + residual, by torch's own product for the device. weight is [in, out]."""
    if bias is not None:
        out = torch.addmm(bias, x, weight)
        return out if residual is None else out.add_(residual)
    return torch.mm(x, weight) if residual is None else torch.addmm(residual, x, weight)


Linear = Callable[..., Tensor]
"""The type of `plain`; kernels.py has another function of it."""


class Rows(NamedTuple):
    """Positions, rotary tables, mask and matrix product of a pass, the same for every layer on a device."""

    positions_M: Tensor | None
    """None where the rows are the last positions of the keys and values given."""
    cos_M1C: Tensor
    sin_M1C: Tensor
    """The sign is included, which saves a kernel: rotate_half(x) * sin == roll(x, C/2) * signed sin."""
    mask: Tensor | None
    """Additive, [M*R, T]; None for a single row, which attends to everything, and for a prefill, which is causal."""
    linear: Linear = plain


def run_layers(hidden_MD: Tensor, layers: list[LayerWeights], shape: Shape, rows: Rows, keys: Tensor, values: Tensor):
    """Hidden states [M, D] after `layers`. keys and values are [layers, 1, G, T, C] and receive those of the rows."""
    to = keys.select(1, 0), values.select(1, 0)
    if rows.positions_M is None:  # sliced once: a slice in every layer would cost as much as its small kernels
        m, end = len(hidden_MD), keys.shape[3]
        to = to[0].narrow(2, end - m, m), to[1].narrow(2, end - m, m)
    slots = (keys.unbind(0), values.unbind(0), to[0].unbind(0), to[1].unbind(0))
    for w, *slot in zip(layers, *slots, strict=True):
        hidden_MD = decoder_layer(hidden_MD, w, shape, rows, *slot)
    return hidden_MD


def decoder_layer(
    hidden_MD: Tensor, w: LayerWeights, shape: Shape, rows: Rows,
    keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor,
) -> Tensor:  # fmt: skip
    """One layer, [M, D] -> [M, D]: attention over keys and values [1, G, T, C], then the MLP.

    The rows' own keys and values are first written to to_keys and to_values (see `write`), which are views of them.
    """
    m, heads, groups, channels = len(hidden_MD), shape.heads, shape.kv_heads, shape.head_dim
    normed_MD = rms_norm(hidden_MD, w.attention_norm_D, shape.eps)
    qkv = rows.linear(normed_MD, w.qkv_weight, w.qkv_bias).view(m, -1, channels)
    qk, v_MGC = qkv.split((heads + groups, groups), 1)
    if w.q_norm_C is not None:
        q_MHC, k_MGC = qk.split((heads, groups), 1)
        qk = torch.cat([rms_norm(q_MHC, w.q_norm_C, shape.eps), rms_norm(k_MGC, w.k_norm_C, shape.eps)], 1)
    q_MHC, k_MGC = rotate(qk, rows).split((heads, groups), 1)
    write(to_keys, rows.positions_M, k_MGC)
    write(to_values, rows.positions_M, v_MGC)
    attended = attend(q_MHC, keys, values, rows.mask, groups)
    hidden_MD = rows.linear(attended, w.out_weight, w.out_bias, hidden_MD)
    return mlp(hidden_MD, w, shape, rows.linear)


def write(to: Tensor, positions_M: Tensor | None, rows_MGC: Tensor) -> None:
    """Write rows to their positions in `to` [G, T, C], or without positions to all of `to` [G, M, C]."""
    if positions_M is None:
        to.copy_(rows_MGC.transpose(0, 1))
    else:
        to.index_copy_(1, positions_M, rows_MGC.transpose(0, 1))


def rotate(x_MHC: Tensor, rows: Rows) -> Tensor:
    """Apply the rotary position embedding to every head; [M, H, C]."""
    return torch.addcmul(x_MHC * rows.cos_M1C, x_MHC.roll(x_MHC.shape[-1] // 2, -1), rows.sin_M1C)


def attend(q_MHC: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    """Attention output [M, H*C] over keys and values [1, G, T, C].

    The R query heads that share a key/value head are treated as rows of one head, so keys are never repeated.
    """
    m, heads, channels = q_MHC.shape
    if m > 1 and mask is None:  # prefill: the causal kernel is faster than one with an explicit mask
        q_1HMC = q_MHC.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q_1HMC, keys, values, is_causal=True, enable_gqa=groups != heads)
        return out[0].transpose(0, 1).reshape(m, -1)
    q = q_MHC.reshape(m, groups, -1, channels).transpose(0, 1).reshape(1, groups, -1, channels)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return out.reshape(groups, m, -1).transpose(0, 1).reshape(m, -1)


def mlp(residual_MD: Tensor, w: LayerWeights, shape: Shape, linear: Linear) -> Tensor:
    gate_up = linear(rms_norm(residual_MD, w.mlp_norm_D, shape.eps), w.gate_up_weight, w.gate_up_bias)
    inner = gate_up.shape[-1] // 2
    gate, up = gate_up.split((inner, inner), -1)
    return linear(F.silu(gate).mul_(up), w.down_weight, w.down_bias, residual_MD)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension. On a GPU torch has one kernel for it; on a CPU it makes a dozen calls, and the
    matrix product used here instead takes half the time."""
    if x.ndim != 2 or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    eps_11, mean_D1 = _constants(x.shape[1], eps)
    return torch.addmm(eps_11, x * x, mean_D1).rsqrt_().mul(x).mul_(weight)


@cache
def _constants(d: int, eps: float) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.full((1, 1), eps), torch.full((d, 1), 1 / d)


def causal_mask(positions_M: Tensor, length: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [M*repeats, length]: a row at position p attends to positions 0..p, in each of the R heads of a
    group."""
    hidden = torch.arange(length, device=positions_M.device)[None] > positions_M[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(repeats, 0)
