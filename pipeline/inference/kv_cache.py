"""The cache of one text being decoded: keys and values of every layer, and the hidden states after layer N.

Everything is allocated once for the longest text, so rejected drafts are dropped by resetting a length. A slot is one
backbone layer or, after the last of them, the exit head; a block is a run of slots on one device.

G key/value heads, T longest sequence, C channels of a head, D hidden
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values for `max_length` positions. Entries beyond `length` are stale and never read.

    blocks: (number of slots, device) in the order of the slots. hidden_TD: storage for hidden states after layer N, on
    the device of layer N+1.
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
        """One tensor for each block: [slots, 1, G, T, C]."""
        self.hidden_TD = hidden_TD
        self.length = 0
        """Number of committed positions, whose keys and values are valid in every backbone layer."""
        self.head_length = 0
        """The same for the exit head, which may be behind: it processes bonus positions when it next drafts."""

    def commit(self, length: int) -> None:
        """Keep the first `length` positions and drop the rest."""
        self.length = length
        self.head_length = min(self.head_length, length)
