"""Estimates the seconds that the passes of a batch's rounds take as a function of their rows, from recent rounds.

Takes finished `BatchRound`s; gives tables of seconds by rows. Nothing is assumed of the function but that a pass of
more rows takes no less in total and no more per row, so the widths at which it jumps are learned.
"""

from bisect import bisect_left

from .costs import Recent

FEW = 16
"""Up to so many rows, every number of rows has times of its own; above, they share them in steps of an eighth."""


def bucket(rows: int) -> int:
    """The number of rows under which the time of a pass of `rows` is kept: the next of 1..16, 18, 20, ..., 32, 36,
    ..."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


class RowTimes:
    """Seconds of one kind of pass by its rows."""

    def __init__(self) -> None:
        self.times: dict[int, Recent] = {}
        self.first: dict[int, float] = {}
        """Seconds of the first pass of a number of rows. It compiles and allocates what later ones use, so it is only a
        bound: a width that seems to cost more than it does would not be tried again."""

    def add(self, rows: int, seconds: float, now: int) -> bool:
        """Learn from a pass; False if it was the first of its number of rows."""
        if rows in self.first:
            self.times.setdefault(bucket(rows), Recent()).add(seconds, now)
            return True
        self.first[rows] = seconds
        return False

    def forget(self, now: int) -> None:
        """Drop old times but the last two of each number of rows, as a single one may have been disturbed: to find
        again that a width costs much would cost much."""
        for recent in self.times.values():
            recent.forget(now, keep=2)

    def table(self, most: int) -> list[float]:
        """Seconds of passes of 0..most rows; all 0 before any number of rows came twice. Between timed numbers of rows
        it is a line. Fewer rows than any timed ones count as those, and more as the line through the last two. A pass
        that was the first of its width is a bound for all that are not wider."""
        points = _never_less([(rows, r.value(), len(r)) for rows, r in sorted(self.times.items()) if len(r)])
        if not points:
            return [0.0] * (most + 1)
        known = [rows for rows, _ in points]
        (last, seconds), slope = points[-1], points[-1][1] / points[-1][0]
        if len(points) > 1:
            (before, less), _ = points[-2:]
            slope = min(slope, (seconds - less) / (last - before))
        table = [0.0]
        for rows in range(1, most + 1):
            at = bisect_left(known, rows)
            if at == len(points):
                table.append(seconds + slope * (rows - last))
            elif at == 0:
                table.append(points[0][1])
            else:
                (x0, y0), (x1, y1) = points[at - 1], points[at]
                table.append(y0 + (y1 - y0) * (rows - x0) / (x1 - x0))
        bound = float("inf")
        for rows in range(most, 0, -1):
            if rows in self.first and bucket(rows) not in self.times:
                bound = min(bound, self.first[rows])
            table[rows] = min(table[rows], bound)
        return table


def _never_less(points: list[tuple[int, float, int]]) -> list[tuple[int, float]]:
    """(rows, seconds) of the nearest function that never decreases, where `points` are (rows, seconds, weight): pools
    of neighbours that decrease get their mean (isotonic regression: Barlow et al. 1972)."""
    pools: list[tuple[float, int, list[int]]] = []
    for rows, seconds, weight in points:
        pools.append((seconds, weight, [rows]))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (y0, w0, x0), (y1, w1, x1) = pools[-2:]
            pools[-2:] = [((y0 * w0 + y1 * w1) / (w0 + w1), w0 + w1, x0 + x1)]
    return [(rows, seconds) for seconds, _, pool in pools for rows in pool]


def between(table: list[float], rows: float) -> float:
    """The seconds of an expected number of rows, which may lie between two."""
    low = int(rows)
    if low >= len(table) - 1:
        return table[-1]
    return table[low] + (table[low + 1] - table[low]) * (rows - low)


class BatchCosts:
    """Times of the parts of a round of several texts by their rows: passes of the shallow layers and of the exit head,
    and the verification together with all else, which also takes longer for more rows. A round without drafts is one
    pass, of which the shallow layers' part is what they take as a pass."""

    def __init__(self) -> None:
        self.shallow, self.head, self.verify = (RowTimes() for _ in range(3))
        self.now = 0
        """Number of rounds so far."""

    def observe(self, round) -> bool:
        """Learn from a `BatchRound`; False if any of its passes was the first of its number of rows."""
        self.now += 1
        known = []
        for times, passes in ((self.shallow, round.shallow_seconds), (self.head, round.head_seconds)):
            known += [times.add(rows, seconds, self.now) for rows, seconds in passes]
        seconds = round.verify_seconds + round.rest_seconds
        if not round.shallow_seconds:  # one pass through all layers
            seconds = max(0.0, seconds - self.shallow.table(round.rows)[round.rows])
        return all([*known, self.verify.add(round.rows, seconds, self.now)])

    def rounds(self, count: int, limit: int) -> list[float]:
        """C(B, K) for K = 0..limit: the seconds of a round in which B = `count` texts draft K tokens each, which takes
        (K+1) shallow(B) + K head(B) + verify(B (K+1))."""
        shallow, head, verify = (t.table(count * (limit + 1)) for t in (self.shallow, self.head, self.verify))
        step = shallow[count] + head[count]
        return [shallow[count] + k * step + verify[count * (k + 1)] for k in range(limit + 1)]

    def forget(self) -> None:
        for times in (self.shallow, self.head, self.verify):
            times.forget(self.now)
