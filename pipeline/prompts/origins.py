"""The sources that a `prompts` section names, and their raw rows.

Takes the section; gives Origins, and the rows of each with their places for messages (`line 3`). A broken row is given
as a ValueError that describes the fault; a source that cannot be read at all raises UserError.
"""

import codecs
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..config import EvaluatePrompts, Prompts, Source
from ..config_rules import PROMPT_FILES
from ..errors import UserError, reason
from ..pocket.paths import PROMPTS
from .prompt import Role

BATCH = 1000
"""Rows of a table that are converted to Python objects at once."""


@dataclass(frozen=True)
class Origin:
    """One source of prompts, with its names for messages and records."""

    key: str
    """Prefix of its config keys: `prompts`, or `prompts.mixture[1]`."""
    name: str
    """Its public name, without folders. Two files of one name are `a.jsonl` and `a.jsonl#2`."""
    source: Source

    @property
    def label(self) -> str:
        return f"{self.key}.path={self.source.path}"

    @property
    def is_pocket(self) -> bool:
        return self.source.path == "pocket"


def section_of(prompts: Prompts) -> str:
    return "evaluate.prompts" if isinstance(prompts, EvaluatePrompts) else "prompts"


def origins(prompts: Prompts) -> list[Origin]:
    """The sources of the mixture; without a mixture, the one source of the section itself."""
    section = section_of(prompts)
    if not prompts.mixture:
        names = ("path", "name", "revision", "split", "column", "licence")
        return [Origin(section, _name(prompts.path), Source(**{n: getattr(prompts, n) for n in names}))]
    found: list[Origin] = []
    for i, source in enumerate(prompts.mixture):
        name = _name(source.path)
        namesakes = sum(_name(o.source.path) == name for o in found)
        found.append(Origin(f"{section}.mixture[{i}]", f"{name}#{namesakes + 1}" if namesakes else name, source))
    return found


def _name(path: str | None) -> str:
    return Path(str(path)).name if Path(str(path)).suffix in PROMPT_FILES else str(path)


def rows_of(origin: Origin, role: Role) -> Iterator[tuple[str, Any]]:
    """(place, row or ValueError) of each row, in order. `role` matters only for pocket, which has a file for each."""
    path = PROMPTS[role] if origin.is_pocket else file_of(origin)
    if path is None:
        return _numbered(_table_rows(load_dataset(origin).with_format("arrow").iter(BATCH)))
    if path.suffix == ".parquet":
        return _numbered(_parquet_rows(path, origin.label))
    if path.suffix == ".txt":
        return _text_rows(path, origin.label)
    if path.suffix == ".json" and _begins_with_a_list(path, origin.label):
        return _list_rows(path, origin.label)
    return _lines(path, origin.label)


def file_of(origin: Origin) -> Path | None:
    """The path of a file source; None for a datasets id. Raises UserError for anything else."""
    path = Path(str(origin.source.path))
    if path.is_dir():
        raise UserError(f"{origin.label}: a folder; give one file ({', '.join(PROMPT_FILES)})")
    if path.suffix in PROMPT_FILES:
        if not path.is_file():
            raise UserError(f"{origin.label}: no such file")
        return path
    if path.is_file():
        raise UserError(f"{origin.label}: unknown kind of file; these can be read: {', '.join(PROMPT_FILES)}")
    if not origin.source.path or origin.source.path[0] in "./~" or origin.source.path.count("/") > 1:
        raise UserError(
            f"{origin.label}: neither a file that is there nor a datasets id, which is name or org/name (one of its "
            f"configurations is chosen by {origin.key}.name)"
        )
    return None


def load_dataset(origin: Origin) -> Any:
    """The split of a dataset on the Hub.

    Raises UserError if it cannot be loaded or has no revision: without one the set may change under its name.
    """
    source = origin.source
    if not source.revision:
        raise UserError(
            f"{origin.key}.revision=null: pin a commit of the dataset {source.path}, "
            f"see https://huggingface.co/datasets/{source.path}/commits/main"
        )
    import datasets

    try:
        which = {} if source.name is None else {"name": source.name}
        return datasets.load_dataset(str(source.path), **which, revision=source.revision, split=source.split)
    except Exception as error:  # errors of datasets, huggingface_hub, fsspec and OSError
        said = reason(error)
        if "config name" in said.lower() or "builderconfig" in said.lower():  # the error lists the config names
            name = "null" if source.name is None else source.name
            raise UserError(
                f"{origin.key}.name={name}: not a configuration of the dataset {source.path}: {said}. Set "
                f"{origin.key}.name to one of those."
            ) from None
        raise UserError(f"{origin.label}: neither a file nor a readable dataset: {said}") from None


# ---- each kind of file


def _numbered(rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _table_rows(tables: Iterator[Any]) -> Iterator[dict[str, Any]]:
    return itertools.chain.from_iterable(table.to_pylist() for table in tables)


def _parquet_rows(path: Path, label: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        yield from _table_rows(pq.ParquetFile(path).iter_batches(BATCH))
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{label}: not a parquet file: {reason(error)}") from None


def _lines(path: Path, label: str) -> Iterator[tuple[str, Any]]:
    """One JSON value per line. The file is read as bytes, so that U+2028 inside a string does not end a line."""
    with _open(path, label) as file:
        for number, line in enumerate(file, 1):
            if (line := without_bom(line)).strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.strip().decode())
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} (column {error.colno})")
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: {error.reason}")


def _begins_with_a_list(path: Path, label: str) -> bool:
    with _open(path, label) as file:
        lines = map(without_bom, file)
        return next((line for line in lines if line.strip()), b"").lstrip().startswith(b"[")


def _list_rows(path: Path, label: str) -> Iterator[tuple[str, Any]]:
    """The rows of a .json file that is one list. It is parsed as a whole; each row is freed once it is given."""
    with _open(path, label) as file:
        try:
            rows = json.loads(without_bom(file.read()).decode())
        except json.JSONDecodeError as error:
            raise UserError(f"{label}: line {error.lineno}: not JSON: {error.msg}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{label}: cannot be read as UTF-8 text: {error}") from None
    rows.reverse()
    return _numbered(rows.pop() for _ in range(len(rows)))


def _text_rows(path: Path, label: str) -> Iterator[tuple[str, Any]]:
    with _open(path, label) as file:
        for number, line in enumerate(file, 1):
            try:
                texts = without_bom(line).decode().splitlines()
            except UnicodeDecodeError as error:
                yield f"line {number}", ValueError(f"not UTF-8 text: {error.reason}")
                continue
            yield from ((f"line {number}", {"text": text}) for text in texts if text.strip())


def without_bom(line: bytes) -> bytes:
    """The line without a byte order mark, which editors put at the start of files, and concatenation in the middle."""
    return line.removeprefix(codecs.BOM_UTF8)


def _open(path: Path, label: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
