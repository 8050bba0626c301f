"""The rates of GPUs, and how the processes of distill are laid out over nodes.

It takes the name of a GPU and the `machine` section of the config; it gives rates and the time of collectives. The
rates are the manufacturers' peaks for dense matrices. The share of a peak that is reached in practice is an assumption,
written down as a constant here and in work.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..config import Machine
from ..errors import UserError

LINK_SHARE = 0.8
"""Share of a link's rate that large collectives reach (nccl-tests, eight H100: all-gather at 340-370 of 450 GB/s)."""
BANDWIDTH_SHARE = 0.6
"""Share of the memory bandwidth that decoding reaches: transformers' layers launch many small kernels."""
MARGIN = 0.1
"""Share of a GPU's memory that is left free: for the CUDA context, NCCL's buffers and fragmentation."""


class Gpu(NamedTuple):
    """Memory and peak rates of one GPU."""

    memory: float
    """GiB, as torch reports it."""
    bfloat16: float
    """TFLOP/s, dense, accumulated in float32."""
    float32: float
    """TFLOP/s without TF32, which torch does not use by default."""
    bandwidth: float
    """GB/s of its own memory."""
    link: float
    """GB/s one way to the other GPUs of its node, by NVLink or PCIe."""
    network: float
    """GB/s one way between nodes, for each GPU, in a typical cluster: InfiniBand HDR 25, NDR 50, or Ethernet."""


# TFLOP/s and the rates of memory and links are from NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024) and
# L40S (2023), and the Ada whitepaper for the RTX 4090; rates printed with sparsity are halved. Memory is the total
# capacity in torch's out-of-memory messages.
GPUS = {
    "A100-40GB": Gpu(39.4, 312, 19.5, 1555, 300, 25),
    "A100-80GB": Gpu(79.1, 312, 19.5, 2039, 300, 25),
    "H100": Gpu(79.1, 989, 67, 3350, 450, 50),
    "H200": Gpu(139.7, 989, 67, 4800, 450, 50),
    "L40S": Gpu(44.4, 362, 91.6, 864, 32, 12.5),
    "RTX-4090": Gpu(23.5, 165, 82.6, 1008, 32, 1.25),
}


def gpu_of(name: str) -> Gpu | None:
    """The GPU of that name; None for `cpu`, whose peak is not known. Raises UserError for an unknown name."""
    if name == "cpu":
        return None
    if name not in GPUS:
        raise UserError(f"plan.gpu={name}: give one of {', '.join(GPUS)}, or cpu, whose peak is not known")
    return GPUS[name]


@dataclass(frozen=True)
class Layout:
    """How the processes of distill, one for each GPU, share copies of the backbone."""

    processes: int
    per_node: int
    degree: int
    """S: the number of processes that share one copy."""

    @classmethod
    def of(cls, machine: Machine) -> "Layout":
        """Raises UserError if the processes cannot be divided into groups of machine.shard_degree."""
        return cls(machine.processes, machine.processes_per_node, machine.processes_of_a_copy())

    @property
    def copies(self) -> int:
        return self.processes // self.degree

    @property
    def nodes_of_a_copy(self) -> int:
        return -(-self.degree // self.per_node)

    def gather_seconds(self, size: float, gpu: Gpu, network: float) -> float:
        """Seconds of an all-gather of `size` bytes within a copy; a reduce-scatter takes as long.

        Each process receives (S-1)/S of the bytes over its link. If the copy spans m nodes, (m-1)/m of the bytes enter
        each node through the network ports of all its GPUs, and travel on over the links inside it. `network`: GB/s.
        """
        inside = size * (self.degree - 1) / self.degree / gpu.link
        nodes = self.nodes_of_a_copy
        between = size * (nodes - 1) / nodes / (min(self.degree, self.per_node) * network)
        return max(inside, between) / (LINK_SHARE * 1e9)

    def sum_seconds(self, size: float, gpu: Gpu, network: float) -> float:
        """Seconds of a ring all-reduce between the copies, of the `size` bytes that each process holds."""
        rate = network if self.processes > self.per_node else gpu.link
        return 2 * size * (self.copies - 1) / self.copies / (LINK_SHARE * rate * 1e9)

    def __str__(self) -> str:
        if self.processes == 1:
            return "1 process"
        over = f"{self.degree} processes" if self.nodes_of_a_copy == 1 else f"{self.nodes_of_a_copy} nodes"
        return (
            f"{self.processes} processes, {self.per_node} a node; {self.copies} "
            f"{'copy' if self.copies == 1 else 'copies'} of the backbone, over {over} each"
        )
