"""Watches the processes of distill while they train together: which one is behind, which failed, which is gone.

Takes the place of this process, gives torch.distributed for as long as a block lasts. A thread of each process writes
into the store of rank 0 that the process is alive, which step it has finished and where in the code it is, and reads
the same of the others. It prints lines that name ranks, and ends a process that would wait for another one for ever.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch.distributed import DistError, PrefixStore, Store

from ..errors import LostError
from .launch import Place
from .rank_log import RankLog
from .rendezvous import Member, connect, described, ranks_of, rendezvous, start_group

BEAT = 1.0
"""Seconds between two signs of life."""
LOOK = 6.0
"""Seconds in which a living process shows one for certain, when something went wrong."""
SILENT = 120.0
"""Seconds without one after which a process counts as gone though nothing went wrong: a call may stop its threads."""
LEAVE = 15.0
"""Seconds for a main thread to end by itself; and for rank 0, whose store dies with it, to wait for the others."""
TOLD = 60.0
"""Seconds between two lines of a rank's log that say which step it has finished."""


@contextmanager
def watched_process_group(place: Place, device: torch.device, timeout: float, log: RankLog) -> Iterator["Watchdog"]:
    """Wait for all processes, start torch.distributed and the watch; both end with the block.

    Raises UserError if not all come (rendezvous.py), LostError if a process vanishes, SystemExit(1) if another one
    failed: that one shows the error.
    """
    store, members = rendezvous(place, device, timeout)
    if place.rank == 0 and place.world_size > 1:
        for line in described(members):
            print(f"distill: node {line}", flush=True)
    me = members[place.rank]
    log.line(f"all have come; this one is on {me.device} with {me.threads} CPU threads, {me.versions}")
    start_group(store, place, device, timeout)
    watchdog = Watchdog(place, members, timeout, log)
    failed = True
    try:
        watchdog.start()
        yield watchdog
        failed = False
    except Exception as error:
        watchdog.explain(error)
        raise
    finally:
        watchdog.stop()
        # Else a later run in this process would meet the old group. NCCL would wait here for what the others will
        # never send; the end of the process, which is near, aborts it.
        if not (failed and device.type == "cuda"):
            dist.destroy_process_group()


class Progress(Callback):
    """A Lightning callback that tells the watchdog which step this process has finished."""

    def __init__(self, watchdog: "Watchdog"):
        self.watchdog, self.told = watchdog, time.monotonic()

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.watchdog.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.watchdog.step = trainer.global_step
        if time.monotonic() - self.told > TOLD:
            self.told = time.monotonic()
            self.watchdog.log.line(f"step {trainer.global_step} is done")


class Signs:
    """The signs of life of all ranks, and since when each is the same."""

    def __init__(self, store: Store, world_size: int):
        self.store, self.keys = store, [f"sign {rank}" for rank in range(world_size)]
        self.seen = [(b"", 0.0)] * world_size

    def look(self) -> None:
        now = time.monotonic()
        found = self.store.multi_get(self.keys)
        self.seen = [old if sign == old[0] else (sign, now) for old, sign in zip(self.seen, found, strict=True)]

    def silent(self, seconds: float) -> list[int]:
        """Ranks that did not leave, and from which nothing came for so long."""
        since = time.monotonic() - seconds
        return [rank for rank, (sign, seen) in enumerate(self.seen) if sign != b"left" and seen < since]

    def present(self) -> list[int]:
        return [rank for rank, (sign, _) in enumerate(self.seen) if sign != b"left"]

    def at(self) -> dict[int, tuple[int, str]]:
        """Rank -> the last step that it has finished, and where in the code it is."""
        shown = {rank: self.seen[rank][0].decode().split(maxsplit=2) for rank in self.present()}
        return {rank: (int(step), where) for rank, (_, step, where) in shown.items()}


class Watchdog:
    """The watch of one process. If it is the only one, nothing is watched."""

    def __init__(self, place: Place, members: list[Member], timeout: float, log: RankLog):
        self.place, self.members, self.timeout, self.log = place, members, timeout, log
        self.step = 0
        """The last that this process has finished."""
        self.alone = place.world_size == 1
        self._count = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self.alone:
            return
        # A connection of its own: the one of torch.distributed may be waiting for something.
        self.store = PrefixStore(f"watch {self.place.attempt}", connect(self.place, self.timeout))
        self._show()
        self.store.wait([f"sign {rank}" for rank in range(self.place.world_size)])
        self._thread.start()

    def stop(self) -> None:
        """Show no more signs. Rank 0 waits for the others, so that they find the store as long as they look."""
        if self._thread.ident is None:
            return
        self._left.set()
        self._thread.join()
        with suppress(DistError):
            self.store.set(f"sign {self.place.rank}", "left")
            signs, deadline = self._signs(), time.monotonic() + LEAVE
            while self.place.rank == 0 and time.monotonic() < deadline:
                signs.look()
                if set(signs.present()) <= set(signs.silent(LOOK)):
                    break
                time.sleep(BEAT / 4)

    def explain(self, error: Exception) -> None:
        """Raises what this process should end with if `error` was caused by the end of another process."""
        if self._thread.ident is None:
            return
        try:
            if not _in_communication(error) or (cause := self._look_for_cause()) is None:
                self._fail(error)
                return
        except DistError:
            cause = LostError(self._are_gone([0]))
        raise cause from None

    def _look_for_cause(self) -> BaseException | None:
        """Why communication ended; None if nobody else failed and all are alive."""
        signs, deadline = self._signs(), time.monotonic() + LOOK + BEAT
        while time.monotonic() < deadline:
            signs.look()
            if (failure := self._failure()) is not None:
                print(f"distill: {failure}", file=sys.stderr, flush=True)
                return SystemExit(1)
            if silent := signs.silent(LOOK):
                return LostError(self._are_gone(silent))
            time.sleep(BEAT / 4)
        return None

    # ---- the thread

    def _run(self) -> None:
        signs, stall = self._signs(), Stall(self.timeout)
        end: tuple[str, int] | None = None  # why this process must end, and its exit code
        deadline = 0.0
        while not self._left.wait(BEAT):
            found = None
            try:
                self._show()
                signs.look()
                if failure := self._failure():
                    found = failure, 1
                elif silent := signs.silent(SILENT):
                    found = self._are_gone(silent), LostError.exit_code
                elif behind := stall.behind(signs.at()):
                    self._tell_stall(behind)
            except DistError:
                found = self._are_gone([0]), LostError.exit_code
            if end is None and found is not None:
                end, deadline = found, time.monotonic() + LEAVE
                self.log.line(end[0])
            if end is not None and time.monotonic() > deadline:
                self._end_here(*end)

    def _show(self) -> None:
        self._count += 1
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        where = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        self.store.set(f"sign {self.place.rank}", f"{self._count} {self.step} {where}")

    def _tell_stall(self, behind: str) -> None:
        self.log.line(behind)
        self.log.stacks()
        if self.place.rank == 0:
            print(f"distill: {behind}", file=sys.stderr, flush=True)

    def _end_here(self, why: str, code: int) -> None:
        """The main thread waits for what will never come, where no exception can reach it."""
        print(f"distill: {why}; rank {self.place.rank} ends", file=sys.stderr, flush=True)
        os._exit(code)

    # ---- who failed, who is gone

    def _fail(self, error: Exception) -> None:
        """The first to fail is the one that is named."""
        first = (str(error).strip() or "no message").splitlines()[0]
        text = f"{self.members[self.place.rank]} failed: {type(error).__name__}: {first}"
        self.store.compare_set("failed", "", json.dumps([self.place.rank, text]))

    def _failure(self) -> str | None:
        """What another rank said when it failed."""
        if not self.store.check(["failed"]):
            return None
        rank, text = json.loads(self.store.get("failed"))
        return None if rank == self.place.rank else text

    def _are_gone(self, ranks: list[int]) -> str:
        names = ", ".join(str(self.members[rank]) for rank in ranks)
        return f"{names} {'are' if len(ranks) > 1 else 'is'} gone without a word: killed, or the node is down"

    def _signs(self) -> Signs:
        return Signs(self.store, self.place.world_size)


def _in_communication(error: Exception) -> bool:
    """Whether the error is of a kind that the end of another process gives rise to."""
    return isinstance(error, DistError) or "gloo" in str(error).lower()


class Stall:
    """Notices when no rank has finished a step for too long."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.steps: list[int] = []
        self.since, self.told = time.monotonic(), False

    def behind(self, at: dict[int, tuple[int, str]]) -> str | None:
        """Once for each standstill of more than `timeout` seconds: which ranks are where."""
        steps = [step for step, _ in at.values()]
        if steps != self.steps:
            self.steps, self.since, self.told = steps, time.monotonic(), False
        if self.told or time.monotonic() - self.since < self.timeout:
            return None
        self.told = True
        places = sorted(set(at.values()), key=lambda place: [rank for rank in at if at[rank] == place])
        where = "; ".join(
            f"{ranks_of(rank for rank in at if at[rank] == (step, line))} after step {step} in {line}"
            for step, line in places
        )
        return (
            f"no step was finished for machine.timeout={self.timeout:g} s: {where}. Who is where the others are not "
            "keeps them waiting; the stacks of each rank are in its log"
        )
