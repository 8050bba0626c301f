"""distill killed, stopped and resumed: it ends with the bits of an undisturbed run, whatever became of its files."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from distilling import assert_same, end_of, finish, gone, lines, prepare, start

from pipeline.errors import UserError
from pipeline.runs.folder import RunDir
from pipeline.stages import distill
from pipeline.training.callbacks import Checkpoints
from pipeline.training.checkpoints import WholeFile, damage_of, newest_intact
from pipeline.training.module import Distillation

PASSES = "distill.sequences_per_pass=1"  # two a step
UNDISTURBED = [PASSES]


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, undisturbed, backbone):
    """Killed between the two passes of a step."""
    run = prepare(tmp_path, backbone, PASSES)
    assert list(map(end_of, start(run, "die,first,7,between"))) == [-9]
    assert newest_intact(run / "checkpoints").name == "step-00000006.ckpt" and not (run / "heads").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')  # what a kill may leave
    distill.run(run)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_the_run_goes_on(
    tmp_path, undisturbed, backbone, monkeypatch, capsys, number
):
    run = prepare(tmp_path, backbone, PASSES)
    plain = Distillation.training_step

    def step(self, batch, index):
        if self.global_step == 4:
            os.kill(os.getpid(), number)
        return plain(self, batch, index)

    monkeypatch.setattr(Distillation, "training_step", step)
    handler = signal.getsignal(number)
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            distill.run(run)
    else:
        with pytest.raises(SystemExit) as ended:
            distill.run(run)
        assert ended.value.code == 128 + number
    monkeypatch.undo()
    assert f"{number.name}: saved" in capsys.readouterr().out and not (run / "heads").exists()
    assert newest_intact(run / "checkpoints").name == "step-00000005.ckpt"
    assert signal.getsignal(number) == handler
    distill.run(run)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_first_validation_stops_behind_the_first_step(
    tmp_path, undisturbed, backbone, monkeypatch, capsys, number
):
    """Where Lightning's own handler of SIGTERM would end the run as if it were done."""
    run = prepare(tmp_path, backbone, PASSES)
    plain = Distillation.validate

    def validate(self, step):
        if step == 0:
            os.kill(os.getpid(), number)
        return plain(self, step)

    monkeypatch.setattr(Distillation, "validate", validate)
    with pytest.raises(SystemExit) as ended:
        distill.run(run)
    assert ended.value.code == 128 + number and f"{number.name}: saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert names(run / "checkpoints") == ["step-00000001.ckpt"]
    distill.run(run)
    assert_same(run, undisturbed)


# ---- damaged checkpoints


@pytest.fixture(scope="module")
def without_heads(tmp_path_factory, backbone) -> Path:
    """The folder of a run that was killed between its last checkpoint and its heads."""
    run = prepare(tmp_path_factory.mktemp("without-heads"), backbone, PASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "save_heads", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill.run(run)
    assert names(run / "checkpoints") == ["step-00000006.ckpt", "step-00000009.ckpt"]
    return run.path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, at: int) -> None:
    with path.open("rb+") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def flip_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def leave_half(path: Path) -> None:
    """What a process leaves that is killed while it writes the checkpoint."""
    path.rename(path.with_name(f".tmp-{path.name}@host-1"))
    cut(path.with_name(f".tmp-{path.name}@host-1"))


@pytest.mark.parametrize("damage", [None, flip_the_middle, cut, empty, leave_half])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, undisturbed, backbone, without_heads, capsys, damage):
    """The run resumes from the checkpoint before the damaged one; without damage, from the newest."""
    shutil.copytree(without_heads, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000009.ckpt"
    if damage:
        damage(newest)
    run = prepare(tmp_path, backbone, PASSES)
    distill.run(run)
    told = capsys.readouterr()
    assert f"going on from {newest.with_name(f'step-0000000{6 if damage else 9}.ckpt')}" in told.out
    assert (f"{newest} is damaged" in told.err) == (damage not in (None, leave_half))
    assert_same(run, undisturbed)
    assert names(newest.parent) == ["step-00000006.ckpt", "step-00000009.ckpt"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path, backbone, without_heads):
    """Weights under the names that an earlier version gave them would be left out without an error."""
    shutil.copytree(without_heads, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000009.ckpt"
    old = torch.load(newest, weights_only=True)
    old.pop("format", None)
    old["state_dict"] = {name.replace("step_model.", "engine."): w for name, w in old["state_dict"].items()}
    torch.save(old, newest)
    with pytest.raises(UserError, match=f"^{newest}: this checkpoint has format 1, .* format 2 only.*--redo distill"):
        distill.run(prepare(tmp_path, backbone, PASSES))
    assert not (tmp_path / "run" / "heads").exists()


def test_without_an_intact_checkpoint_the_run_starts_anew(tmp_path, undisturbed, backbone, without_heads, capsys):
    shutil.copytree(without_heads, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        flip_the_middle(path)
    run = prepare(tmp_path, backbone, PASSES)
    distill.run(run)
    assert "no checkpoint in" in capsys.readouterr().err
    assert_same(run, undisturbed)


def test_a_flipped_byte_anywhere_is_noticed_or_changes_nothing(tmp_path):
    """Every third byte is tried. Some are never read, such as padding and dates."""
    path = tmp_path / "step-1.ckpt"
    state = {"weights": {"a": torch.arange(300.0), "b": torch.ones(7, 3)}, "step": torch.tensor(5)}
    torch.save(state, path)
    whole = path.read_bytes()
    noticed = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        if damage_of(path):
            noticed += 1
        else:
            torch.testing.assert_close(torch.load(path, weights_only=True, mmap=True), state, rtol=0, atol=0)
    assert noticed > 400


def test_the_last_two_checkpoints_are_kept_and_none_of_an_abandoned_future(tmp_path):
    """Two damaged ones were passed over; training began anew."""

    class Trainer:
        is_global_zero = True
        global_step = 0

        def save_checkpoint(self, path: Path) -> None:
            path.touch()

    trainer, checkpoints = Trainer(), Checkpoints(tmp_path, every=3)
    for step in (6, 9):
        (tmp_path / f"step-0000000{step}.ckpt").touch()
    kept = []
    for trainer.global_step in (3, 5, 6):
        checkpoints.save(trainer)
        kept.append([int(name[5:13]) for name in names(tmp_path)])
    assert kept == [[3], [3, 5], [5, 6]]


def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path):
    """A limit of 100 kB on the size of files gives a writer the same kind of error as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        WholeFile().save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "step-1.ckpt")
        with pytest.raises(UserError, match=r"cannot write .*step-2\.ckpt: File too large"):
            WholeFile().save_checkpoint({"weights": torch.zeros(100_000)}, tmp_path / "step-2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-1.ckpt"] and newest_intact(tmp_path) == tmp_path / "step-1.ckpt"


# ---- more than one process


KILLS = 10
VICTIMS = ("first", "other", "all")
MOMENTS = ("before", "between", "after", "saving")
TORTURE = [PASSES, "machine.processes_per_node=2", "distill.sequences_per_step=4", "distill.max_steps=24"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, backbone) -> RunDir:
    """An undisturbed run of two processes with two passes a step."""
    run = prepare(tmp_path_factory.mktemp("two"), backbone, *TORTURE)
    finish(start(run), run)
    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_ten_times_two_processes_end_with_the_same_bits(tmp_path, backbone, two):
    """Killed are the first process, the one that it started, or both, at random steps and moments. No process stays."""
    rng = random.Random(0)
    run = prepare(tmp_path, backbone, *TORTURE)
    log = run.path.with_suffix(".log")
    for step in sorted(rng.sample(range(24), KILLS)):
        manner = (
            f"die,{rng.choice(['first', 'other', 'all'])},{step},{rng.choice(['before', 'between', 'after', 'saving'])}"
        )
        (process,) = start(run, manner)
        assert end_of(process) != 0, f"{manner}: not killed\n{log.read_text()}"
        others = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("started ")]
        deadline = time.monotonic() + 60
        while not all(map(gone, others)):
            assert time.monotonic() < deadline, f"{manner}: a process is left\n{log.read_text()}"
            time.sleep(0.2)
    assert len(others) == KILLS and not (run / "heads").exists()
    finish(start(run), run)
    assert_same(run, two)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_to_the_same_losses(tmp_path, backbone, two, before, after):
    run = prepare(tmp_path, backbone, *TORTURE, f"machine.processes_per_node={before}")
    assert list(map(end_of, start(run, "die,first,13,before"))) == [-9]
    assert newest_intact(run / "checkpoints").name == "step-00000012.ckpt"
    run = prepare(tmp_path, backbone, *TORTURE, f"machine.processes_per_node={after}")
    finish(start(run), run)
    for ours, theirs in zip(lines(run), lines(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
