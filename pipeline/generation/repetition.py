"""Repetition in token ids: where a text begins to loop, and how much of it repeats.

Takes token ids, gives positions and shares of repeated n-grams.
"""

LOOP = 8


def first_loop(tokens: list[int], n: int = LOOP) -> int:
    """Number of tokens before the first n-gram that was there already; all of them if none repeats."""
    seen: set[tuple[int, ...]] = set()
    for end in range(n, len(tokens) + 1):
        gram = tuple(tokens[end - n : end])
        if gram in seen:
            return end - n
        seen.add(gram)
    return len(tokens)


def repeated_share(tokens: list[int], n: int = LOOP) -> float:
    """Share of the n-grams that occurred before in the text; 0 of a text too short for any."""
    count = len(tokens) - n + 1
    return 1 - len({tuple(tokens[i : i + n]) for i in range(count)}) / count if count > 0 else 0.0
