"""The responses folder: the prompts and the shards of answers (runs/shards.py).

Takes rows and counts; gives files that any number of processes may write at once.

    responses/
      prompts.parquet        the prompts to answer: a row group for each shard
      shard-00000.parquet    one row for each answered turn, the turns of a conversation in order
      entries/  claims/  manifest.json    see runs/shards.py; an entry also has the shard's counts (COUNTS)
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, reason
from ..runs.files import atomic_path, sha256_of
from ..runs.shards import Shards

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
"""Columns of a shard. id: the prompt's id, followed by `.2`, `.3` ... for later turns. prompt: the user's text of this
turn. prompt_ids: the whole context. response_ids: end with an end token if finish_reason is `stop`; the other reason is
`length`. seed: the sampling seed of the shard and turn. exact: these ids were sampled; false if re-encoded from a
server's text. reproducible: making the shard again gives the same rows."""
ASKED = pa.schema([("prompt", pa.string()), ("ids", pa.list_(pa.int32()))])
COUNTS = ("prompts", "turns", "rows", "empty", "unanswered", "tokens", "stop", "length", "looping", "inexact")
"""Counts of a shard: prompts; turns; each turn is one of rows, empty (an end token at most) or unanswered (after an
empty answer, or without room in the context); sampled tokens; rows by finish reason (stop, length); looping: rows that
repeat an 8-gram; inexact: rows whose ids were re-encoded from text."""


class Responses(Shards):
    """One responses folder. The constructor neither reads nor creates anything."""

    stage, suffix, schema = "generate", "parquet", SCHEMA

    def count(self, manifest: dict[str, Any]) -> int:
        return manifest["asked"]["shards"]

    def facts(self, path: Path) -> dict[str, Any]:
        try:
            metadata = pq.read_metadata(path)
            return {"rows": metadata.num_rows, "counts": json.loads(metadata.metadata[b"counts"])}
        except (pa.ArrowInvalid, OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def totals(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        total: Counter[str] = Counter()
        for entry in entries:
            total.update(entry["counts"])
        return {"responses": {name: total[name] for name in COUNTS}}

    def ask(self, head: dict[str, Any], asked: Iterator[list[tuple[str, list[int]]]]) -> None:
        """Write prompts.parquet, from a list of (prompt as JSON, ids) for each shard, and the manifest with `head`.

        If another process has written one of these files, it is kept.
        """
        final = self.folder / "prompts.parquet"
        prompts = shards = 0
        with atomic_path(final, once=True) as temporary, pq.ParquetWriter(temporary, ASKED) as writer:
            for rows in asked:
                columns = {"prompt": [prompt for prompt, _ in rows], "ids": [ids for _, ids in rows]}
                writer.write_table(pa.Table.from_pydict(columns, schema=ASKED), row_group_size=len(rows))
                prompts, shards = prompts + len(rows), shards + 1
        found = {"prompts": prompts, "shards": shards, "sha256": sha256_of(final)}
        self.begin(head | {"asked": found, "responses": {}})

    def check_asked(self) -> None:
        """Raises UserError unless prompts.parquet has the hash that the manifest gives."""
        path, manifest = self.folder / "prompts.parquet", self.manifest()
        if not path.is_file() or not manifest or sha256_of(path) != manifest["asked"]["sha256"]:
            raise UserError(f"{path}: missing or not what was written: put it back, or --redo generate.")

    def asked(self, index: int) -> list[tuple[str, list[int]]]:
        """The prompts of the shard `index`, as (prompt as JSON, ids)."""
        table = pq.ParquetFile(self.folder / "prompts.parquet").read_row_group(index).to_pydict()
        return list(zip(table["prompt"], table["ids"], strict=True))

    def put(self, name: str, rows: list[dict[str, Any]], counts: dict[str, int], made: dict[str, Any]) -> None:
        """Write a shard, put it in place unless another process has, and register the one in place."""
        columns = {column: [row[column] for row in rows] for column in COLUMNS.names}
        # the file holds the counts too, so that a lost entry can be made again
        table = pa.Table.from_pydict(columns, schema=COLUMNS.with_metadata({"counts": json.dumps(counts)}))
        self.place(name, lambda path: pq.write_table(table, path), made)


def rows_of(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a shard. Raises UserError for a file that cannot be read."""
    try:
        return pq.read_table(path, columns=columns).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
