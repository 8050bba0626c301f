"""Every family that has no module of its own here: transformers' own decoder layers are called one by one.

Takes a causal LM of transformers whose decoder layers form one list; gives the functions of its `Family`. What a layer
is called with comes from the model's own forward (outline.py), so windows, rotary embeddings and layers without them
are those of transformers. As the modules themselves run, it is exact for whatever is in them, such as mixtures of
experts; it takes more time than a family of our own. Only torch's own linear layers compute in another way while a
layer runs: with the kernel that is fastest here.

M rows of a pass, D hidden, G key/value heads, T positions of the cache, C channels of a head
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .family import Family
from .generic_configs import samples
from .kernels import Kernels, Product
from .layers import Shape
from .outline import Call, Outline
from .unmodified import check_calls, check_unhooked

OUTLINES = 4
"""Passes whose arguments are kept: those of a round repeat the positions of earlier ones."""


class LayerWeights:
    """A decoder layer, and products for those of its linear layers that compute nothing else."""

    def __init__(self, layer: nn.Module):
        self.module = layer
        self.linears = [module for module in layer.modules() if _is_plain(module)]
        self._fit([Product(linear.weight.data.t(), linear.bias) for linear in self.linears])

    def _fit(self, products: list[Product]) -> None:
        self._products = products
        self._forwards = [_forward(product) for product in products]

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def products(self) -> list[Product]:
        return self._products

    def fitted(self, kernels: Kernels) -> "LayerWeights":
        self._fit([kernels.fit(product) for product in self._products])
        return self

    def __call__(self, hidden_1MD: Tensor, *positional: Any, **named: Any) -> Any:
        """Call the module, with the products in place of its linear layers."""
        changed = []
        try:
            for linear, forward in zip(self.linears, self._forwards, strict=True):
                if "forward" not in linear.__dict__:
                    linear.__dict__["forward"] = forward
                    changed.append(linear)
            return self.module(hidden_1MD, *positional, **named)
        finally:
            for linear in changed:
                del linear.__dict__["forward"]


def _is_linear(module: nn.Module) -> bool:
    """Whether this is torch's own linear layer on a plain tensor."""
    if type(module) is not nn.Linear:
        return False
    return type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor


def _is_plain(module: nn.Module) -> bool:
    """Whether this is such a layer, and computes what its class does."""
    return _is_linear(module) and "forward" not in vars(module)


def _forward(product: Product) -> Callable[[Tensor], Tensor]:
    outputs = product.weight_IO.shape[1]

    def forward(input: Tensor) -> Tensor:
        return product(input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], outputs)

    return forward


class Slot:
    """One layer's keys and values, in the form of a cache of transformers."""

    def __init__(self, keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor):
        self.keys, self.values, self.to_keys, self.to_values = keys, values, to_keys, to_values

    def update(self, keys_1GMC: Tensor, values_1GMC: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the rows' own keys and values, and give all of them, [1, G, T, C]."""
        self.to_keys.copy_(keys_1GMC[0])
        self.to_values.copy_(values_1GMC[0])
        return self.keys, self.values


class Filled:
    """A cache that holds `length` positions, as far as a model's forward asks before its layers."""

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, length: int):
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0


class Passes:
    """Makes the calls of every pass of one engine; the counterpart of passes.py."""

    def __init__(self, model: nn.Module, shape: Shape):
        body: Any = model.model
        self.outline, self.device = Outline(body, list(body.layers)), body.embed_tokens.weight.device
        self._made: dict[tuple[int, int, torch.device], list[Call]] = {}

    def allocate(self, length: int, devices: set[torch.device]) -> None:
        """Nothing is prepared for positions."""

    def embed(self, ids: list[int], base: int) -> Tensor:
        """Hidden states [M, D] of tokens at positions base.. before the first layer."""
        hidden_MD, calls = self.run(ids, base)
        self._keep((base, len(ids), self.device), calls)
        return hidden_MD

    def rows(self, base: int, m: int, device: torch.device) -> list[Call]:
        """The call of each layer 1..L, and of the exit layer, in a pass of m rows at positions base.."""
        key = base, m, device
        if key not in self._made:
            _, calls = self.run([0] * m, base)
            self._keep(key, calls if device == self.device else _moved(calls, device))
        return self._made[key]

    def run(self, ids: list[int], base: int) -> tuple[Tensor, list[Call]]:
        """Hidden states [M, D] before the first layer, and the call of each layer, for tokens at positions base.."""
        ids_1M = torch.tensor([ids], device=self.device)
        positions_1M = torch.arange(base, base + len(ids), device=self.device)[None]
        hidden_1MD, calls = self.outline(
            input_ids=ids_1M, position_ids=positions_1M, past_key_values=Filled(base), use_cache=True
        )
        return hidden_1MD[0], calls

    def _keep(self, key: tuple[int, int, torch.device], calls: list[Call]) -> None:
        self._made.pop(key, None)
        while len(self._made) >= OUTLINES:
            self._made.pop(next(iter(self._made)))
        self._made[key] = [*calls, calls[-1]]


def _moved(calls: list[Call], device: torch.device) -> list[Call]:
    """The calls with every tensor on the device; one that several layers share is moved once."""
    moved: dict[int, Tensor] = {}

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in moved:
            moved[id(x)] = x.to(device)
        return moved[id(x)]

    return tree_map(move, calls)


def gather(layer: nn.Module) -> LayerWeights:
    """The layer itself."""
    return LayerWeights(layer)


def decoder_layer(
    hidden_MD: Tensor, w: LayerWeights, shape: Shape, call: Call,
    keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor, last_row: bool = False,
) -> Tensor:  # fmt: skip
    """One layer, [M, D] -> [M, D], over keys and values [1, G, T, C], to which the rows' own are added."""
    slot = Slot(keys, values, to_keys, to_values)
    out = w(hidden_MD[None], *call.positional, **{**call.named, "past_key_values": slot})
    return (out[0] if isinstance(out, tuple) else out)[0]


def final_norm(model: nn.Module, shape: Shape, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The norm before the LM head, on hidden states [M, D] on the device."""
    body: Any = model.model
    own = body.norm.weight.device
    return body.norm if own == device else lambda hidden_MD: body.norm(hidden_MD.to(own)).to(device)


def check_around(model: Any) -> None:
    """Raises ValueError for what is not computed by the layers as they are: a changed LM head, and what changes the
    logits of `generate` besides modules. It takes little time, and is done before every text."""
    lm_head: Any = model.lm_head
    if not _is_linear(lm_head):
        kind = type(lm_head) if type(lm_head) is not nn.Linear else type(lm_head.weight.data)
        raise ValueError(f"lm_head is a {kind.__module__}.{kind.__qualname__}: a plain linear layer is needed there")
    check_unhooked(lm_head, "lm_head")
    check_calls(model)


def check(model: nn.Module) -> None:
    """Raises ValueError unless the model's layers can be called one by one: they are tried on two tokens. Offloaded
    layers are not tried; the engine refuses them."""
    config: Any = model.config
    body: Any = model.model
    check_around(model)
    if any(parameter.is_meta for parameter in body.parameters()):
        return
    where, shape = f"model_type={config.model_type}", Shape.of(config)
    try:
        passes = Passes(model, shape)
        one, other = (tree_leaves(passes.run(ids, 1)[1]) for ids in ([0, 1], [1, 0]))
        hidden_MD, calls = passes.run([0, 1], 0)
        for layer, call in zip(body.layers, calls, strict=True):
            device = next(layer.parameters()).device
            (call,) = _moved([call], device)
            keys, values = torch.zeros(2, 1, shape.kv_heads, 2, shape.head_dim, dtype=hidden_MD.dtype, device=device)
            with torch.no_grad():
                hidden_MD = decoder_layer(
                    hidden_MD.to(device), LayerWeights(layer), shape, call, keys, values, keys[0], values[0]
                )
            if not bool(keys.any()):
                raise ValueError("a layer keeps nothing in the cache that it is given")
    except (AttributeError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{where}: its layers cannot be called one by one, as decoding with drafts needs it: {error}"
        ) from error
    if any(isinstance(x, Tensor) and not torch.equal(x, y) for x, y in zip(one, other, strict=True)):
        raise ValueError(
            f"{where}: its layers are called with the tokens, which the verification of drafts does not know; not "
            "supported"
        )


GENERIC = Family(gather, Passes, decoder_layer, final_norm, samples, check, is_fast=False)
