"""Estimates the seconds that each part of a round takes, from recent rounds, robustly against single slow ones.

Takes finished rounds with their times; gives C(k), the seconds of a round of k drafts, and names a number of drafts
that has not been timed for a long while. docs/control.md gives the reasons and the measurements.
"""

from bisect import bisect_left, insort
from collections import deque

from .rounds import Round

PROBES = (4, 0, 1)
"""Numbers of drafts that are timed again regularly: 4 and 1 determine the line fitted to verification, 0 the cost of
verifying a single token."""
WINDOW = 32
"""Number of times kept for each part, and for verification at each width."""
GAP = 128
"""Rounds after which a number of drafts in PROBES is due again, unless it occurred anyway. In the beginning the gap is
shorter: half of the rounds so far, but at least 32."""
EXPIRY = 2 * GAP
"""Rounds after which a time is discarded, so that estimates follow changes of the machine's speed."""


def first_probes(limit: int) -> list[int]:
    """The numbers of drafts of the first rounds: each in PROBES twice, once to warm up and once to be timed."""
    return [min(k, limit) for _ in range(2) for k in PROBES]


class Recent:
    """Trimmed mean of the last times of one part: the slowest third is left out (of two times, the slower one).

    Disturbances such as another process or the compilation of a kernel only make a time longer, so trimming is
    one-sided. From the second time on, a single slow round has no effect, however slow it is.
    """

    def __init__(self) -> None:
        self.times: deque[tuple[int, float]] = deque()
        """(number of the round, seconds), oldest first."""
        self.ordered: list[float] = []
        """The same seconds, fastest first."""

    def __len__(self) -> int:
        return len(self.times)

    def add(self, seconds: float, now: int = 0) -> None:
        self.times.append((now, seconds))
        insort(self.ordered, seconds)
        if len(self.times) > WINDOW:
            self._drop_oldest()

    def forget(self, now: int, keep: int = 0) -> None:
        """Drop what is older than EXPIRY, but keep so many of the last times."""
        while len(self.times) > keep and self.times[0][0] < now - EXPIRY:
            self._drop_oldest()

    def value(self) -> float:
        """Seconds; 0 before the first time."""
        kept = max(1, 2 * len(self.times) // 3)
        return sum(self.ordered[:kept]) / kept

    def _drop_oldest(self) -> None:
        del self.ordered[bisect_left(self.ordered, self.times.popleft()[1])]


class Costs:
    """Estimates from recent rounds: a mean for each part, and for verification a function of the width.

    Verifying one token uses other kernels than verifying several, so it has an estimate of its own; for several it is a
    line a + b * width with a >= 0 and b >= 0, because a wider pass takes no less in total and no more per token. So no
    estimate is negative or grows without bound. (A synthetic benchmark instead of the rounds is a third off on CPUs,
    because its caches are warm and those of decoding are cold.)
    """

    def __init__(self) -> None:
        self.shallow, self.head, self.rest = Recent(), Recent(), Recent()
        """Seconds of one shallow pass, of one pass of the exit head, and of all else except verification."""
        self.copied = Recent()
        """Seconds of the one shallow pass over all rows of a round whose drafts were copied."""
        self.verify: dict[int, Recent] = {}
        """Width -> seconds of a verification."""
        self.now = 0
        """Number of rounds so far."""
        self.seen: dict[int, int] = {}
        """Number of drafts -> the last round that made as many, or in which `due` asked for them."""

    def observe(self, round: Round) -> None:
        """Learn from a round, unless it is the first of its width, which may include compiling or choosing kernels."""
        self.now += 1
        self.seen[round.drafted] = self.now
        width = round.drafted + 1
        if width not in self.verify:
            self.verify[width] = Recent()
            return
        if round.source != "head":
            self.copied.add(round.shallow_seconds, self.now)
        else:
            self.shallow.add(round.shallow_seconds / (round.levels + 1), self.now)
        if round.head_passes:
            self.head.add(round.head_seconds / round.head_passes, self.now)
        self.verify[width].add(round.verify_seconds, self.now)
        parts = round.shallow_seconds + round.head_seconds + round.verify_seconds
        self.rest.add(max(0.0, round.seconds - parts), self.now)

    def due(self, limit: int) -> int | None:
        """A number of drafts, at most `limit`, that should be timed in this round, or None. It counts as timed at once,
        because the caller is expected to try."""
        gap = min(GAP, max(32, self.now // 2))
        for drafts in PROBES:
            drafts = min(drafts, limit)
            if self.now - self.seen.setdefault(drafts, self.now) >= gap:
                self.seen[drafts] = self.now  # else a text that ends before so many drafts would probe in every round
                return drafts
        return None

    def rounds(self, limit: int) -> list[float]:
        """C(k) for k = 0..limit: the seconds of k+1 shallow passes, k head passes, one verification and the rest."""
        self._forget()
        shallow, verify = self.shallow.value(), self.verify_seconds(limit + 1)
        step = shallow + self.head.value()
        return [self.rest.value() + shallow + k * step + verify[k] for k in range(limit + 1)]

    def copied_rounds(self, limit: int) -> list[float]:
        """The seconds of a round of n copied drafts, n = 0..limit: one shallow pass of all rows, one verification and
        the rest. Until it was timed, the shallow pass counts as that of a single row."""
        self._forget()
        shallow = (self.copied if len(self.copied) else self.shallow).value()
        return [self.rest.value() + shallow + seconds for seconds in self.verify_seconds(limit + 1)]

    def row(self) -> float:
        """The seconds of one more row in a round's verification and in one of its shallow passes, which is assumed to
        take the same share more."""
        self._forget()
        _, two, three = self.verify_seconds(3)
        return (three - two) * (1 + self.shallow.value() / two) if two > 0 else 0.0

    def _forget(self) -> None:
        for part in (self.shallow, self.copied, self.head, self.rest, *self.verify.values()):
            part.forget(self.now)

    def verify_seconds(self, widest: int) -> list[float]:
        """Seconds of a verification of 1..widest tokens. If only single or only wider passes were timed, their estimate
        is used for both."""
        single = self.verify.get(1, Recent()).value()
        timed = [(len(times), width, times.value()) for width, times in self.verify.items() if width > 1 and times]
        # with a single time, a slow round cannot be told from a slow width
        timed = [point for point in timed if point[0] > 1] or timed
        if not timed:
            return [single] * widest
        total = sum([n for n, _, _ in timed])
        width = sum([n * w for n, w, _ in timed]) / total
        seconds = sum([n * t for n, _, t in timed]) / total
        spread = sum([n * (w - width) ** 2 for n, w, _ in timed])
        slope = sum([n * (w - width) * t for n, w, t in timed]) / spread if spread else 0.0
        slope = min(max(0.0, slope), seconds / width)
        line = [seconds + slope * (w - width) for w in range(1, widest + 1)]
        return [single or line[0], *line[1:]]
