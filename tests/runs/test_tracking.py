"""metrics.jsonl and its mirror in W&B, offline: nothing is lost when the process, or W&B's own, is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_records import lines, rows, segments

from pipeline.config import load
from pipeline.runs.folder import RunDir
from pipeline.runs.tracking import Tracker
from pipeline.runs.wandb_resume import steps_in

KILLED = """
import os, signal, sys, time
from pipeline.config import load
from pipeline.runs.folder import RunDir
from pipeline.runs.tracking import Tracker
from pipeline.runs.wandb_resume import steps_in
run = RunDir(load(None, sys.argv[1:]))
tracker = Tracker(run, True)
tracker.start(-1)
for step in range(5):
    tracker.log(step, {"loss": 1 / (step + 1)})
    tracker.log(step, {"val": float(step)})
(file,) = (run / "wandb").rglob("run-*.wandb")
while 3 not in steps_in(file):  # W&B's own process writes when it comes to it
    time.sleep(0.05)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
for process in [*map(int, children), os.getpid()]:
    os.kill(process, signal.SIGKILL)
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [f"run.dir={tmp_path}", "run.name=run", "wandb.mode=offline"]


def test_what_a_killed_start_logged_in_vain_is_logged_once_more(words: list[str]) -> None:
    # With a service of its own: that of an earlier test in this process would outlive it.
    alone = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    command = [sys.executable, "-c", KILLED, *words]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = RunDir(load(None, words))
    before = [rows(segment) for segment in segments(run)]
    assert len(before) == 1 and list(before[0]) == [0, 1, 2, 3], "W&B writes a step when the next begins"
    tracker = Tracker(run, True)
    tracker.start(3)  # as if the last checkpoint were of step 3
    for step in (4, 5):
        tracker.log(step, {"loss": 1 / (step + 1), "val": float(step)})
    tracker.finish()
    first, second = map(rows, segments(run))
    assert lines(run) == {step: {"loss": 1 / (step + 1), "val": float(step)} for step in range(6)}
    assert first | second == lines(run)
    assert not set(first) & set(second), "nor is anything there twice"


def logged(run: RunDir, after: int, *steps: int) -> None:
    """One start, from the checkpoint of step `after`; returns when W&B's file has every step.

    W&B's own process writes, and on a loaded machine it may still do so after `finish` has returned.
    """
    known = {*(run / "wandb").rglob("run-*.wandb")}
    tracker = Tracker(run, True)
    tracker.start(after)
    for step in steps:
        tracker.log(step, {"loss": float(step)})
    tracker.finish()
    (file,) = {*(run / "wandb").rglob("run-*.wandb")} - known
    deadline = time.monotonic() + 60
    while steps[-1] not in steps_in(file):
        assert time.monotonic() < deadline, f"W&B did not write step {steps[-1]} to {file}"
        time.sleep(0.05)


def test_a_file_that_w_and_b_cannot_read_stops_nothing(words: list[str], capsys: pytest.CaptureFixture) -> None:
    run = RunDir(load(None, words))
    logged(run, -1, 0, 1, 2)
    (file,) = (run / "wandb").rglob("run-*.wandb")
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[11:13], "little")  # of the first record; a header of 7 bytes stands before it
    data[14 : 14 + length] = b"\xff" * length
    file.write_bytes(data)
    logged(run, 2, 3)
    assert f"{file} is damaged (DecodeError)" in capsys.readouterr().err
    shutil.rmtree(file.parent)
    (second,) = map(rows, segments(run))
    assert second == lines(run) and list(second) == [0, 1, 2, 3]


def test_a_training_that_begins_anew_is_a_run_of_its_own(words: list[str]) -> None:
    """W&B would drop its steps under the old id, as it has been further; the path is the same, as in a container."""
    run, ids = RunDir(load(None, words)), []
    for _ in range(2):
        logged(run, -1, 0)
        logged(run, 0, 1)
        found = segments(run)
        assert len(found) == 2
        ids.append({record["run"]["run_id"] for segment in found for record in segment if "run" in record})
        run.redo("distill")
    assert all(len(one) == 1 for one in ids) and ids[0] != ids[1]


def test_training_goes_on_when_the_process_of_wandb_is_killed(words: list[str], capsys: pytest.CaptureFixture) -> None:
    run = RunDir(load(None, words))
    tracker = Tracker(run, True)
    tracker.start(-1)
    tracker.log(0, {"loss": 1.0})
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGTERM)
            os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOWAIT)
    for step in range(1, 50):
        tracker.log(step, {"loss": 1.0})
    tracker.finish()
    assert list(lines(run)) == list(range(50))
    assert capsys.readouterr().err.count("W&B failed") == 1
    tracker.start(49)
    tracker.finish()
    first, second = map(rows, segments(run))
    assert first | second == lines(run) and len(second) > len(first)
