"""Repetition in token ids: where a text begins to loop, and the share of repeated n-grams.

Takes token ids; gives a position or a share.
"""

LOOP = 8


def first_loop(tokens: list[int], n: int = LOOP) -> int:
    """Number of tokens before the first repeated n-gram; the length of the text if none repeats."""
    seen: set[tuple[int, ...]] = set()
    for end in range(n, len(tokens) + 1):
        gram = tuple(tokens[end - n : end])
        if gram in seen:
            return end - n
        seen.add(gram)
    return len(tokens)


def repeated_share(tokens: list[int], n: int = LOOP) -> float:
    """Share of the n-grams that occurred before in the text; 0 for a text shorter than n tokens."""
    count = len(tokens) - n + 1
    return 1 - len({tuple(tokens[i : i + n]) for i in range(count)}) / count if count > 0 else 0.0
