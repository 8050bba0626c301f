"""A stopwatch for the parts of repeated work: the caller marks the end of each part, and reads all seconds at the end.

On a GPU, marks are events in its stream, so that the host waits only when the result is read.
"""

import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Sums the time between marks by the name of the part that each mark ends.

    moment: records a point in time. since: (after, before) -> seconds between two points in time.
    """

    def __init__(self, moment: Callable[[], Any], since: Callable[[Any, Any], float] = operator.sub):
        self._moment, self._since = moment, since
        self.start()

    def start(self) -> None:
        """Drop all marks and start measuring now."""
        self._marks: list[tuple[str, Any]] = [("", self._moment())]

    def mark(self, part: str) -> None:
        """Count the time since the previous mark (or the start) as time of `part`."""
        self._marks.append((part, self._moment()))

    def read(self) -> defaultdict[str, float]:
        """Seconds of each part since the start. On a GPU this waits until the stream has reached the last mark."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for (_, before), (part, after) in pairwise(self._marks):
            seconds[part] += self._since(after, before)
        return seconds


def stopwatch(devices: Iterable[torch.device], event: Callable[..., Any] = torch.cuda.Event) -> Stopwatch:
    """The stopwatch for work on `devices`.

    On a single GPU it uses events in the GPU's stream. Otherwise it reads the host's clock, and waits for every GPU at
    every mark, because events of two devices cannot be subtracted.
    """
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
    return before.elapsed_time(after) / 1000  # elapsed_time gives milliseconds


def _now(devices: list[torch.device]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter()
