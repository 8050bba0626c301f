"""Passes of a few fixed widths, which a GPU records once and replays as CUDA graphs.

Takes rows at absolute positions like the eager passes, padded to the next width, and attends to the whole cache through
a mask. No shape of a pass depends on the length of the text, so a recorded pass can be replayed: one launch instead of
about 20 for each layer. On a CPU the same passes run eagerly; they are no faster there, but can be tested.

Where drafts branch, what a row attends to follows from its place in the tree, so such passes are recorded for
themselves.

W rows of a pass, one of WIDTHS or BRANCHED; D hidden, T slots of the cache, C channels of a head, R slots of a tree
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layers import Layer, LayerKind, Rows, Shape, causal_mask, run_layers
from .passes import Tables
from .rounds import WIDTHS
from .tree import WIDEST, Tree

ROOM = 256
"""Caches are rounded up to a multiple of this many slots, because passes are recorded anew for every cache size."""
BRANCHED = (1, 2, 4, 8, 16, 32, WIDEST + 1)
"""Numbers of rows for which passes over trees are recorded."""


def rounded(length: int, spare: int) -> int:
    """Slots that a cache needs for texts of `length` tokens, `spare` drafts more, and the padding rows after them."""
    padding = BRANCHED[-1] if spare else WIDTHS[-1] - 1
    return -(-(length + spare + padding) // ROOM) * ROOM


class Chain(NamedTuple):
    """Where the rows of a pass are, in which each follows the one before it."""

    positions_W: Tensor


class Branches(NamedTuple):
    """Where the rows of a pass over a tree are. Rows beyond the tree only fill up the pass."""

    slots_W: Tensor
    positions_W: Tensor
    root_1: Tensor
    """The slot of the pending token."""
    hidden_WR: Tensor
    """True where a row must not attend to the draft in slot root + 1 + r."""
    positions_R: Tensor
    """Of the drafts in these slots."""

    @classmethod
    def of(cls, tree: Tree, root: int, first: int, width: int, device: torch.device) -> "Branches":
        """Of the rows of a tree from `first` on."""
        count = min(width, len(tree) - first)
        fill = width - count
        hidden = [row + [True] * (WIDEST + 1 - len(tree)) for row in tree.hidden(first, len(tree))[:count]]
        hidden += [[True] * WIDEST] * fill
        positions = [root + depth for depth in tree.depths[first : first + count]]
        drafts = [root + depth for depth in tree.depths[1:]]
        return cls(
            torch.arange(root + first, root + first + width, device=device),
            torch.tensor(positions + [root] * fill, device=device),
            torch.tensor([root], device=device),
            torch.tensor(hidden, device=device),
            torch.tensor(drafts + [root] * (WIDEST - len(drafts)), device=device),
        )

    def mask(self, length: int, repeats: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """The additive mask [W*repeats, length] of `layers.causal_mask` for these rows."""
        slots_T = torch.arange(length, device=self.root_1.device)
        behind_T = slots_T - self.root_1  # a slot up to the root is the position of its token
        draft_T = (behind_T - 1).clamp(0, WIDEST - 1)
        hidden_WT = torch.where(behind_T > 0, self.hidden_WR[:, draft_T] | (behind_T > WIDEST), False)
        if window is not None:
            positions_T = torch.where(behind_T > 0, self.positions_R[draft_T], slots_T)
            hidden_WT = hidden_WT | (positions_T <= self.positions_W[:, None] - window)
        mask = torch.zeros(hidden_WT.shape, dtype=dtype, device=hidden_WT.device)
        return mask.masked_fill_(hidden_WT, float("-inf")).repeat_interleave(repeats, 0)


Where = Chain | Branches


def run_fixed(
    layer: Layer, shape: Shape, hidden_WD: Tensor, where: Where, tables: Tables, weights: list[Any],
    kinds: list[LayerKind], keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """`run_layers` in which everything that depends on the positions is computed from tensors, so that replays with
    other positions are right. [W, D]"""
    positions_W = where.positions_W
    cos_W1C, sin_W1C = tables.cos_T1C[positions_W], tables.sin_T1C[positions_W]
    made, about = {}, (keys.shape[3], shape.repeats, hidden_WD.dtype)
    for kind in dict.fromkeys(kinds):
        if isinstance(where, Branches):
            made[kind] = Rows(where.slots_W, cos_W1C, sin_W1C, where.mask(*about, kind.window))
        else:
            made[kind] = Rows(positions_W, cos_W1C, sin_W1C, causal_mask(positions_W, *about, kind.window))
    rows = [made[kind] for kind in kinds]
    return run_layers(hidden_WD, layer, weights, shape, rows, keys, values, at_end=False)


class FixedShapes:
    """The passes of one engine over one cache. A recording holds the addresses of its weights and cache, so another
    cache needs another object."""

    def __init__(self, layer: Layer, shape: Shape):
        self.layer, self.shape = layer, shape
        self._recorded: dict[tuple[int, int, type], _Recorded] = {}

    def __call__(
        self, hidden_WD: Tensor, where: Where, tables: Tables, weights: list[Any], kinds: list[LayerKind],
        keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [W, D] after layers of these weights and kinds; keys and values are a whole block of the cache.

        On a GPU the result is overwritten by the next pass of the same layers, width and kind of place.
        """
        rest = tables, weights, kinds, keys, values
        if hidden_WD.device.type != "cuda":
            return run_fixed(self.layer, self.shape, hidden_WD, where, *rest)
        key = keys.data_ptr(), len(hidden_WD), type(where)
        if key not in self._recorded:
            self._recorded[key] = _Recorded(self.layer, self.shape, hidden_WD, where, *rest)
        return self._recorded[key](hidden_WD, where)


class _Recorded:
    """A CUDA graph of one pass over fixed weights and a fixed cache. Calls replay it on other rows and positions."""

    def __init__(self, layer: Layer, shape: Shape, hidden_WD: Tensor, where: Where, *rest: Any):
        self.hidden_WD, self.where = hidden_WD.clone(), type(where)(*(part.clone() for part in where))
        arguments = (layer, shape, self.hidden_WD, self.where, *rest)
        self.arguments = arguments  # the tensors that the graph reads must live as long as the graph
        stream = torch.cuda.Stream(hidden_WD.device)
        stream.wait_stream(torch.cuda.current_stream(hidden_WD.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate workspaces before the capture
                run_fixed(*arguments)
        torch.cuda.current_stream(hidden_WD.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(hidden_WD.device), torch.cuda.graph(self.graph, stream=stream):
            self.out_WD = run_fixed(*arguments)

    def __call__(self, hidden_WD: Tensor, where: Where) -> Tensor:
        self.hidden_WD.copy_(hidden_WD)
        for part, new in zip(self.where, where, strict=True):
            part.copy_(new)
        self.graph.replay()
        return self.out_WD
