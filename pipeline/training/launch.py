"""Which process this is, and how the others are started: alone, on one machine, under srun or under torchrun.

Takes the `machine` section and the environment, gives the place of this process among all, and worker processes. Knows
nothing of what the processes do.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from ..config import Machine
from ..errors import UserError


@dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    """Which of its node, and so which of its GPUs."""
    node_rank: int
    node: str
    """What its node is called."""
    address: str
    """Of rank 0; all meet there (rendezvous.py)."""
    port: int
    attempt: str = "0"
    """Which start of these processes this is, for whoever starts them again after a failure."""
    hosts: bool = True
    """False if not rank 0 but the launcher keeps the place where all meet."""
    starts_others: bool = False
    """True if this process has to start the workers of its machine."""

    @property
    def environment(self) -> "Started":
        """The same for Lightning."""
        return Started(self)


def find_place(machine: Machine) -> Place:
    """Raises UserError if machine.nodes and machine.processes_per_node do not fit what launched this process."""
    world, env = machine.processes, os.environ
    node = env.get("SLURMD_NODENAME") or socket.gethostname()
    started = started_together()
    if "TORCHELASTIC_RUN_ID" in env:
        _check(machine, started, "torchrun")
        return Place(
            int(env["RANK"]), world, int(env["LOCAL_RANK"]), int(env["GROUP_RANK"]), node, env["MASTER_ADDR"],
            int(env["MASTER_PORT"]), env.get("TORCHELASTIC_RESTART_COUNT", "0"),
            hosts=env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        )  # fmt: skip
    # One process in a step on one node, such as a shell (srun --pty bash), starts the others as on a laptop.
    if "SLURM_STEP_ID" in env and (started > 1 or machine.nodes > 1):
        _check(machine, started, "srun")
        return _place_under_srun(world, node)
    if "LOCAL_RANK" in env and "MASTER_ADDR" in env and "MASTER_PORT" in env:
        local, node_rank = int(env["LOCAL_RANK"]), int(env.get("NODE_RANK", 0))
        rank = node_rank * machine.processes_per_node + local
        return Place(rank, world, local, node_rank, node, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    if machine.nodes > 1:
        raise UserError(f"machine.nodes={machine.nodes}: start them with srun or torchrun, as slurm/distill.sh does")
    return Place(0, world, 0, 0, node, "127.0.0.1", find_free_network_port(), starts_others=world > 1)


def started_together() -> int:
    """How many processes srun or torchrun started at once, this one among them."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["WORLD_SIZE"])
    return int(env.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_STEP_ID" in env else 1


def own_device(device: torch.device, place: Place) -> torch.device:
    """The device of this process: of several on a node each has the GPU with its number there.

    Raises UserError if there is no such GPU, or if one GPU is named for all.
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


def _place_under_srun(world: int, node: str) -> Place:
    env = os.environ
    restarts = int(env.get("SLURM_RESTART_COUNT", 0))
    # Another port for every job and restart: what is left of the one before may still hold its own.
    port = 15000 + (int(env["SLURM_JOB_ID"]) * 8 + restarts) % 16000
    address = SLURMEnvironment.resolve_root_node_address(env["SLURM_STEP_NODELIST"])
    return Place(
        int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), int(env["SLURM_NODEID"]), node,
        env.get("MASTER_ADDR", address), int(env.get("MASTER_PORT", port)), f"{env['SLURM_JOB_ID']}.{restarts}",
    )  # fmt: skip


def _check(machine: Machine, started: int, launcher: str) -> None:
    if started != machine.processes:
        raise UserError(
            f"machine.nodes={machine.nodes}, machine.processes_per_node={machine.processes_per_node}: "
            f"{launcher} started {started} processes; the product must be the same"
        )


class Started(ClusterEnvironment):
    """Tells Lightning what is so already: all processes run, each at its place.

    Lightning's own for Slurm would save inside a signal's handler, where the ranks are at different places: it hangs.
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
    """Starts the other processes of this machine, if this one has to, and waits for them at the end.

    They read `config_file` and run the same stage. Their output other than errors is silent, as their rank is not 0.
    """
    started: list[subprocess.Popen] = []
    try:
        if place.starts_others:
            command = [sys.executable, "-m", "pipeline", "distill", "--config", str(config_file)]
            meet_at = {"NODE_RANK": "0", "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
            for rank in range(1, processes):
                started.append(subprocess.Popen(command, env=os.environ | meet_at | {"LOCAL_RANK": str(rank)}))
        yield
        for rank, process in enumerate(started, 1):
            if code := process.wait(timeout=120):
                raise RuntimeError(f"process {rank} of distill ended with code {code}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
