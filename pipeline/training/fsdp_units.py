"""What a training step asks of FSDP2 units: gradient norms and whole weights of a head, and that nothing stays whole.

Takes modules that `fully_shard` has cut, gives tensors. Knows nothing of losses, data or the Trainer.
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
    """Whatever happens in the block, after it every unit under `root` is in shards again.

    A forward pass without gradients leaves the root and the heads whole, as if a backward pass were to follow. A pass
    that raises leaves whole what it was at, gradients that the next pass would add to, and counters from which none
    could start: all that goes, too.
    """
    try:
        yield
    except BaseException:
        root.zero_grad()
        if hasattr(root, "reset_iter_state"):  # torch 2.13; before, FSDP2 cannot go on after an exception
            root.reset_iter_state()  # type: ignore[operator]
        raise
    for unit in root.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def gradient_square(module: nn.Module) -> Tensor:
    """This process's part of the squared gradient norm: a float64 scalar; the sum over all processes is the square."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([_local(grad) for grad in grads])
    return norm.double().square() / _copies(grads[0])


def scale_gradient(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            _local(parameter.grad).mul_(factor)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Name -> whole tensor on the CPU, a copy, on process 0; {} on the others. All processes must call it.

    One tensor is whole at a time: no other process ever holds the module.
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
    """This process's shard; in-place changes reach it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copies(tensor: Tensor) -> int:
    """How many processes hold the same shard: more than one where shards are replicated over nodes."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return prod(size for size, placement in sizes if placement.is_replicate())
