"""What a pass needs besides hidden states and the cache: the embedded tokens, and positions and masks for every layer.

Takes token ids, or the positions of rows; gives hidden states before the first layer, and for each layer its `Rows`.
This is for the families whose layers are computed here; family_generic.py has the same for all others.

M rows of this pass, D hidden, C channels of a head, T positions, L layers; slot L is the exit layer
Of several texts: P places, W the most rows of one of them
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch_attention import FEW, MANY, Alone, Apart, Bags, Together
from .layers import LayerKind, Rows, Shape, causal_mask, joined
from .tree import Tree, branched_mask


class Tables(NamedTuple):
    """Positions [T] on a device, and cos and signed sin [T, 1, C] of the rotary embedding (`layers.rotate`)."""

    positions_T: Tensor
    cos_T1C: Tensor
    sin_T1C: Tensor


class Span(NamedTuple):
    """Rows of one of several texts in a pass: those in slots base..base+rows-1 of its place."""

    place: int
    base: int
    rows: int
    tree: Tree | None = None
    """The drafts of a round, if these rows are of them and they branch. Without, a slot is a position."""
    root: int = 0
    """The slot of their pending token."""

    @classmethod
    def of(cls, place: int, base: int, rows: int, tree: Tree | None, root: int) -> "Span":
        """Without a tree that makes no difference."""
        branches = tree is not None and not tree.is_chain and base >= root
        return cls(place, base, rows, tree, root) if branches else cls(place, base, rows)

    @property
    def positions(self) -> Sequence[int]:
        if self.tree is None:
            return range(self.base, self.base + self.rows)
        first = self.base - self.root
        return [self.root + depth for depth in self.tree.depths[first : first + self.rows]]


class Group(NamedTuple):
    """Spans of texts whose places are in one store."""

    slots: int
    """T: of each place."""
    texts: int
    """P: the places 0..P-1 are in use."""
    spans: list[Span]

    @property
    def width(self) -> int:
        """W: the most rows of a text."""
        return max(span.rows for span in self.spans)

    @property
    def end(self) -> int:
        """The number of slots up to the last that any of the rows attends to."""
        return max(span.base + span.rows for span in self.spans)


def mask_of_texts(
    spans: list[Span], positions_P: Tensor, width: int, end: int, repeats: int, dtype: torch.dtype, window: int | None
) -> Tensor:
    """Additive mask [P*W*repeats, end] of a pass over texts in P places of `width` rows each, whose positions [P*W] are
    given: `layers.causal_mask`, but a row of a tree sees, behind the pending token, the drafts of its own path only."""
    if all(span.tree is None for span in spans):
        return causal_mask(positions_P, end, repeats, dtype, window)
    last, seen = [0] * len(positions_P), list[int]()
    for span in spans:
        for i, position in enumerate(span.positions):
            row = span.place * width + i
            last[row] = position if span.tree is None else span.root
            if span.tree is not None:
                path = span.tree.path(span.base - span.root + i)[-(window or end) :]
                seen += [row * end + span.root + draft for draft in path]
    device = positions_P.device
    mask_PT = causal_mask(torch.tensor(last, device=device), end, 1, dtype)
    if window is not None:
        early_PT = torch.arange(end, device=device) <= positions_P[:, None] - window
        mask_PT.masked_fill_(early_PT, float("-inf"))
    mask_PT.view(-1).index_fill_(0, torch.tensor(seen, dtype=torch.long, device=device), 0.0)
    return mask_PT.repeat_interleave(repeats, 0)


class Passes:
    """Makes the rows of every pass of one engine. kinds: of the layers 1..L; the exit layer is of the last one's."""

    def __init__(self, model: nn.Module, kinds: list[LayerKind], shape: Shape):
        body: Any = model.model
        self.embedding_VD = body.embed_tokens.weight.data
        self.kinds, self.shape = [*kinds, kinds[-1]], shape
        self._rotary = body.rotary_emb
        self._tables: dict[torch.device, Tables] = {}

    def allocate(self, length: int, devices: set[torch.device]) -> None:
        """Make tables for positions up to `length` on these devices."""
        for device in devices:
            if device not in self._tables or len(self._tables[device].positions_T) < length:
                self._tables[device] = self._make_tables(length, device)

    def _make_tables(self, length: int, device: torch.device) -> Tables:
        positions_T = torch.arange(length, device=self._rotary.inv_freq.device)
        like = torch.zeros(1, dtype=torch.float32, device=positions_T.device)
        cos_TC, sin_TC = (table[0] for table in self._rotary(like, positions_T[None]))
        half = self.shape.head_dim // 2
        signed_TC = torch.cat([-sin_TC[:, :half], sin_TC[:, half:]], -1)
        dtype = self.embedding_VD.dtype
        cos_T1C, signed_T1C = (table[:, None].to(device, dtype) for table in (cos_TC, signed_TC))
        return Tables(positions_T.to(device), cos_T1C, signed_T1C)

    def tables(self, device: torch.device) -> Tables:
        return self._tables[device]

    def embed(self, ids: list[int], base: int) -> Tensor:
        """Hidden states [M, D] of tokens at positions base.. before the first layer."""
        if len(ids) == 1:  # a view needs no kernel
            return self.embedding_VD.narrow(0, ids[0], 1)
        return self.embedding_VD[torch.tensor(ids, device=self.embedding_VD.device)]

    def rows(self, base: int, m: int, device: torch.device, tree: Tree | None = None, root: int = 0) -> list[Rows]:
        """What a pass of m rows in slots base.. is to each layer 1..L and to the exit layer. tree: the drafts of a
        round, if they branch; its pending token is in slot `root`. Without, a slot is a position."""
        tables, made = self._tables[device], {}
        for kind in set(self.kinds):
            if tree is None:
                made[kind] = self._of_kind(kind, base, m, tables)
            else:
                made[kind] = self._of_branches(kind, base - root, base - root + m, tables, tree, root)
        return [made[kind] for kind in self.kinds]

    def _of_kind(self, kind: LayerKind, base: int, m: int, tables: Tables) -> Rows:
        positions_T, cos_T1C, sin_T1C = tables
        end = base + m
        window = kind.window if kind.window is not None and kind.window < end else None
        start = 0 if window is None else max(0, base + 1 - window)
        mask = None
        if m > 1 and base > 0:
            mask = causal_mask(positions_T[base:end], end, self.shape.repeats, cos_T1C.dtype, window, start)
        return Rows(None, cos_T1C.narrow(0, base, m), sin_T1C.narrow(0, base, m), mask, start, window)

    def _of_branches(self, kind: LayerKind, first: int, stop: int, tables: Tables, tree: Tree, root: int) -> Rows:
        """Of the rows first..stop-1 of a tree."""
        depths = tree.depths[first:stop]
        window = kind.window if kind.window is not None and kind.window <= root + max(depths) else None
        start = 0 if window is None else min(root, max(0, root + min(depths) + 1 - window))
        positions_M = torch.tensor(depths, device=tables.positions_T.device) + root
        cos_M1C, sin_M1C = tables.cos_T1C[positions_M], tables.sin_T1C[positions_M]
        mask_MT = branched_mask(tree, first, stop, root, start, window, cos_M1C)
        mask = mask_MT.repeat_interleave(self.shape.repeats, 0)
        return Rows(None, cos_M1C, sin_M1C, mask, start, window, branched=True)

    def rows_of_texts(self, groups: list[Group], device: torch.device) -> list[Rows]:
        """The same for a pass of rows of several texts, one group after the other."""
        tables = self._tables[device]
        indices = [_Indices.of(group, self.shape.kv_heads, device) for group in groups]
        positions_M = joined([some.positions_M for some in indices])
        cos_M1C, sin_M1C = tables.cos_T1C[positions_M], tables.sin_T1C[positions_M]
        made = {}
        for kind in set(self.kinds):
            several = [self._of_group(kind, *some, tables) for some in zip(groups, indices, strict=True)]
            made[kind] = Rows(None, cos_M1C, sin_M1C, None, several=tuple(several))
        return [made[kind] for kind in self.kinds]

    def _of_group(self, kind: LayerKind, group: Group, indices: "_Indices", tables: Tables) -> Together | Apart:
        positions_M, slots_M, cells_MG, at_M = indices
        texts, width, end, m = group.texts, group.width, group.end, len(positions_M)
        if width > MANY:
            parts = [Alone(span.rows, span.place, span.base + span.rows, self._of_span(kind, span, tables))
                     for span in group.spans]  # fmt: skip
            return Apart(m, slots_M, cells_MG, parts)
        # Rows that only fill up see position 0: a row that sees nothing would be NaN.
        filled_P = torch.zeros(texts * width, dtype=torch.long, device=positions_M.device)
        filled_P.index_copy_(0, at_M, positions_M)
        repeats, dtype = self.shape.repeats, tables.cos_T1C.dtype
        mask = mask_of_texts(group.spans, filled_P, width, end, repeats, dtype, kind.window).view(texts, 1, -1, end)
        bags = None
        if mask.device.type == "cpu" and dtype == torch.float32 and mask.numel() * self.shape.kv_heads <= FEW:
            bags = Bags.of(mask, self.shape.kv_heads, group.slots)
        is_even = [(span.place, span.rows) for span in group.spans] == [(place, width) for place in range(texts)]
        return Together(m, slots_M, cells_MG, texts, width, None if is_even else at_M, mask, bags)

    def _of_span(self, kind: LayerKind, span: Span, tables: Tables) -> Rows:
        if span.tree is None:
            return self._of_kind(kind, span.base, span.rows, tables)
        first = span.base - span.root
        return self._of_branches(kind, first, first + span.rows, tables, span.tree, span.root)


class _Indices(NamedTuple):
    """Of the rows of a group: their positions, slots and cells (`batch_attention.Together`), and place * W + number in
    the text."""

    positions_M: Tensor
    slots_M: Tensor
    cells_MG: Tensor
    at_M: Tensor

    @classmethod
    def of(cls, group: Group, kv_heads: int, device: torch.device) -> "_Indices":
        spans = group.spans
        positions = [position for span in spans for position in span.positions]
        slots = [span.place * group.slots + span.base + i for span in spans for i in range(span.rows)]
        at = [span.place * group.width + i for span in spans for i in range(span.rows)]
        positions_M, slots_M, at_M = torch.tensor([positions, slots, at], device=device).unbind(0)
        of_head_G = torch.arange(kv_heads, device=device) * group.slots
        places_M = slots_M.div(group.slots, rounding_mode="floor")
        cells_MG = (slots_M + places_M * ((kv_heads - 1) * group.slots))[:, None] + of_head_G
        return cls(positions_M, slots_M, cells_MG.view(-1), at_M)
