"""Claims: which process works on which piece of work, for processes on any number of machines.

Takes a folder that all processes see; gives claims. A claim is a file that only one process can create. Its holder
touches the file regularly, so the claim of a killed process is recognised by its age and taken over. Claims only save
work: if two processes hold the same one (a clock jumped, a process was stopped for an hour), no result is lost or
mixed, as long as results are put in place by files.place_once.
"""

import contextlib
import json
import math
import os
import random
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import cannot_write, place_once, temporary_of

BEAT = 5.0
"""Seconds between two touches of a claim's file."""
SILENT = 120.0
"""Seconds without a touch after which the holder of a claim on another machine counts as gone."""


@dataclass(frozen=True)
class Holder:
    """The holder of a claim, as its file says, and the claim's age."""

    host: str
    pid: int
    born: str
    """When the process started, by its system's count: it tells processes apart that had the same id."""
    since: float
    """Seconds since the claim was created."""
    silent: float
    """Seconds since it was last touched."""

    @property
    def is_gone(self) -> bool:
        """True if the process is known to be dead, or has not touched its claim for too long."""
        if self.host == socket.gethostname():
            return _born(self.pid) != self.born
        return self.silent > SILENT


class Claims:
    """The claims in one folder, which is created if it does not exist."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        self._clock = (0.0, -math.inf)
        """The file system's time at the last query, and time.monotonic() at that moment."""

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Context manager: gives True and holds the claim `name`, or gives False if a living process holds it."""
        path, mine = self.folder / name, json.dumps(self.me | {"made": time.time()})
        if not self._create(path, mine) and not (self._take_over(path) and self._create(path, mine)):
            yield False
            return
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, done), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            done.set()
            beat.join()
            with contextlib.suppress(FileNotFoundError):
                if path.read_text() == mine:  # otherwise another process has taken it over
                    path.unlink()

    def names(self) -> set[str]:
        """The names of all claims, of living and dead processes alike. It lists the folder and opens no file."""
        try:
            return {name for name in os.listdir(self.folder) if not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def holders(self, look_only: bool = False) -> dict[str, Holder]:
        """Claim -> holder, for all claims. `look_only` takes ages from this machine's clock and writes no file."""
        now = time.time() if look_only else None
        return {name: h for name in sorted(self.names()) if (h := self._holder(self.folder / name, now)) is not None}

    def free_one(self, names: Iterable[str]) -> bool:
        """Check one of these claims; True if its holder was gone and the claim is free now.

        A process that waits for many claims calls this repeatedly: the cost of a call does not grow with their number.
        """
        found = sorted(names)
        return bool(found) and self._take_over(self.folder / random.choice(found))

    def _create(self, path: Path, text: str) -> bool:
        if path.exists():  # waiting processes ask repeatedly: that should write nothing
            return False
        temporary = self._temporary(path.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text)
            return place_once(temporary, path)
        except OSError as error:
            raise cannot_write(path, error) from None

    def _take_over(self, path: Path) -> bool:
        """Remove a claim whose holder is gone. It is renamed first, so that only one of several processes succeeds."""
        holder = self._holder(path)
        if holder is None:
            return True
        if not holder.is_gone:
            return False
        aside = self._temporary(f"gone-{path.name}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return True
        aside.unlink(missing_ok=True)
        return True

    def _holder(self, path: Path, now: float | None = None) -> Holder | None:
        """The holder of the claim at `path`; None if there is no claim. `now` replaces the file system's time."""
        now = self._now() if now is None else now
        try:
            touched = path.stat().st_mtime
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            said = json.loads(text)
            host, pid, born, made = str(said["host"]), int(said["pid"]), str(said["born"]), float(said["made"])
        except (ValueError, KeyError, TypeError):  # another version wrote it: its age decides
            host, pid, born, made = "", 0, "", touched
        return Holder(host, pid, born, max(0.0, time.time() - made), max(0.0, now - touched))

    def _now(self) -> float:
        """The file system's time, since the clocks of machines that share it may differ.

        A query writes a file, so the time is extrapolated between occasional queries.
        """
        at = time.monotonic()
        if at - self._clock[1] > SILENT:
            clock = self._temporary("clock")
            try:
                clock.touch()
                self._clock = clock.stat().st_mtime, at
                clock.unlink()
            except OSError:  # the folder is read-only or does not exist
                return time.time()
        return self._clock[0] + at - self._clock[1]

    def _temporary(self, name: str) -> Path:
        return temporary_of(self.folder / name)


def left_behind(temporary: Path) -> bool:
    """Whether the process that wrote under this temporary name (files.who) is dead, or wrote nothing for too long."""
    host, _, pid = temporary.name.rpartition("-")
    if host.endswith(f"@{socket.gethostname()}") and pid.isdecimal():
        return not _born(int(pid))
    try:
        return time.time() - temporary.stat().st_mtime > SILENT
    except FileNotFoundError:
        return False


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _born(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; empty if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()  # from field 3 on: the name before may hold blanks and brackets
        return "" if fields[0] in "ZX" else fields[19]  # Z, X: dead, but not yet reaped by its parent
    except (OSError, IndexError):
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # a system without /proc only tells whether it is alive
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
