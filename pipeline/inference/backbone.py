"""A causal LM cut after layer N: shallow (embedding, layers 1..N), exit head, deep (layers N+1..L, norm, LM head).

Takes a transformers model of a known family and an exit head, gives hidden states and logits of rows at
absolute positions, reading and writing a KVCache. Its own layer loop over the model's weights makes a third
of the kernel calls of the transformers one. Knows nothing of drafting, sampling or text.

M rows of this pass, D hidden, H query heads, G key/value heads, R = H/G, C channels of a head, V vocabulary
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exit_head import ExitHead, check_exit_layer, check_family
from .kv_cache import KVCache

# Rotary tables of these types depend on the length of the sequence; a table made once would be wrong.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer, its projections joined so that each is one matrix product."""

    attention_norm_D: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    q_norm_C: Tensor | None
    k_norm_C: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    mlp_norm_D: Tensor
    gate_up_weight: Tensor
    gate_up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


def join(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Stack the weights of linears that read the same input; they become views of the joint tensor.

    The model keeps working and no memory is used twice.
    """
    weight = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, weight.split([x.out_features for x in linears]), strict=True):
        linear.weight.data = part
    biases = [linear.bias for linear in linears]
    return weight, torch.cat([b.data for b in biases]) if biases[0] is not None else None


def gather(layer: nn.Module) -> LayerWeights:
    """The weights of a Llama, Mistral, Qwen2 or Qwen3 decoder layer; joined once, however many heads use them."""
    attention, mlp = layer.self_attn, layer.mlp
    known = layer.__dict__.get("_joined")
    if known is not None and known.qkv_weight.data_ptr() == attention.q_proj.weight.data_ptr():
        return known
    qkv_weight, qkv_bias = join([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up_weight, gate_up_bias = join([mlp.gate_proj, mlp.up_proj])
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    layer._joined = LayerWeights(
        attention_norm_D=layer.input_layernorm.weight.data,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        q_norm_C=q_norm.weight.data if q_norm is not None else None,
        k_norm_C=k_norm.weight.data if k_norm is not None else None,
        out_weight=attention.o_proj.weight.data,
        out_bias=attention.o_proj.bias,
        mlp_norm_D=layer.post_attention_layernorm.weight.data,
        gate_up_weight=gate_up_weight,
        gate_up_bias=gate_up_bias,
        down_weight=mlp.down_proj.weight.data,
        down_bias=mlp.down_proj.bias,
    )
    return layer._joined


class SplitBackbone:
    """The model and one exit head, ready to decode. Weights are shared with `model`, which stays usable.

    Raises ValueError for an unknown family, N out of range, or a head of another backbone.
    """

    def __init__(self, model: nn.Module, head: ExitHead, *, check: bool = True):
        config = model.config
        check_family(config.model_type)
        check_exit_layer(head.exit_layer, config.num_hidden_layers)
        if check:
            head.check_fits(model)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") in LENGTH_DEPENDENT_ROPE:
            raise ValueError(f"rope_type={rope['rope_type']}: its tables depend on the sequence length; not supported")
        self.exit_layer, self.num_layers = head.exit_layer, config.num_hidden_layers
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.hidden, self.eps = config.hidden_size, config.rms_norm_eps
        self.embedding_VD = model.model.embed_tokens.weight.data
        self.final_norm_D = model.model.norm.weight.data
        self.lm_head_VD = model.lm_head.weight.data
        self.dtype, self.device = self.embedding_VD.dtype, self.embedding_VD.device
        self.max_context = _longest_exact(config)
        self._rotary = model.model.rotary_emb
        self._rope: tuple[Tensor, Tensor] | None = None
        last = model.model.layers[-1]
        exit_layer = type(last)(config, layer_idx=self.num_layers - 1).to(self.device, self.dtype)
        exit_layer.load_state_dict(head.weights)
        self.layers = [gather(layer) for layer in model.model.layers]
        self.layers.append(gather(exit_layer.requires_grad_(False)))

    # ---- what the decoder calls

    def new_cache(self, max_length: int) -> KVCache:
        """Room for `max_length` positions. Raises ValueError beyond the backbone's context."""
        if max_length > self.max_context:
            raise ValueError(f"{max_length} positions are needed, the backbone's context is {self.max_context}")
        if self._rope is None or len(self._rope[0]) < max_length:
            positions = torch.arange(max_length, device=self.device)[None]
            like = torch.zeros(1, dtype=torch.float32, device=self.device)
            cos_TC, sin_TC = (table[0] for table in self._rotary(like, positions))
            # rotate_half(x) * sin == roll(x, C/2) * signed sin: one kernel less
            half = self.head_dim // 2
            signed_TC = torch.cat([-sin_TC[:, :half], sin_TC[:, half:]], -1)
            self._rope = cos_TC[:, None].to(self.dtype), signed_TC[:, None].to(self.dtype)
        return KVCache(
            self.num_layers + 1, self.kv_heads, max_length, self.head_dim, self.hidden, self.dtype, self.device
        )

    def extra_bytes(self, length: int) -> dict[str, int]:
        """Memory on top of autoregressive decoding: the head's weights; its keys, values and the stored hidden states
        of `length` positions."""
        w, size = self.layers[-1], self.embedding_VD.element_size()
        tensors = [getattr(w, name) for name in LayerWeights.__slots__]
        numbers = 2 * self.kv_heads * self.head_dim + self.hidden
        return {
            "head_bytes": sum(t.numel() * t.element_size() for t in tensors if t is not None),
            "cache_bytes": numbers * length * size,
        }

    def shallow(self, ids: list[int], base: int, cache: KVCache) -> None:
        """Run layers 1..N on tokens at positions base..; their hidden states stay in the cache."""
        ids_M = torch.tensor(ids, device=self.device)
        hidden_MD = self._run(self.embedding_VD[ids_M], 0, self.exit_layer, base, cache)
        cache.hidden_TD[base : base + len(ids)] = hidden_MD

    def deep(self, base: int, end: int, cache: KVCache) -> Tensor:
        """Hidden states [M, D] before the final norm, from the stored ones of positions base..end-1."""
        return self._run(cache.hidden_TD[base:end], self.exit_layer, self.num_layers, base, cache)

    def full(self, ids: list[int], base: int, cache: KVCache) -> Tensor:
        """All L layers on tokens at positions base..; what autoregressive decoding runs. [M, D]"""
        ids_M = torch.tensor(ids, device=self.device)
        return self._run(self.embedding_VD[ids_M], 0, self.num_layers, base, cache)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Final norm and LM head: [M, V] in float32."""
        return F.linear(self._norm(hidden_MD, self.final_norm_D), self.lm_head_VD).float()

    def draft_logits(self, end: int, cache: KVCache) -> Tensor:
        """The exit head's logits [V] for the token that follows position end-1.

        Positions the head has not seen (the prompt, bonus tokens) first get their keys and values; only the
        last one needs a query, the MLP and the LM head.
        """
        w, slot, base = self.layers[-1], self.num_layers, cache.head_length
        cos, sin = self._tables(base, end)
        hidden_MD = cache.hidden_TD[base:end]
        normed_MD = self._norm(hidden_MD, w.attention_norm_D)
        query_width = self.heads * self.head_dim
        if end - base == 1:
            qkv = F.linear(normed_MD, w.qkv_weight, w.qkv_bias).view(1, -1, self.head_dim)
            q_1HC, kv = qkv[:, : self.heads], qkv[:, self.heads :]
        else:
            bias = w.qkv_bias
            q = F.linear(normed_MD[-1:], w.qkv_weight[:query_width], None if bias is None else bias[:query_width])
            kv = F.linear(normed_MD, w.qkv_weight[query_width:], None if bias is None else bias[query_width:])
            q_1HC, kv = q.view(1, -1, self.head_dim), kv.view(end - base, -1, self.head_dim)
        k_MGC, v_MGC = kv[:, : self.kv_heads], kv[:, self.kv_heads :]
        if w.q_norm_C is not None:
            q_1HC, k_MGC = self._norm(q_1HC, w.q_norm_C), self._norm(k_MGC, w.k_norm_C)
        (to_keys,), (to_values,), (keys,), (values,) = cache.views(slot, slot + 1, base, end)
        to_keys.copy_(self._rotate(k_MGC, cos, sin).transpose(0, 1))
        to_values.copy_(v_MGC.transpose(0, 1))
        cache.head_length = end
        attended = self._attend(self._rotate(q_1HC, cos[-1:], sin[-1:]), keys, values, None)
        hidden_1D = self._mlp(w, self._out(w, attended, hidden_MD[-1:]))
        return self.logits(hidden_1D)[0]

    def draft_logits_of_all(self, end: int, cache: KVCache) -> Tensor:
        """The exit head's logits [end, V] behind each of the positions 0..end-1 at once, for analysis."""
        slot = self.num_layers
        hidden_MD = self._run(cache.hidden_TD[:end], slot, slot + 1, 0, cache)
        cache.head_length = end
        return self.logits(hidden_MD)

    # ---- the layer loop

    def _run(self, hidden_MD: Tensor, start: int, stop: int, base: int, cache: KVCache) -> Tensor:
        m, joint = hidden_MD.shape[0], self.heads + self.kv_heads
        cos, sin = self._tables(base, base + m)
        mask = self._mask(base, m) if m > 1 and base > 0 else None
        views = cache.views(start, stop, base, base + m)
        for w, to_keys, to_values, keys, values in zip(self.layers[start:stop], *views, strict=True):
            normed_MD = self._norm(hidden_MD, w.attention_norm_D)
            qkv = F.linear(normed_MD, w.qkv_weight, w.qkv_bias).view(m, -1, self.head_dim)
            qk, v_MGC = qkv.split((joint, self.kv_heads), 1)
            if w.q_norm_C is not None:
                q_MHC, k_MGC = qk.split((self.heads, self.kv_heads), 1)
                qk = torch.cat([self._norm(q_MHC, w.q_norm_C), self._norm(k_MGC, w.k_norm_C)], 1)
            q_MHC, k_MGC = self._rotate(qk, cos, sin).split((self.heads, self.kv_heads), 1)
            to_keys.copy_(k_MGC.transpose(0, 1))
            to_values.copy_(v_MGC.transpose(0, 1))
            hidden_MD = self._mlp(w, self._out(w, self._attend(q_MHC, keys, values, mask), hidden_MD))
        return hidden_MD

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _tables(self, base: int, end: int) -> tuple[Tensor, Tensor]:
        assert self._rope is not None, "new_cache makes the tables"
        return self._rope[0][base:end], self._rope[1][base:end]

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(self.head_dim // 2, -1), sin)

    def _mask(self, base: int, m: int) -> Tensor:
        """Additive [M*R, base+M]: row i sees positions up to base+i, in each of the R heads of a group."""
        rows = torch.arange(base, base + m, device=self.device)[:, None]
        hidden = torch.arange(base + m, device=self.device)[None] > rows
        mask = torch.zeros(m, base + m, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return mask.repeat_interleave(self.heads // self.kv_heads, 0)

    def _attend(self, q_MHC: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[M, H*C] from keys and values [1, G, T, C].

        The R heads that share keys become rows of one head, so keys are never repeated.
        """
        m, g, c = q_MHC.shape[0], self.kv_heads, self.head_dim
        if m > 1 and mask is None:  # prefill: the causal kernel beats a mask of P x P
            q_1HMC = q_MHC.transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(q_1HMC, keys, values, is_causal=True, enable_gqa=g != self.heads)
            return out[0].transpose(0, 1).reshape(m, -1)
        q = q_MHC.reshape(m, g, -1, c).transpose(0, 1).reshape(1, g, -1, c)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.reshape(g, m, -1).transpose(0, 1).reshape(m, -1)

    def _out(self, w: LayerWeights, attended: Tensor, residual_MD: Tensor) -> Tensor:
        if w.out_bias is None:
            return torch.addmm(residual_MD, attended, w.out_weight.t())
        return residual_MD + F.linear(attended, w.out_weight, w.out_bias)

    def _mlp(self, w: LayerWeights, residual_MD: Tensor) -> Tensor:
        gate_up = F.linear(self._norm(residual_MD, w.mlp_norm_D), w.gate_up_weight, w.gate_up_bias)
        gate, up = gate_up.chunk(2, -1)
        inner = F.silu(gate).mul_(up)
        if w.down_bias is None:
            return torch.addmm(residual_MD, inner, w.down_weight.t())
        return residual_MD + F.linear(inner, w.down_weight, w.down_bias)


def _longest_exact(config) -> int:
    """Longest sequence for which full attention is what the model computes."""
    limit = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
    return min(limit, window) if window and slides else limit
