"""In which passes the prompts of texts that enter together are read, and what of them was read before.

Takes the prompts, and the beginnings of texts that are being decoded; gives passes. What a prompt begins with in common
with another text, such as a system message, is not computed again: its keys, values and hidden states are copied.
"""

from bisect import bisect_left
from typing import NamedTuple

MOST = 512
"""Tokens of a pass of several prompts: enough rows for its matrix products, and few enough that their hidden states
stay in a CPU's cache."""
WORTH = 16
"""Fewest tokens that are copied, and for which a prompt waits until another one was read."""


class Prefill(NamedTuple):
    """A prompt to be read in a pass."""

    number: int
    """Its index among the prompts."""
    shared: int
    """So many of its first tokens are copied ..."""
    source: int
    """... from this text: those that are being decoded come first, then the prompts."""


def common(a: list[int], b: list[int]) -> int:
    """The number of tokens that both begin with."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


def passes_of(prompts: list[list[int]], known: list[list[int]]) -> list[list[Prefill]]:
    """The passes, one after the other. known: what the texts that are being decoded begin with."""
    passes, rest = [], list(range(len(prompts)))
    read = list(enumerate(known))
    while rest:
        now: list[Prefill] = []
        later, tokens = [], 0
        for i in rest:
            ids = prompts[i][:-1]  # the last token's logits are needed
            shared, source = max(((common(ids, other), at) for at, other in read), default=(0, 0))
            if shared < WORTH:
                shared = 0
            ahead = max((common(ids, prompts[other.number]) for other in now), default=0)
            if now and (ahead >= shared + WORTH or tokens + len(prompts[i]) - shared > MOST):
                later.append(i)
                continue
            now.append(Prefill(i, shared, source))
            tokens += len(prompts[i]) - shared
        passes.append(now)
        read += [(len(known) + one.number, prompts[one.number]) for one in now]
        rest = later
    return passes
