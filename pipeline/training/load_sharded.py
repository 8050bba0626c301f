"""The frozen backbone and its exit heads, filled from the safetensors files of a checkpoint, each process its own rows.

Takes a backbone's name and a device mesh, gives sharded modules. Modules are built on the meta device and cut before
they have any memory, then every tensor's rows are copied from where its file is mapped: no process holds a model, a
layer or a whole tensor at any time, on the host or on a GPU. Which tensor fills which parameter, the files decide
(backbones/weight_files.py).

torch.distributed.checkpoint's HuggingFaceStorageReader needs the same memory, but opens every safetensors file that
lies in the folder and reads each tensor into one parameter only.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from ..backbones.source import load_config
from ..backbones.weight_files import WeightFiles, fingerprint_of_files
from ..config import Backbone
from ..errors import UserError
from .sharding import own_rows, shard_backbone, shard_head

PIECE = 2**22
"""Elements copied at once: a change of dtype on the way to a GPU, or a random draw, holds as many for a moment."""

Wanted = dict[str, list[Tensor]]
"""Tensor in the checkpoint -> the parameters that it fills."""


def load_sharded_backbone(
    backbone: Backbone,
    device: torch.device,
    mesh: DeviceMesh,
    expected_fingerprint: str,
    exit_layers: list[int],
    init: str = "last",
    seed: int = 0,
    layers: bool = True,
) -> tuple[Any, list[nn.Module]]:
    """The frozen backbone in backbone.dtype, and for each exit layer N a head that has float32 weights and computes in
    that dtype; sharded but for the root (`sharding.shard_step_model`). All processes must call it.

    A head starts as layer L (`init` = last), as layer N (layer), or as the family initialises a layer (random: of
    `seed`, and the same for every number of processes). Without `layers` there are no decoder layers and no embedding:
    what is left turns hidden states into logits.
    Raises UserError as `check_checkpoint` does, in every process if in one.
    """
    with fail_on_all_ranks():
        files = check_checkpoint(backbone, expected_fingerprint, exit_layers, init)
    model, heads = _on_meta(backbone, len(exit_layers))
    if not layers:
        model.model.embed_tokens, model.model.layers = None, nn.ModuleList()
    shard_backbone(model, mesh)
    for head in heads:
        shard_head(head, mesh, getattr(torch, backbone.dtype))
    with fail_on_all_ranks():
        for module in (model, *heads):
            module.to_empty(device=device)
        _read(files, _wanted(files, model, heads, exit_layers, init))
        if init == "random":
            for n, head in zip(exit_layers, heads, strict=True):
                _draw(head, model.config.initializer_range, f"{seed} exit-{n}")
    # The only buffers, and not in the checkpoint: to_empty left nothing sensible in them.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model, heads


def check_checkpoint(backbone: Backbone, expected_fingerprint: str, exit_layers: list[int], init: str) -> WeightFiles:
    """The backbone's files, judged by their headers and a few rows: nothing is loaded, no process waits for another.

    Raises UserError for a checkpoint that is incomplete, damaged, quantised or not in safetensors, and for another
    backbone than `expected_fingerprint` was taken of. Fetches the files of a Hub id.
    """
    where = f"backbone.name_or_path={backbone.name_or_path}"
    model, heads = _on_meta(backbone, len(exit_layers))
    files = WeightFiles(backbone)
    wanted = _wanted(files, model, heads, exit_layers, init)
    files.check({name: parameters[0].shape for name, parameters in wanted.items()})
    found = fingerprint_of_files(backbone, files)
    if found != expected_fingerprint:
        raise UserError(
            f"{where}: its fingerprint is {found[:12]}, the responses come from {expected_fingerprint[:12]}: "
            "give the backbone that made them, or make them anew (--redo generate)"
        )
    return files


@contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """What goes wrong inside in one process goes wrong in all, so that none is left waiting. All must enter it."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = error
    if error is not None and not isinstance(error, UserError):  # not every exception can be sent
        told = RuntimeError(f"rank {dist.get_rank()}: {error!r}")
    everyones: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, told)
    for failure in (error, *everyones):
        if failure is not None:
            raise failure


def _on_meta(backbone: Backbone, num_heads: int) -> tuple[Any, list[nn.Module]]:
    """Backbone and heads without memory."""
    config = load_config(backbone)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, backbone.dtype), trust_remote_code=backbone.trust_remote_code
        )
        # Where embeddings are tied too: two units cannot share a parameter.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        layer = type(model.model.layers[-1])
        # The last layer's index: Qwen configs look the layer's type up by it.
        heads = [layer(model.config, layer_idx=config.num_hidden_layers - 1).float() for _ in range(num_heads)]
    return model.requires_grad_(False).eval(), heads


def _wanted(files: WeightFiles, model: Any, heads: list[nn.Module], exit_layers: list[int], init: str) -> Wanted:
    wanted: Wanted = defaultdict(list)
    for name, parameter in model.named_parameters():
        wanted[files.tensor_of(name, model.config)].append(parameter)
    if init != "random":
        for n, head in zip(exit_layers, heads, strict=True):
            layer = (n if init == "layer" else model.config.num_hidden_layers) - 1
            for name, parameter in head.named_parameters():
                wanted[f"model.layers.{layer}.{name}"].append(parameter)
    return wanted


def _by_file(files: WeightFiles, wanted: Wanted) -> dict[str, list[str]]:
    """Path -> names of the tensors in it. Raises UserError for one that the index does not know."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        names[files.path(name)].append(name)
    return names


def _read(files: WeightFiles, wanted: Wanted) -> None:
    for path, names in _by_file(files, wanted).items():
        with safe_open(path, framework="pt") as file:  # one at a time: pages of a closed file are given back
            for name in names:
                for parameter in wanted[name]:
                    _fill(parameter, file.get_slice(name))


def _draw(head: nn.Module, std: float, seed: str) -> None:
    for name, parameter in head.named_parameters():
        _fill(parameter, _Drawn(name, parameter.shape, std, seed))


def _fill(parameter: Tensor, source: Any) -> None:
    """Copy this process's rows of `source`, of which rows [first:last] can be taken, in pieces.

    Pieces begin at the same rows in every process, whichever of their rows it needs.
    """
    own, first = own_rows(parameter)
    last, step = first + len(own), max(1, PIECE // math.prod(parameter.shape[1:]))
    for start in range(first - first % step, last, step):
        stop = min(start + step, len(parameter))
        rows = slice(max(start, first), min(stop, last))
        own[rows.start - first : rows.stop - first] = source[start:stop][rows.start - start : rows.stop - start]


class _Drawn:
    """A tensor of a layer as transformers' families initialise it: normal matrices, norms of one, biases of zero.

    Rows [first:last] are drawn from a seed of their own, so that they need not follow those before them.
    """

    def __init__(self, name: str, shape: Sequence[int], std: float, seed: str):
        self.name, self.shape, self.std, self.seed = name, tuple(shape), std, seed

    def __getitem__(self, rows: slice) -> Tensor:
        shape = (rows.stop - rows.start, *self.shape[1:])
        if len(shape) == 1:
            return torch.zeros(shape) if self.name.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed} {self.name} {rows.start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return torch.empty(shape).normal_(std=self.std, generator=generator)
