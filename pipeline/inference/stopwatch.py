"""How long the parts of a round take, by marks between them, without waiting for a GPU more often than decoding does.
Knows nothing of what the parts are."""

import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """`moment` notes a point in time, `since` gives the seconds from the second of two to the first."""

    def __init__(self, moment: Callable[[], Any], since: Callable[[Any, Any], float] = operator.sub):
        self._moment, self._since = moment, since
        self.start()

    def start(self) -> None:
        self._marks: list[tuple[str, Any]] = [("", self._moment())]

    def mark(self, part: str) -> None:
        """What was begun since the mark before belongs to `part`."""
        self._marks.append((part, self._moment()))

    def read(self) -> defaultdict[str, float]:
        """Seconds of each part since the start. Waits until the last mark is reached."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for (_, before), (part, after) in pairwise(self._marks):
            seconds[part] += self._since(after, before)
        return seconds


def stopwatch(devices: Iterable[torch.device], event: Callable[..., Any] = torch.cuda.Event) -> Stopwatch:
    """On one GPU by events in its stream, which the host sets and runs ahead of. Else by the host's clock, with several
    devices behind a wait for every GPU at every mark, since events of two cannot be subtracted."""
    used = set(devices)
    cuda = [device for device in used if device.type == "cuda"]
    if len(used) == len(cuda) == 1:
        return Stopwatch(partial(_passed, event, *cuda), _seconds)
    return Stopwatch(partial(_now, cuda))


def _passed(event: Callable[..., Any], device: torch.device) -> Any:
    (mark := event(enable_timing=True)).record(torch.cuda.current_stream(device))
    return mark


def _seconds(after: Any, before: Any) -> float:
    after.synchronize()
    return before.elapsed_time(after) / 1000  # of milliseconds


def _now(devices: list[torch.device]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter()
