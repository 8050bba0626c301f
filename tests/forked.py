"""Processes that begin with torch imported: forked off a server that has imported it once and does nothing else.

Takes the command line of a Python process; gives what subprocess gives for it. The import of torch and of what
transformers takes of it is 5 of the 8 seconds of a process that decodes five texts, so tests that start many
use this. It is for processes that only have to be other ones: where a test asks what a fresh interpreter does or may
import, it starts one by subprocess. Tests that fork many processes off their own are `apart`.
"""

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CalledProcessError, CompletedProcess, TimeoutExpired
from typing import Any

__all__ = ["CalledProcessError", "Popen", "run"]  # of subprocess, in whose place tests put this module

SPAWN = multiprocessing.get_context("spawn")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor"])
"""Nothing that reads the environment when it is imported (huggingface_hub, transformers) or starts a thread."""
PATH = tuple(sys.path)
"""Of before the first test: transformers adds the folder of its modules' cache, in which a child would then look for
those of its own."""


class Popen:
    """As subprocess.Popen, in a session of its own. `argv` is an interpreter, perhaps -P, then a script, -m and a
    module, or -c and code, then words; output is appended to files."""

    def __init__(
        self,
        argv: list[str],
        *,
        env: Mapping[str, str],
        cwd: Path | str = ".",
        stdin: Path | str = os.devnull,
        stdout: Path | str = os.devnull,
        stderr: Path | str = os.devnull,
    ):
        files = [str(Path(file).absolute()) for file in (stdin, stdout, stderr)]
        target = (PATH, argv, dict(env), str(Path(cwd).absolute()), files)
        self._process = CONTEXT.Process(target=_main, args=target, daemon=True)
        self._process.start()
        self.args, self.pid = argv, self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise TimeoutExpired(self.args, timeout or 0)
        return code


def run(
    argv: list[str], *, env: Mapping[str, str], cwd: Path | str = ".", input: str = "", check: bool = False, **_: Any
) -> CompletedProcess:
    """As subprocess.run(..., capture_output=True, text=True)."""
    with tempfile.TemporaryDirectory() as folder:
        stdin, stdout, stderr = (Path(folder, name) for name in ("stdin", "stdout", "stderr"))
        stdin.write_text(input)
        process = Popen(argv, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)
        done = CompletedProcess(argv, process.wait(), stdout.read_text(), stderr.read_text())
    if check:
        done.check_returncode()
    return done


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """A test that forks runs in a fresh process, whose children end with it. Its fixtures must be picklable.

    A process that has had threads, such as OpenMP's or a server's, may leave their locks behind in what is forked off
    it, which then waits for ever.
    """

    @functools.wraps(test)
    def in_a_fresh_process(**fixtures: Any) -> None:
        process = SPAWN.Process(target=_call, args=(test.__module__, test.__name__, fixtures))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.exitcode == 0, "the test failed in its own process: see stderr"

    return in_a_fresh_process


def own_progress_bars() -> None:
    """Give a forked process a lock of its own for tqdm's bars.

    tqdm's own is shared by all processes that are forked off one, and one that is killed while it holds it would let
    the others wait for ever.
    """
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.set_lock(threading.RLock())


def _call(module: str, name: str, fixtures: Mapping[str, Any]) -> None:
    os.setsid()
    getattr(importlib.import_module(module), name).__wrapped__(**fixtures)


def _main(path: tuple[str, ...], argv: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    """In the forked process: becomes what the command line says."""
    os.setsid()
    own_progress_bars()
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, file in enumerate(files):
        mode = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(file, mode, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, "rw"[fd > 0], closefd=False) for fd in range(3))
    multiprocessing.current_process()._config["daemon"] = False  # it may have children of its own
    words = [word for word in argv[1:] if word != "-P"]
    code = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        with contextlib.suppress(ValueError):  # closed
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
