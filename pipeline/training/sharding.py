"""Where the weights lie: the mesh, the sharded frozen backbone, the exit heads, and the one FSDP2 root.

Takes a config and a device mesh, gives modules ready to train on one process or many. Knows nothing of data,
losses or the Trainer.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from .. import backbones
from ..config import Backbone
from ..errors import UserError
from ..inference.exit_head import fingerprint, new_exit_layer


def load_sharded_backbone(
    backbone: Backbone, device: torch.device, mesh: DeviceMesh, expected_fingerprint: str, num_heads: int
) -> tuple[nn.Module, list[nn.Module]]:
    """The frozen backbone, one FSDP2 unit a layer, and `num_heads` copies of its last layer in float32, not sharded.

    Every process loads the whole model on its device before it is cut: right for backbones that fit one device.
    Raises UserError if the backbone is not the one that `expected_fingerprint` was taken of.
    """
    model = backbones.load_model(backbone, device)
    found = fingerprint(model)
    if found != expected_fingerprint:
        raise UserError(
            f"backbone.name_or_path={backbone.name_or_path}: its fingerprint is {found[:12]}, the responses come from "
            f"{expected_fingerprint[:12]}: give the backbone that made them, or make them anew (--redo generate)"
        )
    heads = [new_exit_layer(model).to(device) for _ in range(num_heads)]
    _untie(model)
    # Without reshard_after_forward a forward pass under no_grad would leave every layer whole on every process.
    for unit in (model.model.embed_tokens, *model.model.layers, model.lm_head):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return model, heads


def shard_engine(engine: nn.Module, heads: list[nn.Module], mesh: DeviceMesh) -> None:
    """Make each head a unit and `engine` the root: its forward must be the whole step."""
    for head in heads:
        fully_shard(head, mesh=mesh, reshard_after_forward=False)
    fully_shard(engine, mesh=mesh)
    for head in heads:
        # Else its backward would gather the last backbone layer, which ran before it, for nothing.
        head.set_modules_to_backward_prefetch([head])  # type: ignore[operator]


def _untie(model: nn.Module) -> None:
    """Give the LM head its own copy of tied embeddings: two FSDP2 units cannot share a parameter."""
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
