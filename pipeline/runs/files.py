"""Atomic files: temporary names, renames, files that are put in place once, and hashes.

Takes paths and content; gives complete files under their final names. Several processes, on several machines, may write
to one folder; a killed process leaves only files with temporary names, which are never read.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR}
"""Errors that the user can mend; any other OSError inside a write is a bug and shows its traceback."""


TEMPORARY = ".tmp-"
"""Prefix of temporary names; files that a killed process left under such names are ignored and later removed."""


def who() -> str:
    """Suffix of temporary names, unique to this process on its machine: many processes may write to one folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def temporary_of(path: Path) -> Path:
    """The temporary path beside `path` that this process writes to first.

    As no host name has an @, the part that came from `path` can be told from the suffix.
    """
    return path.parent / f"{TEMPORARY}{path.name}@{who()}"


@contextlib.contextmanager
def atomic_path(path: Path, *, once: bool = False) -> Iterator[Path]:
    """Context manager: gives a temporary path to write a file or folder to; renamed to `path` if the block succeeds.

    `once`: a file that exists at `path` is kept (`place_once`). Raises UserError for a full disk or a missing right.
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
    """The exception to raise: a UserError if the user can mend it (full disk, missing right), else the error itself."""
    if error.errno not in CANNOT_WRITE:
        return error
    return UserError(f"cannot write {path}: {error.strerror or error}")


def place_once(temporary: Path, path: Path) -> bool:
    """Give a finished file its final name unless a file of that name exists; True if it was put in place.

    One of several processes wins, and a file in place is never replaced. `temporary` is removed in any case.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # after a crash there must be no name without its content
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        if path.exists():  # no hard links on this file system: equal but for a race between these two lines
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
    """SHA-256 in hex of a file, or of a folder's files together with their names."""
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
