"""What the engine has to know of a model family; family_llama.py and family_generic.py say it of theirs.

M rows of a pass, D hidden
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from .kernels import Kernels, Product
from .layers import Layer


class Weights(Protocol):
    """The weights of one decoder layer, as its family holds them."""

    @property
    def nbytes(self) -> int: ...

    def products(self) -> list[Product]:
        """Its matrix products."""
        ...

    def fitted(self, kernels: Kernels) -> "Weights":
        """The same with the kernels chosen for its products."""
        ...


class Family(NamedTuple):
    """How the models of a family are computed from their weights."""

    gather: Callable[[nn.Module], Weights]
    """A decoder layer of the model -> its `Weights`."""
    passes: Callable[..., Any]
    """Model and the shape of its layers -> `Passes`, which embeds tokens and prepares the layers' rows."""
    layer: Layer
    """One decoder layer on rows, with these weights."""
    final_norm: Callable[..., Callable[[Tensor], Tensor]]
    """Model, shape and device -> the norm before the LM head, on hidden states [M, D]."""
    samples: Callable[[Any], list[str]]
    """Config -> names of the weights in the fingerprint."""
    check: Callable[[nn.Module], None]
    """Raises ValueError for a model whose layers do not compute what `layer` does."""
    is_fast: bool = True
    """Whether its layers are computed here, from weights, and not by transformers' modules."""
