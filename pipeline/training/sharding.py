"""Shards the backbone and the exit heads with FSDP2: the device mesh, the units, and the root.

Takes modules, on the meta device or with weights, and shards them in place over the processes of a mesh.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def make_mesh(device_type: str, world_size: int, shard_degree: int) -> DeviceMesh:
    """A 1-D mesh over all processes if `shard_degree` is 0 or `world_size`, else a 2-D mesh (HSDP).

    With HSDP every `shard_degree` neighbouring processes share one copy of the model. The backbone has no gradients, so
    only those of the heads are summed over the copies.
    """
    if shard_degree in (0, world_size):
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_degree, shard_degree)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_backbone(model: Any, mesh: DeviceMesh) -> None:
    """Make the embedding, each decoder layer and the LM head a unit each; the final norm belongs to the root."""
    for unit in (model.model.embed_tokens, *model.model.layers, model.lm_head):
        if unit is not None:
            # Without reshard_after_forward, a forward pass under no_grad would leave every layer unsharded.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def shard_head(head: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Make a head one unit that computes in `dtype`; weights, gradients and their reduction stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(head, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def shard_step_model(step_model: nn.Module, heads: list[nn.Module], mesh: DeviceMesh) -> None:
    """Make `step_model`, which contains all units, the FSDP root: its forward must be the whole step."""
    fully_shard(step_model, mesh=mesh)
    for head in heads:
        # By default its backward would prefetch the last backbone layer, which has no backward pass.
        head.set_modules_to_backward_prefetch([head])  # type: ignore[operator]


def own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """(this process's rows of a parameter, sharded or not, as a view; index of the first in the whole parameter)."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    (chunk,) = parameter.__create_chunk_list__()
    return parameter.detach().to_local(), chunk.offsets[0]
