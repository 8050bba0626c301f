"""Workers that wait for others: what they do to a shared disk does not grow with what the others hold."""

import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from pipeline.runs import shards
from pipeline.runs.claims import Claims
from pipeline.runs.shard_worker import Report, ShardWorker
from pipeline.runs.shards import Shards


class Small(Shards):
    stage, suffix, schema = "small", "txt", 1

    def count(self, manifest: dict[str, Any]) -> int:
        return manifest["count"]

    def facts(self, path: Path) -> dict[str, Any]:
        return {"length": len(path.read_text())}


class Enough(Exception):
    pass


def waits_of(folder: Path, held: int, looks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], Counter[str]]:
    """The waits of a worker that finds `held` shards, all of them held by processes of another machine, and what it did
    to files between the first two waits and the last."""
    here = Small(folder)
    here.begin({"count": held})
    here.claims.folder.mkdir()
    for name in here.names():
        (here.claims.folder / name).write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "7", "made": 0}))
    waits: list[float] = []
    done: Counter[str] = Counter()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == looks:
            raise Enough

    def count(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            done[name] += len(waits) >= 2
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    monkeypatch.setattr(shards.time, "sleep", sleep)
    for name in ("stat", "touch", "read_text", "write_text", "exists", "unlink"):
        count(Path, name)
    count(os, "listdir")
    with pytest.raises(Enough):
        list(here.complete(lambda index, name: pytest.fail("a shard that is held was made")))
    monkeypatch.undo()
    return waits, done


def test_a_look_costs_the_same_however_many_shards_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (waits_of(tmp_path / str(held), held, 12, monkeypatch) for held in (3, 300))
    assert few[1] == many[1] and few[1]["touch"] == 0, "nor is a file made"
    assert sum(few[1].values()) <= 10 * 6
    assert few[0] == many[0] == [0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8, 8, 8], "and it comes less and less often"


def test_what_is_left_behind_is_made_by_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WAIT", 0.001)
    here = Small(tmp_path)
    here.begin({"count": 5})
    here.claims.folder.mkdir()
    for name in here.names()[1:4]:  # of a process that is gone
        (here.claims.folder / name).write_text(json.dumps(here.claims.me | {"born": "long ago", "made": 0}))
    made: list[str] = []

    def make(index: int, name: str) -> None:
        here.place(name, lambda path: path.write_text(name), {})
        made.append(name)

    assert len(list(here.complete(make))) == 5 and sorted(made) == here.names()
    assert here.is_complete() and here.claims.names() == set()


class Worker(ShardWorker):
    """Makes shards of five units, of which it reports none, some or all before a shard's end."""

    unit = "unit"

    def total(self) -> int:
        return 15

    def units(self, entry: dict[str, Any]) -> int:
        return 5

    def make(self, index: int, name: str, report: Report):
        for _ in range((0, 3, 5)[index]):
            report(7, 1)
        return lambda how: self.shards.place(name, lambda path: path.write_text(name), how)


def test_units_that_are_done_before_the_end_of_a_shard_count_once(tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(tqdm, "update", lambda bar, n=1: seen.append(n))
    here = Small(tmp_path / "shards")
    here.begin({"count": 3})
    Worker(here, {}).work()
    assert seen == [5, 1, 1, 1, 2, 1, 1, 1, 1, 1, 0]


def test_many_make_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WAIT", 0.001)
    Small(tmp_path / "shards").begin({"count": 24})

    def work() -> None:
        here = Small(tmp_path / "shards")

        def make(index: int, name: str) -> None:
            (tmp_path / "made").open("a").write(f"{index}\n")
            here.place(name, lambda path: path.write_text(name), {})

        assert len(list(here.complete(make))) == 24

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(4)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(map(int, (tmp_path / "made").read_text().split())) == list(range(24))
    assert Small(tmp_path / "shards").is_complete()


def test_a_shard_that_is_not_what_its_entry_says_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WAIT", 0.001)
    here = Small(tmp_path)
    here.begin({"count": 3})

    def make(index: int, name: str) -> None:
        here.place(name, lambda path: path.write_text("right"), {})

    make(1, here.names()[1])
    (tmp_path / here.names()[1]).write_text("wrong")  # of the same length: only its hash tells
    assert len(list(here.complete(make))) == 3
    assert [(tmp_path / name).read_text() for name in here.names()] == ["right"] * 3


def test_to_look_at_claims_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "7", "made": 0}))
    before = tmp_path.stat().st_mtime_ns
    claims = Claims(tmp_path)
    assert claims.holders(look_only=True).keys() == {"a"} and tmp_path.stat().st_mtime_ns == before
    assert claims.holders().keys() == {"a"} and tmp_path.stat().st_mtime_ns > before, "the clock is a file"
    before = tmp_path.stat().st_mtime_ns
    assert claims.holders().keys() == {"a"} and tmp_path.stat().st_mtime_ns == before, "asked for once in a while"
