"""The exit head as a model of vLLM: one decoder layer of its own; everything else is the served model's.

Takes vLLM's config and the head's safetensors file, then the served model; gives draft logits for the tokens of a pass.
Embedding, the first N layers, final norm and LM head are the served model's modules, and these layers write and read
their own KV cache, so that only the exit layer's weights and cache are new.

M rows of a pass, D hidden, V vocabulary, W draft vocabulary
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from .support import Refused

DRAFT_IDS = "draft_ids"
JOINED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
"""Matrices of a checkpoint that vLLM holds as one: name -> (its name, which part)."""


def _of_vllm_config(layer: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda vllm_config, prefix: layer(vllm_config=vllm_config, prefix=prefix)


def _of_config(layer: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda vllm_config, prefix: layer(
        config=vllm_config.model_config.hf_config, cache_config=vllm_config.cache_config, prefix=prefix
    )


LAYERS = {
    "llama": _of_vllm_config(LlamaDecoderLayer),
    "mistral": _of_vllm_config(MistralDecoderLayer),
    "qwen2": _of_config(Qwen2DecoderLayer),
    "qwen3": _of_config(Qwen3DecoderLayer),
}
"""model_type of the backbone -> what makes its decoder layer."""


class ExitHeadForCausalLM(nn.Module):
    """Shallow layers of the served model, the exit layer, and the served model's norm and LM head. `bind` comes
    first."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.layer = LAYERS[self.config.backbone["model_type"]](vllm_config, f"{prefix}.layers.0")
        ids_W = torch.zeros(self.config.draft_vocabulary, dtype=torch.long)
        self.register_buffer(DRAFT_IDS, ids_W, persistent=False)
        self.rows_WD: Tensor | None = None
        """The LM head's rows of the draft vocabulary; None if every token can be drafted."""
        self.served: list[Any] = []
        """The served model, in a list so that its modules do not count as parts of this one."""
        self.known: tuple[Tensor, Tensor] | None = None
        """For the next pass alone: hidden states behind layer N [>= M, D], and the rows [B] of pending tokens."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the exit layer from a decoder layer's tensors under its own names. Returns the names of the parameters
        that were filled."""
        parameters, filled = dict(self.layer.named_parameters()), set()
        wanted = self.config.draft_vocabulary or 0
        for name, tensor in weights:
            if name == DRAFT_IDS:
                if len(tensor) != wanted:
                    raise Refused(f"model.safetensors: {len(tensor)} draft tokens, config.json says {wanted}")
                self.get_buffer(DRAFT_IDS).copy_(tensor)
                wanted = 0
                continue
            module, _, kind = name.rpartition(".")
            above, _, last = module.rpartition(".")
            joined, part = JOINED.get(last, (last, None))
            target = f"{above}.{joined}.{kind}" if above else f"{joined}.{kind}"
            if target not in parameters:
                raise Refused(f"model.safetensors: the exit layer has no {name} in vLLM: not a head of this family")
            loader = getattr(parameters[target], "weight_loader", default_weight_loader)
            loader(parameters[target], tensor, *([] if part is None else [part]))
            filled.add(f"layer.{target}")
        if wanted:
            raise Refused(f"model.safetensors lacks the {wanted} draft tokens of config.json: get the head anew")
        return filled

    def bind(self, served: nn.Module) -> list[str]:
        """Take the served model's modules as shallow layers, norm and LM head. Returns the names of the shallow layers'
        caches. Raises Refused if it is not built as expected."""
        stack = getattr(served, "model", None)
        if not all(hasattr(stack, name) for name in ("embed_tokens", "layers", "norm")) or not hasattr(
            served, "lm_head"
        ):
            raise Refused(f"the served model is a {type(served).__name__}, whose layers are not where those of "
                          f"{', '.join(LAYERS)} are")  # fmt: skip
        shallow = list(stack.layers[: self.config.exit_layer])
        others = {type(layer).__name__ for layer in shallow} - {type(self.layer).__name__}
        if others:
            raise Refused(
                f"the served model's layers are {', '.join(others)}, the exit layer is a {type(self.layer).__name__}"
            )
        processor = served.logits_processor
        if processor.scale != 1 or processor.soft_cap is not None:
            raise Refused("the served model scales or caps its logits, which no tried family does")
        self.served = [served, shallow]
        if self.config.draft_vocabulary:
            self.rows_WD = served.lm_head.weight[self.get_buffer(DRAFT_IDS)].detach().contiguous()
        return [layer.self_attn.attn.layer_name for layer in shallow]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.served[0].model.embed_tokens(input_ids)

    def shallow(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [M, D] behind layer N, of token ids [M] at positions [M]."""
        hidden_MD, residual_MD = self.embed_input_ids(input_ids), None
        for layer in self.served[1]:
            hidden_MD, residual_MD = layer(positions, hidden_MD, residual_MD)
        return hidden_MD + residual_MD

    def attend(self, positions: Tensor, hidden_MD: Tensor) -> Tensor:
        """The exit layer's attention [M, D] to hidden states behind layer N; its cache gets these rows."""
        return self.layer.self_attn(positions=positions, hidden_states=self.layer.input_layernorm(hidden_MD))

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Hidden states [M, D] after exit layer and final norm, of token ids [M] at positions [M]. Where `known` has
        been set the tokens are not read, and only its rows are right: of others nothing but keys and values is
        needed."""
        known, self.known = self.known, None
        if known is None:
            return self._behind(self.shallow(input_ids, positions), positions, slice(None))
        hidden_MD, rows_B = known[0][: len(positions)], known[1]
        hidden_MD[rows_B] = self._behind(hidden_MD, positions, rows_B)
        return hidden_MD

    def _behind(self, hidden_MD: Tensor, positions: Tensor, rows: Tensor | slice) -> Tensor:
        """Hidden states after exit layer and final norm, of these rows alone."""
        attended, residual = self.attend(positions, hidden_MD)[rows], hidden_MD[rows]
        out, residual = self.layer.post_attention_layernorm(attended, residual)
        return self.served[0].model.norm(self.layer.mlp(out), residual)[0]

    def top_tokens(self, hidden_MD: Tensor) -> Tensor:
        """The most probable token [M] of each row."""
        if self.rows_WD is None:
            return self.served[0].compute_logits(hidden_MD).argmax(-1)
        return self.get_buffer(DRAFT_IDS)[functional.linear(hidden_MD, self.rows_WD).argmax(-1)]

    def compute_logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits [M, V]; -inf for tokens that the head cannot draft."""
        if self.rows_WD is None:
            return self.served[0].compute_logits(hidden_MD)
        logits_MW = functional.linear(hidden_MD, self.rows_WD)
        logits_MV = logits_MW.new_full((len(logits_MW), self.config.vocab_size), -torch.inf)
        logits_MV[:, self.get_buffer(DRAFT_IDS)] = logits_MW
        return logits_MV
