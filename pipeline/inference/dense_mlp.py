"""A dense MLP in place of the experts of a decoder layer, for exit heads of mixtures of experts.

Takes a decoder layer of a mixture of experts; finds the block that holds its experts and says how wide the MLP of one
token is there. A head with experts would be as large as a layer of the backbone, of which one token uses a small part.

E experts, K of them for each token, D hidden, F width of the MLP, I width of an expert
"""

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.activations import ACT2FN

FAMILIES = ("glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
"""Model types of which a layer takes a dense MLP in place of its experts."""
GPT_OSS = ("gpt_oss",)
"""Those whose experts have biases, and whose layers expect a pair of the experts' block: hidden states, and scores of
the router."""
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Fields of configs of mixtures of experts, one of them in each."""


class DenseMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), [..., D] -> [..., D]; of gpt_oss with biases, and in a pair with None."""

    def __init__(self, hidden: int, width: int, activation: str, of_gpt_oss: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=of_gpt_oss)
        self.up_proj = nn.Linear(hidden, width, bias=of_gpt_oss)
        self.down_proj = nn.Linear(width, hidden, bias=of_gpt_oss)
        self.activation, self.of_gpt_oss = ACT2FN[activation], of_gpt_oss

    def forward(self, hidden: Tensor) -> Any:
        out = self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))
        return (out, None) if self.of_gpt_oss else out


class Block(NamedTuple):
    """Where a decoder layer of a mixture of experts has its MLP."""

    name: str
    """Of the block in the layer: its router, its experts, and what computes every token."""
    expert_width: int
    """I."""
    shared: str
    """In the block, the name of the experts that compute every token; empty if there are none."""
    shared_width: int
    """Width of all of them."""
    experts: int
    """E."""
    experts_per_token: int
    """K."""

    @property
    def width(self) -> int:
        """F = K I + the shared width: the width of the MLP that computes one token."""
        return self.experts_per_token * self.expert_width + self.shared_width

    @property
    def widest(self) -> int:
        """E I + the shared width: that of all experts together."""
        return self.experts * self.expert_width + self.shared_width


def block_of(layer: nn.Module, config: Any) -> Block:
    """The block of a layer that holds its experts. Raises ValueError for a layer without experts, and for a family of
    which it is not known that its layers take another block."""
    where = f"model_type={config.model_type}"
    found = [(name, child) for name, child in layer.named_children() if any(w.ndim == 3 for w in child.parameters())]
    if len(found) != 1:
        raise ValueError(f"{where}: it is no mixture of experts, its layers are dense themselves")
    if config.model_type not in FAMILIES:
        raise ValueError(f"{where}: dense heads are known of {', '.join(FAMILIES)}")
    ((name, block),) = found
    experts: Any = block.experts
    shared = {n: m.down_proj for n, m in block.named_modules() if isinstance(getattr(m, "down_proj", None), nn.Linear)}
    return Block(
        name=name,
        expert_width=experts.down_proj[0].numel() // config.hidden_size,
        shared=next(iter(shared), ""),
        shared_width=sum(linear.in_features for linear in shared.values()),
        experts=len(experts.down_proj),
        experts_per_token=experts_per_token(config),
    )


def experts_per_token(config: Any) -> int:
    """K by the config; 0 if it names none."""
    return next(filter(None, (getattr(config, field, None) for field in EXPERTS_PER_TOKEN)), 0)


def with_dense_mlp(layer: nn.Module, config: Any, width: int) -> nn.Module:
    """The same layer with a new MLP of this width in place of its experts, on the device of torch's context.

    Raises ValueError as `block_of` does.
    """
    mlp = DenseMLP(config.hidden_size, width, config.hidden_act, config.model_type in GPT_OSS)
    setattr(layer, block_of(layer, config).name, mlp)
    return layer
