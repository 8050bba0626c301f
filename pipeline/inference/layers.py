"""What the decoder layers of all model families are made of, as plain functions on tensors: norm, rotation, attention
over the cache, and the loop over layers.

Takes hidden states of rows at absolute positions. A family (family_llama.py) puts its layer together from these parts;
backbone.py decides which layers are run, and on which device.

M rows of this pass, D hidden, H query heads, G key/value heads, R = H/G, C channels of a head, T positions of the cache
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch_attention import Apart, Together, attend_together

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Types whose rotary tables do not depend on the length of the sequence, so that they can be computed once."""


@dataclass(frozen=True)
class Shape:
    """Sizes that all layers of a backbone have in common, and the epsilon of their norms."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    logit_scale: float = 1.0
    """By which the products with the LM head are multiplied."""
    logit_cap: float = 0.0
    """c of c tanh(x / c), by which logits are then bent; 0: they are not."""

    @classmethod
    def of(cls, config: Any) -> "Shape":
        heads = config.num_attention_heads
        return cls(
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=getattr(config, "rms_norm_eps", 0.0),
            logit_scale=logit_scale(config),
            logit_cap=logit_cap(config),
        )

    @property
    def repeats(self) -> int:
        """R: how many query heads share one key/value head."""
        return self.heads // self.kv_heads


def logit_scale(config: Any) -> float:
    """By which a model multiplies the products with its LM head: Granite divides by `logits_scaling`, Cohere multiplies
    by `logit_scale`."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def logit_cap(config: Any) -> float:
    """The cap of a model's logits (Gemma 2), or 0."""
    return getattr(config, "final_logit_softcapping", None) or 0.0


class LayerKind(NamedTuple):
    """What the layers of a backbone may differ in besides their weights."""

    window: int | None = None
    """Number of positions that a row attends to, its own included; None without a limit."""


class Rows(NamedTuple):
    """Positions, rotary tables and mask of a pass, the same for every layer of a kind on a device."""

    positions_M: Tensor | None
    """None where the rows are the last positions of the keys and values given."""
    cos_M1C: Tensor
    sin_M1C: Tensor
    """The sign is included, which saves a kernel: rotate_half(x) * sin == roll(x, C/2) * signed sin."""
    mask: Tensor | None
    """Additive, [M*R, T]; None for a single row, which attends to everything, and for a prefill, which is causal."""
    start: int = 0
    """The first position that any of the rows attends to; the mask begins there."""
    window: int | None = None
    """The number of positions that a row attends to, where there are more."""
    branched: bool = False
    """Whether the rows are of a tree that branches (tree.py): then the mask says what a row attends to."""
    several: tuple[Together | Apart, ...] | None = None
    """Of rows of several texts: those of each store. Positions and mask are in these, and keys and values are given as
    one tensor for each store."""

    def last(self, repeats: int) -> "Rows":
        """What the pass is to its last row alone."""
        if self.branched and self.mask is not None:
            return self._replace(mask=self.mask[-repeats:])
        return self._replace(mask=None, start=0)


Layer = Callable[..., Tensor]
"""A family's decoder layer, [M, D] -> [M, D]; see `family_llama.decoder_layer`."""


def run_layers(
    hidden_MD: Tensor, layer: Layer, weights: list[Any], shape: Shape, rows: Sequence[Any], keys: Tensor,
    values: Tensor, at_end: bool, last_row: bool = False,
) -> Tensor:  # fmt: skip
    """Hidden states [M, D] after layers of these weights. rows: of each layer, what the pass is to it. keys and values
    are [layers, 1, G, T, C] and receive those of the rows, at_end: at the last positions, else where rows say.
    last_row: only the last row's hidden state is wanted, [1, D]."""
    to = keys.select(1, 0), values.select(1, 0)
    if at_end:  # sliced once: a slice in every layer would cost as much as its small kernels
        m, end = len(hidden_MD), keys.shape[3]
        to = to[0].narrow(2, end - m, m), to[1].narrow(2, end - m, m)
    slots = zip(weights, rows, keys.unbind(0), values.unbind(0), to[0].unbind(0), to[1].unbind(0), strict=True)
    for i, (w, those, *slot) in enumerate(slots, start=1):
        hidden_MD = layer(hidden_MD, w, shape, those, *slot, last_row=last_row and i == len(weights))
    return hidden_MD


def write(to: Any, rows: Rows, x_MGC: Tensor) -> None:
    """Write keys or values of rows to their positions in `to` [G, T, C], or without positions to all of `to`
    [G, M, C]; of several texts to the slots of each store's [P*G*T, C]."""
    if rows.several is not None:
        parts = _parts(x_MGC, rows.several)
        for store, some, part_MGC in zip(to, rows.several, parts, strict=True):
            store.index_copy_(0, some.cells_MG, part_MGC.reshape(-1, part_MGC.shape[-1]))
    elif rows.positions_M is None:
        to.copy_(x_MGC.transpose(0, 1))
    else:
        to.index_copy_(1, rows.positions_M, x_MGC.transpose(0, 1))


def _parts(x_M: Tensor, several: tuple[Together | Apart, ...]) -> Sequence[Tensor]:
    """The rows of each store. `Tensor.split` is written in Python and takes as long as a small kernel."""
    return [x_M] if len(several) == 1 else x_M.split_with_sizes([some.rows for some in several])


def joined(parts: list[Tensor]) -> Tensor:
    """Rows of several stores, one after the other; a single one's are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rotate(x_MHC: Tensor, rows: Rows) -> Tensor:
    """Apply the rotary position embedding to every head; [M, H, C]."""
    return torch.addcmul(x_MHC * rows.cos_M1C, x_MHC.roll(x_MHC.shape[-1] // 2, -1), rows.sin_M1C)


def attend(q_MHC: Tensor, keys: Any, values: Any, rows: Rows, groups: int) -> Tensor:
    """Attention output [M, H*C] over keys and values [1, G, T, C], of several texts over [P, G, T, C] of each store.

    The R query heads that share a key/value head are treated as rows of one head, so keys are never repeated.
    """
    if rows.several is not None:
        parts = zip(_parts(q_MHC, rows.several), keys, values, rows.several, strict=True)
        attended = [
            attend_together(q, k, v, some, groups)
            if isinstance(some, Together)
            else _attend_apart(q, k, v, some, groups)
            for q, k, v, some in parts
        ]
        return joined(attended)
    m, heads, _ = q_MHC.shape
    alone = m == 1 and rows.mask is None and rows.window is not None
    start = keys.shape[2] - rows.window if alone else rows.start  # type: ignore[operator]
    if start:
        length = keys.shape[2] - start
        keys, values = keys.narrow(2, start, length), values.narrow(2, start, length)
    if m > 1 and rows.mask is None and rows.window is not None:
        return _attend_in_windows(q_MHC, keys, values, rows.window, groups)
    if m > 1 and rows.mask is None:  # prefill: the causal kernel is faster than one with an explicit mask
        q_1HMC = q_MHC.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q_1HMC, keys, values, is_causal=True, enable_gqa=groups != heads)
        return out[0].transpose(0, 1).reshape(m, -1)
    return _attend_masked(q_MHC, keys, values, rows.mask, groups)


def _attend_apart(q_MHC: Tensor, keys: Tensor, values: Tensor, some: Apart, groups: int) -> Tensor:
    """The same for the rows of several texts, one text after the other."""
    parts = []
    for q, text in zip(q_MHC.split_with_sizes([text.rows for text in some.texts]), some.texts, strict=True):
        own_keys, own_values = (part[text.place, :, : text.end][None] for part in (keys, values))
        parts.append(attend(q, own_keys, own_values, text.pass_, groups))
    return joined(parts)


def _attend_masked(q_MHC: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    m, _, channels = q_MHC.shape
    q = q_MHC.reshape(m, groups, -1, channels).transpose(0, 1).reshape(1, groups, -1, channels)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return out.reshape(groups, m, -1).transpose(0, 1).reshape(m, -1)


def _attend_in_windows(q_MHC: Tensor, keys: Tensor, values: Tensor, window: int, groups: int) -> Tensor:
    """The attention of a prefill [M, H*C] in which every row attends to the last `window` positions: in blocks of as
    many rows, so that no mask is larger than 2 windows."""
    blocks = []
    for first in range(0, len(q_MHC), window):
        q, start = q_MHC[first : first + window], max(0, first + 1 - window)
        positions_M = torch.arange(first, first + len(q), device=q.device)
        mask = causal_mask(positions_M, first + len(q), q.shape[1] // groups, q.dtype, window, start)
        seen = slice(start, first + len(q))
        blocks.append(_attend_masked(q, keys[:, :, seen], values[:, :, seen], mask, groups))
    return torch.cat(blocks)


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


def causal_mask(
    positions_M: Tensor, length: int, repeats: int, dtype: torch.dtype, window: int | None = None, start: int = 0
) -> Tensor:
    """Additive mask [M*repeats, length - start]: a row at position p attends to positions 0..p, or to the last `window`
    of them, in each of the R heads of a group. Positions before `start` are left out."""
    keys_1T, rows_M1 = torch.arange(start, length, device=positions_M.device)[None], positions_M[:, None]
    hidden = keys_1T > rows_M1
    if window is not None:
        hidden |= keys_1T <= rows_M1 - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(repeats, 0)
