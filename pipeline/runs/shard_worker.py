"""The loop of one process over a folder of shards: it makes missing shards, shows progress and measures its speed.

Takes a folder (shards.py) and, from the subclass, how to make and write a shard; gives the tokens/s of this process.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from .shards import Shards, made


class Report(Protocol):
    def __call__(self, new_tokens: int, units: int = 0) -> None:
        """Called from time to time while a shard is made, with the number of new tokens since the last call, and of
        units that are done, where that is known before the shard's end."""


class ShardWorker(ABC):
    """Base class for the work of one process on the shards of a shared stage."""

    unit: str
    """What the progress bar counts, such as `prompt`."""

    def __init__(self, shards: Shards, by: dict[str, Any]):
        """`by` is recorded with each shard: device and versions that decide rounding (backbones.load.rounds_by)."""
        self.shards, self.by = shards, by

    @abstractmethod
    def total(self) -> int:
        """Number of units of all shards together."""

    @abstractmethod
    def units(self, entry: dict[str, Any]) -> int:
        """Number of units of one shard, from its entry."""

    @abstractmethod
    def make(self, index: int, name: str, report: Report) -> Callable[[dict[str, Any]], None]:
        """Compute the shard `index`; return a function that writes it, given the record of how it was made."""

    def work(self) -> float:
        """Make missing shards, together with other processes, until all exist.

        Returns the tokens/s of this process, 0 if it made no shard.
        """
        started, tokens, early = time.time(), 0, 0
        bar = tqdm(total=self.total(), desc=self.shards.stage, unit=self.unit, unit_scale=self.unit == "token")

        def report(new_tokens: int, units: int = 0) -> None:
            nonlocal tokens, early
            tokens, early = tokens + new_tokens, early + units
            bar.set_postfix_str(f"{tokens / (time.time() - started):.0f} tokens/s", refresh=False)
            bar.update(units)

        def make(index: int, name: str) -> None:
            began = time.time()
            write = self.make(index, name, report)
            write(made(began, self.by))

        self.shards.compare(self.by)
        with bar:
            for entry in self.shards.complete(make):
                units = self.units(entry)
                counted = min(early, units)
                early -= counted
                bar.update(units - counted)
        return round(tokens / (time.time() - started), 1) if tokens else 0.0
