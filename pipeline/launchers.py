"""What torchrun, srun and other launchers say in the environment: how many processes they started together.

Reads environment variables, gives numbers. A variable that is empty counts as one that is not set; one that holds no
number, or contradicts another, is a UserError that names it. Also the command by which the project starts itself.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from .errors import UserError

# (launcher, its mark, where it says how many processes it started). The first one whose mark is set counts: torchrun
# may itself run under srun, one on each node. accelerate starts several processes through torchrun; deepspeed, Kubeflow
# and Lightning set WORLD_SIZE.
LAUNCHERS = (
    ("torchrun", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_TASKS"),
    ("srun or torchrun", "WORLD_SIZE", "WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_SIZE", "PMI_SIZE"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_SIZE"),
)


class Launched(NamedTuple):
    """What started this process, maybe together with others."""

    launcher: str
    processes: int
    """How many it started, this one among them."""
    variable: str
    """Where it says so."""


def launched() -> Launched | None:
    """The launcher that started this process; None if the environment names none."""
    for launcher, mark, variable in LAUNCHERS:
        if is_set(mark):
            return Launched(launcher, number(variable, at_least=1), variable)
    return None


def is_set(name: str) -> bool:
    """Whether the variable is there and holds anything."""
    return bool(os.environ.get(name, "").strip())


def number(name: str, default: int | None = None, at_least: int = 0, below: int | None = None) -> int:
    """The whole number that a variable holds; `default` if it is empty or not set.

    Raises UserError if it holds anything else, is out of range, or is needed and not there.
    """
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    bound = f"from {at_least} to {below - 1}" if below is not None else f"of {at_least} or above"
    value = int(text) if text.isascii() and text.isdecimal() else at_least - 1
    if value < at_least or (below is not None and value >= below):
        raise UserError(
            f"{name}={text}: a launcher such as torchrun or srun sets a number {bound} there; unset it if no launcher "
            "started this process, or start all processes with one launcher"
        )
    return value


def own_command(*words: str) -> list[str]:
    """`exit-heads word ...` as a process of its own, with this Python and this very package.

    -P keeps the current folder off the path: a pipeline.py or torch.py that lies there is the user's.
    """
    root = str(Path(__file__).resolve().parent.parent)
    start = f"import sys; sys.path.append({root!r}); from pipeline.cli import process; process()"
    return [sys.executable, "-P", "-c", start, *words]
