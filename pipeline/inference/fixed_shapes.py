"""Passes of a few fixed widths that a GPU records once and replays as CUDA graphs.

Takes rows at absolute positions like the eager passes, padded to the next width, and attends to the whole cache behind
a mask: nothing of a pass depends on how long the text is, so what surrounds the arithmetic (a kernel launch each, 20
in a layer) is paid once. On a CPU the same passes run as they are, which is how they are tested; they are no faster
there. Knows nothing of what the layers are for.

W rows of a width, D hidden, T positions of the cache
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .layers import LayerWeights, Rows, Shape, causal_mask, run_layers
from .rounds import WIDTHS

ROOM = 256
"""Caches are rounded up to multiples of this many positions: passes are recorded anew for each size."""


def rounded(length: int) -> int:
    """Positions of a cache for texts of `length`, padding rows included."""
    return -(-(length + WIDTHS[-1] - 1) // ROOM) * ROOM


def run_fixed(
    shape: Shape, hidden_WD: Tensor, positions_W: Tensor, cos_T1C: Tensor, sin_T1C: Tensor,
    layers: list[LayerWeights], keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """`run_layers` with everything that depends on the positions computed from tensors."""
    mask = causal_mask(positions_W, keys.shape[3], shape.repeats, hidden_WD.dtype)
    rows = Rows(positions_W, cos_T1C[positions_W], sin_T1C[positions_W], mask)
    return run_layers(hidden_WD, layers, shape, rows, keys, values)


class FixedShapes:
    """The passes of one engine over one cache: a recording knows weights and cache by their addresses."""

    def __init__(self, shape: Shape):
        self._run: Callable[..., Tensor] = partial(run_fixed, shape)
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def __call__(
        self, hidden_WD: Tensor, positions_W: Tensor, tables: list[Tensor], layers: list[LayerWeights],
        keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [W, D] behind `layers`, W one of WIDTHS; keys and values are a whole block of the cache.

        On a GPU valid until the next pass of the same layers and width.
        """
        if hidden_WD.device.type != "cuda":
            return self._run(hidden_WD, positions_W, *tables, layers, keys, values)
        key = keys.data_ptr(), len(hidden_WD)
        if key not in self._recorded:
            self._recorded[key] = _Recorded(self._run, hidden_WD, positions_W, *tables, layers, keys, values)
        return self._recorded[key](hidden_WD, positions_W)


class _Recorded:
    """A CUDA graph of one pass over fixed weights and a fixed cache; only the rows and their positions change."""

    def __init__(self, run: Callable[..., Tensor], hidden_WD: Tensor, positions_W: Tensor, *rest):
        self.hidden_WD, self.positions_W = hidden_WD.clone(), positions_W.clone()
        arguments = (self.hidden_WD, self.positions_W, *rest)
        self.arguments = arguments  # what the graph reads must live as long as it
        stream = torch.cuda.Stream(hidden_WD.device)
        stream.wait_stream(torch.cuda.current_stream(hidden_WD.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels choose themselves and allocate their workspaces before anything is captured
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
