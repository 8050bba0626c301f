"""What GPUs can do, and how the processes of distill lie on nodes of them.

Takes names and the `machine` section, gives rates and the time that collectives need. The numbers are the makers', of
dense matrices; what share of them is reached is assumed elsewhere or here, in the open.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..config import Machine
from ..errors import UserError

LINK_SHARE = 0.8
"""What large collectives reach of a link's rate (nccl-tests on eight H100: all-gather at 340 to 370 of 450 GB/s)."""
BANDWIDTH_SHARE = 0.6
"""What decoding reaches of the memory's rate: transformers' layers launch many small kernels."""
MARGIN = 0.1
"""Share of a GPU's memory that is not planned with: the CUDA context, NCCL's buffers, holes between allocations."""


class Gpu(NamedTuple):
    """One GPU of its kind."""

    memory: float
    """GiB, as torch counts them."""
    bfloat16: float
    """TFLOP/s, dense, summed in float32."""
    float32: float
    """TFLOP/s without TF32, which torch does not use unless told to."""
    bandwidth: float
    """GB/s of its own memory."""
    link: float
    """GB/s one way to the other GPUs of its node, by NVLink or PCIe."""
    network: float
    """GB/s one way that usual clusters have for each GPU between nodes: InfiniBand HDR 25, NDR 50, Ethernet."""


# TFLOP/s, rates of memory and links: NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024) and L40S (2023), and
# the Ada whitepaper for the RTX 4090; where they print rates with sparsity, half of them. Memory: what torch's
# out-of-memory messages call the total capacity.
GPUS = {
    "A100-40GB": Gpu(39.4, 312, 19.5, 1555, 300, 25),
    "A100-80GB": Gpu(79.1, 312, 19.5, 2039, 300, 25),
    "H100": Gpu(79.1, 989, 67, 3350, 450, 50),
    "H200": Gpu(139.7, 989, 67, 4800, 450, 50),
    "L40S": Gpu(44.4, 362, 91.6, 864, 32, 12.5),
    "RTX-4090": Gpu(23.5, 165, 82.6, 1008, 32, 1.25),
}


def gpu_of(name: str) -> Gpu | None:
    """None for `cpu`, of which no peak is known. Raises UserError for a name that is not in the table."""
    if name == "cpu":
        return None
    if name not in GPUS:
        raise UserError(f"plan.gpu={name}: known are {', '.join(GPUS)}, and cpu, of which no peak is known")
    return GPUS[name]


@dataclass(frozen=True)
class Layout:
    """How the processes of distill, one a GPU, share copies of the backbone."""

    processes: int
    per_node: int
    degree: int
    """S: processes that share one copy."""

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
        """Until every process of a copy has all of `size` bytes; the same for a reduce-scatter of so many.

        Each process takes in (S-1)/S of it over its link. Of a copy over m nodes, (m-1)/m of it enter each node,
        through the network ports of all its GPUs together, and go on over the links inside.
        """
        inside = size * (self.degree - 1) / self.degree / gpu.link
        nodes = self.nodes_of_a_copy
        between = size * (nodes - 1) / nodes / (min(self.degree, self.per_node) * network)
        return max(inside, between) / (LINK_SHARE * 1e9)

    def sum_seconds(self, size: float, gpu: Gpu, network: float) -> float:
        """Until the copies have summed the `size` bytes that each process holds (a ring all-reduce)."""
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
