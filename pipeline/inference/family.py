"""What the engine has to know of a model family; family_llama.py and family_generic.py say it of theirs.

M rows of a pass, D hidden
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .layers import Layer, LayerKind


class Family(NamedTuple):
    """How the models of a family are computed from their weights."""

    gather: Callable[[nn.Module], Any]
    """A decoder layer of the model -> its weights, a NamedTuple of tensors and `Product`s."""
    passes: Callable[..., Any]
    """Model, kinds of its layers and their shape -> `Passes`, which embeds tokens and prepares the layers' rows."""
    layer: Layer
    """One decoder layer on rows, with these weights."""
    final_norm: Callable[..., Callable[[Tensor], Tensor]]
    """Model, shape and device -> the norm before the LM head, on hidden states [M, D]."""
    kinds: Callable[[Any], list[LayerKind]]
    """Config -> the kind of every decoder layer."""
    samples: Callable[[Any], list[str]]
    """Config -> names of the weights in the fingerprint."""
    is_fast: bool = True
    """Whether its layers are computed here, from weights, and not by transformers' modules."""
