"""Operations on sharded modules (FSDP2 units, see sharding.py) that a training step needs.

They give the gradient norm and the whole weights of a head, scale its gradient, and make sure that no unit stays
gathered after a pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def resharded(root: nn.Module) -> Iterator[None]:
    """After the block, also if it raises, every unit under `root` is sharded again.

    A forward pass without gradients leaves the root and the heads gathered, as if a backward pass were to follow. A
    pass that raises also leaves gradients, which the next pass would add to, and FSDP counters from which no pass could
    start; both are reset.
    """
    try:
        yield
    except BaseException:
        root.zero_grad()
        if hasattr(root, "reset_iter_state"):  # from torch 2.13 on; earlier, FSDP2 cannot continue after an exception
            root.reset_iter_state()  # type: ignore[operator]
        raise
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def gradient_square(module: nn.Module) -> Tensor:
    """This process's part of the squared gradient norm, a float64 scalar: the sum over all processes is the square."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([_local(grad) for grad in grads])
    return norm.double().square() / _copies(grads[0])


def scale_gradient(module: nn.Module, factor: float) -> None:
    """Multiplies the gradient by `factor`, in place."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            _local(parameter.grad).mul_(factor)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Name -> a copy of the whole tensor on the CPU, on process 0; {} on the others. Collective.

    The tensors are gathered one at a time, so no process but the first ever holds all of them.
    """
    weights = {}
    for name, parameter in module.named_parameters():
        whole: Any = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if dist.get_rank() == 0:
            weights[name] = whole.cpu().clone()
    return weights


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of the tensor; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> int:
    """The number of processes that hold the same shard: more than one where shards are replicated (HSDP)."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return prod(size for size, placement in sizes if placement.is_replicate())
