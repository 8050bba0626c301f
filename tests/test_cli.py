"""Every mistake at the command line: exit code 2, one message that names it, no traceback, nothing half-written.

Stages are replaced by one that writes a line, so that these are tests of the command line alone.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli
from pipeline.config import load
from pipeline.errors import GateError, UserError
from pipeline.launchers import own_command
from pipeline.runs.files import atomic_write
from pipeline.runs.folder import OUTPUTS, STAGES, RunDir

ran: list[str] = []
WRITING = [verb for verb in cli.VERBS if verb not in ("plan", "chat", "heads")]  # these only print


def stub(run: Callable[[RunDir], None]) -> SimpleNamespace:
    """The module of a stage; for all that the stage pilot is asked, the exit layers are given."""
    return SimpleNamespace(run=run, prepare=lambda run: None, chosen=lambda run, **_: run)


def small_stage(name: str) -> SimpleNamespace:
    def run(folder: RunDir) -> None:
        if folder.plan(name, []):
            with folder.stage(name, []):
                ran.append(name)
                atomic_write(folder / OUTPUTS[name][0] / "made.txt", name)

    return stub(run)


def closing_table(run: RunDir, published: bool | None = True) -> None:
    print("table of a measurement" if published is None else "table" if published else "table of a refused head")


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    ran.clear()
    monkeypatch.setattr(cli, "_stage", small_stage)
    monkeypatch.setitem(sys.modules, "pipeline.evaluation.closing", SimpleNamespace(closing_table=closing_table))


def call(argv: list[str]) -> int:
    """The exit code, also when argparse ends the process."""
    try:
        return cli.main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# Each: the words after the verb, and what the message must name.
MISTAKES = {
    "unknown section": (["nosuch.key=1"], ["nosuch"]),
    "mistyped key": (["distill.max_step=3"], ["distill.max_step", "distill.max_steps"]),
    "mistyped value": (["distill.max_steps=many"], ["distill.max_steps", "many"]),
    "no such config file": (["--config", "nowhere.yaml"], ["nowhere.yaml", "configs/"]),
    "no value": (["seed"], ["seed", "key=value"]),
    "one value for a list": (["distill.exit_layers=2"], ["distill.exit_layers", "a list is needed, in brackets"]),
    "exit layer below 1": (["distill.exit_layers=[0]"], ["distill.exit_layers", "N >= 1"]),
    "unknown option": (["--seed=1"], ["--seed"]),
    "config without a file": (["--config"], ["--config"]),
}


@pytest.mark.parametrize("verb", [*WRITING, "chat", "heads"])
@pytest.mark.parametrize(("words", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(verb: str, words: list[str], named: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call([verb, *words]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and not out
    for part in named:
        assert part in err
    assert not ran and files(tmp_path) == []


@pytest.mark.parametrize("verb", [*STAGES, "run"])
def test_redo_of_no_stage(verb: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call([verb, "--redo", "everything"]) == 2
    err = capsys.readouterr().err
    assert "everything" in err and "generate" in err and not ran and files(tmp_path) == []


def test_one_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(["generate", f"run.dir={tmp_path}", "distill.max_step=3"])
    message = capsys.readouterr().err
    assert message.startswith("exit-heads generate: ") and message.count("\n") == 1


@pytest.mark.parametrize("verb", [*WRITING, "heads"])
def test_unwritable_folder(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")  # below a file nobody can make a folder, not even root
    assert call([verb, f"run.dir={tmp_path / 'file'}"]) == 2
    assert "run.dir=" in capsys.readouterr().err
    assert not ran and files(tmp_path) == ["file"]


@pytest.mark.parametrize("verb", STAGES)
def test_run_folder_of_another_config(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"run.dir={tmp_path}"
    assert call([verb, here]) == 0
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert call([verb, here, "backbone.name_or_path=elsewhere"]) == 2
    err = capsys.readouterr().err
    assert "backbone.name_or_path was pocket, is elsewhere" in err and f"--redo {verb}" in err
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_redo_of_a_stage_that_the_verb_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["generate", "--redo", "distill", f"run.dir={tmp_path}"]) == 2
    assert "exit-heads distill --redo distill" in capsys.readouterr().err
    assert not ran


def test_redo_of_a_draft_model_is_called_as_it_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["publish", "--as", "draft", "--redo", "publish", f"run.dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "exit-heads publish --as draft does not run that stage" in err and "exit-heads publish --redo" in err
    assert call(["publish", "--redo", "draft", f"run.dir={tmp_path}"]) == 2
    assert "exit-heads publish --as draft --redo draft" in capsys.readouterr().err and not ran


def test_redo_of_a_stage_that_never_ran_runs_it(tmp_path: Path) -> None:
    assert call(["distill", "--redo", "distill", f"run.dir={tmp_path}"]) == 0
    assert ran == ["distill"]


@pytest.mark.parametrize("several", ["SLURM_STEP_NUM_TASKS", "WORLD_SIZE"])
def test_redo_is_for_one_process(several: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late one of four would remove what the first has begun."""
    words = ["distill", f"run.dir={tmp_path}"]
    call(words)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    monkeypatch.setenv(several, "4")
    assert call([*words, "--redo", "distill"]) == 2
    err = capsys.readouterr().err
    assert "torchrun started 4 processes" in err.replace("srun", "torchrun") and f"Unset {several}" in err
    assert "--redo distill: " in err and "another run.name" in err
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    monkeypatch.setenv(several, "1")
    assert call([*words, "--redo", "distill"]) == 0 and ran == ["distill"] * 2


@pytest.mark.parametrize("teacher", ["online", "cached"])
def test_run_does_all_in_order_and_skips_what_is_done(teacher: str, tmp_path: Path, capsys) -> None:
    words = [f"run.dir={tmp_path}", f"distill.teacher={teacher}"]
    stages = [name for name in STAGES if name not in ("cache", "pilot") or (name, teacher) == ("cache", "cached")]
    assert call(["run", *words]) == 0
    assert ran == stages and capsys.readouterr().out.endswith("table\n")
    assert call(["run", *words]) == 0
    assert ran == stages


def test_run_with_redo_makes_that_stage_and_all_after_it_anew(tmp_path: Path) -> None:
    here = f"run.dir={tmp_path}"
    call(["run", here])
    ran.clear()
    assert call(["run", "--redo", "evaluate", here]) == 0
    assert ran == ["evaluate", "publish"]


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [1, 2, 0]], ids=["first", "between", "last"])
def test_options_stand_anywhere(order: list[int], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    parts = [["--config", str(tmp_path / "my.yaml")], [f"run.dir={tmp_path}"], ["seed=2"]]
    assert call(["generate", *(word for i in order for word in parts[i])]) == 0
    assert "seed: 2" in (tmp_path / "pocket" / "config.yaml").read_text()


def test_public_is_a_word_for_a_key(tmp_path: Path) -> None:
    to_hub = ["publish.target=hub", "publish.repo_id=org/head"]
    assert call(["publish", f"run.dir={tmp_path}", *to_hub, "--public", "seed=3"]) == 0
    text = (tmp_path / "pocket" / "config.yaml").read_text()
    assert "public: true" in text and "seed: 3" in text


def test_a_published_head_is_for_evaluate_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", f"run.dir={tmp_path}", "evaluate.head=org/head"]) == 2
    assert "only `exit-heads evaluate`" in capsys.readouterr().err
    assert call(["distill", "--head", "org/head"]) == 2
    assert "--head" in capsys.readouterr().err and not ran


@pytest.mark.parametrize("error", [UserError("no such thing"), GateError("too slow")], ids=["user", "gate"])
def test_exit_codes(error: UserError | GateError, capsys, tmp_path: Path, monkeypatch) -> None:
    def raise_it(folder: RunDir) -> None:
        raise error

    monkeypatch.setattr(cli, "_stage", lambda name: stub(raise_it))
    assert call(["publish", f"run.dir={tmp_path}"]) == error.exit_code == {UserError: 2, GateError: 3}[type(error)]
    assert capsys.readouterr().err == f"exit-heads publish: {error}\n"


def test_a_run_shows_its_table_before_it_says_what_the_gate_refused(capsys, tmp_path: Path, monkeypatch) -> None:
    def refuse(folder: RunDir) -> None:
        raise GateError("too slow")

    monkeypatch.setattr(cli, "_stage", lambda name: stub(refuse) if name == "publish" else small_stage(name))
    for verb, table in (("run", "table of a refused head\n"), ("publish", "")):
        assert call([verb, f"run.dir={tmp_path}"]) == 3
        assert capsys.readouterr() == (table, f"exit-heads {verb}: too slow\n")
    assert ran == list(cli.stages_of(load(None, []))[:-1])


def test_a_bug_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(folder: RunDir) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_stage", lambda name: stub(raise_it))
    with pytest.raises(ZeroDivisionError):
        call(["generate", f"run.dir={tmp_path}"])


def test_help_of_the_whole_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    assert "configs/pocket.yaml" in text and all(verb in text for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([verb, "--help"]) == 0
    text = capsys.readouterr().out
    does, writes, sections = cli.VERBS[verb]
    assert does in text and writes in text and "key=value" in text and "--config" in text
    assert ("--redo" in text) == (verb in (*STAGES, "run")) and ("--vary" in text) == (verb == "plan")
    for section in sections:
        assert f"  {section}=" in text or f"  {section}." in text, section


@pytest.mark.parametrize("command", [["-m", "pipeline"], ["-c", "from pipeline.cli import process; process()"]])
def test_as_a_process(command: list[str], tmp_path: Path) -> None:
    """Through the real entry points: the code, the message, no traceback, and no wait for torch."""
    argv = [sys.executable, "-X", "importtime", *command, "generate", "distill.max_step=3"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and not done.stdout
    assert "exit-heads generate: distill.max_step=3" in done.stderr and "Traceback" not in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]


@pytest.mark.parametrize("has_group", [True, False])
def test_a_process_that_still_has_its_group_ends_at_once(has_group, tmp_path) -> None:
    """With the code of `main`; what Python does at its end is left out, which may abort a process with such a group."""
    code = (
        "import atexit, sys, torch.distributed as dist\n"
        "from pipeline import cli\n"
        f"{has_group} and dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\n"
        "cli.main = lambda: print('done') or 3\n"
        "atexit.register(print, 'taken down')\n"
        "cli.process()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 3 and found.stdout.split("\n")[:-1] == (
        ["done"] if has_group else ["done", "taken down"]
    )


def test_a_worker_with_a_process_group_ends_at_once_too(tmp_path: Path) -> None:
    before = (
        "import atexit, torch.distributed as dist\n"
        "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\n"
        "atexit.register(print, 'taken down')\n"
    )
    interpreter, safe, c, code, *words = own_command("generate", "distill.max_step=3")
    argv = [interpreter, safe, c, before + code, *words]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "distill.max_step=3" in done.stderr and not done.stdout
