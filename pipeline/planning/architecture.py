"""The numbers of a backbone's architecture, and how many parameters they make.

Takes a config of transformers, or the facts of well-known backbones in architectures.yaml beside this file; gives
counts of parameters. What machines hold and compute is in memory.py and work.py.
"""

import contextlib
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from ..inference import layers
from ..inference.dense_mlp import experts_per_token
from ..inference.exit_head import LAYER, HeadSpec, experts_of
from ..inference.families import FAMILIES

Shape = tuple[int, ...]

WORTH_CUTTING = 16_384
"""Vocabularies below this are drafted whole by default: their LM heads cost little."""
USUAL_DRAFT_VOCABULARY = 8_192


@dataclass(frozen=True)
class Architecture:
    """A causal LM of the families that inference/ knows: embedding, L equal decoder layers, norm, LM head."""

    name: str
    source: str
    """Where these numbers come from, for the reader."""
    layers: int
    hidden: int
    ffn: int
    """F: width of the MLP that computes one token."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Embedding and LM head are one tensor."""
    context: int
    biases: tuple[str, ...] = ()
    """Projections that have one: some of q, k, v, o, gate, up, down."""
    qk_norm: bool = False
    """Queries and keys have a norm each (Qwen3)."""
    own_layers: tuple[tuple[Shape, ...], ...] = ()
    """Shapes of every layer's parameters where they do not follow from the other numbers: of a family without formulas
    here, as transformers makes its layers."""
    experts: int = 0
    """E: experts of a layer, in a mixture of experts. The tensors of own_layers that hold them have E rows and three
    dimensions."""
    experts_per_token: int = 0
    dense_head: tuple[Shape, ...] = ()
    """Shapes of an exit head's parameters where it has a dense MLP in place of experts; else it is a layer."""
    dense_width: int = 0
    """Width of that MLP."""
    scores: bool = False
    """Whether attention holds its scores, as it does in families for which transformers has no fused kernel."""

    @classmethod
    def of(cls, name: str, source: str, config: Any, head: HeadSpec = LAYER) -> "Architecture":
        """The architecture of a transformers config that inference/families.py accepts, with exit heads as `head` says
        (a dense one has its width)."""
        shape = layers.Shape.of(config)
        own = cls._own(config, head) if config.model_type not in FAMILIES else cls._by_formulas(config)
        return cls(
            name=name,
            source=source,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=own.pop("ffn", config.intermediate_size),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            context=config.max_position_embeddings,
            **own,
        )

    @staticmethod
    def _by_formulas(config: Any) -> dict[str, Any]:
        """Fields of a family whose layers follow from the other numbers."""
        biases: tuple[str, ...] = ()
        if config.model_type == "qwen2":
            biases = ("q", "k", "v")
        elif config.model_type in ("llama", "qwen3") and getattr(config, "attention_bias", False):
            biases = ("q", "k", "v", "o")
        if config.model_type == "llama" and getattr(config, "mlp_bias", False):
            biases += ("gate", "up", "down")
        return {"biases": biases, "qk_norm": config.model_type == "qwen3"}

    @staticmethod
    def _own(config: Any, head: HeadSpec) -> dict[str, Any]:
        """Fields of any other family, from the model that transformers makes of the config on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            exit_head = head.build(type(model.model.layers[-1]), config)
        own = tuple(tuple(tuple(w.shape) for w in layer.parameters()) for layer in model.model.layers)
        width = {}
        with contextlib.suppress(ValueError):  # no mixture of experts, or one that is not known
            width = {"ffn": experts_of(config).width}
        return width | {
            "own_layers": own,
            "experts": next((shape[0] for shape in own[-1] if len(shape) == 3), 0),
            "experts_per_token": experts_per_token(config),
            "dense_head": tuple(tuple(w.shape) for w in exit_head.parameters()) if head.kind == "dense" else (),
            "dense_width": head.width,
            "scores": not model._supports_sdpa,
        }

    @property
    def query(self) -> int:
        """Q: width of all queries."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """G: width of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    @cached_property
    def matrices(self) -> list[Shape]:
        """Shapes of a layer's matrices. Of experts, those of one token."""
        if self.own_layers:
            return [self._of_token(shape) for shape in self.layer_shapes if len(shape) > 1]
        d, f = self.hidden, self.ffn
        return [(self.query, d), (self.key, d), (self.key, d), (d, self.query), (f, d), (f, d), (d, f)]

    @cached_property
    def layer_shapes(self) -> list[Shape]:
        """Shapes of all parameters of the last layer; with formulas all layers are alike."""
        if self.own_layers:
            return list(self.own_layers[-1])
        names = ("q", "k", "v", "o", "gate", "up", "down")
        biases = [(rows,) for name, (rows, _) in zip(names, self.matrices, strict=True) if name in self.biases]
        norms = [(self.hidden,)] * 2 + [(self.head_dim,)] * (2 * self.qk_norm)
        return [*self.matrices, *biases, *norms]

    @property
    def layer(self) -> int:
        """P: parameters of a layer."""
        return sum(map(prod, self.layer_shapes))

    @property
    def head_shapes(self) -> list[Shape]:
        """Shapes of all parameters of an exit head."""
        return list(self.dense_head) or self.layer_shapes

    @property
    def head(self) -> int:
        """P': parameters of an exit head; P where it is a layer."""
        return sum(map(prod, self.head_shapes))

    @property
    def head_matrices(self) -> int:
        """Numbers in the matrices of an exit head by which one token is multiplied."""
        return sum(map(prod, (s for s in self.dense_head if len(s) > 1) if self.dense_head else self.matrices))

    @property
    def head_read(self) -> float:
        """Parameters of an exit head that a pass of one row reads."""
        return self.head if self.dense_head else self.read()

    @property
    def head_ffn(self) -> int:
        """Width of the MLP of an exit head."""
        return self.dense_width or self.ffn

    def _of_token(self, shape: Shape) -> Shape:
        is_of_experts = len(shape) == 3 and self.experts and shape[0] == self.experts
        return (self.experts_per_token, *shape[1:]) if is_of_experts else shape

    def read(self, rows: int = 1) -> float:
        """Parameters of a layer that a pass of so many rows reads: P, or in a mixture of experts those that all rows
        share and the experts that the rows reach."""
        one = sum(prod(self._of_token(shape)) for shape in self.layer_shapes)
        if one == self.layer:
            return self.layer
        expert = (self.layer - one) / (self.experts - self.experts_per_token)
        return one + expert * (self.reached(rows) - self.experts_per_token)

    def reached(self, rows: int) -> float:
        """E (1 - (1 - k/E)^rows): how many different experts `rows` independent choices of k of E reach on average
        (MoESD, arXiv 2505.19645)."""
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** rows)

    @property
    def is_mixture(self) -> bool:
        """Whether one token is computed by some of the experts only."""
        return 0 < self.experts_per_token < self.experts

    @property
    def embedding(self) -> int:
        """V D: parameters of the embedding, and of the LM head."""
        return self.vocabulary * self.hidden

    def draft_vocabulary(self, asked: str) -> int:
        """W: the tokens that a head can draft. For distill.draft_vocabulary=auto, which depends on the responses, a
        usual number."""
        if asked == "auto":
            return USUAL_DRAFT_VOCABULARY if self.vocabulary >= WORTH_CUTTING else self.vocabulary
        return min(int(asked) or self.vocabulary, self.vocabulary)

    @property
    def parameters(self) -> int:
        """Number of parameters of the checkpoint: tied embeddings count once."""
        layers = sum(sum(map(prod, shapes)) for shapes in self.own_layers) or self.layers * self.layer
        return layers + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def units(self) -> list[list[Shape]]:
        """Shapes of distill's units of sharding: embedding, layers, LM head (untied there), final norm."""
        table: list[Shape] = [(self.vocabulary, self.hidden)]
        layers = [list(shapes) for shapes in self.own_layers] or [self.layer_shapes] * self.layers
        return [table, *layers, table, [(self.hidden,)]]


def share(shapes: list[Shape], degree: int) -> int:
    """Number of parameters of these shapes in each of `degree` processes: FSDP2 cuts along rows and pads every share to
    the largest."""
    return sum(-(-shape[0] // degree) * prod(shape[1:]) for shape in shapes)


@cache
def facts() -> dict[str, dict[str, Any]]:
    """Name on the Hub -> the fields of its config.json that make its architecture."""
    known = yaml.safe_load((Path(__file__).parent / "architectures.yaml").read_text())
    return {name: entry["fields"] for entry in known for name in entry["names"]}
