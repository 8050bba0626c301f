"""The sources that a `prompts` section names, and the rows of each as they stand there.

Takes the section, gives Origins; of an Origin its rows one after another, with the place that a message can name
(`line 3`). A row that is broken is given as a ValueError that says how; a source that cannot be read at all is a
UserError.
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
"""Rows of a table that are Python objects at the same time."""


@dataclass(frozen=True)
class Origin:
    """One source and what messages call it."""

    key: str
    """`prompts`, or `prompts.mixture[1]`: what the keys below it begin with."""
    name: str
    """Public: no folders. Two files of one name are `a.jsonl` and `a.jsonl#2`."""
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
    """The sources of the mixture; without one, that of the section itself."""
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
    """(place, row or ValueError), in their order; only pocket has another file for each role."""
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
    """The file, or None for a datasets id; anything else is a UserError."""
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
    """The split of a datasets id. A revision is needed: a set that changes under its name cannot be repeated."""
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
    except Exception as error:  # datasets raises its own, huggingface_hub's, fsspec's and OSError here
        said = reason(error)
        if "config name" in said.lower() or "builderconfig" in said.lower():  # it says which there are
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
    """One JSON value a line; read as bytes, which are cut at line feeds alone and not at U+2028 inside strings."""
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
    """A .json file may also be one list; it has to be parsed as a whole, and each row is let go once it is given."""
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
    """Editors begin a file with a byte order mark, and joined files have one in the middle."""
    return line.removeprefix(codecs.BOM_UTF8)


def _open(path: Path, label: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
