"""Provenance: which code, versions, hardware and command made a result.

`provenance` gives one dict for run.json and for benchmarks, without environment variables and access tokens.
"""

import getpass
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """A dict of the commit, versions, machine and command of this process."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **_git(),
        **environment(),
        "host": socket.gethostname(),
        "user": _user(),
        "command": sys.argv,
    }


def environment() -> dict[str, Any]:
    """The part of it on which a measurement depends: versions and hardware."""
    packages = ("torch", "transformers", "lightning", "datasets", "accelerate", "wandb", "omegaconf")
    return {
        "versions": {"exit-heads": version("exit-heads"), "python": platform.python_version()}
        | {p: version(p) for p in packages},
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": _gpus()},
    }


def _git() -> dict[str, Any]:
    """The commit of this code, and whether there are uncommitted changes; None for both if git does not track it.

    A package that is installed inside the folder of another repository does not count as tracked.
    """
    here = Path(__file__).resolve()
    # Inside a git hook, GIT_* variables point to the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"git": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):  # not tracked, no git, or an untrusted repository
        return {"git": None, "git_dirty": None}


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None  # a container's user without a name


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
