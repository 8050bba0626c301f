"""Who is at which stage of a run folder: one process alone, or many that share the work.

Takes the folder stages/ of a run, gives context managers. A process that is alone at a stage holds a file lock for as
long as it works there. Processes that share a stage each hold a claim (claims.py) and take the lock only for the moment
in which they come; so whoever holds the lock and finds no claim knows that nobody is there, and that nobody will come.
A claim also says which host and process it is, for messages.
"""

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError
from ..launchers import number
from .claims import Claims
from .files import who

RESTARTED = 180.0
"""Seconds that a job which Slurm started again waits for what its first start may seem to hold."""
COMING = 60.0
"""Seconds that a process which shares a stage waits for one that is alone at it, such as one that removes it."""


class Presence:
    """The processes at the stages of one run, as files in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.claims = Claims(folder / "claims")
        self.mine: dict[str, str] = {}
        """Name of a claim -> its stage, of those held through this object."""

    @contextlib.contextmanager
    def alone(self, *stages: str) -> Iterator[None]:
        """No other process is at any of the stages while the block runs. Raises UserError that names one which is."""
        with contextlib.ExitStack() as held:
            for stage in stages:
                self._lock(held, stage, _patience())
            for stage in stages:
                if others := self._at(stage):
                    raise self._busy(stage, others)
            for stage in stages:
                held.enter_context(self._claim(stage))
            yield

    @contextlib.contextmanager
    def shared(self, stage: str) -> Iterator[None]:
        """This process is at the stage while the block runs, and others may be too."""
        if stage in self.mine.values():
            yield
            return
        with contextlib.ExitStack() as held:
            with contextlib.ExitStack() as coming:
                self._lock(coming, stage, COMING + _patience())
                held.enter_context(self._claim(stage))
            yield

    def _lock(self, held: contextlib.ExitStack, stage: str, patience: float) -> None:
        lock = FileLock(self.folder / f".{stage}.lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise self._busy(stage, self._at(stage)) from None
        held.callback(lock.release)

    @contextlib.contextmanager
    def _claim(self, stage: str) -> Iterator[None]:
        name = f"{stage}@{who()}-{secrets.token_hex(2)}"
        with self.claims.hold(name):
            self.mine[name] = stage
            try:
                yield
            finally:
                del self.mine[name]

    def _at(self, stage: str) -> list[str]:
        """Host and process of every other one that is at the stage; those that are gone are not."""
        holders = self.claims.holders()
        return [
            f"{holder.host}, process {holder.pid}, for {holder.since:.0f} s"
            for name, holder in holders.items()
            if name.partition("@")[0] == stage and name not in self.mine and not holder.is_gone
        ]

    def _busy(self, stage: str, others: list[str]) -> UserError:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        named = f" ({'; '.join(others[:3])}{more})" if others else ""
        return UserError(
            f"{self.folder.parent}: another process is at stage {stage} of it{named}. Wait until it ends or stop "
            "it, or give another run.name."
        )


def _patience() -> float:
    """Seconds to wait for a lock. A job that Slurm started again may come before the file system has noticed that its
    first node is dead: NFS keeps the locks of a client for a while."""
    return RESTARTED if number("SLURM_RESTART_COUNT", 0) else 0.0
