"""--redo removes nothing while a process is at the stage, and says which; a dead one keeps nobody from it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli
from pipeline.config import Config, load
from pipeline.errors import UserError
from pipeline.runs import presence
from pipeline.runs.files import atomic_write
from pipeline.runs.folder import OUTPUTS, SHARED, STAGES, RunDir

AT_WORK = """
import sys, time
from pipeline.config import load
from pipeline.runs.folder import RunDir
how, stage, *words = sys.argv[1:]
run = RunDir(load(None, words))
with {"before": run.at, "alone": run.presence.alone, "shared": lambda s: run.stage(s, [], shared=True)}[how](stage):
    print("there", flush=True)
    time.sleep(100)
"""


def again(config: Config) -> RunDir:
    return RunDir(load(None, [f"run.dir={config.run.dir}", f"run.name={config.run.name}"]))


def written(run: RunDir) -> set[str]:
    """All but locks and claims."""
    files = (p for p in run.path.rglob("*") if p.is_file() and p.suffix != ".lock" and "claims" not in p.parts)
    return {p.relative_to(run.path).as_posix() for p in files}


@pytest.fixture
def at_work(config: Config, root: Path):
    """Starts a process that is at a stage of the run folder."""
    started: list[subprocess.Popen] = []

    def start(how: str, stage: str) -> subprocess.Popen:
        words = [f"run.dir={config.run.dir}", f"run.name={config.run.name}"]
        process = subprocess.Popen([sys.executable, "-c", AT_WORK, how, stage, *words], stdout=-1, cwd=root)
        assert process.stdout.readline() == b"there\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("how", "stage"), [("shared", "generate"), ("before", "generate"), ("before", "cache"), ("alone", "distill")]
)
def test_redo_waits_for_nobody_and_removes_nothing_of_a_stage_at_work(
    how, stage, at_work, config, capsys, monkeypatch
) -> None:
    """`before`: a worker that still loads its model, and holds no shard."""
    monkeypatch.setattr(cli, "_stage", lambda name: SimpleNamespace(run=None))
    run = RunDir(config)
    for name in STAGES:
        atomic_write(run / OUTPUTS[name][0] / "made.txt", name)
        atomic_write(run / "stages" / f"{name}.json", "{}")
    process = at_work(how, stage)
    before = written(run)
    words = [f"run.dir={config.run.dir}", f"run.name={config.run.name}", "distill.teacher=cached"]
    for verb in (stage, "run"):
        assert cli.main([verb, "--redo", stage, *words]) == 2
        err = capsys.readouterr().err
        assert f"another process is at stage {stage} of it (" in err and f"process {process.pid}, for" in err
    assert written(run) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    again(config).redo(stage)
    assert not (run / OUTPUTS[stage][0]).exists() and not (run / "stages" / f"{stage}.json").exists()


def test_redo_of_what_a_later_stage_may_be_reading(at_work, config) -> None:
    at_work("alone", "evaluate")
    for stage in ("generate", "distill"):
        with pytest.raises(UserError, match="another process is at stage evaluate"):
            RunDir(config).redo(stage)
    RunDir(config).redo("publish", "draft")


def test_redo_of_several_stages_removes_none_if_one_is_at_work(at_work, config) -> None:
    run = RunDir(config)
    atomic_write(run / "heads" / "made.txt", "x")
    at_work("alone", "publish")
    with pytest.raises(UserError, match="stage publish"):
        run.redo("distill", "evaluate", "publish")
    assert (run / "heads" / "made.txt").exists()


@pytest.mark.parametrize("stage", SHARED)
def test_who_comes_while_a_stage_is_removed_waits(stage: str, config, monkeypatch) -> None:
    monkeypatch.setattr(presence, "COMING", 0.1)
    run, other = RunDir(config), again(config)
    with run.presence.alone(stage), pytest.raises(UserError, match=f"stage {stage} .*process {os.getpid()}"):
        other.at(stage).__enter__()
    with other.at(stage), again(config).at(stage), other.stage(stage, [], shared=True):
        pass
    assert not list((run / "stages" / "claims").iterdir()), "nothing is left of it"


def test_the_command_line_is_there_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the stage is marked begun, and before it holds a shard."""
    seen = []

    def run(folder: RunDir) -> None:
        with pytest.raises(UserError, match="another process is at stage generate"):
            RunDir(folder.config).redo("generate")
        seen.append(folder)

    monkeypatch.setattr(cli, "_stage", lambda name: SimpleNamespace(run=run))
    assert cli.main(["generate", f"run.dir={tmp_path}"]) == 0 and seen
    RunDir(seen[0].config).redo("generate")
