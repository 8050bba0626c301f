"""A worker of generate or cache that fails at a chosen moment, for the tests of interrupted work.

Takes the manner of failure and the words of the command line. `call:K:before` and `call:K:after` kill the process
before or after its K-th call of link, replace, rename, unlink or fsync on a shared folder; `seconds:S` kills it S
seconds after it began its first shard of responses; `disk:BYTES` limits the size of every file, which a writer sees
like a full disk; `none` does nothing.
"""

import gc
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import forked

FOLDERS = ("responses", "cache")
CALLS = ("link", "replace", "rename", "unlink", "fsync")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(manner: str) -> None:
    kind, _, rest = manner.partition(":")
    if kind == "call":
        number, _, when = rest.partition(":")
        count_down = [int(number)]
        for name in CALLS:
            setattr(os, name, _fatal(getattr(os, name), count_down, when))
    elif kind == "seconds":
        from pipeline.generation.shard_answers import AnswerWorker

        inner = AnswerWorker.answer_shard

        def answer_shard(self, *args):
            AnswerWorker.answer_shard = inner
            timer = threading.Timer(float(rest), die)
            timer.daemon = True
            timer.start()
            return inner(self, *args)

        AnswerWorker.answer_shard = answer_shard
    elif kind == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest), int(rest)))


def _fatal(call, count_down: list[int], when: str):
    def wrapped(*args, **kwargs):
        ours = not args or isinstance(args[0], int) or any(part in FOLDERS for part in Path(args[0]).parts)
        count_down[0] -= ours
        if ours and count_down[0] == 0 and when == "before":
            die()
        result = call(*args, **kwargs)
        if ours and count_down[0] == 0:
            die()
        return result

    return wrapped


def main(manner: str, words: list[str]) -> int:
    arm(manner)
    from pipeline.cli import main

    return main(words)


class Log:
    """Collects the output of all workers through a pipe, which the limit on file sizes does not affect."""

    def __init__(self):
        self.read_end, self.write_end = os.pipe()
        self.parts: list[bytes] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while part := os.read(self.read_end, 65536):
            self.parts.append(part)

    def __str__(self) -> str:
        return b"".join(self.parts).decode(errors="replace")


def start(manner: str, words: list[str], log: Log) -> int:
    """Start a worker in a forked process, which need not import torch again; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # collecting the parent's objects, such as a process group, would wait for threads of the parent
    forked.own_progress_bars()
    code = 1
    try:
        os.dup2(log.write_end, 1), os.dup2(log.write_end, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)  # not pytest's
        code = main(manner, words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main(sys.argv[1], sys.argv[2:]))
