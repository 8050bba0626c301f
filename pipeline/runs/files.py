"""Files that are whole or not there: temporary names, atomic renames, files put in place once, and hashes.

Takes paths and content, gives files under their final names. Several processes, on several machines, may write to
one folder; what a killed process leaves lies under a temporary name and is never read.
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


CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR}
"""What the user can do something about; any other OSError inside a write is a bug and shows its traceback."""


TEMPORARY = ".tmp-"
"""How names begin that are not final; what a killed process leaves under them is no part of anything."""


def who() -> str:
    """How names end that are not final: several processes, on several machines, may write to one folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def temporary_of(path: Path) -> Path:
    """The neighbour that this process writes to first. No host has an @ in its name: where that of `path` ends is
    certain."""
    return path.parent / f"{TEMPORARY}{path.name}@{who()}"


@contextlib.contextmanager
def atomic_path(path: Path, *, once: bool = False) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to (a file or a folder); renamed onto it when the block ends well.

    `once`: a file that is there already stays (`place_once`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    remove(temporary)
    try:
        yield temporary
        if once:
            place_once(temporary, path)
            return
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        remove(temporary)


def cannot_write(path: Path, error: OSError) -> Exception:
    """What to raise: a UserError for what the user can change (a full disk, a missing right), else the error itself."""
    if error.errno not in CANNOT_WRITE:
        return error
    return UserError(f"cannot write {path}: {error.strerror or error}")


def place_once(temporary: Path, path: Path) -> bool:
    """Put a finished file under its final name unless one is there already; True if it was put there.

    Of several processes one wins, and what has once been there is never replaced. The temporary name is gone after it.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # a name must not survive a crash that its content does not
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links: the same but for a moment between these two lines
            return False
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def atomic_write(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a file, or of a folder's files with their names."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    else:
        for child in sorted(p for p in path.rglob("*") if p.is_file()):
            if any(part.startswith(TEMPORARY) for part in child.relative_to(path).parts):
                continue
            digest.update(child.relative_to(path).as_posix().encode() + sha256_of(child).encode())
    return digest.hexdigest()
