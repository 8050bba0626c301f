"""The memory of one decode: keys and values of every layer, and the hidden states after layer N.

Takes rows written at absolute positions, gives everything up to a position; allocated once, so to forget
rejected drafts is to move an integer. Knows nothing of tokens or of what the layers compute.

S slots (L backbone layers, then the exit head), G key/value heads, T longest sequence, C channels of a head,
D hidden, M rows of this pass
"""

import torch
from torch import Tensor


class KVCache:
    """Preallocated for `max_length` positions. What lies beyond a length is stale and never read."""

    def __init__(
        self,
        slots: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.max_length = max_length
        shape = (slots, 1, kv_heads, max_length, head_dim)
        self.keys_S1GTC = torch.zeros(shape, dtype=dtype, device=device)
        self.values_S1GTC = torch.zeros(shape, dtype=dtype, device=device)
        self.hidden_TD = torch.zeros(max_length, hidden, dtype=dtype, device=device)
        self.length = 0
        """Committed positions whose keys and values are right in every backbone layer."""
        self.head_length = 0
        """The same for the exit head, which may lag behind: bonus positions are caught up lazily."""

    def views(self, start: int, stop: int, base: int, end: int) -> tuple[tuple[Tensor, ...], ...]:
        """For slots start..stop-1: where keys and values of positions base..end-1 go, and those of all up to end.

        Four tuples of one view a slot, [G, M, C] to write and [1, G, end, C] to read. Made once a pass: slicing in
        every layer would cost as much as the layer's small kernels.
        """
        keys, values = self.keys_S1GTC[start:stop, :, :, :end], self.values_S1GTC[start:stop, :, :, :end]
        return keys[:, 0, :, base:].unbind(0), values[:, 0, :, base:].unbind(0), keys.unbind(0), values.unbind(0)

    def commit(self, length: int) -> None:
        """Keep the first `length` positions, forget the rest."""
        self.length = length
        self.head_length = min(self.head_length, length)
