"""Claims: one holder at a time, and what a dead process held is free again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runs import claims
from pipeline.runs.claims import Claims, left_behind
from pipeline.runs.files import place_once

HOLD = """
import sys, time
from pathlib import Path
from pipeline.runs.claims import Claims
with Claims(Path(sys.argv[1])).hold("a") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path, root: Path):
    """A process that holds `a`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout.readline() == b"True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_claim_is_held_once_and_then_free(tmp_path):
    mine = Claims(tmp_path)
    with mine.hold("a") as first:
        assert first
        with mine.hold("a") as again, mine.hold("b") as another:
            assert not again and another
        holder = mine.holders()["a"]
        assert (holder.pid, holder.is_gone) == (os.getpid(), False)
    assert not mine.holders()
    with mine.hold("a") as free:
        assert free


def test_another_living_process_keeps_its_claim(tmp_path, other):
    with Claims(tmp_path).hold("a") as mine:
        assert not mine
    assert Claims(tmp_path).holders()["a"].pid == other.pid


def test_what_a_killed_process_held_is_taken_over_at_once(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert Claims(tmp_path).holders()["a"].is_gone
    with Claims(tmp_path).hold("a") as mine:
        assert mine
    assert not list(tmp_path.iterdir()), "nothing is left of it"


def test_a_process_that_is_dead_but_not_reaped_is_gone(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    deadline = time.time() + 20
    while not Claims(tmp_path).holders()["a"].is_gone:
        assert time.time() < deadline
        time.sleep(0.01)


def test_a_reused_process_id_is_not_its_old_owner(tmp_path):
    (tmp_path / "a").write_text(json.dumps(Claims(tmp_path).me | {"born": "long ago", "made": 0}))
    with Claims(tmp_path).hold("a") as mine:
        assert mine


@pytest.mark.parametrize(("silent", "free"), [(claims.SILENT - 30, False), (claims.SILENT + 30, True)])
@pytest.mark.parametrize("text", ['{"host": "elsewhere", "pid": 1, "born": "7", "made": 0}', "", "[]"])
def test_a_claim_of_another_machine_is_free_when_it_was_silent_for_long(tmp_path, silent, free, text):
    (tmp_path / "a").write_text(text)
    os.utime(tmp_path / "a", (0, time.time() - silent))
    with Claims(tmp_path).hold("a") as mine:
        assert mine is free


def test_a_holder_touches_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with Claims(tmp_path).hold("a"):
        os.utime(tmp_path / "a", (0, 0))
        deadline = time.time() + 20
        while (tmp_path / "a").stat().st_mtime == 0:
            assert time.time() < deadline
            time.sleep(0.01)


def test_a_claim_that_was_taken_over_is_not_removed_by_who_lost_it(tmp_path):
    with Claims(tmp_path).hold("a"):
        (tmp_path / "a").write_text("somebody else's")
    assert (tmp_path / "a").read_text() == "somebody else's"


def test_what_is_left_under_temporary_names(tmp_path):
    host = Claims(tmp_path).me["host"]
    dead = tmp_path / f".tmp-x@{host}-999999999"
    alive = tmp_path / f".tmp-x@{host}-{os.getpid()}"
    elsewhere = tmp_path / ".tmp-x@elsewhere-1"
    for path in (dead, alive, elsewhere):
        path.touch()
    assert [left_behind(p) for p in (dead, alive, elsewhere)] == [True, False, False]
    os.utime(elsewhere, (0, 0))
    assert left_behind(elsewhere)


def test_of_two_who_place_a_file_the_first_wins(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    assert place_once(tmp_path / "one", tmp_path / "final")
    assert not place_once(tmp_path / "two", tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (tmp_path / "final").read_text() == "one"


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    test_of_two_who_place_a_file_the_first_wins(tmp_path)
