"""Attention of rows of several texts: each row attends to the keys and values of its own text.

Takes queries of a pass's rows, and keys and values of all texts in one store (places.py); gives what each row attended
to. Where texts have a few rows each, one call is for all of them (`Together`); where they have many, such as prompts,
each text's rows are attended to as if it were alone (`Apart`).

M rows of a pass, P texts, W the most rows of one of them, H query heads, G key/value heads, R = H/G, C channels of a
head, T slots
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MANY = 16
"""More rows of a text than these are attended to by a call of their own: to fill up all texts would take longer."""
FEW = 1 << 22
"""Up to so many scores of a layer are kept as a matrix on a CPU; more would not stay in its cache."""
SPARSE = 4
"""Up to so many rows of a head of a text have their scores computed one by one: a matrix product of more is faster."""


class Bags(NamedTuple):
    """Which keys every score is computed with, and which values every row of scores is a weighted sum of: for each of
    the P*G*W*R rows its T slots, in the form of a sparse matrix's rows (CSR)."""

    slots: Tensor
    """[P*G*W*R*T]: of each score, its slot among those of all places and heads of the store."""
    first: Tensor
    """[P*G*W*R + 1]: where in it each row of scores begins, and where the last one ends."""
    mask: Tensor
    """Additive, of each score, [P*G, W*R, T]."""
    sparse: Tensor | None
    """The same as a sparse matrix; None where a row of scores is one of many of its head."""

    @classmethod
    def of(cls, mask: Tensor, groups: int, slots: int) -> "Bags":
        """For a mask [P, 1, W*R, T] over the first T of as many slots as a place has."""
        texts, _, rows, end = mask.shape
        begins = torch.arange(texts * groups, dtype=torch.int32)[:, None, None] * slots
        bags = (begins + torch.arange(end, dtype=torch.int32)).expand(-1, rows, -1).reshape(-1)
        first = torch.arange(texts * groups * rows + 1, dtype=torch.int32) * end
        mask = mask.repeat(1, groups, 1, 1).view(-1, rows, end)
        sparse = None
        if rows <= SPARSE:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls sparse matrices of this form new
                size = texts * groups * rows, texts * groups * slots
                sparse = torch.sparse_csr_tensor(first, bags, mask.view(-1), size)
        return cls(bags, first, mask, sparse)


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
    if some.bags is None:
        seen = keys[:texts, :, : mask.shape[-1]], values[:texts, :, : mask.shape[-1]]
        out = F.scaled_dot_product_attention(q, *seen, attn_mask=mask)
    else:
        out = _attend_in_bags(q, keys[:texts], values, some.bags)
    out = out.view(texts, groups, width, -1, channels).transpose(1, 2).reshape(texts * width, -1)
    return out if at_M is None else out.index_select(0, at_M)


def _attend_in_bags(q: Tensor, keys: Tensor, values: Tensor, bags: Bags) -> Tensor:
    """The same as torch's attention, for few rows of each text on a CPU. There torch calls a matrix product for every
    text and head, which reads keys and values at a fifth of the memory's speed; products of single rows and weighted
    sums of rows of a table are computed by kernels that were made for reading."""
    channels = q.shape[-1]
    scale = channels**-0.5
    if bags.sparse is not None:
        table_CT = keys.view(-1, channels).t()
        scores = torch.sparse.sampled_addmm(bags.sparse, q.reshape(-1, channels), table_CT, alpha=scale).values()
        shares = scores.view(bags.mask.shape).softmax(-1)
    else:
        keys_BCT = keys[:, :, : bags.mask.shape[-1]].flatten(0, 1).transpose(1, 2)
        shares = torch.baddbmm(bags.mask, q.flatten(0, 1), keys_BCT, alpha=scale).softmax(-1)
    return F.embedding_bag(
        bags.slots, values.view(-1, channels), bags.first, mode="sum", per_sample_weights=shares.view(-1),
        include_last_offset=True,
    )  # fmt: skip
