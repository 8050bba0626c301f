"""Every family that has no module of its own here: transformers' own decoder layers are called one by one.

Takes a causal LM of transformers whose decoder layers form one list; gives the functions of its `Family`.
What a layer is called with comes from the model's own forward (outline.py), so windows, rotary embeddings and layers
without them are those of transformers. As the modules themselves run, it is exact for whatever is in them, such as
mixtures of experts; it takes more time than a family of our own. Only torch's own linear layers are replaced, in twins
of the layers, by products with a kernel of choice.

M rows of a pass, D hidden, G key/value heads, T positions of the cache, C channels of a head
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .family import Family
from .kernels import Kernels, Product
from .layers import LayerKind, Shape
from .outline import Call, Outline
from .unmodified import as_built

PARTS, WEIGHTS = ("embed_tokens", "layers", "norm", "rotary_emb"), ("embed_tokens", "norm")
"""Of `model.model`: modules, and those of them with a weight."""
ELSEWHERE = ("kv_lora_rank", "num_kv_shared_layers", "attention_chunk_size", "is_encoder_decoder",
             "use_bidirectional_attention")  # fmt: skip
"""Fields of models whose layers keep other keys and values than a head's channels, or share them, or see the future."""
UNCHANGED = (None, 0, False)
CAPS = (
    "final_logit_softcapping",
    "final_logit_softcap",
    "logits_soft_cap",
    "output_multiplier_scale",
    "mup_width_scale",
)
"""Fields by which logits differ from the product with the LM head in a way that training does not know."""
OUTLINES = 4
"""Passes whose arguments are kept: those of a round repeat the positions of earlier ones."""


class Linear(nn.Linear):
    """torch's linear layer with the kernel that is fastest here (kernels.py); only in twins of a model's layers."""

    product: Product

    def forward(self, input: Tensor) -> Tensor:
        x_MI = input.reshape(-1, input.shape[-1])
        return self.product(x_MI).view(*input.shape[:-1], -1)


class LayerWeights:
    """A twin of a decoder layer: it has the layer's own parameters, and linear layers that choose their kernel."""

    def __init__(self, layer: nn.Module):
        self.linears: list[Linear] = []
        self.module = self._twin(layer)

    def _twin(self, module: nn.Module) -> nn.Module:
        twin = copy.copy(module)
        twin.__dict__ = dict(module.__dict__)
        if _is_plain(module):
            twin.__class__ = Linear
            twin.product = Product(module.weight.data.t(), module.bias)  # type: ignore[union-attr,arg-type]
            self.linears.append(twin)  # type: ignore[arg-type]
        elif "forward" not in vars(module):  # a forward of its own runs the original, whatever is in the twin
            twin._modules = {name: child and self._twin(child) for name, child in module._modules.items()}
        return twin

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def products(self) -> list[Product]:
        return [linear.product for linear in self.linears]

    def fitted(self, kernels: Kernels) -> "LayerWeights":
        for linear in self.linears:
            linear.product = kernels.fit(linear.product)
        return self


def _is_plain(module: nn.Module) -> bool:
    """Whether this is torch's own linear layer on a plain tensor, which computes what its class does."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor


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

    def __init__(self, model: nn.Module, kinds: list[LayerKind], shape: Shape):
        body: Any = model.model
        self.outline, self.device = Outline(body, list(body.layers)), body.embed_tokens.weight.device
        self._made: dict[tuple[int, int], list[Call]] = {}
        one, other = (tree_leaves(self._run(ids, 1)[1]) for ids in ([0, 1], [1, 0]))
        if any(isinstance(x, Tensor) and not torch.equal(x, y) for x, y in zip(one, other, strict=True)):
            raise ValueError(
                f"model_type={model.config.model_type}: its layers are called with the tokens, which the exit head of "
                "a later pass does not know; not supported"
            )

    def allocate(self, length: int, devices: set[torch.device]) -> None:
        """Nothing is prepared for positions."""

    def embed(self, ids: list[int], base: int) -> Tensor:
        """Hidden states [M, D] of tokens at positions base.. before the first layer."""
        hidden_MD, calls = self._run(ids, base)
        self._keep(base, len(ids), calls)
        return hidden_MD

    def rows(self, base: int, m: int, device: torch.device) -> list[Call]:
        """The call of each layer 1..L, and of the exit layer, in a pass of m rows at positions base.."""
        if (base, m) not in self._made:
            self._keep(base, m, self._run([0] * m, base)[1])
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, self._made[base, m])

    def _run(self, ids: list[int], base: int) -> tuple[Tensor, list[Call]]:
        ids_1M = torch.tensor([ids], device=self.device)
        positions_1M = torch.arange(base, base + len(ids), device=self.device)[None]
        hidden_1MD, calls = self.outline(
            input_ids=ids_1M, position_ids=positions_1M, past_key_values=Filled(base), use_cache=True
        )
        return hidden_1MD[0], calls

    def _keep(self, base: int, m: int, calls: list[Call]) -> None:
        while len(self._made) >= OUTLINES:
            self._made.pop(next(iter(self._made)))
        self._made[base, m] = [*calls, calls[-1]]


def gather(layer: nn.Module) -> LayerWeights:
    """The layer itself, as a twin."""
    return LayerWeights(layer)


def decoder_layer(
    hidden_MD: Tensor, w: LayerWeights, shape: Shape, call: Call,
    keys: Tensor, values: Tensor, to_keys: Tensor, to_values: Tensor, last_row: bool = False,
) -> Tensor:  # fmt: skip
    """One layer, [M, D] -> [M, D], over keys and values [1, G, T, C], to which the rows' own are added."""
    slot = Slot(keys, values, to_keys, to_values)
    out = w.module(hidden_MD[None], *call.positional, **{**call.named, "past_key_values": slot})
    return (out[0] if isinstance(out, tuple) else out)[0]


def final_norm(model: nn.Module, shape: Shape, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The final norm, on hidden states [M, D]."""
    body: Any = model.model
    return body.norm


def kinds(config: Any) -> list[LayerKind]:
    """Nothing is known of the layers: their calls say it."""
    return [LayerKind()] * config.num_hidden_layers


def samples(config: Any) -> list[str]:
    """Names of the weights of which rows are in the fingerprint: embedding, final norm, LM head, and of three layers
    the first and the last matrix of their attention, which is alike in all layers."""
    layer = _skeleton(config).model.layers[0]
    matrices = [name for name, w in layer.named_parameters() if w.ndim == 2 and name.startswith("self_attn.")]
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1):
        names += [f"model.layers.{i}.{name}" for name in dict.fromkeys((matrices[0], matrices[-1]))]
    return names


def _skeleton(config: Any) -> Any:
    """transformers' model of the config on the meta device, with one layer of each type."""
    kind: Any = type(config)
    return as_built(kind, config.to_json_string(use_diff=False))


def check_fits(config: Any) -> None:
    """Raises ValueError for a config whose model is not of the form that this module runs."""
    where = f"model_type={config.model_type}"
    for field in (*ELSEWHERE, *CAPS):
        if getattr(config, field, None) not in UNCHANGED:
            raise ValueError(f"{where}: {field}={getattr(config, field)} is not supported")
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if not isinstance(getattr(config, field, None), int):
            raise ValueError(
                f"{where}: its config has no {field}, so it is no causal LM of one list of attention layers; not "
                "supported"
            )
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{where}: is_causal=False: its layers see the future; not supported")
    try:
        Shape.of(config)  # raises where layers differ in their heads
        model = _skeleton(config)
    except KeyError:
        raise ValueError(f"{where}: transformers has no causal LM of this type; not supported") from None
    except Exception as error:  # transformers validates with exceptions of many types
        raise ValueError(f"{where}: its config does not make a model: {error}") from None
    body = getattr(model, "model", None)
    missing = [f"model.{name}" for name in PARTS if not hasattr(body, name)]
    missing += [f"{name}.weight" for name in WEIGHTS if not hasattr(getattr(body, name, None), "weight")]
    missing += [] if hasattr(model, "lm_head") else ["lm_head"]
    if missing:
        raise ValueError(
            f"{where}: transformers' {type(model).__name__} has no {', '.join(missing)}; models with one list of "
            "attention layers between an embedding and an LM head are supported"
        )
    for layer in model.model.layers:
        if not hasattr(layer, "self_attn"):
            raise ValueError(
                f"{where}: a {type(layer).__name__} without attention (a state-space layer?) keeps a state from which "
                "rejected drafts cannot be dropped; not supported"
            )


GENERIC = Family(gather, Passes, decoder_layer, final_norm, kinds, samples, is_fast=False)
