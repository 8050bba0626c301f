"""A folder of numbered shards that any number of processes make together.

Takes a function that makes the shard of a number; gives files on which all processes agree. A shard is the unit of
work: it is made whole, put in place once, never replaced, and then registered by a file in entries/. A shard without an
entry does not count until a process has checked and registered it. Subclasses define the content of a shard.

    <folder>/
      shard-00000.<suffix>
      entries/shard-00000.json    one for each finished shard: size, sha256, facts from its file; who made it, how fast
      claims/                     which process works on which shard now
      manifest.json               the inputs, the list of shards, complete or not; without times, so that equal shards
                                  give equal manifests
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .claims import Claims, left_behind
from .files import TEMPORARY, atomic_path, atomic_write, sha256_of, who

WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds between two checks of other processes' progress: at first, and at most, when nothing changes for long."""


class Shards:
    """One folder of shards. The constructor neither reads nor creates anything."""

    stage: str
    """The stage (command) that makes the shards, for messages."""
    suffix: str
    schema: int

    def __init__(self, folder: Path):
        self.folder = folder
        self.claims = Claims(folder / "claims")

    # ---- defined by the subclass

    def count(self, manifest: dict[str, Any]) -> int:
        """The number of shards of a complete folder."""
        raise NotImplementedError

    def facts(self, path: Path) -> dict[str, Any]:
        """An entry's fields beside size and sha256, read from a shard's file. Raises ValueError for any other file."""
        raise NotImplementedError

    def totals(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """The complete manifest's fields about all shards together."""
        return {}

    # ---- the whole folder folder

    def manifest(self) -> dict[str, Any] | None:
        path = self.folder / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def begin(self, head: dict[str, Any]) -> None:
        """Write the manifest with the inputs `head`, unless another process has written one."""
        manifest = head | {"schema": self.schema, "complete": False, "shards": []}
        with atomic_path(self.folder / "manifest.json", once=True) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")

    def names(self) -> list[str]:
        manifest = self.manifest()
        if manifest and manifest["schema"] != self.schema:
            raise UserError(
                f"{self.folder}: schema {manifest['schema']}, this version knows schema {self.schema}: "
                f"give another run.name, or --redo {self.stage}."
            )
        return [f"shard-{i:05d}.{self.suffix}" for i in range(self.count(manifest))] if manifest else []

    def is_complete(self) -> bool:
        """Whether all shards exist and have the hashes that the manifest lists: a remade shard may differ in bits."""
        manifest = self.manifest()
        if manifest is None or not manifest["complete"]:
            return False
        found = map(self.found, self.names())
        return all(e and e["sha256"] == s["sha256"] for e, s in zip(found, manifest["shards"], strict=True))

    def complete(self, make: Callable[[int, str], None]) -> Iterator[dict[str, Any]]:
        """Make missing shards, together with other processes, until all exist and their hashes are checked.

        `make(number, name)` makes one shard and puts it in place. Yields the entry of each shard once, as soon as the
        shard exists, whichever process made it.
        """
        self.sweep()
        missing, given, told, wait = dict(enumerate(self.names())), set(), False, WAIT
        while missing or not self._completed():
            entered, held = self._entered(), self.claims.names()
            if not missing:  # another process completes the manifest, or damaged shards were removed
                missing = {i: name for i, name in enumerate(self.names()) if Path(name).stem not in entered}
            before = len(missing)
            for index, name in list(missing.items()):
                if name in held and Path(name).stem not in entered:
                    continue  # another process makes it
                if self._claim_and_make(index, name, make):
                    entered, held = self._entered(), self.claims.names()
                if entry := self.found(name):
                    del missing[index]
                    if name not in given:
                        given.add(name)
                        yield entry
            if len(missing) < before or self.claims.free_one(held & set(missing.values())):
                wait = WAIT
                continue
            told = told or self._tell_who_holds()
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _completed(self) -> bool:
        """Whether the manifest is complete; the first process that sees all shards completes it."""
        with self.claims.hold("manifest") as mine:
            if self.is_complete():
                return True
            return mine and self.finish()

    def finish(self) -> bool:
        """Complete the manifest if every shard matches its entry; otherwise remove those that do not, return False."""
        manifest, names = self.manifest(), self.names()
        assert manifest is not None
        entries = [entry for entry in map(self.entry, names) if entry is not None]
        if damaged := self.damaged(names):
            for name in damaged:
                self.forget(name)
            return False
        manifest["shards"] = [{k: v for k, v in entry.items() if k != "made"} for entry in entries]
        manifest |= self.totals(entries) | {"complete": True}
        atomic_write(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        self.sweep()
        return True

    def _claim_and_make(self, index: int, name: str, make: Callable[[int, str], None]) -> bool:
        """Make a shard unless it exists or another process is making it; True if it was made."""
        if self.has(name):
            return False
        with self.claims.hold(name) as mine:
            if mine and not self.has(name) and not self.adopt(name):
                make(index, name)
                return True
        return False

    def _tell_who_holds(self) -> bool:
        holders = self.claims.holders()
        at = [f"{name} ({h.host}, process {h.pid})" for name, h in holders.items()]
        more = f" and {len(at) - 3} more" if len(at) > 3 else ""
        tqdm.write(f"{self.stage}: waiting for other processes: {', '.join(at[:3])}{more}", file=sys.stderr)
        return bool(holders)

    # ---- single shards

    def has(self, name: str) -> bool:
        """Whether the shard has an entry, and a file of the size that the entry gives."""
        return self.found(name) is not None

    def found(self, name: str) -> dict[str, Any] | None:
        """The entry of a shard that is known to exist."""
        entry = self.entry(name)
        try:
            return entry if entry is not None and (self.folder / name).stat().st_size == entry["bytes"] else None
        except FileNotFoundError:
            return None

    def damaged(self, names: Iterable[str]) -> list[str]:
        """The shards that are missing or do not match their entries. Hashes every byte, several files in parallel."""

        def is_whole(name: str) -> bool:
            entry = self.found(name)
            return entry is not None and sha256_of(self.folder / name) == entry["sha256"]

        names = list(names)
        with ThreadPoolExecutor() as pool:  # hashing a block lets other threads run
            return [name for name, whole in zip(names, pool.map(is_whole, names), strict=True) if not whole]

    def entry(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self._entry_path(name).read_text())
        except FileNotFoundError:
            return None

    def place(self, name: str, write: Callable[[Path], Any], made: dict[str, Any]) -> None:
        """Write a shard with `write`, put it in place unless another process has, and register the one in place."""
        with atomic_path(self.folder / name, once=True) as temporary:
            write(temporary)
        self._enter(name, made)

    def adopt(self, name: str) -> bool:
        """Register a shard that a killed process put in place without an entry; False if there is none.

        A file that cannot be read or does not match its entry is removed.
        """
        path = self.folder / name
        if not path.is_file():
            return False
        if self.entry(name) is not None:  # its size differs, otherwise has() would be true
            self.forget(name)
            return False
        return self._enter(name, {})

    def forget(self, name: str) -> None:
        """Remove a shard: its entry first, then its file."""
        self._entry_path(name).unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)

    def _enter(self, name: str, made: dict[str, Any]) -> bool:
        path = self.folder / name
        try:
            facts = self.facts(path)
        except ValueError:
            path.unlink(missing_ok=True)
            return False
        entry = {"file": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} | facts | {"made": made}
        atomic_write(self._entry_path(name), json.dumps(entry) + "\n")
        return True

    def _entered(self) -> set[str]:
        """The stems of all registered shards, from one listing of the folder."""
        try:
            return {name.removesuffix(".json") for name in os.listdir(self.folder / "entries")}
        except FileNotFoundError:
            return set()

    def _entry_path(self, name: str) -> Path:
        return self.folder / "entries" / f"{Path(name).stem}.json"

    def compare(self, here: dict[str, Any]) -> None:
        """Print a line if shards were made on another device or version than `here` (backbones.load.rounds_by)."""
        records = (entry["made"] for entry in map(self.entry, self.names()) if entry is not None)
        other = next(filter(None, records), None)
        if other and (differ := [f"{k} {other[k]}, here {here[k]}" for k in here if other[k] != here[k]]):
            print(f"{self.stage}: shards were made with {'; '.join(differ)}: new ones may have other last bits")

    def sweep(self) -> None:
        """Remove the temporary files that killed processes left."""
        for path in self.folder.rglob(f"{TEMPORARY}*"):
            if left_behind(path):
                path.unlink(missing_ok=True)


def made(started: float, by: dict[str, Any]) -> dict[str, Any]:
    """An entry's record of the process that made its shard: `by` (backbones.load.rounds_by), and the time it took.

    `started` is time.time() at the beginning of the work.
    """
    now = time.time()
    return {"worker": who(), **by, "seconds": round(now - started, 3), "finished": round(now, 3)}
