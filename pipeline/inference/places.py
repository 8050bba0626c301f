"""The caches of several texts that are decoded together. Texts of about the same length lie in one store, so that one
call attends over all of them.

A place is where one text's keys, values and hidden states are. A store has places of one length, 256 slots or a power
of two times as many, and of its places 0, 1, ... are taken without gaps: when a text leaves, the last one moves to its
place. A text that outgrows its place moves to the store of the next length. So there are at most twice the slots of a
text's tokens, beyond the first 256, and at most twice the places of a store's texts: memory follows the tokens that
there are, and no text attends over the length of a much longer one.

P places, T slots of each, G key/value heads, C channels of a head, D hidden
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kv_cache import KVCache, allocate

SHORTEST = 256
"""Slots of the shortest places."""


def slots_for(length: int) -> int:
    """Slots of a place of the shortest kind that holds so many tokens."""
    slots = SHORTEST
    while slots < length:
        slots *= 2
    return slots


class Layout(NamedTuple):
    """What a slot consists of."""

    blocks: list[tuple[int, torch.device]]
    """(number of layers, device) in the order of the layers (`KVCache`)."""
    kv_heads: int
    head_dim: int
    hidden: tuple[int, torch.device, torch.dtype]
    """D, device and dtype of the hidden states after layer N, which is the dtype of keys and values too."""

    def bytes_of(self, length: int) -> dict[torch.device, int]:
        """Memory of the place of a text of `length` tokens, by device."""
        size, device, dtype = self.hidden
        slot_bytes = {device: size * dtype.itemsize}
        for layers, at in self.blocks:
            slot_bytes[at] = slot_bytes.get(at, 0) + 2 * layers * self.kv_heads * self.head_dim * dtype.itemsize
        return {at: slots_for(length) * one for at, one in slot_bytes.items()}


@dataclass(eq=False)
class Place:
    """Where a text is: its cache, whose tensors are views of a store, and the number of its place there."""

    cache: KVCache
    store: "Store"
    number: int
    ids: list[int]
    """The tokens that its text begins with."""


class Store:
    """Places of one length. `taken` are those in use, by their numbers."""

    def __init__(self, layout: Layout, slots: int):
        self.layout, self.slots, self.taken = layout, slots, list[Place]()
        self.written: list[int] = []
        """Of each place, behind how many slots there are zeros: what a mask hides must be finite."""
        self.keys: list[Tensor] = []
        """One tensor for each block, [layers, P, G, T, C]: those of one text follow each other."""
        self.values: list[Tensor] = []
        self._make(0)

    @property
    def places(self) -> int:
        """P."""
        return self.hidden_PTD.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values, self.hidden_PTD))

    def take(self, ids: list[int]) -> Place:
        """The next place, empty, of a text that begins with these tokens."""
        number = len(self.taken)
        if number == self.places:  # half as many more, as making room takes time
            self.resize(number + max(1, number // 2))
        self._clear(number, 0)
        self.written[number] = len(ids)
        place = Place(KVCache(*self._views(number)), self, number, ids)
        self.taken.append(place)
        return place

    def free(self, place: Place) -> None:
        """Free a place; the text of the last one moves there."""
        last = self.taken.pop()
        if last is not place:
            length = last.cache.length
            for part_PT in self._parts():
                part_PT[place.number, :length] = part_PT[last.number, :length]
            self._clear(place.number, length)
            last.number = place.number
            last.cache.store(*self._views(last.number))
            self.taken[last.number] = last

    def write(self, place: Place, length: int) -> None:
        """Note that the first `length` slots of a place are written to."""
        self.written[place.number] = max(self.written[place.number], length)

    def _clear(self, number: int, length: int) -> None:
        """Leave nothing behind the first `length` slots of a place: an overflow of the text that was there must not
        reach the one that is there now through 0 * inf."""
        if length < self.written[number]:
            for part_PT in self._parts():
                part_PT[number, length : self.written[number]].zero_()
        self.written[number] = length

    def copy(self, to: Place, of: Place, length: int) -> None:
        """Copy the first `length` slots of a place, of this store or another one, to one of this store."""
        for new_PT, old_PT in zip(self._parts(), of.store._parts(), strict=True):
            new_PT[to.number, :length] = old_PT[of.number, :length]

    def _parts(self) -> list[Tensor]:
        """Views [P, T, ...] of every part of the store."""
        return [self.hidden_PTD, *(part.permute(1, 3, 0, 2, 4) for part in (*self.keys, *self.values))]

    def resize(self, places: int) -> None:
        """Have so many places, at least those that are taken."""
        before = self._parts()
        self._make(places)
        for old_PT, new_PT in zip(before, self._parts(), strict=True):
            for place in self.taken:
                new_PT[place.number, : place.cache.length] = old_PT[place.number, : place.cache.length]
        for place in self.taken:
            place.cache.store(*self._views(place.number))
            self.write(place, place.cache.length)

    def _make(self, places: int) -> None:
        blocks, kv_heads, head_dim, (size, device, dtype) = self.layout
        made = [allocate(layers, at, dtype, places, kv_heads, self.slots, head_dim) for layers, at in blocks]
        self.keys, self.values = [keys for keys, _ in made], [values for _, values in made]
        self.hidden_PTD = torch.zeros(places, self.slots, size, dtype=dtype, device=device)
        self.written = [0] * places

    def _views(self, number: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What a `KVCache` of the text in this place is made of."""
        keys, values = ([part[:, number, None] for part in parts] for parts in (self.keys, self.values))
        return keys, values, self.hidden_PTD[number]


class Places:
    """The places of all texts, which are numbered 0, 1, ...: when one leaves, the last one takes its number."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.stores: dict[int, Store] = {}
        """By the slots of their places."""
        self.texts: list[Place] = []

    @property
    def caches(self) -> list[KVCache]:
        return [place.cache for place in self.texts]

    @property
    def longest(self) -> int:
        """Slots of the longest places."""
        return max(self.stores, default=0)

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores.values())

    def enter(self, texts: list[list[int]]) -> list[Place]:
        """The places of texts that begin with these tokens and have none after them yet."""
        for slots, count in Counter(slots_for(len(ids)) for ids in texts).items():
            store = self._store(slots)
            if (needed := len(store.taken) + count) > store.places:  # made once for all of them
                store.resize(needed)
        places = [self._take(len(ids), ids) for ids in texts]
        self.texts += places
        return places

    def share(self, new: Place, of: Place, length: int) -> None:
        """Copy the first `length` slots of a text to one that begins with the same tokens and has none yet."""
        new.store.copy(new, of, length)
        new.cache.head_length = min(length, of.cache.head_length)

    def leave(self, text: int) -> None:
        """Free the place of a text, whose number the last one takes."""
        place, last = self.texts[text], self.texts.pop()
        if last is not place:
            self.texts[text] = last
        place.store.free(place)

    def reserve(self, more: int) -> None:
        """Make room for so many more tokens of each text, and give up what is not needed for that. What the caches have
        committed is kept."""
        for i, place in enumerate(self.texts):
            if (length := place.cache.length + more) > place.store.slots:
                to = self._take(length, place.ids)
                to.store.copy(to, place, place.cache.length)
                place.store.free(place)
                place.cache.store(to.cache.keys, to.cache.values, to.cache.hidden_TD)
                to.cache = place.cache  # others hold it
                self.texts[i] = place = to
            place.store.write(place, length)
        self.trim()

    def trim(self) -> None:
        """Give up empty stores, and the places of others of which not more than half are taken. Not where texts leave,
        as others often take their places at once."""
        self.stores = {slots: store for slots, store in self.stores.items() if store.taken}
        for store in self.stores.values():
            if len(store.taken) <= store.places // 2:
                store.resize(len(store.taken))

    def _take(self, length: int, ids: list[int]) -> Place:
        return self._store(slots_for(length)).take(ids)

    def _store(self, slots: int) -> Store:
        if slots not in self.stores:
            self.stores[slots] = Store(self.layout, slots)
        return self.stores[slots]
