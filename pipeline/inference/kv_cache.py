"""The cache of one text being decoded: keys and values of every layer, and the hidden states after layer N.

Everything is allocated once for the longest text, so rejected drafts are dropped by resetting a length. A layer here is
one of the backbone or, after the last of them, the exit head; a block is a run of layers on one device. A slot is where
the keys, values and hidden state of one token are: that of a committed token is its position.

G key/value heads, T slots, C channels of a head, D hidden
"""

import torch
from torch import Tensor


def allocate(layers: int, device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the layers of a block, each [layers, *shape]. They are zeros, as what a mask hides must be
    finite."""
    keys, values = (torch.zeros(layers, *shape, dtype=dtype, device=device) for _ in range(2))
    return keys, values


class KVCache:
    """Keys and values for `max_length` slots. What lies beyond `length` belongs to drafts of the round, or is stale.

    keys, values: one tensor for each block, [layers, 1, G, T, C]. hidden_TD: storage for hidden states after layer N,
    on the device of layer N+1.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], hidden_TD: Tensor):
        self.length = 0
        """Number of committed positions, whose keys and values are valid in every backbone layer."""
        self.head_length = 0
        """The same for the exit head, which may be behind: it processes bonus positions when it next drafts."""
        self.store(keys, values, hidden_TD)

    def store(self, keys: list[Tensor], values: list[Tensor], hidden_TD: Tensor) -> None:
        """Use these tensors from now on, to which the committed positions were copied."""
        self.keys, self.values, self.hidden_TD = keys, values, hidden_TD
        self.max_length = len(hidden_TD)

    def commit(self, length: int) -> None:
        """Keep the first `length` positions and drop the rest."""
        self.length = length
        self.head_length = min(self.head_length, length)

    def keep(self, path: list[int]) -> None:
        """Commit the pending token, which is in slot `length`, and the accepted drafts of a round, which are in the
        slots `length + row` of these rows. Where drafts branched, they are moved to where they belong."""
        base, count = self.length, len(path)
        known = sum(base + row < self.head_length for row in path)
        if path and path[-1] != count:
            for parts_1T in (*self.keys, *self.values):
                slots_P = torch.tensor(path, device=parts_1T.device) + base
                parts_1T.narrow(3, base + 1, count).copy_(parts_1T.index_select(3, slots_P))
            slots_P = torch.tensor(path, device=self.hidden_TD.device) + base
            self.hidden_TD.narrow(0, base + 1, count).copy_(self.hidden_TD.index_select(0, slots_P))
        self.head_length = min(self.head_length, base + 1 + known)
        self.length = base + 1 + count
