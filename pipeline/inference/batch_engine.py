"""The passes of `SplitBackbone` over rows of several texts at once: one matrix product for the rows of all texts.

Takes the engine of one text, whose weights, kernels and layers it uses, and spans of rows; gives hidden states and
logits of these rows, in the order of the spans. Keys, values and hidden states of the texts are in `Places`.

M rows of a pass, D hidden, G key/value heads, P places, T slots, C channels of a head, V vocabulary, W tokens that the
head can draft
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .backbone import SplitBackbone
from .kernels import available_bytes
from .kv_cache import KVCache
from .layers import Rows
from .passes import Span, flat_slots
from .places import Places
from .tree import Tree

CATCH_UP = 32
"""Rows of a text that the exit head has not read yet, above which it reads them in a pass of that text alone, so that
the other texts are not filled up to as many rows."""


class BatchEngine:
    """Raises ValueError for a backbone whose layers are called in transformers, or that replays recorded passes: those
    know of one text only."""

    def __init__(self, backbone: SplitBackbone):
        if not backbone.family.is_fast:
            raise ValueError(
                "several texts at once need a family whose layers are computed here (README lists them); those of "
                "this backbone are called in transformers: decode one text after the other"
            )
        if backbone.has_fixed_shapes:
            raise ValueError("several texts at once cannot be decoded with fixed_shapes (cuda_graphs): leave it out")
        self.backbone = backbone
        deep = next(b for b in backbone.blocks if b.start == backbone.exit_layer)
        sizes = [(len(b.weights), b.device) for b in backbone.blocks]
        shape = backbone.shape
        hidden = backbone.hidden, deep.device, backbone.dtype
        self.places = Places(sizes, shape.kv_heads, shape.head_dim, hidden)

    def enter(self, prompt: list[int], length: int) -> tuple[KVCache, Tensor]:
        """(cache of a new text in the next place, float32 logits [1, V] after its prompt), by a pass of this text
        alone. Raises ValueError if its whole `length` is beyond the backbone's context, or an id beyond its
        vocabulary."""
        backbone, n = self.backbone, len(prompt)
        if length > backbone.max_context:
            raise ValueError(f"{length} positions are needed, the backbone's context is {backbone.max_context}")
        last = len(backbone.embedding_VD) - 1
        if min(prompt) < 0 or max(prompt) > last:
            raise ValueError(
                f"the prompt has ids from {min(prompt)} to {max(prompt)}, the vocabulary ends at {last}: it was "
                "encoded for another model"
            )
        self.reserve(n)
        cache = self.places.enter(n)
        try:
            backbone.shallow(prompt, 0, cache)
            logits_1V = backbone.logits(backbone.deep(0, n, cache)[-1:])
        except BaseException:
            self.places.leave(len(self.places.caches) - 1)
            raise
        cache.commit(n)
        return cache, logits_1V

    def fitting(self, length: int) -> int:
        """How many texts of `length` slots fit into the free memory, of which half is left for copies that are made
        when places grow; at least 1."""
        needed = self.places.bytes_of(length)
        return max(1, min(_free_bytes(device) // 2 // size for device, size in needed.items()))

    def leave(self, place: int) -> None:
        """Free a place; the text in the last one moves there."""
        self.places.leave(place)

    def reserve(self, slots: int) -> None:
        """Make room for so many slots of each text. What is beyond the committed ones is lost, so it is called between
        rounds."""
        self.places.reserve(slots)
        self.backbone.passes.allocate(self.places.room[1], {block.device for block in self.backbone.blocks})

    def shallow(self, ids: list[int], spans: list[Span]) -> None:
        """Run layers 1..N on the tokens of these rows; their hidden states are stored."""
        hidden_MD = self.backbone.passes.embed(ids, 0)
        self._store(self._run(hidden_MD, 0, self.backbone.exit_layer, self._pass(spans)), spans)

    def deep(self, spans: list[Span]) -> Tensor:
        """Run layers N+1..L on the stored hidden states of these rows; [M, D] before the final norm."""
        return self._run(self._stored(spans), self.backbone.exit_layer, self.backbone.num_layers, self._pass(spans))

    def full(self, ids: list[int], spans: list[Span], store: bool = False) -> Tensor:
        """Run all L layers on the tokens of these rows; [M, D]. store: the hidden states after layer N too, which the
        exit head may read later and autoregressive decoding does not need."""
        rows, n = self._pass(spans), self.backbone.exit_layer
        hidden_MD = self._run(self.backbone.passes.embed(ids, 0), 0, n, rows)
        if store:
            self._store(hidden_MD, spans)
        return self._run(hidden_MD, n, self.backbone.num_layers, rows)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Apply the final norm and the LM head; [M, V] in float32."""
        return self.backbone.logits(hidden_MD)

    def catch_up(self, places: list[int]) -> None:
        """Let the exit head read what it has not read yet of the committed tokens of these texts, where that is
        much."""
        for place in places:
            cache = self.places.caches[place]
            if cache.length - cache.head_length >= CATCH_UP:
                self.backbone.draft_hidden(cache.length - 1, cache)

    def draft_logits(self, asked: list[tuple[int, Tree, list[int]]]) -> Tensor:
        """The exit head's logits [M, W] for the tokens that follow rows of trees: (place, the tree of its text, rows in
        ascending order) of each text. Its keys and values of tokens that it has not processed yet are computed
        first. After drafts that branch it is asked only in rounds in which it was after their pending token."""
        spans, at, count = [], list[int](), 0
        backbone, layer = self.backbone, self.backbone.num_layers
        for place, tree, rows in asked:
            cache = self.places.caches[place]
            base, root = cache.head_length, cache.length
            cache.head_length = root + rows[-1] + 1
            spans.append(Span.of(place, base, cache.head_length - base, tree, root))
            at += [count + root + row - base for row in rows]
            count += spans[-1].rows
        hidden_MD = self._run(self._stored(spans).to(backbone.device), layer, layer + 1, self._pass(spans))
        return backbone.draft_logits_of(hidden_MD.index_select(0, torch.tensor(at, device=backbone.device)))

    def _slots(self, spans: list[Span], device: torch.device) -> Tensor:
        """The number [M] of each row among the slots of all places."""
        return torch.tensor(flat_slots(spans, self.places.room[1]), device=device)

    def _stored(self, spans: list[Span]) -> Tensor:
        hidden = self.places.hidden_PTD
        return hidden.view(-1, hidden.shape[-1]).index_select(0, self._slots(spans, hidden.device))

    def _store(self, hidden_MD: Tensor, spans: list[Span]) -> None:
        hidden = self.places.hidden_PTD
        hidden.view(-1, hidden.shape[-1]).index_copy_(0, self._slots(spans, hidden.device), hidden_MD.to(hidden.device))

    def _pass(self, spans: list[Span]) -> Callable[[torch.device], list[Rows]]:
        """What a pass of these rows is to each layer on a device, made once."""
        passes, texts, slots = self.backbone.passes, len(self.places.caches), self.places.room[1]
        return cache(lambda device: passes.rows_of_texts(spans, texts, slots, device))

    def _run(self, hidden_MD: Tensor, start: int, stop: int, rows: Callable[[torch.device], list[Rows]]) -> Tensor:
        """Run layers start..stop-1 (from 0; L is the exit head) on rows, block by block."""
        backbone, places = self.backbone, self.places
        texts = len(places.caches)
        device = None
        for i, block in enumerate(backbone.blocks):
            if block.start < start or block.stop > stop:
                continue
            if block.device != device:
                device = block.device
                kinds, hidden_MD = rows(device), hidden_MD.to(device)
                end = kinds[0].mask.shape[-1]  # type: ignore[union-attr]
            keys, values = places.keys[i], places.values[i]
            to_keys, to_values = keys.flatten(2, 3), values.flatten(2, 3)  # [layers, G, P*T, C]
            seen_keys, seen_values = keys[:, :, :texts, :end], values[:, :, :texts, :end]
            layers = zip(
                block.weights, kinds[block.start : block.stop], seen_keys.unbind(0), seen_values.unbind(0),
                to_keys.unbind(0), to_values.unbind(0), strict=True,
            )  # fmt: skip
            for weights, those, *slots in layers:
                hidden_MD = backbone.family.layer(hidden_MD, weights, backbone.shape, those, *slots)
        return hidden_MD


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it for new tensors
    return torch.cuda.mem_get_info(device)[0] + kept
