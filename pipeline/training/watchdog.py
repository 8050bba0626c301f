"""Watches the processes of distill during training, and names ranks that are behind, failed or gone.

Takes the place of this process; gives torch.distributed for the duration of a block. A thread in each process writes a
heartbeat to the store of rank 0, with the last finished step and the current code position, and reads those of the
others. It prints lines that name ranks, and ends a process that would otherwise wait for a lost one for ever.
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
"""Seconds between two heartbeats."""
LOOK = 6.0
"""Seconds without a heartbeat after which a process counts as gone once communication has failed."""
SILENT = 120.0
"""Seconds without a heartbeat after which a process counts as gone otherwise: a long call may block its threads."""
LEAVE = 15.0
"""Seconds that a main thread has to end by itself, and that rank 0, which hosts the store, waits for the others."""
TOLD = 60.0
"""Seconds between two lines in a rank's log with its last finished step."""


@contextmanager
def watched_process_group(place: Place, device: torch.device, timeout: float, log: RankLog) -> Iterator["Watchdog"]:
    """Context manager: waits for all processes, starts torch.distributed and the watchdog, and ends both.

    Raises UserError if a process is missing (rendezvous.py), LostError if one vanishes later, and SystemExit(1) if
    another one failed, which shows the error itself.
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
        # A later run in this process needs a new group. After a failure NCCL would wait here for the other ranks for
        # ever; there the end of the process aborts the group. Only rank 0 has later runs: of the others the group
        # lasts until their process ends (cli.process), as taking gloo's down has aborted one that had done its work.
        ends_now = device.type != "cuda" if failed else place.rank == 0
        if ends_now:
            dist.destroy_process_group()


class Progress(Callback):
    """A Lightning callback that reports each finished step to the watchdog."""

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
    """The last heartbeat of every rank, and when it changed."""

    def __init__(self, store: Store, world_size: int):
        self.store, self.keys = store, [f"sign {rank}" for rank in range(world_size)]
        self.seen = [(b"", 0.0)] * world_size

    def look(self) -> None:
        now = time.monotonic()
        found = self.store.multi_get(self.keys)
        self.seen = [old if sign == old[0] else (sign, now) for old, sign in zip(self.seen, found, strict=True)]

    def silent(self, seconds: float) -> list[int]:
        """Ranks that did not leave and whose heartbeat has not changed for `seconds`."""
        since = time.monotonic() - seconds
        return [rank for rank, (sign, seen) in enumerate(self.seen) if sign != b"left" and seen < since]

    def present(self) -> list[int]:
        return [rank for rank, (sign, _) in enumerate(self.seen) if sign != b"left"]

    def at(self) -> dict[int, tuple[int, str]]:
        """Rank -> (last finished step, code position), for the ranks that did not leave."""
        shown = {rank: self.seen[rank][0].decode().split(maxsplit=2) for rank in self.present()}
        return {rank: (int(step), where) for rank, (_, step, where) in shown.items()}


class Watchdog:
    """The watchdog of one process. A process that is the only one is not watched."""

    def __init__(self, place: Place, members: list[Member], timeout: float, log: RankLog):
        self.place, self.members, self.timeout, self.log = place, members, timeout, log
        self.step = 0
        """The last step that this process has finished."""
        self.alone = place.world_size == 1
        self._count = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self.alone:
            return
        # It has its own connection, since that of torch.distributed may be blocked.
        self.store = PrefixStore(f"watch {self.place.attempt}", connect(self.place, self.timeout))
        self._show()
        self.store.wait([f"sign {rank}" for rank in range(self.place.world_size)])
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat. Rank 0 waits for the others to leave, as they need its store."""
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
        """Raises LostError or SystemExit if `error` results from another process's end; else announces `error`."""
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
        """The exception for the failed or lost rank that ended communication; None if all others are alive."""
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
        """End this process at once: its main thread is blocked in a call that no exception can interrupt."""
        print(f"distill: {why}; rank {self.place.rank} ends", file=sys.stderr, flush=True)
        os._exit(code)

    # ---- failed and lost ranks

    def _fail(self, error: Exception) -> None:
        """Announce the failure of this rank, unless another one has announced its own."""
        first = (str(error).strip() or "no message").splitlines()[0]
        text = f"{self.members[self.place.rank]} failed: {type(error).__name__}: {first}"
        self.store.compare_set("failed", "", json.dumps([self.place.rank, text]))

    def _failure(self) -> str | None:
        """The failure that another rank announced, or None."""
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
    """Whether the error is of a kind that another process's end can cause."""
    return isinstance(error, DistError) or "gloo" in str(error).lower()


class Stall:
    """Detects that no rank has finished a step for longer than `timeout` seconds."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.steps: list[int] = []
        self.since, self.told = time.monotonic(), False

    def behind(self, at: dict[int, tuple[int, str]]) -> str | None:
        """A line on the position of every rank, once for each stall; None otherwise. `at`: see Signs.at."""
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
            f"no step was finished for machine.timeout={self.timeout:g} s: {where}. The others wait for the ranks "
            "that stand elsewhere; the stacks of each rank are in its log"
        )
