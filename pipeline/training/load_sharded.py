"""Loads the frozen backbone and the exit heads sharded, straight from a checkpoint's safetensors files.

Takes the `backbone` section and a device mesh; gives sharded modules. Modules are built on the meta device and sharded
before they have memory; then each process copies its own rows of every tensor from the mapped file. So no process ever
holds a whole model, layer or tensor, on the host or on a GPU. backbones/weight_files.py maps parameters to tensors.

torch.distributed.checkpoint's HuggingFaceStorageReader needs the same memory, but opens every safetensors file in the
folder and reads each tensor into one parameter only.
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

from ..backbones.experts import stored_experts
from ..backbones.source import load_config
from ..backbones.weight_files import WeightFiles, fingerprint_of_files
from ..config import Backbone
from ..errors import UserError
from ..inference.dense_mlp import DenseMLP
from ..inference.exit_head import LAYER, HeadSpec, persistent_buffers
from ..inference.families import FAMILIES
from ..inference.generic_configs import is_mixture
from . import dense_start
from .sharding import own_rows, shard_backbone, shard_head

PIECE = 2**22
"""Elements copied at once: it bounds the temporary memory of dtype conversion and random initialisation."""

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
    spec: HeadSpec = LAYER,
    layers: bool = True,
) -> tuple[Any, list[nn.Module]]:
    """The frozen backbone in backbone.dtype, and a head for each exit layer N. Collective: all ranks must call it.

    Heads have float32 weights and compute in backbone.dtype. All is sharded except the root, which
    `sharding.shard_step_model` makes. A head starts as a copy of layer L (`init` = last) or of layer N (layer), or with
    the family's random initialisation (random), which depends on `seed` but not on the number of processes. Without
    `layers` the backbone has no embedding and no decoder layers, only the final norm and the LM head.
    Raises UserError as `check_checkpoint` does, on all ranks if on one.
    """
    with fail_on_all_ranks():
        files = check_checkpoint(backbone, expected_fingerprint, exit_layers, init, spec)
    model, heads = _on_meta(backbone, len(exit_layers), spec)
    if not layers:
        model.model.embed_tokens, model.model.layers = None, nn.ModuleList()
    shard_backbone(model, mesh)
    for head in heads:
        shard_head(head, mesh, getattr(torch, backbone.dtype))
    with fail_on_all_ranks():
        for module in (model, *heads):
            module.to_empty(device=device)
        _compute_buffers(model, [model, *heads])
        _read(files, _wanted(files, model, heads, exit_layers, init))
        if init == "random":
            for n, head in zip(exit_layers, heads, strict=True):
                _draw(head, model.config.initializer_range, f"{seed} exit-{n}")
        elif spec.kind == "dense":
            for n, head in zip(exit_layers, heads, strict=True):
                _fill_dense(head, files, _begins_as(n, init, model), spec, model)
    return model, heads


def check_checkpoint(
    backbone: Backbone, expected_fingerprint: str, exit_layers: list[int], init: str, spec: HeadSpec = LAYER
) -> WeightFiles:
    """The backbone's files, checked by their headers and a few rows. Nothing is loaded; it is not collective.

    Raises UserError for a checkpoint that is incomplete, damaged, quantised or not in safetensors, and for another
    backbone than `expected_fingerprint` was taken of. Fetches the files of a Hub id.
    """
    where = f"backbone.name_or_path={backbone.name_or_path}"
    model, heads = _on_meta(backbone, len(exit_layers), spec)
    if init == "random" and model.config.model_type not in FAMILIES:
        raise UserError(
            f"distill.init=random: how a {model.config.model_type} is initialised is not known here; set it to last or "
            "layer"
        )
    for n in exit_layers if (init, spec.kind) == ("layer", "dense") else []:
        if not is_mixture(model.model.layers[n - 1].parameters()):
            raise UserError(f"distill.init=layer: layer {n} has no experts to start from; set it to last")
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
    """If any rank raises inside the block, every rank raises, so none waits. Collective: all ranks must enter."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = error
    if error is not None and not isinstance(error, UserError):  # not every exception can be pickled
        told = RuntimeError(f"rank {dist.get_rank()}: {error!r}")
    everyones: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, told)
    for failure in (error, *everyones):
        if failure is not None:
            raise failure


def _on_meta(backbone: Backbone, num_heads: int, spec: HeadSpec = LAYER) -> tuple[Any, list[nn.Module]]:
    """Backbone and heads on the meta device, which takes no memory."""
    config = load_config(backbone)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, backbone.dtype), trust_remote_code=backbone.trust_remote_code
        )
        # Tied embeddings are untied, since two FSDP units cannot share a parameter.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        layer = type(model.model.layers[-1])
        heads = [spec.build(layer, model.config).float() for _ in range(num_heads)]
    return model.requires_grad_(False).eval(), heads


def _wanted(files: WeightFiles, model: Any, heads: list[nn.Module], exit_layers: list[int], init: str) -> Wanted:
    wanted: Wanted = defaultdict(list)
    for name, parameter in model.state_dict(keep_vars=True).items():  # persistent buffers are stored too
        wanted[files.tensor_of(name, model.config)].append(parameter)
    if init != "random":
        for n, head in zip(exit_layers, heads, strict=True):
            layer, new = _begins_as(n, init, model), _dense_parts(head)
            for name, parameter in head.named_parameters():
                if name.startswith(new):
                    continue
                wanted[files.tensor_of(f"model.layers.{layer}.{name}", model.config)].append(parameter)
    for head in heads:  # buffers are not trained: a head has those of the last layer, whatever it starts from
        for name, buffer in persistent_buffers(head).items():
            tensor = f"model.layers.{model.config.num_hidden_layers - 1}.{name}"
            wanted[files.tensor_of(tensor, model.config)].append(buffer)
    return wanted


def _begins_as(exit_layer: int, init: str, model: Any) -> int:
    """The decoder layer, from 0, that the head of an exit layer is a copy of."""
    return (exit_layer if init == "layer" else model.config.num_hidden_layers) - 1


def _dense_parts(head: nn.Module) -> tuple[str, ...]:
    """How the names begin of the parameters that no decoder layer has."""
    return tuple(f"{name}." for name, module in head.named_modules() if isinstance(module, DenseMLP))


def _fill_dense(head: nn.Module, files: WeightFiles, layer: int, spec: HeadSpec, model: Any) -> None:
    (mlp,) = (module for module in head.modules() if isinstance(module, DenseMLP))
    for name, source in dense_start.sources(files, layer, spec, model.config).items():
        _fill(mlp.get_parameter(name), source)


def _compute_buffers(model: Any, roots: list[nn.Module]) -> None:
    """Let transformers initialise the buffers that are not in the checkpoint, such as the frequencies of the rotary
    embedding: to_empty left them undefined. Parameters stay as they are."""
    for root in roots:
        for module in root.modules():
            if not module._non_persistent_buffers_set:
                continue
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            model._init_weights(module)


def _by_file(files: WeightFiles, wanted: Wanted) -> dict[str, list[str]]:
    """Path -> names of the tensors in it. Raises UserError for a tensor that is not in the index."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        names[files.path(name)].append(name)
    return names


def _read(files: WeightFiles, wanted: Wanted) -> None:
    joined = {name for name in wanted if stored_experts(name, files.names)}
    for name in joined:
        for parameter in wanted[name]:
            _fill(parameter, files.rows(name))
    for path, names in _by_file(files, {n: p for n, p in wanted.items() if n not in joined}).items():
        with safe_open(path, framework="pt") as file:  # one at a time: closing a file frees its pages
            for name in names:
                for parameter in wanted[name]:
                    _fill(parameter, file.get_slice(name))


def _draw(head: nn.Module, std: float, seed: str) -> None:
    for name, parameter in head.named_parameters():
        _fill(parameter, _Drawn(name, parameter.shape, std, seed))


def _fill(parameter: Tensor, source: Any) -> None:
    """Copy this process's rows of `source` into `parameter`, in pieces; `source` is sliced by rows.

    Pieces begin at the same rows in every process, so that random initialisation does not depend on the sharding.
    """
    own, first = own_rows(parameter)
    last, step = first + len(own), max(1, PIECE // math.prod(parameter.shape[1:]))
    for start in range(first - first % step, last, step):
        stop = min(start + step, len(parameter))
        rows = slice(max(start, first), min(stop, last))
        own[rows.start - first : rows.stop - first] = source[start:stop][rows.start - start : rows.stop - start]


class _Drawn:
    """A randomly initialised tensor of a layer, as in transformers: normal matrices, norms of one, biases of zero.

    Each slice of rows has its own seed, so a process can draw it without the rows before.
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
