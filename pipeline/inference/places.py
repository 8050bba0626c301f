"""The caches of several texts that are decoded together, in one store, so that one call attends over all of them.

A place is where one text's keys, values and hidden states are. Places 0, 1, ... are taken without gaps: when a text
leaves, the last one moves to its place. The store grows and shrinks by blocks with the number of texts and the longest
of them, so its memory is that of places x longest text.

P places, T slots of each, G key/value heads, C channels of a head, D hidden
"""

import torch
from torch import Tensor

from .kv_cache import KVCache, allocate

BLOCK = 128
"""Slots by which places grow."""


class Places:
    """The store. blocks: (number of layers, device) in the order of the layers (`KVCache`). hidden: D, device and dtype
    of the hidden states after layer N, which is the dtype of keys and values too."""

    def __init__(
        self,
        blocks: list[tuple[int, torch.device]],
        kv_heads: int,
        head_dim: int,
        hidden: tuple[int, torch.device, torch.dtype],
    ):
        self._blocks, self._kv_heads, self._head_dim, self._hidden = blocks, kv_heads, head_dim, hidden
        self.most = 1
        """The most texts that will be in it at once."""
        self.caches: list[KVCache] = []
        """Of the text in each place; its tensors are views of the store."""
        self.keys: list[Tensor] = []
        """One tensor for each block, [layers, G, P, T, C]: a row of keys is copied to one index of [G, P*T, C]."""
        self.values: list[Tensor] = []
        self._make(0, 0)

    @property
    def room(self) -> tuple[int, int]:
        """P and T."""
        return self.hidden_PTD.shape[0], self.hidden_PTD.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values, self.hidden_PTD))

    def bytes_of(self, length: int) -> dict[torch.device, int]:
        """Memory of one place of `length` slots, by device."""
        size, device, dtype = self._hidden
        slot_bytes = {device: size * dtype.itemsize}
        for layers, at in self._blocks:
            slot_bytes[at] = slot_bytes.get(at, 0) + 2 * layers * self._kv_heads * self._head_dim * dtype.itemsize
        return {at: -(-length // BLOCK) * BLOCK * one for at, one in slot_bytes.items()}

    def enter(self, length: int) -> KVCache:
        """The empty cache of a text that takes the next place and needs `length` slots now."""
        places = self.room[0]
        if len(self.caches) == places:  # doubled, as making room takes time
            self._resize(max(places + 1, min(2 * places, self.most)), length)
        self.reserve(length)
        for part_PT in self._parts():  # an overflow of the text before must not reach this one through 0 * inf
            part_PT[len(self.caches)].zero_()
        cache = KVCache(*self._views(len(self.caches)))
        self.caches.append(cache)
        return cache

    def leave(self, place: int) -> None:
        """Free a place; the text of the last one moves there."""
        last = self.caches.pop()
        if place < len(self.caches):
            self.caches[place] = last
            for part_PT in self._parts():
                part_PT[place, : last.length] = part_PT[len(self.caches), : last.length]
            last.store(*self._views(place))
        places, slots = self.room
        needed = max((cache.length for cache in self.caches), default=0)
        if len(self.caches) <= places // 2 or needed + BLOCK <= slots // 2:
            self._resize(len(self.caches), needed)

    def reserve(self, length: int) -> None:
        """Make room for texts of `length` slots. What the caches have committed is kept."""
        if length > self.room[1]:
            self._resize(self.room[0], length)

    def _parts(self) -> list[Tensor]:
        """Views [P, T, ...] of every part of the store."""
        return [self.hidden_PTD, *(part.permute(2, 3, 0, 1, 4) for part in (*self.keys, *self.values))]

    def _resize(self, places: int, length: int) -> None:
        before = self._parts()
        length = max([length, *(cache.length for cache in self.caches)])
        self._make(places, -(-length // BLOCK) * BLOCK)
        for old_PT, new_PT in zip(before, self._parts(), strict=True):
            for place, cache in enumerate(self.caches):
                new_PT[place, : cache.length] = old_PT[place, : cache.length]
        for place, cache in enumerate(self.caches):
            cache.store(*self._views(place))

    def _make(self, places: int, slots: int) -> None:
        size, device, dtype = self._hidden
        shape = self._kv_heads, places, slots, self._head_dim
        made = [allocate(layers, at, dtype, *shape) for layers, at in self._blocks]
        self.keys, self.values = [keys for keys, _ in made], [values for _, values in made]
        self.hidden_PTD = torch.zeros(places, slots, size, dtype=dtype, device=device)

    def _views(self, place: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What a `KVCache` of the text in this place is made of."""
        keys, values = ([part[:, :, place].unsqueeze(1) for part in parts] for parts in (self.keys, self.values))
        return keys, values, self.hidden_PTD[place]
