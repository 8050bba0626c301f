"""One process at work on a folder of shards: makes what is missing, shows how far it is, and measures its speed.

Takes a folder (shards.py) and, from the subclass, how a shard is made and written; gives the tokens/s of this process.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .shards import Shards, made

Report = Callable[[int], None]
"""Told now and then while a shard is made: tokens that are new since the last call."""


class ShardWorker(ABC):
    """What a stage whose shards many processes share does in each of them."""

    unit: str
    """What the progress bar counts, such as `prompt`."""

    def __init__(self, shards: Shards, by: dict[str, Any]):
        """`by`: what decides how sums are rounded here (backbones.load.rounds_by), recorded with each shard."""
        self.shards, self.by = shards, by

    @abstractmethod
    def total(self) -> int:
        """How many units all shards have together."""

    @abstractmethod
    def units(self, entry: dict[str, Any]) -> int:
        """How many units the shard of this entry has."""

    @abstractmethod
    def make(self, index: int, name: str, report: Report) -> Callable[[dict[str, Any]], None]:
        """Make the shard of this number, and give what writes it once it is told who made it."""

    def work(self) -> float:
        """Make what is missing, together with whoever else is at it, until all is there; returns the tokens/s of this
        process (0 if there was nothing left for it)."""
        started, tokens = time.time(), 0
        bar = tqdm(total=self.total(), desc=self.shards.stage, unit=self.unit, unit_scale=self.unit == "token")

        def report(new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / (time.time() - started):.0f} tokens/s", refresh=False)
            bar.update(0)

        def make(index: int, name: str) -> None:
            began = time.time()
            write = self.make(index, name, report)
            write(made(began, self.by))

        self.shards.compare(self.by)
        with bar:
            for entry in self.shards.complete(make):
                bar.update(self.units(entry))
        return round(tokens / (time.time() - started), 1) if tokens else 0.0
