"""Drafts copied from the text itself: what followed the latest earlier occurrence of the text's last tokens.

Takes token ids as they are committed; gives the length of the longest match and the tokens to copy. No exit head runs,
so such drafts cost little more than their verification (prompt lookup, Saxena 2023; SuffixDecoding, Oliaro et al. 2024,
arXiv 2411.04975, keeps a tree where this keeps a table of n-grams). A copied token is certain: its law is one point.
"""

from functools import cached_property

import torch
from torch import Tensor

from .law import Law

NGRAM = 8
"""The longest n-gram in the table; longer matches are found by comparing backwards from its place."""
LONGEST_MATCH = 32
"""Matches are not followed further back than this."""


class Lookup:
    """Finds the latest earlier occurrence of the longest possible end of a text.

    Adding a token and finding a match take NGRAM accesses to a dict each.
    """

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        """N-gram -> index of the token after its latest occurrence. The text's own end is not in it yet."""
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            at = len(self.tokens)
            for n in range(1, min(NGRAM, at) + 1):
                self.after[tuple(self.tokens[at - n :])] = at
            self.tokens.append(token)

    def match(self) -> tuple[int, int]:
        """(length of the match, index of the token after its earlier occurrence); length 0 if there is none."""
        text, end = self.tokens, len(self.tokens)
        for n in range(min(NGRAM, end), 0, -1):
            at = self.after.get(tuple(text[end - n :]))
            if at is not None:
                length = n
                while length < min(LONGEST_MATCH, at) and text[at - length - 1] == text[end - length - 1]:
                    length += 1
                return length, at
        return 0, end

    def copy(self, at: int, count: int) -> list[int]:
        """`count` tokens from index `at` on. Beyond the text's end it copies what it has copied, so that a text which
        repeats itself with a short period is continued for any length."""
        found: list[int] = []
        for i in range(at, at + count):
            found.append(self.tokens[i] if i < len(self.tokens) else found[i - len(self.tokens)])
        return found


class Point(Law):
    """The law of a draft that could not have been another one."""

    def __init__(self, token_1: Tensor, like_V: Tensor):
        """like_V: any tensor of the vocabulary's size, dtype and device."""
        super().__init__(like_V)
        self.token_1 = token_1

    @cached_property
    def q_W(self) -> Tensor:
        return torch.zeros_like(self.logits_W).index_fill_(0, self.token_1, 1.0)
