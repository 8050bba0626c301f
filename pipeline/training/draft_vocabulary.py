"""Which tokens a head shall be able to draft: those that the backbone's own answers use most.

`ranked` takes the packed training set and gives all tokens, the most useful first; a draft vocabulary is the first W of
them (FR-Spec, Zhao et al. 2025, arXiv 2502.14856, which ranks the tokens of a general corpus instead). `coverage` says
what share of held-out answers such a vocabulary can draft at all.

S packed sequences, T tokens of a sequence, V vocabulary, W tokens of the draft vocabulary, R rows
"""

import torch
from torch import Tensor

from .packing import Packed


def ranked(train: Packed, size: int) -> Tensor:
    """The ids of all `size` tokens, [V]: by how often the answers have them, then the prompts, then by id.

    Ids of byte-pair encodings count merges in the order in which they were learned, so of tokens that were never seen
    the lower ids are those of the more frequent strings.
    """
    answers_V = torch.bincount(targets(train), minlength=size)
    real_ST = torch.arange(train.ids_ST.shape[1]) < train.lengths_S[:, None]
    everything_V = torch.bincount(train.ids_ST[real_ST].long(), minlength=size)
    by_id_V = torch.argsort(everything_V, descending=True, stable=True)
    return by_id_V[torch.argsort(answers_V[by_id_V], descending=True, stable=True)]


def targets(packed: Packed) -> Tensor:
    """The tokens [R] that the rows predict."""
    return packed.ids_ST[:, 1:][packed.mask_ST[:, :-1]].long()


def coverage(ranked_V: Tensor, validation: Packed, size: int) -> float:
    """The share of the tokens of the validation answers that are among the first `size`."""
    return torch.isin(targets(validation), ranked_V[:size]).double().mean().item()
