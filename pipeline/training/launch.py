"""Finds the rank of this process of distill, and starts the other processes if no launcher did.

Takes the `machine` section and the environment variables of srun, torchrun or another launcher (launchers.py); gives
the Place of this process, and starts the workers of one machine.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from ..config import Machine
from ..errors import UserError
from ..launchers import Launched, is_set, launched, number, own_command


@dataclass(frozen=True)
class Place:
    """The rank of this process, its node, and where the processes meet."""

    rank: int
    world_size: int
    local_rank: int
    """Index of the process on its node, and so of its GPU."""
    node_rank: int
    node: str
    """Name of its node."""
    address: str
    """Address of rank 0, where all processes meet (rendezvous.py)."""
    port: int
    attempt: str = "0"
    """Number of this start, which differs after every restart by the launcher."""
    hosts: bool = True
    """False if the launcher, and not rank 0, hosts the store at which all processes meet."""
    starts_others: bool = False
    """True if this process has to start the other processes of its machine."""

    @property
    def environment(self) -> "Started":
        """The place as Lightning's ClusterEnvironment."""
        return Started(self)


def find_place(machine: Machine) -> Place:
    """The place of this process.

    Raises UserError if machine.nodes and machine.processes_per_node do not match the launcher, or if the launcher's
    variables contradict each other.
    """
    world, by = machine.processes, launched()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if by and by.launcher == "torchrun":
        _check(machine, by)
        return _place_under_torchrun(machine, node)
    # A single process of srun on one node, such as a shell (srun --pty bash), starts the others as on a laptop.
    if by and by.launcher == "srun" and (by.processes > 1 or machine.nodes > 1):
        _check(machine, by)
        return _place_under_srun(machine, node)
    # With WORLD_SIZE=1 this process starts the others too.
    alone = by is not None and by.variable == "WORLD_SIZE" and by.processes == 1 and world > 1
    meets = is_set("MASTER_ADDR") and is_set("MASTER_PORT")
    # LOCAL_RANK alone says nothing of how many there are: a debugger or an earlier launcher has left it.
    named = by is not None or is_set("RANK") or is_set("NODE_RANK")
    if meets and is_set("LOCAL_RANK") and named and not alone:
        return _place_by_variables(machine, by, node)
    if by and by.processes > 1 and by.launcher != "srun":
        if meets and by.variable == "WORLD_SIZE" and is_set("RANK"):
            return _place_by_variables(machine, by, node)
        raise UserError(
            f"{by.variable}={by.processes}: {by.launcher} started {by.processes} processes and does not say which one "
            f"this is; start distill with torchrun or srun. Unset {by.variable} if no launcher started this process"
        )
    if machine.nodes > 1:
        raise UserError(f"machine.nodes={machine.nodes}: start them with srun or torchrun, as slurm/distill.sh does")
    return Place(0, world, 0, 0, node, "127.0.0.1", find_free_network_port(), starts_others=world > 1)


def own_device(device: torch.device, place: Place) -> torch.device:
    """The device of this process: each process of a node has the GPU of its local rank.

    Raises UserError if there is no such GPU, or if machine.device names one GPU for several processes.
    """
    if device.type != "cuda":
        return device
    if place.world_size > 1 and device.index is not None:
        raise UserError(
            f"machine.device={device}: one GPU for {place.world_size} processes; machine.device=cuda is all"
        )
    index, there = device.index or place.local_rank, torch.cuda.device_count()
    if index >= there:
        raise UserError(
            f"machine.processes_per_node: process {place.local_rank} of {place.node} has no GPU, it sees {there} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Ask for as many GPUs as "
            "processes, and let each see all of its node: no --gpus-per-task, no --gpu-bind"
        )
    return torch.device("cuda", index)


def _place_under_torchrun(machine: Machine, node: str) -> Place:
    env, world = os.environ, machine.processes
    return Place(
        number("RANK", below=world), world, number("LOCAL_RANK", below=machine.processes_per_node),
        number("GROUP_RANK", below=world), node, env["MASTER_ADDR"], number("MASTER_PORT"),
        env.get("TORCHELASTIC_RESTART_COUNT", "0"), hosts=env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )  # fmt: skip


def _place_under_srun(machine: Machine, node: str) -> Place:
    env, world = os.environ, machine.processes
    job, restarts = number("SLURM_JOB_ID"), number("SLURM_RESTART_COUNT", 0)
    # Every job and restart has another port: leftover processes of the previous one may still hold theirs.
    port = 15000 + (job * 8 + restarts) % 16000
    address = env.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(env.get("SLURM_STEP_NODELIST", node))
    return Place(
        number("SLURM_PROCID", below=world), world, number("SLURM_LOCALID", below=machine.processes_per_node),
        number("SLURM_NODEID", below=machine.nodes), node, address, number("MASTER_PORT", port), f"{job}.{restarts}",
    )  # fmt: skip


def _place_by_variables(machine: Machine, by: Launched | None, node: str) -> Place:
    """The place of a process that this project or another launcher started, by RANK, NODE_RANK and LOCAL_RANK."""
    world, each = machine.processes, machine.processes_per_node
    if by and by.variable == "WORLD_SIZE":
        _check(machine, by)
    rank = number("RANK", below=world) if is_set("RANK") else None
    of_node = number("NODE_RANK", 0 if rank is None else rank // each, below=machine.nodes)
    local = number("LOCAL_RANK", (rank or 0) % each, below=each)
    if rank not in (None, of_node * each + local):
        raise UserError(
            f"RANK={rank}: is not NODE_RANK={of_node} x machine.processes_per_node={each} + LOCAL_RANK={local}; unset "
            "what an earlier launcher has left"
        )
    address, port = os.environ["MASTER_ADDR"], number("MASTER_PORT")
    return Place(of_node * each + local, world, local, of_node, node, address, port)


def _check(machine: Machine, by: Launched) -> None:
    if by.processes != machine.processes:
        raise UserError(
            f"machine.nodes={machine.nodes}, machine.processes_per_node={machine.processes_per_node}: {by.launcher} "
            f"started {by.processes} processes ({by.variable}); the product must be the same"
        )


class Started(ClusterEnvironment):
    """Tells Lightning that all processes run already, and the rank of this one.

    Lightning's own environment for Slurm is not used: it saves inside a signal handler, where ranks are at different
    points of the program, and hangs.
    """

    creates_processes_externally = True

    def __init__(self, place: Place):
        self.place = place

    @property
    def main_address(self) -> str:
        return self.place.address

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.world_size

    def set_world_size(self, size: int) -> None:
        assert size == self.place.world_size

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.place.rank

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.node_rank


@contextmanager
def workers(place: Place, config_file: Path, processes: int) -> Iterator[None]:
    """Context manager: starts the other processes of this machine, if this one has to, and waits for them at the end.

    They read `config_file` and run the same stage; as their rank is not 0, they print errors only. Raises RuntimeError
    if one of them fails; those still running when the block ends with an error are killed.
    """
    started: list[subprocess.Popen] = []
    try:
        if place.starts_others:
            command = own_command("distill", "--config", str(config_file.absolute()))
            meet_at = {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port), "WORLD_SIZE": str(processes)}
            meet_at["PYTHONSAFEPATH"] = "1"  # like -P, and inherited by their own children
            for rank in range(1, processes):
                own = {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "RANK": str(rank)}
                started.append(subprocess.Popen(command, env=os.environ | meet_at | own))
        yield
        for rank, process in enumerate(started, 1):
            if code := process.wait(timeout=120):
                raise RuntimeError(f"process {rank} of distill ended with code {code}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
