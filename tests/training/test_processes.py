"""The processes of distill: who they are, that they meet, and that none waits for ever for one that is missing, failed,
was killed or stands still. Real processes, forked, that talk through gloo; no training."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from pipeline.cli import main
from pipeline.config import Machine
from pipeline.errors import LostError, UserError
from pipeline.launchers import launched
from pipeline.training import rendezvous as rendezvous_module
from pipeline.training import watchdog
from pipeline.training.launch import Place, find_place, own_device, workers
from pipeline.training.rank_log import rank_log
from pipeline.training.rendezvous import Member, described, ranks_of, rendezvous

CPU = torch.device("cpu")


def places(world: int, nodes: int = 1) -> list[Place]:
    port, each = find_free_network_port(), world // nodes
    return [Place(r, world, r % each, r // each, f"n{r // each + 1}", "127.0.0.1", port) for r in range(world)]


# ---- which process this is

SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURMD_NODENAME": "gpu08",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2", "RANK": "3",
    "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def test_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SRUN.items():
        monkeypatch.setenv(key, value)
    place = find_place(Machine(nodes=2, processes_per_node=2))
    assert (place.rank, place.local_rank, place.node_rank) == (3, 1, 1)
    assert (place.node, place.address, place.starts_others) == ("gpu08", "gpu07", False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = find_place(Machine(nodes=2, processes_per_node=2))
    assert again.port != place.port and again.attempt != place.attempt, "what is left of the first start is not met"


def test_one_process_in_a_shell_of_srun_starts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(key, value)
    place = find_place(Machine(processes_per_node=8))
    assert (place.rank, place.world_size, place.starts_others) == (0, 8, True)
    with pytest.raises(UserError, match="srun started 1"):
        find_place(Machine(nodes=2, processes_per_node=4))


def test_each_process_has_a_gpu_of_its_own_or_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    two, gpu = places(4, nodes=2)[:2], torch.device("cuda")
    assert own_device(CPU, two[1]) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(own_device(gpu, place)) for place in two] == ["cuda:0", "cuda:1"]
    assert str(own_device(torch.device("cuda:1"), places(1)[0])) == "cuda:1"
    with pytest.raises(UserError, match=r"machine\.device=cuda:1: one GPU for 4 processes"):
        own_device(torch.device("cuda:1"), two[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"process 1 of n1 has no GPU, it sees 1 .*CUDA_VISIBLE_DEVICES"):
        own_device(gpu, two[1])


def test_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    place = find_place(Machine(nodes=2, processes_per_node=2))
    assert (place.rank, place.local_rank, place.node_rank, place.hosts) == (3, 1, 1, False)


@pytest.mark.parametrize(("started", "by"), [(SRUN, "srun"), (TORCHRUN, "torchrun")], ids=["srun", "torchrun"])
def test_processes_that_were_started_must_be_those_of_the_config(started, by, monkeypatch) -> None:
    for key, value in started.items():
        monkeypatch.setenv(key, value)
    for machine in (Machine(), Machine(nodes=2, processes_per_node=4)):
        with pytest.raises(UserError, match=rf"processes_per_node={machine.processes_per_node}: {by} started 4"):
            find_place(machine)


@pytest.mark.parametrize("started", [SRUN, TORCHRUN], ids=["srun", "torchrun"])
def test_run_is_for_one_process(started, tmp_path, monkeypatch, capsys) -> None:
    for key, value in started.items():
        monkeypatch.setenv(key, value)
    assert main(["run", f"run.dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "started 4 processes" in err and "slurm/distill.sh" in err and not any(tmp_path.iterdir())


GENERIC = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
"""As of Kubeflow; with LOCAL_RANK as of deepspeed, with NODE_RANK too as of Lightning."""


@pytest.mark.parametrize("more", [{}, {"LOCAL_RANK": "1"}, {"LOCAL_RANK": "1", "NODE_RANK": "1"}])
def test_under_another_launcher(more, monkeypatch) -> None:
    for key, value in (GENERIC | more).items():
        monkeypatch.setenv(key, value)
    place = find_place(Machine(nodes=2, processes_per_node=2))
    assert (place.rank, place.local_rank, place.node_rank, place.address, place.port) == (3, 1, 1, "a", 1)
    with pytest.raises(UserError, match="started 4 processes"):
        find_place(Machine(processes_per_node=2))


@pytest.mark.parametrize("launcher", [SRUN, TORCHRUN, GENERIC, {"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_SIZE": "4"},
                                      {"JSM_NAMESPACE_SIZE": "4"}])  # fmt: skip
def test_variables_that_are_empty_are_not_there(launcher, monkeypatch) -> None:
    for key in (*launcher, "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(key, "")
    assert launched() is None
    place = find_place(Machine(processes_per_node=3))
    assert (place.rank, place.world_size, place.address, place.starts_others) == (0, 3, "127.0.0.1", True)


WRONG = [
    (TORCHRUN, "WORLD_SIZE", "four"), (TORCHRUN, "WORLD_SIZE", ""), (TORCHRUN, "WORLD_SIZE", "0"),
    (TORCHRUN, "RANK", ""), (TORCHRUN, "RANK", "4"), (TORCHRUN, "LOCAL_RANK", "2"), (TORCHRUN, "MASTER_PORT", "x"),
    (SRUN, "SLURM_STEP_NUM_TASKS", "4(x2)"), (SRUN, "SLURM_PROCID", ""), (SRUN, "SLURM_PROCID", "4"),
    (SRUN, "SLURM_NODEID", "2"), (SRUN, "SLURM_RESTART_COUNT", "x"), (GENERIC, "WORLD_SIZE", "-1"),
    (GENERIC, "WORLD_SIZE", "4.0"), (GENERIC, "RANK", "4"), (GENERIC | {"LOCAL_RANK": "0"}, "LOCAL_RANK", "x"),
    (GENERIC | {"LOCAL_RANK": "1"}, "RANK", "2"), (GENERIC, "MASTER_PORT", "http"), (GENERIC, "RANK", ""),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE", "4"), ({"PMI_SIZE": "2"}, "PMI_SIZE", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("launcher", "name", "value"), WRONG)
def test_a_variable_that_cannot_be_right_is_named(launcher, name, value, monkeypatch) -> None:
    for key, said in (launcher | {name: value}).items():
        monkeypatch.setenv(key, said)
    with pytest.raises(UserError, match=f"^{name}=|^WORLD_SIZE=4: ") as caught:
        find_place(Machine(nodes=2, processes_per_node=2))
    assert "\n" not in str(caught.value) and "nset" in str(caught.value)


LEFT = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}


@pytest.mark.parametrize("left", [GENERIC | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, LEFT])
def test_what_an_earlier_launcher_left_does_not_count(left, monkeypatch) -> None:
    for key, value in left.items():
        monkeypatch.setenv(key, value)
    place = find_place(Machine(processes_per_node=2))
    assert (place.rank, place.address, place.starts_others) == (0, "127.0.0.1", True)


@pytest.mark.parametrize("variables", [SRUN, TORCHRUN, GENERIC, {"OMPI_COMM_WORLD_SIZE": "4"}])
def test_the_command_line_counts_as_distill_does(variables, tmp_path, monkeypatch, capsys) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    found = launched()
    assert found is not None and found.processes == 4
    assert main(["run", f"run.dir={tmp_path}"]) == 2 and main(["distill", "--redo=distill", f"run.dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.count(f"started 4 processes ({found.variable})") == 2
    monkeypatch.setenv(found.variable, "four")
    assert main(["generate", f"run.dir={tmp_path}"]) == 2
    assert f"{found.variable}=four: " in capsys.readouterr().err and not any(tmp_path.iterdir())


SHADOWS = ("pipeline.py", "torch.py", "wandb.py", "lightning.py", "filelock.py")


def test_a_worker_runs_this_package_whatever_lies_in_the_current_folder(tmp_path, monkeypatch) -> None:
    for name in SHADOWS:
        (tmp_path / name).write_text("raise SystemExit('the user's own')")
    (tmp_path / "my.yaml").write_text("distill:\n  exit_layers: [0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, stderr=-1, **k)) or started[-1])
    place = Place(0, 2, 0, 0, "n", "127.0.0.1", find_free_network_port(), starts_others=True)
    with pytest.raises(RuntimeError, match="ended with code 2"), workers(place, Path("my.yaml"), 2):
        pass
    assert b"exit-heads distill: distill.exit_layers=[0]: " in started[0].stderr.read()


# ---- they meet


def at_once(calls: list[Callable[[], object]]) -> list[object]:
    """What each returns or raises."""
    results: list[object] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return results


def test_all_know_all_when_they_have_met() -> None:
    found = at_once([lambda p=p: rendezvous(p, CPU, 30) for p in places(4, nodes=2)])
    members = found[0][1]
    assert all(theirs == members for _, theirs in found)
    assert [(m.rank, m.node, m.pid) for m in members] == [(r, f"n{r // 2 + 1}", os.getpid()) for r in range(4)]


def test_those_who_do_not_come_are_named_to_all_who_do() -> None:
    there = [place for place in places(6, nodes=2) if place.rank not in (1, 2, 4)]
    found = at_once([lambda p=p: rendezvous(p, CPU, 1) for p in there])
    for error in found:
        assert isinstance(error, UserError)
        assert "machine.timeout=1: ranks 1-2, 4 of 6 did not come within 1 s" in str(error)
        assert "n1: rank 0; n2: ranks 3, 5" in str(error)


def test_rank_0_that_does_not_come_is_named() -> None:
    place = places(2, nodes=2)[1]
    told = rf"rank 0 did not come to 127\.0\.0\.1:{place.port} within 1 s.*rank 1 of 2 on n2"
    with pytest.raises(UserError, match=told):
        rendezvous(place, CPU, 1)


def test_a_port_that_is_taken_is_named() -> None:
    place = places(2)[0]
    with socket.socket() as taken:
        taken.bind(("", place.port))
        taken.listen()
        with pytest.raises(UserError, match=f"MASTER_PORT={place.port}: rank 0 cannot listen there on n1"):
            rendezvous(place, CPU, 1)


def test_other_versions_on_one_node_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rendezvous_module._introduce

    def introduce(place: Place, device: torch.device) -> Member:
        member = plain(place, device)
        return Member(**vars(member) | {"versions": "torch 1.0"}) if place.node == "n2" else member

    monkeypatch.setattr(rendezvous_module, "_introduce", introduce)
    for error in at_once([lambda p=p: rendezvous(p, CPU, 30) for p in places(4, nodes=2)]):
        assert isinstance(error, UserError) and "ranks 2-3: torch 1.0" in str(error)
        assert f"ranks 0-1: torch {torch.__version__}" in str(error)


@pytest.mark.parametrize("who", [0, 2])
def test_who_fails_before_the_meeting_tells_those_who_come(who: int) -> None:
    def come(place: Place) -> object:
        with rendezvous_module.before_rendezvous(place):
            if place.rank == who:
                raise UserError("its disk is not there\nsecond line")
        return rendezvous(place, CPU, 100)

    started = time.monotonic()
    found = at_once([lambda p=p: come(p) for p in places(4, nodes=2)])
    assert time.monotonic() - started < 50, "nobody waited for a time limit"
    assert str(found.pop(who)) == "its disk is not there\nsecond line"
    for error in found:
        assert str(error) == f"rank {who} on n{who // 2 + 1} ended before all had met: its disk is not there"


def test_all_who_fail_before_the_meeting_end_at_once() -> None:
    def fail(place: Place) -> None:
        with rendezvous_module.before_rendezvous(place):
            raise UserError(f"no {place.rank}")

    started = time.monotonic()
    found = at_once([lambda p=p: fail(p) for p in places(4, nodes=2)])
    assert [str(error) for error in found] == [f"no {rank}" for rank in range(4)]
    assert time.monotonic() - started < 50


def test_a_line_a_node() -> None:
    members = [Member(r, f"n{r // 4}", 1, "H100", 8, "torch 2") for r in range(8)]
    what = "4 x H100, 8 CPU threads each, torch 2"
    assert described(members) == [f"n0: ranks 0-3, {what}", f"n1: ranks 4-7, {what}"]
    assert ranks_of([5, 0, 1, 2, 7, 8]) == "ranks 0-2, 5, 7-8" and ranks_of([3]) == "rank 3"


# ---- they work together

QUICK = {"BEAT": 0.1, "LOOK": 1.5, "SILENT": 4.0, "LEAVE": 2.0}
"""Seconds, instead of those that suit a cluster."""
TIMEOUT = 3.0


class Group:
    """Real processes that add numbers up, step by step, until what they shall do ends them."""

    def __init__(self, folder: Path, world: int, then: Callable[[watchdog.Watchdog, Path], None]):
        # Not forked off this process, whose threads would leave their locks behind.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipeline.training.watchdog"])
        self.folder = folder
        self.processes = [context.Process(target=member, args=(place, folder, then)) for place in places(world)]
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        """Exit codes; -9 of a killed one."""
        for process in self.processes:
            process.join(60)
            process.kill()  # one that still runs shows here as killed
            process.join()
        return [process.exitcode for process in self.processes]

    def wait_for_steps(self) -> None:
        deadline = time.time() + 60
        while len(list(self.folder.glob("going-*"))) < len(self.processes):
            assert time.time() < deadline
            time.sleep(0.05)

    def kill(self, rank: int) -> str:
        """How the others call the victim."""
        self.wait_for_steps()
        os.kill(self.processes[rank].pid, signal.SIGKILL)
        return f"rank {rank} (n1, process {self.processes[rank].pid})"

    def printed(self, rank: int) -> str:
        return (self.folder / f"out-{rank}").read_text()

    def log(self, rank: int) -> str:
        return (self.folder / f"distill-rank-{rank:05d}.log").read_text()


def member(place: Place, folder: Path, then: Callable[[watchdog.Watchdog, Path], None]) -> None:
    for name, value in QUICK.items():
        setattr(watchdog, name, value)
    sys.stdout = sys.stderr = (folder / f"out-{place.rank}").open("a", buffering=1)
    try:
        with rank_log(folder, place) as log, watchdog.watched_process_group(place, CPU, TIMEOUT, log) as seen:
            go(seen, 3)
            (folder / f"going-{place.rank}").touch()
            then(seen, folder)
    except LostError as error:
        print(error)
        sys.exit(error.exit_code)


def go(seen: watchdog.Watchdog, count: int) -> None:
    for _ in range(count):
        dist.all_reduce(torch.ones(1))
        seen.step += 1
        time.sleep(0.01)


def end(seen: watchdog.Watchdog, folder: Path) -> None:
    go(seen, 20)


def never_end(seen: watchdog.Watchdog, folder: Path) -> None:
    go(seen, 10**6)


def fail(seen: watchdog.Watchdog, folder: Path) -> None:
    if seen.place.rank == 1:
        raise ZeroDivisionError("no such thing")
    go(seen, 10**6)


def hang(seen: watchdog.Watchdog, folder: Path) -> None:
    """As in NCCL, which does not notice that a process is gone."""
    time.sleep(60)


def late(seen: watchdog.Watchdog, folder: Path) -> None:
    if seen.place.rank == 2:
        time.sleep(TIMEOUT + 2)
    go(seen, 5)


def test_three_processes_end_well_together(tmp_path: Path) -> None:
    group = Group(tmp_path, 3, end)
    assert group.codes() == [0, 0, 0]
    assert "distill: node n1: ranks 0-2, 3 x CPU" in group.printed(0)
    assert not group.printed(1)
    lines = group.log(1).splitlines()
    assert "start 0: rank 1 of 3 on n1" in lines[0] and lines[-1].endswith(" end")


@pytest.mark.parametrize("does", [never_end, hang])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_and_the_others_end(tmp_path: Path, victim: int, does) -> None:
    group = Group(tmp_path, 3, does)
    name = group.kill(victim)
    assert group.codes() == [-9 if rank == victim else LostError.exit_code for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        assert f"{name} is gone without a word" in group.printed(rank)
        assert f"{name} is gone without a word" in group.log(rank)


def test_the_error_of_one_is_named_by_all_and_shown_by_that_one(tmp_path: Path) -> None:
    group = Group(tmp_path, 3, fail)
    assert group.codes() == [1, 1, 1]
    assert "Traceback" in group.printed(1) and "ZeroDivisionError: no such thing" in group.log(1)
    for rank in (0, 2):
        assert "rank 1 (n1, process" in group.printed(rank) and "no such thing" in group.printed(rank)
        assert "Traceback" not in group.printed(rank)


def test_who_stands_still_is_named(tmp_path: Path) -> None:
    group = Group(tmp_path, 3, late)
    assert group.codes() == [0, 0, 0]
    line = next(line for line in group.printed(0).splitlines() if "no step was finished" in line)
    assert "for machine.timeout=3 s: " in line
    assert re.search(r"ranks 0-1 after step 3 in \w+ \(distributed_c10d\.py:\d+\)", line)
    assert re.search(r"rank 2 after step 3 in late \(test_processes\.py:\d+\)", line)
    for rank, function in ((0, "all_reduce"), (2, "late")):
        assert f"in {function}" in group.log(rank), "its stacks"
