"""Where the weights lie: the device mesh, the units of backbone and heads, and the one FSDP2 root.

Takes modules, on the meta device or filled, and cuts them over the processes of a mesh. Knows nothing of checkpoints,
data, losses or the Trainer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def make_mesh(device_type: str, world_size: int, shard_degree: int) -> DeviceMesh:
    """1-D over all processes if shard_degree is 0 or all of them; else copies of the model, each over shard_degree
    neighbours (HSDP). As no backbone weight has a gradient, only the heads' are summed over the copies."""
    if shard_degree in (0, world_size):
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (world_size // shard_degree, shard_degree)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_backbone(model: Any, mesh: DeviceMesh) -> None:
    """One unit for the embedding, each decoder layer and the LM head; the final norm is left to the root."""
    for unit in (model.model.embed_tokens, *model.model.layers, model.lm_head):
        if unit is not None:
            # Without reshard_after_forward a forward pass under no_grad would leave every layer whole everywhere.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def shard_head(head: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """One unit that computes in `dtype`; weights, gradients and their sums over processes stay float32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(head, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def shard_step_model(step_model: nn.Module, heads: list[nn.Module], mesh: DeviceMesh) -> None:
    """Make `step_model`, which holds all units, the root: its forward must be the whole step."""
    fully_shard(step_model, mesh=mesh)
    for head in heads:
        # Else its backward would gather the last backbone layer, which ran before it, for nothing.
        head.set_modules_to_backward_prefetch([head])  # type: ignore[operator]


def own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor that may be sharded, in place, and where in the whole tensor they begin."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    (chunk,) = parameter.__create_chunk_list__()
    return parameter.detach().to_local(), chunk.offsets[0]
