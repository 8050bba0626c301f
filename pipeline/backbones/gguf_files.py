"""Backbones given as GGUF files: which file a config names, and the checkpoint that is made of it, once.

Takes the `backbone` section; gives an ordinary checkpoint's folder, `<backbone.gguf_dir>/<file's stem>-<its sha256>/`,
which every stage uses. Any number of processes may ask at once: one makes the folder, the others wait for it.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.utils import cached_file

from ..config import Backbone
from ..errors import UserError, reason
from ..pocket.paths import BUILT_IN
from ..runs.anonymous import anonymous
from ..runs.files import TEMPORARY, atomic_path, cannot_write, remove, sha256_of
from . import gguf_checkpoint, gguf_model
from .gguf_header import Header, Stored, read_header

SUFFIX = ".gguf"
DIGITS = 12
"""Hex digits of the sha256 in a folder's name."""
ORDINARY = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""Patterns of the files by which a folder is an ordinary checkpoint, whatever GGUF files lie beside them."""


def gguf_of(backbone: Backbone) -> Path | None:
    """The GGUF file that the section names, fetched from the Hub if it lies there; None for an ordinary checkpoint.

    Raises UserError for a file that does not exist and for a folder of several.
    """
    path, name = Path(backbone.name_or_path), backbone.gguf_file
    if backbone.name_or_path in BUILT_IN:
        if name is not None:
            raise UserError(f"{_where(backbone)}: backbone.name_or_path={path} is built in; set gguf_file=null")
        return None
    if path.is_file() or (path.suffix.lower() == SUFFIX and not path.is_dir()):
        if not path.is_file():
            raise UserError(
                f"{_where(backbone)}: no such file; a GGUF on the Hub is named by backbone.name_or_path=org/name and "
                "backbone.gguf_file=NAME.gguf"
            )
        if name is not None and Path(name).name != path.name:
            raise UserError(
                f"{_where(backbone)}: backbone.name_or_path={path} is a file itself; set backbone.gguf_file=null"
            )
        return path
    if path.is_dir():
        return _in_folder(backbone, path)
    if name is None:
        return None
    try:
        return _fetched(backbone.name_or_path, backbone.revision, name)
    except Exception as error:  # of the Hub, the network, the cache
        raise UserError(f"{_where(backbone)}: cannot be fetched: {reason(error)}") from None


def checkpoint_of(backbone: Backbone, file: Path) -> Path:
    """The checkpoint's folder, made of the GGUF file unless it is there.

    Raises UserError for a file that is damaged or not supported, and for a disk too full, before anything is written.
    """
    header = None
    if not any(path.name.startswith(f"{file.stem}-") for path in Path(backbone.gguf_dir).glob("*")):
        header = read_header(file, _where(backbone))
        _checked(header)  # a long file is not hashed in vain
    state = file.stat()
    digest = _sha256(str(file), state.st_size, state.st_mtime_ns)
    folder = Path(backbone.gguf_dir) / f"{file.stem}-{digest[:DIGITS]}"
    if not folder.is_dir():
        _make(folder, header or read_header(file, _where(backbone)), digest)
    return folder


def config_without_checkpoint(backbone: Backbone, file: Path) -> Any:
    """The transformers config of the model in the file, read from its header; nothing is written.

    Raises UserError as `checkpoint_of` does.
    """
    return _checked(read_header(file, _where(backbone)))[0]


def gguf_record(backbone: Backbone) -> dict[str, str] | None:
    """What the weights were dequantised from: file, sha256, quantisation and name, fit to be published; None for an
    ordinary checkpoint."""
    path = gguf_of(backbone)
    if path is None:
        return None
    record = json.loads((checkpoint_of(backbone, path) / gguf_checkpoint.RECORD).read_text())
    inside_repo = backbone.gguf_file is not None and not Path(backbone.name_or_path).exists()
    return record | {"file": backbone.gguf_file if inside_repo else path.name}


def public_name_of_gguf(backbone: Backbone) -> str | None:
    """The file's name for a GGUF on this machine; None for any other backbone. The file need not exist."""
    path = Path(backbone.name_or_path)
    if backbone.name_or_path in BUILT_IN:
        return None
    if path.is_dir():
        found = backbone.gguf_file or next(iter(_candidates(path)), None)
        return found and Path(found).name
    return path.name if path.is_file() or path.suffix.lower() == SUFFIX else None


def _where(backbone: Backbone) -> str:
    if backbone.gguf_file is not None:
        return f"backbone.gguf_file={backbone.gguf_file}"
    return f"backbone.name_or_path={backbone.name_or_path}"


def _candidates(folder: Path) -> list[str]:
    """The GGUF files of a folder, by name; none if it is an ordinary checkpoint."""
    if any(any(folder.glob(pattern)) for pattern in ORDINARY):
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())


def _in_folder(backbone: Backbone, folder: Path) -> Path | None:
    if backbone.gguf_file is not None:
        if (folder / backbone.gguf_file).is_file():
            return folder / backbone.gguf_file
        there = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
        raise UserError(
            f"{_where(backbone)}: no such file in {folder}; " + (f"it has {', '.join(there)}" if there else
            "it has no GGUF files: set backbone.gguf_file=null for an ordinary checkpoint")
        )  # fmt: skip
    found = _candidates(folder)
    if len(found) > 1:
        raise UserError(
            f"{_where(backbone)}: holds {len(found)} GGUF files and no config.json; name one: "
            f"backbone.gguf_file={found[0]} (or {', '.join(found[1:])})"
        )
    return folder / found[0] if found else None


@functools.lru_cache
def _fetched(name: str, revision: str | None, file: str) -> Path:
    return Path(cached_file(name, file, revision=revision))


@functools.lru_cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    """The sha256 of a file, computed once for each state of it."""
    return sha256_of(Path(path))


def _checked(header: Header) -> tuple[Any, dict[str, Stored]]:
    """The config of the model and the tensors that fill its parameters. Raises UserError for what is not supported."""
    config = gguf_model.config_of(header)
    sources = gguf_model.sources_of(header, config)
    gguf_checkpoint.check_types(header, sources)
    return config, sources


def _make(folder: Path, header: Header, digest: str) -> None:
    """Write the checkpoint whole, in the one process that holds the lock; the others return when it is there."""
    config, sources = _checked(header)
    with _alone(folder, header):
        if folder.is_dir():
            return
        for left in folder.parent.glob(f"{TEMPORARY}*"):  # by a process that was killed: it held this lock
            if left.name.startswith(f"{TEMPORARY}{folder.name}@"):
                remove(left)
        _check_room(folder, header, gguf_checkpoint.size_of(sources))
        record = {
            "file": header.path.name,
            "sha256": digest,
            "quantisation": header.quantisation,
            "name": anonymous(str(header.fields.get("general.name", ""))),
        }
        with atomic_path(folder) as temporary:
            gguf_checkpoint.write(temporary, header, config, sources, record)


@contextlib.contextmanager
def _alone(folder: Path, header: Header) -> Iterator[None]:
    """Holds the lock of a folder to be made. It dies with its process."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(f"backbone: another process dequantises {header.path.name}; waiting for it", flush=True)
        lock.acquire()
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def _check_room(folder: Path, header: Header, need: int) -> None:
    """Print what is made where. Raises UserError if it does not fit on the disk."""
    free = shutil.disk_usage(folder.parent).free
    what = f"{header.path.name} ({header.quantisation}) -> {folder}, {need / 1e9:.2f} GB"
    if need > free:
        raise UserError(
            f"backbone.gguf_dir={folder.parent}: {what}; {free / 1e9:.2f} GB are free. Make room, or name a folder on "
            "another disk"
        )
    print(f"backbone: dequantising {what}, once for all stages", flush=True)
