"""Drafts copied from a text: what followed the latest earlier occurrence of its last tokens, in itself or in others.

Takes token ids as they are committed; gives the longest match and the tokens to copy. No exit head runs,
so such drafts cost little more than their verification (prompt lookup, Saxena 2023; SuffixDecoding, Oliaro et al. 2024,
arXiv 2411.04975, keeps a tree where this keeps a table of n-grams). A copied token is certain: its law is one point.
"""

import warnings
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .law import Law

NGRAM = 8
"""The longest n-gram in the table; longer matches are found by comparing backwards from its place."""
LONGEST_MATCH = 32
"""Matches are not followed further back than this."""
BOUNDARY = -1
"""Stands between two texts of a memory: no token has this id."""


class Lookup:
    """Finds the latest earlier occurrence of the longest possible end of a text.

    Adding a token and finding a match take NGRAM accesses to a dict each.
    """

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.begin = 0
        """Where the last text begins, if several are added."""
        self.after: dict[tuple[int, ...], int] = {}
        """N-gram -> index of the token after its latest occurrence. The text's own end is not in it yet."""
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            at = len(self.tokens)
            if token == BOUNDARY:
                self.begin = at + 1
            else:
                for n in range(1, min(NGRAM, at - self.begin) + 1):
                    self.after[tuple(self.tokens[at - n :])] = at
            self.tokens.append(token)

    def match(self, text: list[int] | None = None) -> tuple[int, int]:
        """(length of the match, index of the token after its earlier occurrence) of the end of `text`, by default of
        the tokens added so far; length 0 if there is none."""
        text = self.tokens if text is None else text
        end = len(text)
        for n in range(min(NGRAM, end), 0, -1):
            at = self.after.get(tuple(text[end - n :]))
            if at is not None:
                length = n
                while length < min(LONGEST_MATCH, at, end) and self.tokens[at - length - 1] == text[end - length - 1]:
                    length += 1
                return length, at
        return 0, end

    def copy(self, at: int, count: int) -> list[int]:
        """`count` tokens from index `at` on, fewer where another text begins. Beyond the end it copies what it has
        copied, so that a text which repeats itself with a short period is continued for any length."""
        found: list[int] = []
        for i in range(at, at + count):
            token = self.tokens[i] if i < len(self.tokens) else found[i - len(self.tokens)]
            if token == BOUNDARY:
                break
            found.append(token)
        return found


class Memory:
    """Earlier texts, of which the oldest are forgotten: two tables, of which the older one is dropped when the younger
    is full. It takes about 1 kB of the host's memory for a token.

    limit: the most tokens in both.
    """

    def __init__(self, limit: int = 1 << 16):
        if limit < 4:
            raise ValueError(f"a memory of {limit} tokens: at least 4")
        self.limit, self.tables, self.forgot = limit, [Lookup([]), Lookup([])], False

    def __len__(self) -> int:
        return sum(len(table.tokens) for table in self.tables)

    def add(self, tokens: list[int]) -> None:
        """Remember a text, or of one that is longer than the memory's half the end."""
        half = self.limit // 2
        if len(tokens) >= half:
            warnings.warn(f"a text of {len(tokens)} tokens: only its last {half - 1} are remembered", stacklevel=2)
        if len(self.tables[0].tokens) + len(tokens) + 1 > half:
            if self.tables[1].tokens and not self.forgot:
                self.forgot = True
                warnings.warn(f"the memory of {self.limit} tokens is full: it forgets the oldest texts", stacklevel=2)
            self.tables = [Lookup([]), self.tables[0]]
        self.tables[0].extend([*tokens[-(half - 1) :], BOUNDARY])


class Match(NamedTuple):
    """The longest end of a text that occurred before."""

    length: int
    source: str
    """Where: lookup, in this text; or memory, in an earlier one."""
    table: Lookup
    at: int
    """Index of the token after it."""

    def copy(self, count: int) -> list[int]:
        """Up to `count` tokens that followed it."""
        return self.table.copy(self.at, count)


class Copying:
    """What one text can be continued with: what is in itself, and in a memory of earlier ones."""

    def __init__(self, prompt: list[int], memory: Memory | None):
        self.text, self.memory, self.prompted = Lookup(prompt), memory, len(prompt)

    def match(self, answer: list[int]) -> Match:
        """The longest match of the end of the prompt and all of the answer so far; of equally long ones that in the
        text itself, then that in the youngest texts."""
        self._follow(answer)
        best = Match(0, "lookup", self.text, 0)
        tables = [("lookup", self.text)]
        tables += [("memory", table) for table in self.memory.tables] if self.memory is not None else []
        for source, table in tables:
            length, at = table.match(self.text.tokens)
            if length > best.length:
                best = Match(length, source, table, at)
        return best

    def end(self, answer: list[int]) -> None:
        """The answer is complete: remember the text."""
        if self.memory is not None:
            self._follow(answer)
            self.memory.add(self.text.tokens)

    def _follow(self, answer: list[int]) -> None:
        self.text.extend(answer[len(self.text.tokens) - self.prompted :])


class Point(Law):
    """The law of a draft that could not have been another one."""

    def __init__(self, token_1: Tensor, like_V: Tensor):
        """like_V: any tensor of the vocabulary's size, dtype and device."""
        super().__init__(like_V)
        self.token_1 = token_1

    @cached_property
    def q_W(self) -> Tensor:
        return torch.zeros_like(self.logits_W).index_fill_(0, self.token_1, 1.0)
