"""How the next draft is distributed: over all tokens of the backbone, or over the tokens of a draft vocabulary only.

A head with a draft vocabulary computes logits of W tokens instead of V, which takes W/V of the time of the LM head
(FR-Spec, Zhao et al. 2025, arXiv 2502.14856). Its q is 0 for every other token. The accept rule is exact for any q, so
such a token is never drafted, and reaches the text as a bonus token.

Takes logits of a head; gives probabilities and the tokens that indices stand for.

V vocabulary of the backbone, W tokens of the draft vocabulary; W = V and index = token for a head without one
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class DraftVocabulary(NamedTuple):
    """The tokens that a head can draft."""

    ids_W: Tensor
    """Their ids, in ascending order."""
    size: int
    """V."""

    def spread(self, x: Tensor, fill: float) -> Tensor:
        """[..., V]: the values x [..., W] at the tokens of the draft vocabulary, `fill` at all others."""
        return x.new_full((*x.shape[:-1], self.size), fill).index_copy_(-1, self.ids_W, x)


class Law:
    """The distribution q of the next draft, from processed logits [W]; or those of several positions, from [M, W]."""

    def __init__(self, logits_W: Tensor, vocabulary: DraftVocabulary | None = None):
        self.logits_W, self.vocabulary = logits_W, vocabulary

    def row(self, i: int) -> "Law":
        """The law of position i of several, with its q if that was computed for all of them."""
        one = Law(self.logits_W[i], self.vocabulary)
        if "q_W" in vars(self):
            one.q_W = self.q_W[i]
        return one

    @cached_property
    def q_W(self) -> Tensor:
        return self.logits_W.softmax(-1)

    def token(self, index_1: Tensor) -> Tensor:
        """The token [1] that an index into q stands for."""
        return index_1 if self.vocabulary is None else self.vocabulary.ids_W.index_select(0, index_1)

    @property
    def q_V(self) -> Tensor:
        """q of every token of the backbone."""
        return self.q_W if self.vocabulary is None else self.vocabulary.spread(self.q_W, 0.0)


def check_draft_ids(ids_W: Tensor, size: int) -> None:
    """Raises ValueError unless `ids_W` are ascending tokens of a vocabulary of `size`, two or more."""
    whole = not (ids_W.is_floating_point() or ids_W.is_complex() or ids_W.dtype == torch.bool)
    if ids_W.ndim != 1 or not whole or len(ids_W) < 2 or int(ids_W[0]) < 0 or not bool((ids_W.diff() > 0).all()):
        raise ValueError("the draft vocabulary is no ascending list of two or more token ids: get the head anew")
    if int(ids_W[-1]) >= size:
        raise ValueError(
            f"the draft vocabulary has the token {int(ids_W[-1])}, the backbone's vocabulary ends at {size - 1}: "
            "the head belongs to another tokenizer; load the backbone it was trained for"
        )
