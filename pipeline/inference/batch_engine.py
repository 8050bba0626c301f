"""The passes of `SplitBackbone` over rows of several texts at once: one matrix product for the rows of all texts.

Takes the engine of one text, whose weights, kernels and layers it uses, and spans of rows; gives hidden states and
logits of these rows, in the order of the spans. Keys, values and hidden states of the texts are in `Places`. A pass
over the rows of a single text is that engine's own, which takes less time.

M rows of a pass, D hidden, G key/value heads, P places, T slots, C channels of a head, V vocabulary, W tokens that the
head can draft
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from .backbone import SplitBackbone
from .kernels import available_bytes
from .kv_cache import KVCache
from .layers import Rows, joined
from .passes import Group, Span
from .places import Layout, Places, Store
from .prefills import passes_of
from .tree import WIDEST, Tree

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
        self.places = Places(Layout(sizes, shape.kv_heads, shape.head_dim, hidden))

    def check(self, prompt: list[int], length: int) -> None:
        """Raises ValueError if the whole `length` of a text is beyond the backbone's context, its prompt is empty, or
        an id is beyond the vocabulary."""
        backbone = self.backbone
        if length > backbone.max_context:
            raise ValueError(f"{length} positions are needed, the backbone's context is {backbone.max_context}")
        last = len(backbone.embedding_VD) - 1
        if min(prompt) < 0 or max(prompt) > last:
            raise ValueError(
                f"the prompt has ids from {min(prompt)} to {max(prompt)}, the vocabulary ends at {last}: it was "
                "encoded for another model"
            )

    def enter(self, prompts: list[list[int]]) -> tuple[list[KVCache], Tensor]:
        """(caches of new texts in the next places, float32 logits [texts, V] after their prompts), by passes over many
        prompts at once. What a prompt has in common with a text that is there is copied (prefills.py)."""
        texts, known = self.places.texts, [place.ids for place in self.places.texts]
        logits_V: list[Any] = [None] * len(prompts)
        try:
            new = self.places.enter(prompts)
            self._allocate()
            for some in passes_of(prompts, known):
                ids, spans = list[int](), []
                for number, shared, source in some:
                    if shared:
                        self.places.share(new[number], texts[source], shared)
                    ids += prompts[number][shared:]
                    spans.append(Span(len(known) + number, shared, len(prompts[number]) - shared))
                hidden_MD = self.full(ids, spans, store=True)
                last_P = torch.tensor([*accumulate(span.rows for span in spans)], device=hidden_MD.device) - 1
                logits_PV = self.logits(hidden_MD.index_select(0, last_P))
                for (number, _, _), own_V in zip(some, logits_PV, strict=True):
                    new[number].cache.commit(len(prompts[number]))
                    logits_V[number] = own_V
        except BaseException:
            while len(texts) > len(known):
                self.places.leave(len(texts) - 1)
            self.places.trim()
            raise
        return [place.cache for place in new], torch.stack(logits_V)

    def fitting(self, length: int) -> int:
        """How many texts of `length` tokens, drafts of a round beyond, fit into the free memory, of which half is left
        for copies that are made when places grow; at least 1."""
        needed = self.places.layout.bytes_of(length + WIDEST)
        return max(1, min(_free_bytes(device) // 2 // size for device, size in needed.items()))

    def leave(self, place: int) -> None:
        """Free a place; the last text takes its number."""
        self.places.leave(place)

    def leave_all(self) -> None:
        """Free all places, and their memory."""
        while self.places.texts:
            self.places.leave(len(self.places.texts) - 1)  # the last one: no other moves
        self.places.trim()

    def reserve(self, more: int) -> None:
        """Make room for so many more tokens of each text. What is beyond the committed ones is lost, so it is called
        between rounds."""
        self.places.reserve(more)
        self._allocate()

    def shallow(self, ids: list[int], spans: list[Span]) -> None:
        """Run layers 1..N on the tokens of these rows; their hidden states are stored."""
        if len(spans) == 1:
            base, _, cache, tree = self._of_one(*spans)
            self.backbone.shallow(ids, base, cache, tree)
            return
        rows = self._pass(spans)
        rows.store(self._run(self._embedded(ids, rows), 0, self.backbone.exit_layer, rows))

    def deep(self, spans: list[Span]) -> Tensor:
        """Run layers N+1..L on the stored hidden states of these rows; [M, D] before the final norm."""
        if len(spans) == 1:
            return self.backbone.deep(*self._of_one(*spans))
        rows = self._pass(spans)
        return rows.as_given(self._run(rows.stored(), self.backbone.exit_layer, self.backbone.num_layers, rows))

    def full(self, ids: list[int], spans: list[Span], store: bool = False) -> Tensor:
        """Run all L layers on the tokens of these rows; [M, D]. store: the hidden states after layer N too, which the
        exit head may read later and autoregressive decoding does not need."""
        if len(spans) == 1:
            base, _, cache, tree = self._of_one(*spans)
            if tree is None and not store:
                return self.backbone.full(ids, base, cache)
            self.shallow(ids, spans)
            return self.deep(spans)
        rows, n = self._pass(spans), self.backbone.exit_layer
        hidden_MD = self._run(self._embedded(ids, rows), 0, n, rows)
        if store:
            rows.store(hidden_MD)
        return rows.as_given(self._run(hidden_MD, n, self.backbone.num_layers, rows))

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Apply the final norm and the LM head; [M, V] in float32."""
        return self.backbone.logits(hidden_MD)

    def catch_up(self, places: list[int]) -> None:
        """Let the exit head read what it has not read yet of the committed tokens of these texts, where that is
        much. Of a single text, `draft_logits` reads all at once."""
        for place in places if len(places) > 1 else []:
            cache = self.places.texts[place].cache
            if cache.length - cache.head_length >= CATCH_UP:
                self.backbone.draft_hidden(cache.length - 1, cache)

    def draft_logits(self, asked: list[tuple[int, Tree, list[int]]]) -> Tensor:
        """The exit head's logits [M, W] for the tokens that follow rows of trees: (place, the tree of its text, rows in
        ascending order) of each text. Its keys and values of tokens that it has not processed yet are computed
        first. After drafts that branch it is asked only in rounds in which it was after their pending token."""
        backbone, layer = self.backbone, self.backbone.num_layers
        if len(asked) == 1:
            place, tree, rows = asked[0]
            cache = self.places.texts[place].cache
            return backbone.draft_logits([cache.length + row for row in rows], cache, tree)
        spans = []
        for place, tree, rows in asked:
            cache = self.places.texts[place].cache
            base, root = cache.head_length, cache.length
            cache.head_length = root + rows[-1] + 1
            spans.append(Span.of(place, base, cache.head_length - base, tree, root))
        ahead = self._pass(spans)
        hidden_MD = self._run(ahead.stored().to(backbone.device), layer, layer + 1, ahead)
        # The last row of a span is the last of those asked for.
        those = zip(asked, ahead.numbers, strict=True)
        at = [numbers[row - rows[-1] - 1] for (_, _, rows), numbers in those for row in rows]
        return backbone.draft_logits_of(hidden_MD.index_select(0, torch.tensor(at, device=backbone.device)))

    def _allocate(self) -> None:
        self.backbone.passes.allocate(self.places.longest, {block.device for block in self.backbone.blocks})

    def _of_one(self, span: Span) -> tuple[int, int, KVCache, Tree | None]:
        """(first slot, the one after the last, cache, tree) of the rows of one text."""
        return span.base, span.base + span.rows, self.places.texts[span.place].cache, span.tree

    def _pass(self, spans: list[Span]) -> "_Pass":
        return _Pass(self.places, spans, self.backbone.passes.rows_of_texts)

    def _embedded(self, ids: list[int], rows: "_Pass") -> Tensor:
        return self.backbone.passes.embed(rows.grouped(ids), 0)

    def _run(self, hidden_MD: Tensor, start: int, stop: int, rows: "_Pass") -> Tensor:
        """Run layers start..stop-1 (from 0; L is the exit head) on rows, block by block."""
        backbone, device = self.backbone, None
        for i, block in enumerate(backbone.blocks):
            if block.start < start or block.stop > stop:
                continue
            if block.device != device:
                device = block.device
                kinds, hidden_MD = rows.kinds(device), hidden_MD.to(device)
            layers = zip(block.weights, kinds[block.start : block.stop], *rows.keys_and_values(i), strict=True)
            for weights, those, *slots in layers:
                hidden_MD = backbone.family.layer(hidden_MD, weights, backbone.shape, those, *slots)
        return hidden_MD


class _Pass:
    """The rows of a pass: those of texts in one store follow each other, whatever order they are given in."""

    def __init__(self, places: Places, spans: list[Span], rows_of_texts: Callable[..., list[Rows]]):
        where = [places.texts[span.place] for span in spans]
        order = sorted(range(len(spans)), key=lambda i: (where[i].store.slots, where[i].number))
        self.stores: list[Store] = []
        self.groups: list[Group] = []
        for i in order:
            place = where[i]
            if not self.stores or self.stores[-1] is not place.store:
                self.stores.append(place.store)
                self.groups.append(Group(place.store.slots, len(place.store.taken), []))
            self.groups[-1].spans.append(spans[i]._replace(place=place.number))
        starts = dict(zip(order, accumulate((spans[i].rows for i in order), initial=0), strict=False))
        self.numbers = [range(starts[i], starts[i] + span.rows) for i, span in enumerate(spans)]
        """Of each span as given: the numbers of its rows in the pass."""
        self.is_as_given = order == list(range(len(spans)))
        self.kinds = cache(lambda device: rows_of_texts(self.groups, device))
        """What the pass is to each layer on a device."""

    def grouped(self, ids: list[int]) -> list[int]:
        """The tokens of rows, in the order of the pass."""
        found = dict(zip(chain.from_iterable(self.numbers), ids, strict=True))
        return [found[number] for number in range(len(ids))]

    def as_given(self, hidden_MD: Tensor) -> Tensor:
        """Rows in the order of the spans as they were given."""
        if self.is_as_given:
            return hidden_MD
        return hidden_MD.index_select(0, torch.tensor([*chain.from_iterable(self.numbers)], device=hidden_MD.device))

    def stored(self) -> Tensor:
        """The hidden states [M, D] after layer N."""
        return joined([hidden.index_select(0, slots_M) for hidden, slots_M in self._hidden()])

    def store(self, hidden_MD: Tensor) -> None:
        """Keep these as the hidden states after layer N."""
        first = 0
        for hidden, slots_M in self._hidden():
            part_MD = hidden_MD.narrow(0, first, len(slots_M))
            hidden.index_copy_(0, slots_M, part_MD.to(hidden.device))
            first += len(slots_M)

    def keys_and_values(self, block: int) -> list[Iterator[tuple[Tensor, ...]]]:
        """Of each layer of a block, one tensor for each store: keys [P, G, T, C], values too, and both as [P*G*T, C],
        to which those of the rows are written."""
        stores = [[getattr(store, part)[block] for store in self.stores] for part in ("keys", "values")]
        cells = [[some.flatten(1, 3) for some in part] for part in stores]
        return [zip(*(some.unbind(0) for some in part), strict=True) for part in (*stores, *cells)]

    def _hidden(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each store: hidden states of all slots, and which of them are those of the rows."""
        several = self.kinds(self.stores[0].hidden_PTD.device)[0].several or ()
        for store, some in zip(self.stores, several, strict=True):
            yield store.hidden_PTD.view(-1, store.hidden_PTD.shape[-1]), some.slots_M


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it for new tensors
    return torch.cuda.mem_get_info(device)[0] + kept
