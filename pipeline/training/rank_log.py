"""The log of each process of distill, such as logs/distill-rank-00003.log, with a time on each line.

Takes the place of a process; gives a RankLog for the duration of a block. The log also records all that the process
prints meanwhile, including warnings and errors, and how the block ended.
"""

import contextlib
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import LostError, UserError
from .launch import Place


class RankLog:
    """Writes lines with their time to disk at once. On a full disk lines are lost without an error."""

    def __init__(self, file: TextIO):
        self.file = file

    def line(self, text: str) -> None:
        if text.strip():
            with contextlib.suppress(OSError):
                self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def stacks(self) -> None:
        """Write the stack of every thread of this process."""
        faulthandler.dump_traceback(self.file)


class Tee:
    """A stream that also writes its lines to a log; of an overwritten line, as of a progress bar, the last state."""

    def __init__(self, stream: Any, log: RankLog):
        self.stream, self.log, self.rest = stream, log, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.log.line(line.rpartition("\r")[2])
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def rank_log(folder: Path, place: Place) -> Iterator[RankLog]:
    """Context manager: the log of this process during the block, appended to the file of earlier starts."""
    folder.mkdir(exist_ok=True)
    with (folder / f"distill-rank-{place.rank:05d}.log").open("a", buffering=1) as file:
        log = RankLog(file)
        who = f"rank {place.rank} of {place.world_size} on {place.node}, process {os.getpid()}"
        log.line(f"start {place.attempt}: {who}")
        out, err = Tee(sys.stdout, log), Tee(sys.stderr, log)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
                yield log
        except (UserError, LostError, SystemExit, KeyboardInterrupt) as error:
            log.line(f"end: {type(error).__name__}: {error}")
            raise
        except BaseException:
            file.write(traceback.format_exc())
            raise
        else:
            log.line("end")
