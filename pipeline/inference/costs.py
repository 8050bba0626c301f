"""Seconds of each part of a round, estimated from the rounds themselves so that slow rounds do not decide.

Takes finished rounds with their times; gives C(k), the seconds of a round of k drafts, and says which number of drafts
has not been timed for long. docs/control.md gives the reasons and what was measured.
"""

from bisect import bisect_left, insort
from collections import deque

from .rounds import Round

PROBES = (4, 0, 1)
"""Numbers of drafts that are timed again from time to time: both ends of the line of verification, and the single
token."""
WINDOW = 32
"""Times kept of each part, and of verification at each width."""
GAP = 128
"""Rounds after which one of PROBES is due again, when it was not drafted anyway. Less at first: half the rounds so
far, 32 at least."""
EXPIRY = 2 * GAP
"""Rounds after which a time is forgotten, so that estimates follow the machine."""


class Recent:
    """Trimmed mean of the last times of one part: the slowest third is left out, of two the slower one.

    What disturbs a measured time can only make it longer (another process, a kernel that is compiled), so trimming is
    one-sided. From the second time on, one slow round has no effect, however slow it is.
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

    def forget(self, now: int) -> None:
        while self.times and self.times[0][0] < now - EXPIRY:
            self._drop_oldest()

    def value(self) -> float:
        """Seconds; 0 before the first time."""
        kept = max(1, 2 * len(self.times) // 3)
        return sum(self.ordered[:kept]) / kept

    def _drop_oldest(self) -> None:
        del self.ordered[bisect_left(self.ordered, self.times.popleft()[1])]


class Costs:
    """Estimates from recent rounds: the mean of each part, and of verification as a function of the width.

    Verification of one token, for which there are kernels of its own, is a number; that of more is a line
    a + b * width with a >= 0 and b >= 0: a wider pass takes no less in all and no more per token. So no estimate can be
    negative, and none can grow without bound. (A synthetic benchmark in place of the rounds is a third off on CPUs:
    caches are warm there and cold here.)
    """

    def __init__(self) -> None:
        self.shallow, self.head, self.rest = Recent(), Recent(), Recent()
        """Of one shallow pass, one pass of the exit head, and all that is neither of them nor verification."""
        self.verify: dict[int, Recent] = {}
        """Of a verification, by its width."""
        self.now = 0
        """Rounds so far."""
        self.seen: dict[int, int] = {}
        """Round in which each number of drafts was last made, or asked for in vain."""

    def observe(self, round: Round) -> None:
        """Learn from a round, unless it is the first of its width: that one may have compiled or chosen kernels."""
        self.now += 1
        self.seen[round.drafted] = self.now
        width = round.drafted + 1
        if width not in self.verify:
            self.verify[width] = Recent()
            return
        self.shallow.add(round.shallow_seconds / width, self.now)
        if round.head_passes:
            self.head.add(round.head_seconds / round.head_passes, self.now)
        self.verify[width].add(round.verify_seconds, self.now)
        parts = round.shallow_seconds + round.head_seconds + round.verify_seconds
        self.rest.add(max(0.0, round.seconds - parts), self.now)

    def due(self, limit: int) -> int | None:
        """A number of drafts, at most `limit`, that should be timed now; the caller is taken to try."""
        gap = min(GAP, max(32, self.now // 2))
        for drafts in PROBES:
            drafts = min(drafts, limit)
            if self.now - self.seen.setdefault(drafts, self.now) >= gap:
                self.seen[drafts] = self.now  # a text that ends sooner must not make every round a probe
                return drafts
        return None

    def rounds(self, limit: int) -> list[float]:
        """C(k), seconds of a round of k drafts, for k = 0..limit: k+1 shallow passes, k of the head, one verify."""
        for part in (self.shallow, self.head, self.rest, *self.verify.values()):
            part.forget(self.now)
        shallow, verify = self.shallow.value(), self.verify_seconds(limit + 1)
        step = shallow + self.head.value()
        return [self.rest.value() + shallow + k * step + verify[k] for k in range(limit + 1)]

    def verify_seconds(self, widest: int) -> list[float]:
        """Seconds of a verification of 1..widest tokens; where one kind of pass was not timed, the other stands in."""
        single = self.verify.get(1, Recent()).value()
        timed = [(len(times), width, times.value()) for width, times in self.verify.items() if width > 1 and times]
        # a width that was timed once only cannot tell a slow round from a slow width
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
