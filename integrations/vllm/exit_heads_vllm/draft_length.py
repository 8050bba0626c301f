"""How many tokens to draft in a step of a batch: as many as bring the most tokens per second, from what was measured.

Takes the number of requests in a step, the outcome of every verified round and the time of every plain step; gives the
draft length of the next step, the same for all its requests. It knows nothing of vLLM, and needs no package.

With K drafts for each of b requests a step commits b E(K) tokens, E(K) = 1 + t_1 + t_1 t_2 + ... + t_1 ... t_K, where
t_i is the chance that draft i is accepted if all before it were, and takes the time T(b, K). The rule drafts the K of
the largest E(K) / T(b, K), K = 0 among them: where all steps are of one kind, that ratio is the rate which the rule
of docs/control.md of exit-heads maximises. Every t_i has a Beta posterior and is drawn from it (Thompson sampling),
so lengths that are little known are tried when luck makes them look good. T comes from measured steps, as a line
through all of them (`Costs`) where (b, K) itself was not measured.

b requests, K drafts
"""

import math
import random
from collections import deque

HELD = 4
"""Steps for which a choice is kept. A step verifies what the one before it drafted, so only two of one length in a
row have the cost of that length."""
HELD_FIRST = 3
"""The same for the choices before anything is known, some of which may be dear."""
PROBED = 64
"""One choice in so many is one draft more or less, so that a cost or an acceptance that has changed is seen."""
FADING = 0.9995
"""The weight of older outcomes is multiplied by this at each verified round of a request."""
TIMES, AGE = 32, 4096
"""A time is the robust mean of the last TIMES; those older than AGE steps are forgotten."""
SURE = 3
"""So many times of one (b, K) are believed without the line."""


class DraftLength:
    """The draft length of each step. longest: never more than this."""

    def __init__(self, longest: int, seed: int = 0):
        if longest < 1:
            raise ValueError(f"longest={longest}: at least 1 draft")
        self.longest = longest
        self.costs = Costs()
        self.outcomes = [[1.0, 1.0] for _ in range(longest)]
        """Accepted and rejected drafts at each position, a uniform prior included."""
        self.dice = random.Random(seed)
        self.chosen, self.left, self.batch = 0, 0, 0
        self.choices = 0
        self.first = list(dict.fromkeys((longest, 0, 1)))
        """Lengths that are tried first, so that the line through the times has ends."""

    def choose(self, batch: int) -> int:
        """The draft length of the next step, 0 to `longest`, of `batch` requests."""
        cell = rounded(batch)
        if self.left == 0 or (cell != self.batch and not self.first):
            self.left, self.batch = HELD_FIRST if self.first else HELD, cell
            self.chosen = self._decide(batch)
        self.left -= 1
        return self.chosen

    def _decide(self, batch: int) -> int:
        if self.first:
            return self.first.pop(0)
        k = best([self.dice.betavariate(*ab) for ab in self.outcomes], self.costs.steps(batch, self.longest))
        self.choices += 1
        if self.choices % PROBED == 0:
            k = self.dice.choice([j for j in (k - 1, k + 1) if 0 <= j <= self.longest])
        return k

    def outcome(self, drafted: int, accepted: int) -> None:
        """A request's round was verified. Drafts behind the first rejected one were not tested."""
        for i, ab in enumerate(self.outcomes[:drafted]):
            ab[0], ab[1] = 1 + FADING * (ab[0] - 1), 1 + FADING * (ab[1] - 1)
            if i <= accepted:
                ab[0 if i < accepted else 1] += 1

    def took(self, batch: int, length: int, seconds: float) -> None:
        """A step of `batch` requests that verified and drafted `length` tokens each, and nothing else."""
        self.costs.add(batch, length, seconds)


def best(chances: list[float], seconds: list[float]) -> int:
    """The K of the largest E(K) / T(K). chances: of acceptance, by position. seconds: T(0), T(1), ..., all positive."""
    rates, tokens, reached = [1 / seconds[0]], 1.0, 1.0
    for chance, time in zip(chances, seconds[1:], strict=True):
        reached *= chance
        tokens += reached
        rates.append(tokens / time)
    return max(range(len(rates)), key=rates.__getitem__)


def rounded(batch: int) -> int:
    """Batches beyond 8 on a scale of quarter octaves, so that neighbours share their measurements."""
    return batch if batch <= 8 else int(2 ** (round(4 * math.log2(batch)) / 4))


class Costs:
    """Times of steps by requests b and drafts K, in seconds, and a line through them.

    The line is T = w0 + w1 [K > 0] + w2 b (1 + K) + w3 K + w4 b K, all w >= 0: the step, that it drafts at all, rows to
    verify, passes of the head, and rows of these. So nothing costs less for more, as noise would have it."""

    def __init__(self) -> None:
        self.times: dict[tuple[int, int], deque[tuple[int, float]]] = {}
        self.steps_seen = 0
        self.weights: list[float] | None = None

    def add(self, batch: int, length: int, seconds: float) -> None:
        self.steps_seen += 1
        cell = self.times.setdefault((rounded(batch), length), deque(maxlen=TIMES))
        cell.append((self.steps_seen, seconds))
        self.weights = None

    def steps(self, batch: int, longest: int) -> list[float]:
        """Seconds of a step with 0, 1, ..., `longest` drafts, measured or from the line. Without any measurement all
        are equal."""
        known = self._known()
        if not known:
            return [1.0] * (longest + 1)
        if self.weights is None:
            rows = [_row(b, k) for b, k in known]
            self.weights = fitted(rows, [seconds for seconds, _ in known.values()])
        found, cell = [], rounded(batch)
        for k in range(longest + 1):
            seconds, count = known.get((cell, k), (0.0, 0))
            line = sum(w * x for w, x in zip(self.weights, _row(cell, k), strict=True))
            found.append(seconds if count >= SURE else max(line, 1e-9))
        return found

    def _known(self) -> dict[tuple[int, int], tuple[float, int]]:
        """Of each (b, K): its robust time, and how many times that is from."""
        found = {}
        for cell, times in self.times.items():
            while times and times[0][0] < self.steps_seen - AGE:
                times.popleft()
            if times:
                found[cell] = robust([seconds for _, seconds in times]), len(times)
        return found


def _row(batch: int, length: int) -> list[float]:
    return [1.0, float(length > 0), float(batch * (1 + length)), float(length), float(batch * length)]


def robust(times: list[float]) -> float:
    """The mean of the fastest two thirds; of two the faster. What disturbs a time can only lengthen it."""
    kept = sorted(times)[: max(1, len(times) * 2 // 3)]
    return sum(kept) / len(kept)


def fitted(rows: list[list[float]], values: list[float], sweeps: int = 200) -> list[float]:
    """The weights >= 0 with the smallest relative squared errors of rows * weights against positive values, by
    coordinate descent."""
    scaled = [[x / value for x in row] for row, value in zip(rows, values, strict=True)]
    width = len(rows[0])
    squares = [[sum(row[i] * row[j] for row in scaled) for j in range(width)] for i in range(width)]
    sums = [sum(row[i] for row in scaled) for i in range(width)]
    weights = [0.0] * width
    for _ in range(sweeps):
        for i in range(width):
            if squares[i][i] > 0:
                rest = sum(squares[i][j] * weights[j] for j in range(width) if j != i)
                weights[i] = max(0.0, (sums[i] - rest) / squares[i][i])
    return weights
