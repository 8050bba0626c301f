"""Passes of a few fixed widths, which a GPU records once and replays as CUDA graphs.

Takes rows at absolute positions like the eager passes, padded to the next width, and attends to the whole cache through
a mask. No shape of a pass depends on the length of the text, so a recorded pass can be replayed: one launch instead of
about 20 for each layer. On a CPU the same passes run eagerly; they are no faster there, but can be tested.

W rows of a pass, one of WIDTHS; D hidden, T positions of the cache, C channels of a head
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layers import Layer, LayerKind, Rows, Shape, causal_mask, run_layers
from .passes import Tables
from .rounds import WIDTHS

ROOM = 256
"""Caches are rounded up to a multiple of this many positions, because passes are recorded anew for every cache size."""


def rounded(length: int) -> int:
    """Positions that a cache needs for texts of `length` tokens and the padding rows after them."""
    return -(-(length + WIDTHS[-1] - 1) // ROOM) * ROOM


def run_fixed(
    layer: Layer, shape: Shape, hidden_WD: Tensor, positions_W: Tensor, tables: Tables, weights: list[Any],
    kinds: list[LayerKind], keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """`run_layers` in which everything that depends on the positions is computed from tensors, so that replays with
    other positions are right. [W, D]"""
    cos_W1C, sin_W1C = tables.cos_T1C[positions_W], tables.sin_T1C[positions_W]
    made = {}
    for kind in dict.fromkeys(kinds):
        mask = causal_mask(positions_W, keys.shape[3], shape.repeats, hidden_WD.dtype, kind.window)
        made[kind] = Rows(positions_W, cos_W1C, sin_W1C, mask)
    rows = [made[kind] for kind in kinds]
    return run_layers(hidden_WD, layer, weights, shape, rows, keys, values, at_end=False)


class FixedShapes:
    """The passes of one engine over one cache. A recording holds the addresses of its weights and cache, so another
    cache needs another object."""

    def __init__(self, layer: Layer, shape: Shape):
        self._run: Callable[..., Tensor] = partial(run_fixed, layer, shape)
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def __call__(
        self, hidden_WD: Tensor, positions_W: Tensor, tables: Tables, weights: list[Any], kinds: list[LayerKind],
        keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [W, D] after layers of these weights and kinds, W one of WIDTHS; keys and values are a whole
        block of the cache.

        On a GPU the result is overwritten by the next pass of the same layers and width.
        """
        if hidden_WD.device.type != "cuda":
            return self._run(hidden_WD, positions_W, tables, weights, kinds, keys, values)
        key = keys.data_ptr(), len(hidden_WD)
        if key not in self._recorded:
            self._recorded[key] = _Recorded(self._run, hidden_WD, positions_W, tables, weights, kinds, keys, values)
        return self._recorded[key](hidden_WD, positions_W)


class _Recorded:
    """A CUDA graph of one pass over fixed weights and a fixed cache. Calls replay it on other rows and positions."""

    def __init__(self, run: Callable[..., Tensor], hidden_WD: Tensor, positions_W: Tensor, *rest):
        self.hidden_WD, self.positions_W = hidden_WD.clone(), positions_W.clone()
        arguments = (self.hidden_WD, self.positions_W, *rest)
        self.arguments = arguments  # the tensors that the graph reads must live as long as the graph
        stream = torch.cuda.Stream(hidden_WD.device)
        stream.wait_stream(torch.cuda.current_stream(hidden_WD.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose kernels and allocate workspaces before the capture
                run(*arguments)
        torch.cuda.current_stream(hidden_WD.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(hidden_WD.device), torch.cuda.graph(self.graph, stream=stream):
            self.out_WD = run(*arguments)

    def __call__(self, hidden_WD: Tensor, positions_W: Tensor) -> Tensor:
        self.hidden_WD.copy_(hidden_WD)
        self.positions_W.copy_(positions_W)
        self.graph.replay()
        return self.out_WD
