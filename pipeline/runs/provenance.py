"""Provenance: which code, versions, hardware and command made a result.

Gives one dict for run.json and for benchmarks. It holds no environment variables and no tokens.
"""

import contextlib
import errno
import getpass
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from ..config import Config, to_dict
from ..errors import GateError, UserError


def provenance() -> dict[str, Any]:
    """Where a record comes from: code, versions, machine, command. No environment, no tokens."""
    packages = ("torch", "transformers", "lightning", "datasets", "accelerate", "wandb", "omegaconf")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "versions": {"exit-heads": version("exit-heads"), "python": platform.python_version()}
        | {p: version(p) for p in packages},
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": _gpus()},
        "host": socket.gethostname(),
        "user": _user(),
        "command": sys.argv,
    }


def _git(*words: str) -> str | None:
    try:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or no git


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
