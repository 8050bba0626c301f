"""Where a checkpoint keeps the experts of a layer, which transformers' modules hold as one tensor.

Takes the name of a parameter and those of the stored tensors; gives the tensors that make the parameter. A parameter
`...experts.gate_up_proj` is [E, 2 F, D], `...experts.down_proj` is [E, D, F]; checkpoints have two or one matrices for
each of the E experts. transformers converts them as it loads a whole model; here single rows must be found.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """How the checkpoints of some families name a layer's experts."""

    block: str
    """In place of `mlp`."""
    matrices: dict[str, tuple[str, ...]]
    """Name of the joined parameter -> names of an expert's matrices, which lie below one another in it."""


FORMS = (
    Form("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    Form("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
)
RENAMED = {
    ".mlp.gate.weight": ".block_sparse_moe.gate.weight",
    ".mlp.router.weight": ".block_sparse_moe.gate.weight",
    ".block_sparse_moe.router.weight": ".block_sparse_moe.router.layer.weight",
    ".block_sparse_moe.experts.gate_up_proj": ".block_sparse_moe.input_linear.weight",
    ".block_sparse_moe.experts.down_proj": ".block_sparse_moe.output_linear.weight",
}
"""How the name of a parameter ends -> how that of its tensor does, in files of Mixtral, Phi-3.5-MoE and Granite."""


def stored_name(parameter: str, names: Container[str]) -> str:
    """The stored tensor of a parameter that has another name in the checkpoint; of any other its own name."""
    if parameter in names:
        return parameter
    others = [parameter.removesuffix(end) + other for end, other in RENAMED.items() if parameter.endswith(end)]
    return next((other for other in others if other in names), parameter)


def stored_experts(parameter: str, names: Container[str]) -> list[list[str]]:
    """The tensors of each expert that make this parameter; [] unless it is of experts that are stored one by one."""
    block, _, matrix = parameter.rpartition(".")
    layer, _, rest = block.rpartition(".mlp.")
    if rest != "experts" or parameter in names:
        return []
    for form in FORMS:
        experts: list[list[str]] = []
        while True:
            where = f"{layer}.{form.block}.experts.{len(experts)}"
            tensors = [f"{where}.{name}.weight" for name in form.matrices.get(matrix, ())]
            if not tensors or tensors[0] not in names:
                break
            experts.append(tensors)
        if experts:
            return experts
    return []


class JoinedExperts:
    """The parameter [E, O, I] that stored experts make; an expert is opened and read when it is asked for.

    experts: the tensors of each. rows: gives a tensor with shape and dtype, sliced by rows, by its name.
    """

    def __init__(self, experts: Sequence[Sequence[str]], rows: Callable[[str], Any]):
        self.experts, self.rows = experts, rows
        first = [rows(name) for name in experts[0]]
        self.shape = (len(experts), sum(part.shape[0] for part in first), first[0].shape[1])
        self.dtype = first[0].dtype

    def __getitem__(self, rows: slice) -> Tensor:
        chosen = self.experts[rows]
        if not chosen:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        parts = [[self.rows(name) for name in names] for names in chosen]
        return torch.stack([torch.cat([part[0 : part.shape[0]] for part in expert]) for expert in parts])
