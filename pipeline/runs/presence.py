"""Excludes processes from a stage of a run folder: one process runs it alone, or many share it.

Takes the folder stages/ of a run; gives context managers. A process that runs a stage alone holds a file lock
throughout. Processes that share a stage hold a claim each (claims.py), and take the lock only while they create it. So
a process that holds the lock and finds no claim knows that no other process is at the stage or can enter it. A claim
also names its host and process, for messages.
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
"""Seconds that a requeued Slurm job waits for locks that its previous start may still seem to hold."""
COMING = 60.0
"""Seconds that a process waits to join a shared stage while another has it alone, such as for --redo."""


class Presence:
    """The processes at the stages of one run, recorded as files in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.claims = Claims(folder / "claims")
        self.mine: dict[str, str] = {}
        """Claim -> stage, for the claims that this object holds."""

    @contextlib.contextmanager
    def alone(self, *stages: str) -> Iterator[None]:
        """Keep every other process from these stages during the block. Raises UserError if one is there, naming it."""
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
        """Be at the stage during the block, together with other processes. Raises UserError if one has it alone."""
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
        """Host and process id of every other living process at the stage."""
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
    """Seconds to wait for a lock.

    NFS keeps the locks of a dead node for a while, so a requeued Slurm job may start before they are released.
    """
    return RESTARTED if number("SLURM_RESTART_COUNT", 0) else 0.0
