"""Who works on what: claims of numbered pieces of work, by any number of processes on any number of machines.

Takes a folder that all of them see, gives claims. A claim is a file that one process alone can put there; while it
works it touches the file again and again, so that what a killed process held can be told and taken over. Claims only
save work: two processes that hold the same one (a clock that jumps, a process stopped for an hour) do no harm where
results are put in place once and for all (files.place_once).
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
"""Seconds between two touches of a claim."""
SILENT = 120.0
"""Seconds without a touch after which a claim of another machine counts as left behind."""


@dataclass(frozen=True)
class Holder:
    """Who holds a claim, as its file says, and for how long it was silent."""

    host: str
    pid: int
    born: str
    """When the process began, as its system counts: process ids are used again."""
    since: float
    """Seconds since the claim was made."""
    silent: float
    """Seconds since it was last touched."""

    @property
    def is_gone(self) -> bool:
        """The process is known to be dead, or was silent for too long."""
        if self.host == socket.gethostname():
            return _born(self.pid) != self.born
        return self.silent > SILENT


class Claims:
    """The claims in one folder, made if it is not there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        self._clock = (0.0, -math.inf)
        """The file system's time when it was last asked for, and when that was by time.monotonic()."""

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """True while the block holds the claim `name`; False if another process does, and is alive."""
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
                if path.read_text() == mine:  # else another took it for left behind
                    path.unlink()

    def names(self) -> set[str]:
        """The claims that there are, of processes alive or gone: one look at the folder, whatever is in it."""
        try:
            return {name for name in os.listdir(self.folder) if not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def holders(self, look_only: bool = False) -> dict[str, Holder]:
        """Name -> holder of every claim there is. `look_only`: by this machine's clock, and nothing is written."""
        now = time.time() if look_only else None
        return {name: h for name in sorted(self.names()) if (h := self._holder(self.folder / name, now)) is not None}

    def free_one(self, names: Iterable[str]) -> bool:
        """Look at one of these claims, whichever; true if its holder was gone and it is free now.

        Who waits for many calls this again and again: a call takes the same time however many they are.
        """
        found = sorted(names)
        return bool(found) and self._take_over(self.folder / random.choice(found))

    def _create(self, path: Path, text: str) -> bool:
        if path.exists():  # who waits for others asks again and again: no write for that
            return False
        temporary = self._temporary(path.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text)
            return place_once(temporary, path)
        except OSError as error:
            raise cannot_write(path, error) from None

    def _take_over(self, path: Path) -> bool:
        """Remove a claim whose holder is gone. Renaming it first lets one of several takers win."""
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
        """None if the claim is not there. `now`: the time, if not the file system's."""
        now = self._now() if now is None else now
        try:
            touched = path.stat().st_mtime
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            said = json.loads(text)
            host, pid, born, made = str(said["host"]), int(said["pid"]), str(said["born"]), float(said["made"])
        except (ValueError, KeyError, TypeError):  # not by this code: wait until it is silent
            host, pid, born, made = "", 0, "", touched
        return Holder(host, pid, born, max(0.0, time.time() - made), max(0.0, now - touched))

    def _now(self) -> float:
        """The file system's time, as the clocks of machines that share it may differ. It is asked for once in a while:
        that takes a file."""
        at = time.monotonic()
        if at - self._clock[1] > SILENT:
            clock = self._temporary("clock")
            try:
                clock.touch()
                self._clock = clock.stat().st_mtime, at
                clock.unlink()
            except OSError:  # a folder that can only be read, or none
                return time.time()
        return self._clock[0] + at - self._clock[1]

    def _temporary(self, name: str) -> Path:
        return temporary_of(self.folder / name)


def left_behind(temporary: Path) -> bool:
    """Whether the process that wrote under this temporary name (files.who) is dead, or was silent for too long."""
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
    """When a process of this machine began; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()  # from field 3 on; the name before it may hold blanks and brackets
        return "" if fields[0] in "ZX" else fields[19]  # dead already, and only its parent has not noticed
    except (OSError, IndexError):
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # a system without /proc: alive or not is all that can be told
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
