"""The responses folder: what is asked, the shards of answers, and the manifest of the whole.

Takes rows and counts, gives files that any number of processes may write at once. A shard is the unit of work: it is
made whole, put in place once and for all, and then entered; a shard without an entry counts for nothing until somebody
has looked it over. Knows nothing of how answers are made.

    responses/
      prompts.parquet        what is asked: a row group for each shard
      shard-00000.parquet    the rows: one for each answered turn, turns of a conversation one behind the other
      entries/shard-00000.json    of each finished shard: size, sha256, counts; who made it, in how many seconds
      claims/                who works on which shard now
      manifest.json          of the whole: of what it is made, which shards, complete or not; no times, so that equal
                             responses have equal manifests
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .claims import Claims, left_behind
from .errors import UserError
from .rundir import TEMPORARY, atomic_path, atomic_write, sha256_of

SCHEMA = 2
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("temperature", pa.float64()),
        ("seed", pa.int64()),
        ("source", pa.string()),
        ("exact", pa.bool_()),
        ("reproducible", pa.bool_()),
    ]
)
"""id: of the prompt, `.2`, `.3` ... behind it for later turns. prompt: what the user says in this turn. prompt_ids: the
whole context. response_ids: end with an end token if finish_reason is `stop`; the other reason is `length`. seed: of
the shard's drawing. exact: these very ids were drawn; false if encoded anew from a server's text. reproducible: the
shard can be made again, to the same rows."""
ASKED = pa.schema([("prompt", pa.string()), ("ids", pa.list_(pa.int32()))])
COUNTS = ("prompts", "turns", "rows", "empty", "unanswered", "tokens", "stop", "length", "looping", "inexact")
"""Of a shard: prompts, and their turns, each of which is a row, empty (nothing but an end token), or unanswered (behind
an empty answer, or no room left); tokens drawn; rows by finish reason; rows that repeat some 8 tokens; rows that
are not exact."""


class Responses:
    """One responses folder. Nothing is read or made before it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.claims = Claims(folder / "claims")

    # ---- the whole

    def manifest(self) -> dict[str, Any] | None:
        path = self.folder / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def begin(self, head: dict[str, Any], asked: Iterator[list[tuple[str, list[int]]]]) -> None:
        """Write what is asked, a list of (prompt as JSON, ids) for each shard, and a manifest that says of what the
        responses will be. Both are of whoever came first."""
        final = self.folder / "prompts.parquet"
        prompts = shards = 0
        with atomic_path(final, once=True) as temporary, pq.ParquetWriter(temporary, ASKED) as writer:
            for rows in asked:
                columns = {"prompt": [prompt for prompt, _ in rows], "ids": [ids for _, ids in rows]}
                writer.write_table(pa.Table.from_pydict(columns, schema=ASKED), row_group_size=len(rows))
                prompts, shards = prompts + len(rows), shards + 1
        manifest = head | {
            "schema": SCHEMA,
            "complete": False,
            "asked": {"prompts": prompts, "shards": shards, "sha256": sha256_of(final)},
            "shards": [],
            "responses": {},
        }
        with atomic_path(self.folder / "manifest.json", once=True) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")

    def finish(self) -> bool:
        """Complete the manifest if every shard is what its entry says; those that are not are removed: False."""
        manifest = self.manifest()
        assert manifest is not None
        entries: list[dict[str, Any]] = []
        total: Counter[str] = Counter()
        for name in self.names():
            entry, path = self.entry(name), self.folder / name
            if entry is None or not path.is_file() or sha256_of(path) != entry["sha256"]:
                self.forget(name)
                return False
            entries.append(entry)
            total.update(entry["counts"])
        manifest["shards"] = [{k: e[k] for k in ("file", "rows", "bytes", "sha256", "counts")} for e in entries]
        manifest["responses"] = {name: total[name] for name in COUNTS}
        manifest["complete"] = True
        atomic_write(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        self.sweep()
        return True

    # ---- shards

    def names(self) -> list[str]:
        manifest = self.manifest()
        if manifest and manifest["schema"] != SCHEMA:
            raise UserError(
                f"{self.folder}: schema {manifest['schema']}, this version knows schema {SCHEMA}: "
                "give another run.name, or --redo generate."
            )
        return [f"shard-{i:05d}.parquet" for i in range(manifest["asked"]["shards"])] if manifest else []

    def check_asked(self) -> None:
        """Raises UserError unless prompts.parquet is what the manifest says."""
        path, manifest = self.folder / "prompts.parquet", self.manifest()
        if not path.is_file() or not manifest or sha256_of(path) != manifest["asked"]["sha256"]:
            raise UserError(f"{path}: missing or not what was written: put it back, or --redo generate.")

    def asked(self, index: int) -> list[tuple[str, list[int]]]:
        """(prompt as JSON, ids) of the shard of this number."""
        table = pq.ParquetFile(self.folder / "prompts.parquet").read_row_group(index).to_pydict()
        return list(zip(table["prompt"], table["ids"], strict=True))

    def has(self, name: str) -> bool:
        """Whether the shard is entered and its file there, of the size that was entered."""
        entry = self.entry(name)
        try:
            return entry is not None and (self.folder / name).stat().st_size == entry["bytes"]
        except FileNotFoundError:
            return False

    def entry(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self._entry_path(name).read_text())
        except FileNotFoundError:
            return None

    def put(self, name: str, rows: list[dict[str, Any]], counts: dict[str, int], made: dict[str, Any]) -> None:
        """Write a shard, put it in place unless another process has, enter what is there then."""
        columns = {column: [row[column] for row in rows] for column in COLUMNS.names}
        # the counts travel in the file: an entry can be made again from it
        table = pa.Table.from_pydict(columns, schema=COLUMNS.with_metadata({"counts": json.dumps(counts)}))
        with atomic_path(self.folder / name, once=True) as temporary:
            pq.write_table(table, temporary)
        self._enter(name, made)

    def adopt(self, name: str) -> bool:
        """Enter a shard that a killed process put in place and had not entered yet; False if there is none.

        A file that is there but does not match its entry, or cannot be read, is removed.
        """
        path = self.folder / name
        if not path.is_file():
            return False
        if self.entry(name) is not None:  # of another size, or has() were true
            self.forget(name)
            return False
        return self._enter(name, {})

    def forget(self, name: str) -> None:
        """Remove a shard: first its entry, then its file."""
        self._entry_path(name).unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)

    def _enter(self, name: str, made: dict[str, Any]) -> bool:
        path = self.folder / name
        try:
            metadata = pq.read_metadata(path)
            counts = json.loads(metadata.metadata[b"counts"])
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
            path.unlink(missing_ok=True)
            return False
        entry = {"file": name, "rows": metadata.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        entry |= {"counts": counts, "made": made}
        atomic_write(self._entry_path(name), json.dumps(entry) + "\n")
        return True

    def _entry_path(self, name: str) -> Path:
        return self.folder / "entries" / f"{Path(name).stem}.json"

    def sweep(self) -> None:
        """Remove what killed processes left under temporary names."""
        for path in self.folder.rglob(f"{TEMPORARY}*"):
            if left_behind(path):
                path.unlink(missing_ok=True)


def rows_of(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a shard. Raises UserError for a file that cannot be read."""
    try:
        return pq.read_table(path, columns=columns).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
