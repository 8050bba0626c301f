"""Matrix products with a model's weights, each by the kernel that is fastest on this machine for its number of rows.

Takes the weights of linear layers, gives `Product`s that the layers call. Kernels are chosen for every shape of weights
and number of rows, as a rule by timing them on the weights themselves when a model is first used. Three of them are
known, and they differ in float32 on a CPU only; everywhere else all products are torch's own.

plain    torch's own product: a matrix-vector routine for one row, and one made for large matrices from two rows on, so
         that a pass of 3 tokens takes longer than two passes of one token
onednn   oneDNN's product on the same weights, which does not have that step
packed   oneDNN's product on a copy of the weights in its own blocked order: verifying 4 tokens then takes little longer
         than one token, as both mainly read the weights. The copies take as much memory as the weights

M rows of a pass, I inputs and O outputs of a linear layer
"""

import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from .rounds import WIDTHS

CHOICES = {
    "timed": "by timing, the fastest on this machine",
    "repeatable": "torch's own for one row, and oneDNN's from two rows on, packed where there is memory for it, which "
    "gives the same numbers; so equal passes give equal results in every process and whatever memory is free",
    "plain": "torch's own for all",
}
FEWEST_WEIGHTS = 1 << 17
"""Smaller products stay torch's own where nothing is timed: a call of oneDNN costs 30 us more than one of torch, and
the first call with another number of rows a millisecond, which is more than they save."""
MANY = 64
"""Rows for which the kernel of a prefill is chosen."""
TIMED = (*WIDTHS, MANY)
CLEARLY = 0.95
"""A kernel is chosen only if it needs less than this share of the time of a simpler one."""
SAMPLE = 64 << 20
"""Bytes of weights of a shape that are timed together, so that they do not stay in the CPU's cache."""
REPEATS = (3, 9)
"""Fewest and most repeats of a timing; the most only while all of them take less than `SECONDS`."""
SECONDS = 0.3


class Product:
    """x @ weight + bias, or x @ weight + bias + residual: [M, I] -> [M, O]."""

    __slots__ = ("bias_O", "kernels", "packed", "seen", "weight_IO")

    def __init__(self, weight_IO: Tensor, bias_O: Tensor | None = None):
        self.weight_IO, self.bias_O = weight_IO, bias_O
        """The weight is a transposed view of the [O, I] tensor of the model's linear layer."""
        self.packed: Tensor | None = None
        self.seen: Tensor | None = None
        """Some numbers of the weight when it was packed."""
        self.kernels: list[Kernel] = [plain] * (WIDTHS[-1] + 2)
        """The kernel for m rows is at index min(m, 10); index 0 is unused."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and the bias, as of a tensor; without the packed copy."""
        return self.weight_IO.nbytes + (0 if self.bias_O is None else self.bias_O.nbytes)

    def pack(self) -> None:
        """Copy the weight into oneDNN's blocked order, which `packed` reads. The number of rows is a hint only."""
        with torch.inference_mode():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_IO.t().contiguous(), 4)
            self.seen = self._some().clone()

    def is_current(self) -> bool:
        """Whether the packed copy still holds the weight, as far as some of its numbers tell: merging an adapter
        changes all of them, in place and unnoticed by torch."""
        return self.seen is None or torch.equal(self.seen, self._some())

    def _some(self) -> Tensor:
        flat = self.weight_IO.t().reshape(-1)
        return flat[:: max(1, len(flat) // 256)]

    def __call__(self, x_MI: Tensor, residual_MO: Tensor | None = None) -> Tensor:
        return self.kernels[min(len(x_MI), WIDTHS[-1] + 1)](self, x_MI, residual_MO)


Kernel = Callable[[Product, Tensor, Tensor | None], Tensor]


def plain(product: Product, x_MI: Tensor, residual_MO: Tensor | None) -> Tensor:
    weight_IO, bias_O = product.weight_IO, product.bias_O
    if bias_O is not None:
        out = torch.addmm(bias_O, x_MI, weight_IO)
        return out if residual_MO is None else out.add_(residual_MO)
    return torch.mm(x_MI, weight_IO) if residual_MO is None else torch.addmm(residual_MO, x_MI, weight_IO)


def onednn(product: Product, x_MI: Tensor, residual_MO: Tensor | None) -> Tensor:
    return _onednn(x_MI, product.weight_IO.t(), product.bias_O, residual_MO)


def packed(product: Product, x_MI: Tensor, residual_MO: Tensor | None) -> Tensor:
    return _onednn(x_MI, product.packed, product.bias_O, residual_MO)


def _onednn(x_MI: Tensor, weight: Tensor | None, bias_O: Tensor | None, residual_MO: Tensor | None) -> Tensor:
    operator = torch.ops.mkldnn._linear_pointwise
    if residual_MO is None:
        return operator(x_MI, weight, bias_O, "none", [], "")
    return operator.binary(x_MI, residual_MO, weight, bias_O, "add")


class Kernels:
    """The kernels chosen for one model, and the packed copies of its weights.

    products: all products of the model. choice: see `CHOICES`. pack: allow packed copies, where the memory that is
    available is at least twice their size.
    """

    def __init__(self, products: Iterable[Product], choice: str, *, pack: bool):
        self.chosen: dict[tuple[int, int], list[Kernel]] = {}
        """Shape (I, O) -> kernel of every number of rows."""
        shapes: dict[tuple[int, int], list[Product]] = {}
        for product in products:
            shapes.setdefault(_shape(product), []).append(product)
        if choice not in CHOICES:
            raise ValueError(f"products={choice}: must be one of {', '.join(CHOICES)}")
        if choice == "plain" or not all(differs(some[0].weight_IO) for some in shapes.values()):
            return
        every = sum(p.weight_IO.nbytes for some in shapes.values() for p in some)
        pack = pack and _can_pack() and available_bytes() >= 2 * every
        if choice == "repeatable":
            many = packed if pack else onednn
            large = [shape for shape in shapes if shape[0] * shape[1] >= FEWEST_WEIGHTS]
            self.chosen = {shape: [plain, plain, *[many] * WIDTHS[-1]] for shape in large}
            return
        with torch.inference_mode():
            for shape, some in shapes.items():
                self.chosen[shape] = _choose(some[: -(-SAMPLE // some[0].nbytes)], pack)

    def fit(self, product: Product) -> Product:
        """The same product with the kernels chosen for its shape, and packed if one of them needs it."""
        kernels = self.chosen.get(_shape(product))
        fitted = Product(product.weight_IO, product.bias_O)
        if kernels is not None and differs(product.weight_IO):
            fitted.kernels = kernels
            if packed in kernels:
                fitted.pack()
        return fitted

    def table(self) -> dict[str, list[str]]:
        """Shape "I x O" -> name of the kernel for each number of rows in `TIMED`, for records of what was measured."""
        return {
            f"{i} x {o}": [kernels[min(m, WIDTHS[-1] + 1)].__name__ for m in TIMED]
            for (i, o), kernels in self.chosen.items()
        }


def _choose(products: list[Product], pack_them: bool) -> list[Kernel]:
    candidates: list[Kernel] = [plain, onednn]
    if pack_them:
        candidates.append(packed)
        for product in products:
            product.pack()
    fastest = {m: _fastest(products, candidates, m) for m in TIMED}
    for product in products:
        product.packed = product.seen = None
    kernels: list[Kernel] = [plain]
    for m in range(1, WIDTHS[-1] + 1):
        kernels.append(fastest[next(width for width in WIDTHS if width >= m)])
    return [*kernels, fastest[MANY]]


def _fastest(products: list[Product], candidates: list[Kernel], m: int) -> Kernel:
    """The kernel that is clearly the fastest for m rows; of those that are about equal, the first."""
    x_MI = torch.ones(m, len(products[0].weight_IO))
    seconds = _seconds(products, candidates, x_MI)
    best = candidates[0]
    for kernel in candidates[1:]:
        if seconds[kernel] < CLEARLY * seconds[best]:
            best = kernel
    return best


def _seconds(products: list[Product], candidates: list[Kernel], x_MI: Tensor) -> dict[Kernel, float]:
    """The shortest of several repeats in turns, because other processes can only make a repeat longer."""
    least = dict.fromkeys(candidates, float("inf"))
    begun = time.perf_counter()
    for i in range(REPEATS[1]):
        if i >= REPEATS[0] and time.perf_counter() - begun > SECONDS:
            break
        for kernel in candidates:
            started = time.perf_counter()
            for product in products:
                kernel(product, x_MI, None)
            least[kernel] = min(least[kernel], time.perf_counter() - started)
    return least


def _shape(product: Product) -> tuple[int, int]:
    return product.weight_IO.shape[0], product.weight_IO.shape[1]


def differs(weight: Tensor) -> bool:
    """Whether the kernels compute differently on this weight. The operators are private: a release of torch without
    them only loses speed."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _can_pack() -> bool:
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return True
    warnings.warn(
        f"torch {torch.__version__} cannot reorder weights for oneDNN: verifying several tokens takes longer than it "
        "could; torch 2.13 can",
        stacklevel=2,
    )
    return False


def available_bytes() -> int:
    """Memory that new tensors may take: what Linux calls available, or what the container's limit leaves if less.
    Elsewhere a number that no model reaches."""
    found = [1 << 62]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" is no limit, and no number
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(counts["inactive_file"]))  # files that were read are dropped when needed
    except (OSError, KeyError, ValueError):
        pass
    return min(found)
