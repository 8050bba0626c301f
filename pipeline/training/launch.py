"""Which process this is, and how the others are started: alone, on one machine, under srun or under torchrun.

Takes the `machine` section and the environment, gives rank, a Lightning environment, and worker processes. Knows
nothing of what the processes do.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from ..config import Machine
from ..errors import UserError

KEYS = ("LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Place:
    """This process among all."""

    rank: int
    world_size: int
    environment: Any
    """Lightning's cluster environment."""
    starts_others: bool
    """True if this process has to start the workers of its machine."""


def find_place(machine: Machine) -> Place:
    """Raises UserError if machine.nodes and machine.processes_per_node do not fit what launched this process."""
    world = machine.nodes * machine.processes_per_node
    if TorchElasticEnvironment.detect():
        _check(machine, int(os.environ["WORLD_SIZE"]), "torchrun")
        return Place(int(os.environ["RANK"]), world, TorchElasticEnvironment(), False)
    if world > 1 and "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        _check(machine, int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"])), "srun")
        # Lightning's own requeue saves inside the signal handler, where the ranks are at different places: it hangs.
        return Place(int(os.environ["SLURM_PROCID"]), world, SLURMEnvironment(auto_requeue=False), False)
    started = "LOCAL_RANK" in os.environ
    if machine.nodes > 1 and not (started and "NODE_RANK" in os.environ and "MASTER_ADDR" in os.environ):
        raise UserError(f"machine.nodes={machine.nodes}: start the processes with srun or torchrun")
    rank = int(os.environ.get("NODE_RANK", 0)) * machine.processes_per_node + int(os.environ.get("LOCAL_RANK", 0))
    return Place(rank, world, LightningEnvironment(), world > 1 and not started)


def _check(machine: Machine, started: int, launcher: str) -> None:
    if started != machine.nodes * machine.processes_per_node:
        raise UserError(
            f"machine.nodes={machine.nodes}, machine.processes_per_node={machine.processes_per_node}: "
            f"{launcher} started {started} processes; the product must be the same"
        )


@contextmanager
def workers(place: Place, config_file: Path, processes: int) -> Iterator[None]:
    """Starts the other processes of this machine, if this one has to, and waits for them at the end.

    They read `config_file` and run the same stage. Their output other than errors is silent, as their rank is not 0.
    """
    before = {key: os.environ.get(key) for key in KEYS}
    started: list[subprocess.Popen] = []
    try:
        if isinstance(place.environment, LightningEnvironment) and "LOCAL_RANK" not in os.environ:
            # With LOCAL_RANK set Lightning starts no process itself: it would repeat this whole command line.
            os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(find_free_network_port())
        if place.starts_others:
            command = [sys.executable, "-m", "pipeline", "distill", "--config", str(config_file)]
            for rank in range(1, processes):
                started.append(subprocess.Popen(command, env=os.environ | {"LOCAL_RANK": str(rank)}))
        yield
        for rank, process in enumerate(started, 1):
            if process.wait(timeout=120) not in (0, 130, 138, 143):
                raise RuntimeError(f"process {rank} of distill ended with code {process.returncode}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
