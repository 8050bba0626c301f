"""Which matrix product for how many rows: timed on the backbone's own weights when it is loaded.

In float32 on a CPU torch's product falls from the matrix-vector routine to one made for large matrices as soon as there
are two rows, and 3 tokens then cost more than two single ones; oneDNN's does not, but its calls cost too much for thin
layers. Takes layer weights, gives a kernel for every width. Knows nothing of what is multiplied.
"""

import time

import torch
from torch import Tensor

from .layers import LayerWeights, Linear, plain
from .rounds import WIDTHS

CLEARLY = 0.9
"""A kernel must need less than this share of plain's time to be taken: ties stay with torch's own."""


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """`plain` by oneDNN's product, which torch itself calls for compiled models."""
    out = torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
    return out if residual is None else out.add_(residual)


def choose(layers: list[LayerWeights], timed: bool = True) -> list[Linear]:
    """The kernel for m rows at index min(m, 9); index 0 is unused. Untimed, and anything but float32 on a CPU,
    stays with `plain`."""
    weight = layers[0].gate_up_weight
    if not timed or weight.device.type != "cpu" or weight.dtype != torch.float32 or not _has_onednn():
        return [plain] * (WIDTHS[-1] + 1)
    weights = [w.gate_up_weight for w in layers[:8]]  # several, so that none waits in the cache
    kernels: list[Linear] = [plain] * (WIDTHS[-1] + 1)
    with torch.inference_mode():
        for width, after in zip(WIDTHS, (*WIDTHS[1:], WIDTHS[-1] + 1), strict=True):
            x = torch.ones(width, len(weight))
            if _seconds(onednn, x, weights) < CLEARLY * _seconds(plain, x, weights):
                kernels[width:after] = [onednn] * (after - width)
    return kernels


def _has_onednn() -> bool:
    # a private operator: where a release of torch lacks it, nothing is lost but speed
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _seconds(kernel: Linear, x: Tensor, weights: list[Tensor], repeats: int = 5) -> float:
    """The least of some repeats: others on the machine only ever add."""
    least = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for weight in weights:
            kernel(x, weight, None)
        least = min(least, time.perf_counter() - started)
    return least
