"""The drafts of one round, as a tree: after which token each of them was drafted, and in which row of a pass it is.

Takes tokens as they are drafted, level by level; gives what passes need to know of the rows (depths, ancestors). A
chain is the tree in which every draft follows the one before it. Where drafts branch, each path from the root is one
possible continuation of the text, and all of them are verified in one pass (tree attention: Miao et al., SpecInfer,
ASPLOS 2024, arXiv 2305.09781).

R rows: row 0 is the pending token, every other a draft; parents come before their children. M of them, T cache slots
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

WIDEST = 64
"""The most drafts in a round."""


class Draft:
    """A token drawn from q, which stays on its device until it is read.

    When the first figure of q is read, the token is copied to the host in the same transfer, so that the host waits for
    a GPU once instead of twice. The caller receives only the figure; a draft that the controller refuses is dropped
    unread.
    """

    def __init__(self, token_1: Tensor, index_1: Tensor | None = None):
        self.token_1 = token_1
        self.index_1 = token_1 if index_1 is None else index_1
        """Where it stands in q."""

    @cached_property
    def token(self) -> int:
        return int(self.token_1)

    def read_with(self, number_1: Tensor) -> float:
        # as floats: float32 represents every integer up to 2^24 exactly
        number, token = torch.cat((number_1, self.token_1.to(number_1.dtype))).tolist()
        self.token = int(token)
        return number


class Tree:
    """Rows of a round. `tokens`, `parents` (row of the token before; -1 of row 0) and `depths` have one entry each."""

    def __init__(self, pending: int):
        self.tokens, self.parents, self.depths = [pending], [-1], [0]
        self.children: list[list[int]] = [[]]
        """Rows of the drafts that follow each row, in the order in which they were drawn."""
        self.laws: list[Any] = [None]
        """The `Confidence` from which these were drawn."""
        self.drafts: list[Draft] = []
        """Of rows 1, 2, ..."""
        self.is_chain = True
        self.level = [0]
        """The rows that were drafted last, or that of the pending token."""
        self._ancestors = [1]
        """Of each row: a bit for itself and for each row on its path."""

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, draft: Draft, law: Any) -> int:
        """Append a draft that was drawn from `law` to follow the row `parent`; its row. It reads the token."""
        row = len(self.tokens)
        self.is_chain = self.is_chain and parent == row - 1
        self.tokens.append(draft.token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.children.append([])
        self.children[parent].append(row)
        self.laws.append(None)
        self.laws[parent] = law
        self.drafts.append(draft)
        self._ancestors.append(self._ancestors[parent] | 1 << row)
        return row

    def grow(self, wanted: list[list[tuple[int, Draft, Any]]]) -> None:
        """Append a level. wanted: of each row that has drafts after it, these in the order in which they were drawn, as
        `add` takes them. First choices come first, so that those that the head reads next have neighbouring rows."""
        first = len(self)
        for rank in range(max(map(len, wanted), default=0)):
            for candidates in wanted:
                if rank < len(candidates):
                    self.add(*candidates[rank])
        self.level = list(range(first, len(self)))

    def read(self, count: int, end_tokens: Collection[int]) -> list[int]:
        """Those of the first `count` rows of the last level that may have drafts after them: nothing follows a drafted
        end token, which is verified like any other draft."""
        return [row for row in self.level[:count] if not (row and self.tokens[row] in end_tokens)]

    def path(self, row: int) -> list[int]:
        """The rows of the drafts from the root to this row, itself included."""
        found: list[int] = []
        while row > 0:
            found.append(row)
            row = self.parents[row]
        return found[::-1]

    def drafted(self, row: int) -> list[int]:
        """The tokens of this path."""
        return [self.tokens[i] for i in self.path(row)]

    def hidden(self, first: int, stop: int) -> list[list[bool]]:
        """[M][stop - 1]: for rows first..stop-1, which of the rows 1..stop-1 they must not attend to."""
        return [[not self._ancestors[m] >> row & 1 for row in range(1, stop)] for m in range(first, stop)]


def branched_mask(tree: Tree, first: int, stop: int, root: int, start: int, window: int | None, like: Tensor) -> Tensor:
    """Additive mask [M, T] of the rows first..stop-1 of a tree over the slots from `start` on. Row r is in slot
    root + r; slots up to the root hold the text, in which a slot is a position.

    window: as in `layers.causal_mask`. like: a tensor of the mask's dtype and device.
    """
    positions = [root + depth for depth in tree.depths[:stop]]
    mask_MT = like.new_zeros(stop - first, root + stop - start)
    hidden_MR = torch.tensor(tree.hidden(first, stop), dtype=torch.bool, device=like.device)
    mask_MT[:, root + 1 - start :].masked_fill_(hidden_MR, float("-inf"))
    if window is not None:
        keys_T = torch.tensor([*range(start, root), *positions], device=like.device)
        rows_M1 = torch.tensor(positions[first:], device=like.device)[:, None]
        mask_MT.masked_fill_(keys_T <= rows_M1 - window, float("-inf"))
    return mask_MT
