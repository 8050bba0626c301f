"""The memory of one decode: keys and values of every layer, and the hidden states after layer N.

Allocated once, so to forget rejected drafts is to move an integer. Takes the devices of its slots, gives blocks of
slots that lie on one device. Knows nothing of tokens or of what the layers compute.

S slots (L backbone layers, then the exit head), G key/value heads, T longest sequence, C channels of a head, D hidden
"""

import torch
from torch import Tensor


class KVCache:
    """Preallocated for `max_length` positions. What lies beyond a length is stale and never read.

    blocks: (number of slots, device) in the order of the slots.
    """

    def __init__(
        self,
        blocks: list[tuple[int, torch.device]],
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        hidden_TD: Tensor,
    ):
        self.max_length = max_length
        self.keys, self.values = (
            [torch.zeros(n, 1, kv_heads, max_length, head_dim, dtype=dtype, device=d) for n, d in blocks]
            for _ in range(2)
        )
        """Of each block [slots, 1, G, T, C]."""
        self.hidden_TD = hidden_TD
        self.length = 0
        """Committed positions whose keys and values are right in every backbone layer."""
        self.head_length = 0
        """The same for the exit head, which may lag behind: bonus positions are caught up lazily."""

    def commit(self, length: int) -> None:
        """Keep the first `length` positions, forget the rest."""
        self.length = length
        self.head_length = min(self.head_length, length)
