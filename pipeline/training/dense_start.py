"""What the MLP of a dense exit head starts from: experts of the layer that the head is copied from, side by side.

Takes the files of a mixture of experts; gives tensors that are read row by row, as each process holds some rows. The
MLP computes the shared experts and the mean of as many others as its width holds, the first ones of the layer; gates
of shared experts and scales of the routing are left out. Of all starts that were tried this gave the best heads that
need no pass of the backbone (docs/lab-notes.md, dense heads).

E experts, D hidden, F width of the MLP, I width of an expert
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backbones.experts import stored_experts
from ..backbones.weight_files import WeightFiles
from ..inference.dense_mlp import GPT_OSS, Block
from ..inference.exit_head import HeadSpec, experts_of

Read = Callable[[int, int], Tensor]
"""First row and one past the last -> rows of a matrix, in float32."""


class Stack:
    """A tensor made of parts that lie below one another (dim 0) or beside one another (dim 1), sliced by rows.

    lengths: rows of each part. For dim 1 all parts have the same rows.
    """

    def __init__(self, parts: list[Read], lengths: list[int], dim: int):
        self.parts, self.lengths, self.dim = parts, lengths, dim

    def __getitem__(self, rows: slice) -> Tensor:
        if self.dim == 1:
            return torch.cat([read(rows.start, rows.stop) for read in self.parts], 1)
        found, first = [], 0
        for read, length in zip(self.parts, self.lengths, strict=True):
            start, stop = max(rows.start - first, 0), min(rows.stop - first, length)
            if start < stop:
                found.append(read(start, stop))
            first += length
        return torch.cat(found)


class Sum:
    """The sum of vectors, sliced."""

    def __init__(self, parts: list[Read]):
        self.parts = parts

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.stack([read(rows.start, rows.stop) for read in self.parts]).sum(0)


def sources(files: WeightFiles, layer: int, spec: HeadSpec, config: Any) -> dict[str, Stack | Sum]:
    """Name of a parameter in the MLP -> its tensor. layer: the decoder layer, from 0, whose experts are taken. The MLP
    must not be wider than all of them together."""
    block = experts_of(config)
    parts = _gpt_oss if config.model_type in GPT_OSS else _usual
    return parts(files, f"model.layers.{layer}.{block.name}", block, spec.width, config)


def _widths(block: Block, width: int) -> tuple[int, list[int], float]:
    """Width of what is taken of the shared experts and of each other one, the last cut off; and the mean's factor."""
    shared = min(width, block.shared_width)
    count, rest = divmod(width - shared, block.expert_width)
    widths = [block.expert_width] * count + ([rest] if rest else [])
    return shared, widths, 1 / max(1.0, (width - shared) / block.expert_width)


def _usual(files: WeightFiles, where: str, block: Block, width: int, config: Any) -> dict[str, Stack | Sum]:
    """Of experts that compute down(activation(gate(x)) * up(x)): gate_up_proj [E, 2 I, D] and down_proj [E, D, I]."""
    shared, widths, factor = _widths(block, width)
    gates, ups, downs, lengths = [], [], [], []
    if shared:
        names = (f"{where}.{block.shared}.{name}_proj.weight" for name in ("gate", "up", "down"))
        gate, up, down = (_matrix(files, name) for name in names)
        gates, ups, downs, lengths = [gate], [up], [_cut(down, shared)], [shared]
    for e, taken in enumerate(widths):
        both = _expert(files, f"{where}.experts.gate_up_proj", e, config)
        down = _expert(files, f"{where}.experts.down_proj", e, config)
        gates.append(both)
        ups.append(_moved(both, block.expert_width))
        downs.append(_cut(down, taken, factor))
        lengths.append(taken)
    return {
        "gate_proj.weight": Stack(gates, lengths, 0),
        "up_proj.weight": Stack(ups, lengths, 0),
        "down_proj.weight": Stack(downs, lengths, 1),
    }


def _gpt_oss(files: WeightFiles, where: str, block: Block, width: int, config: Any) -> dict[str, Stack | Sum]:
    """Of gpt_oss, whose experts have biases, matrices the other way round, and gate and up in turns, and compute
    (up + 1) gate sigmoid(a gate) = (up + 1) silu(a gate) / a; they also clamp both, which the MLP does not."""
    _, widths, factor = _widths(block, width)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    stored: list[Any] = [files.rows(f"{where}.experts.{name}") for name in names]
    inside, bias, down, last = (rows.inside for rows in stored)
    a = config.swiglu_alpha

    def turns(e: int, odd: int) -> Read:
        return lambda start, stop: inside[e, :, 2 * start : 2 * stop].float()[:, odd::2].t()

    def biases(e: int, odd: int) -> Read:
        return lambda start, stop: bias[e, 2 * start : 2 * stop].float()[odd::2]

    def downs(e: int, taken: int) -> Read:
        return lambda start, stop: down[e, :taken, start:stop].float().t() * (factor / a)

    experts = range(len(widths))
    return {
        "gate_proj.weight": Stack([_scaled(turns(e, 0), a) for e in experts], widths, 0),
        "gate_proj.bias": Stack([_scaled(biases(e, 0), a) for e in experts], widths, 0),
        "up_proj.weight": Stack([turns(e, 1) for e in experts], widths, 0),
        "up_proj.bias": Stack([_scaled(biases(e, 1), 1, 1) for e in experts], widths, 0),
        "down_proj.weight": Stack([downs(e, taken) for e, taken in enumerate(widths)], widths, 1),
        "down_proj.bias": Sum([_last(last, e, factor) for e in experts]),
    }


def _last(bias: Any, e: int, factor: float) -> Read:
    return lambda start, stop: bias[e, start:stop].float() * factor


def _scaled(read: Read, factor: float, more: float = 0.0) -> Read:
    return lambda start, stop: read(start, stop) * factor + more


def _moved(read: Read, by: int) -> Read:
    return lambda start, stop: read(by + start, by + stop)


def _cut(read: Read, columns: int, factor: float = 1.0) -> Read:
    return lambda start, stop: read(start, stop)[:, :columns] * factor


def _matrix(files: WeightFiles, tensor: str) -> Read:
    rows: Any = files.rows(tensor)
    return lambda start, stop: rows[start:stop].float()


def _expert(files: WeightFiles, parameter: str, e: int, config: Any) -> Read:
    """One expert's matrix of a parameter [E, O, I]."""
    name = files.tensor_of(parameter, config)
    if experts := stored_experts(name, files.names):
        lengths = [files.rows(part).shape[0] for part in experts[e]]
        stack = Stack([_matrix(files, part) for part in experts[e]], lengths, 0)
        return lambda start, stop: stack[start:stop]
    rows: Any = files.rows(name)
    inside = rows.inside
    return lambda start, stop: inside[e, start:stop].float()
