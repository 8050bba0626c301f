"""What the decoder layers of all model families are made of, as plain functions on tensors: norm, rotation, attention
over the cache, and the loop over layers.

Takes hidden states of rows at absolute positions. A family (family_llama.py) puts its layer together from these parts;
backbone.py decides which layers are run, and on which device.

M rows of this pass, D hidden, H query heads, G key/value heads, R = H/G, C channels of a head, T positions of the cache
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


class Rows(NamedTuple):
    """Positions, rotary tables and mask of a pass, the same for every layer on a device."""

    positions_M: Tensor | None
    """None where the rows are the last positions of the keys and values given."""
    cos_M1C: Tensor
    sin_M1C: Tensor
    """The sign is included, which saves a kernel: rotate_half(x) * sin == roll(x, C/2) * signed sin."""
    mask: Tensor | None
    """Additive, [M*R, T]; None for a single row, which attends to everything, and for a prefill, which is causal."""


Layer = Callable[..., Tensor]
"""A family's decoder layer, [M, D] -> [M, D]; see `family_llama.decoder_layer`."""


def run_layers(
    hidden_MD: Tensor, layer: Layer, weights: list[Any], shape: Shape, rows: Rows, keys: Tensor, values: Tensor,
    last_row: bool = False,
) -> Tensor:  # fmt: skip
    """Hidden states [M, D] after layers of these weights. keys and values are [layers, 1, G, T, C] and receive those of
    the rows. last_row: only the last row's hidden state is wanted, [1, D]."""
    to = keys.select(1, 0), values.select(1, 0)
    if rows.positions_M is None:  # sliced once: a slice in every layer would cost as much as its small kernels
        m, end = len(hidden_MD), keys.shape[3]
        to = to[0].narrow(2, end - m, m), to[1].narrow(2, end - m, m)
    slots = zip(weights, keys.unbind(0), values.unbind(0), to[0].unbind(0), to[1].unbind(0), strict=True)
    for i, (w, *slot) in enumerate(slots, start=1):
        hidden_MD = layer(hidden_MD, w, shape, rows, *slot, last_row=last_row and i == len(weights))
    return hidden_MD


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
