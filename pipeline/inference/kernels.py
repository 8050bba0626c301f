"""Chooses a matrix product for each number of rows, by timing them on the backbone's own weights when it is loaded.

Takes layer weights, gives a kernel for every width. In float32 on a CPU, torch uses a matrix-vector routine for one row
and one made for large matrices from two rows on, so that a pass of 3 tokens takes longer than two passes of one token.
oneDNN's product does not have that step, but the overhead of its calls is too large for thin layers.
"""

import time

import torch
from torch import Tensor

from .layers import LayerWeights, Linear, plain
from .rounds import WIDTHS

CLEARLY = 0.9
"""A kernel is chosen only if it needs less than this share of the time of `plain`; otherwise torch's own is used."""


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The same as `plain`, computed by the oneDNN product that torch itself uses in compiled models."""
    out = torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
    return out if residual is None else out.add_(residual)


def choose(layers: list[LayerWeights], timed: bool = True) -> list[Linear]:
    """A list in which the kernel for m rows is at index min(m, 9); index 0 is unused. Without timing, and for anything
    but float32 on a CPU, every kernel is `plain`."""
    weight = layers[0].gate_up_weight
    if not timed or weight.device.type != "cpu" or weight.dtype != torch.float32 or not _has_onednn():
        return [plain] * (WIDTHS[-1] + 1)
    weights = [w.gate_up_weight for w in layers[:8]]  # several, so that none stays in the CPU's cache
    kernels: list[Linear] = [plain] * (WIDTHS[-1] + 1)
    with torch.inference_mode():
        for width, after in zip(WIDTHS, (*WIDTHS[1:], WIDTHS[-1] + 1), strict=True):
            x = torch.ones(width, len(weight))
            if _seconds(onednn, x, weights) < CLEARLY * _seconds(plain, x, weights):
                kernels[width:after] = [onednn] * (after - width)
    return kernels


def _has_onednn() -> bool:
    # The operator is private: a release of torch without it only loses speed.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _seconds(kernel: Linear, x: Tensor, weights: list[Tensor], repeats: int = 5) -> float:
    """The shortest of several repeats, because other processes can only make a repeat longer."""
    least = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for weight in weights:
            kernel(x, weight, None)
        least = min(least, time.perf_counter() - started)
    return least
