"""Attention of rows of several texts: each row attends to the keys and values of its own text.

Takes queries of a pass's rows, and keys and values of all texts in one store (places.py); gives what each row attended
to. Where texts have a few rows each, one call is for all of them (`Together`); where they have many, such as prompts,
each text's rows are attended to as if it were alone (`Apart`).

M rows of a pass, P texts, W the most rows of one of them, H query heads, G key/value heads, R = H/G, C channels of a
head, T slots
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MANY = 16
"""More rows of a text than these are attended to by a call of their own: to fill up all texts would take longer."""
FEW = 1 << 22
"""Up to so many scores of a layer are kept as a matrix on a CPU; more would not stay in its cache."""


class Bags(NamedTuple):
    """Which values every row of scores is a weighted sum of, as `torch.nn.functional.embedding_bag` takes it."""

    slots: Tensor
    """[P*G*W*R*T]: of each score, its slot among those of all places and heads of the store."""
    first: Tensor
    """[P*G*W*R]: where in it each row of scores begins."""

    @classmethod
    def of(cls, texts: int, groups: int, slots: int, rows: int, end: int) -> "Bags":
        """For `rows` rows of each head of each text over its first `end` of as many slots as a place has."""
        begins = torch.arange(texts * groups)[:, None, None] * slots
        bags = (begins + torch.arange(end)).expand(-1, rows, -1)
        return cls(bags.reshape(-1), torch.arange(texts * groups * rows) * end)


class Together(NamedTuple):
    """Rows of texts in one store, for one call."""

    rows: int
    """M of them, which follow each other in the pass."""
    slots_M: Tensor
    """The number of each row's slot among those of all places of the store."""
    cells_MG: Tensor
    """The same for each of its key/value heads, flat: [M*G]."""
    texts: int
    """P: the texts are those in places 0..P-1 of the store."""
    width: int
    """W."""
    at_M: Tensor | None
    """place * W + number of each row in its text; None where every text has W rows."""
    mask: Tensor
    """Additive, [P, 1, W*R, T]; T ends with the last slot that any row attends to."""
    bags: Bags | None
    """None where torch's attention is faster."""


class Alone(NamedTuple):
    """The rows of one of several texts."""

    rows: int
    place: int
    end: int
    """The number of slots up to the last of them."""
    pass_: Any
    """What the pass is to these rows: `layers.Rows`."""


class Apart(NamedTuple):
    """Rows of texts in one store, for one call for each text."""

    rows: int
    slots_M: Tensor
    cells_MG: Tensor
    texts: list[Alone]


def attend_together(q_MHC: Tensor, keys: Tensor, values: Tensor, some: Together, groups: int) -> Tensor:
    """Attention output [M, H*C] over keys and values [P, G, T, C] of one store. Texts with fewer rows than others are
    filled up with rows of zeros, in this function only."""
    texts, width, at_M, mask = some.texts, some.width, some.at_M, some.mask
    _, heads, channels = q_MHC.shape
    if at_M is not None:
        q_MHC = q_MHC.new_zeros(texts * width, heads, channels).index_copy_(0, at_M, q_MHC)
    q = q_MHC.view(texts, width, groups, -1, channels).transpose(1, 2).reshape(texts, groups, -1, channels)
    seen = keys[:texts, :, : mask.shape[-1]]
    if some.bags is None:
        out = F.scaled_dot_product_attention(q, seen, values[:texts, :, : mask.shape[-1]], attn_mask=mask)
    else:
        out = _attend_in_bags(q, seen, values, mask, some.bags)
    out = out.view(texts, groups, width, -1, channels).transpose(1, 2).reshape(texts * width, -1)
    return out if at_M is None else out.index_select(0, at_M)


def _attend_in_bags(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, bags: Bags) -> Tensor:
    """The same as torch's attention, for few rows of each text on a CPU. There torch calls a matrix product for every
    text and head, which reads keys and values at a fifth of the memory's speed; weighted sums of rows of a table are
    computed by a kernel that was made for reading."""
    channels = q.shape[-1]
    scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], -1)
    shares = torch.add(mask, scores, alpha=channels**-0.5).softmax(-1)
    table = values.view(-1, channels)
    return F.embedding_bag(bags.slots, table, bags.first, mode="sum", per_sample_weights=shares.view(-1))
