"""Estimates a node's host memory during distill, and the disk space of the run folder and the backbone.

It takes an architecture, the layout of processes and a config, and gives rows as memory.py does. Rows that depend on
the number of prompts are left out where the config does not give it (generate.num_prompts=0).
"""

from ..config import Config
from .architecture import Architecture
from .hardware import Layout
from .memory import GIB, Row, giga, weight_bytes

PROCESS = 3 * GIB
"""Host memory of a process for Python, torch and CUDA's libraries alone. Assumed."""
LISTED = 40
"""Bytes of a token in a Python list of ints: responses are read into such lists before they are packed."""
PACKED = 9
"""Bytes of a packed token: id and position of 32 bits each, one byte of mask."""
STORED = 4
"""Bytes of a token in responses/: ids and text of prompt and answer, compressed; measured 3.1 for the pocket run."""
CHECKPOINTS = 3
"""Checkpoints on disk at once: two are kept while a third is written."""


def set_tokens(config: Config) -> int | None:
    """Upper bound of the tokens of all prompts and answers; None if the number of prompts is not known."""
    return config.generate.num_prompts * config.distill.sequence_length or None


def host(a: Architecture, config: Config, layout: Layout) -> list[Row]:
    """Host memory during distill on the node of process 0, which gathers the checkpoints."""
    processes, heads = min(layout.per_node, layout.processes), len(config.distill.exit_layers)
    rows = [
        Row("processes", processes * PROCESS, f"{processes} x 3 GiB, assumed; weights go from the file to the GPU"),
        Row("best weights of each head", heads * a.head * 4, f"{heads} x {giga(a.head)} x 4 B"),
        Row("a checkpoint, gathered", heads * a.head * 12, f"{heads} x {giga(a.head)} x 12 B"),
    ]  # fmt: skip
    if tokens := set_tokens(config):
        size = processes * tokens * (LISTED + PACKED)
        rows.append(Row("responses, read and packed", size, f"{processes} x {giga(tokens)} x ({LISTED} + {PACKED}) B"))
    return rows


def disk(a: Architecture, config: Config) -> list[Row]:
    """Disk space of the run folder, and of the backbone's files in the Hub's cache."""
    w, heads = weight_bytes(config), len(config.distill.exit_layers)
    rows = [
        Row("backbone's files", a.parameters * 2, f"{giga(a.parameters)} x 2 B, as published"),
        Row("checkpoints", CHECKPOINTS * heads * a.head * 16, f"{CHECKPOINTS} x {heads} x {giga(a.head)} x 16 B"),
        Row("heads, and the published one", (heads + 1) * a.head * 4, f"{heads + 1} x {giga(a.head)} x 4 B"),
    ]
    if tokens := set_tokens(config):
        rows.append(Row("responses", tokens * STORED, f"{giga(tokens)} x {STORED} B"))
        if config.distill.teacher == "cached":
            size = cached_bytes(a, heads, w)
            rows.append(Row("teacher's hidden states", tokens * size, f"{giga(tokens)} x {size} B"))
    return rows


def cached_bytes(a: Architecture, heads: int, w: int) -> int:
    """Bytes of a token in the teacher's cache: a final hidden state, and one after each exit layer."""
    return (heads + 1) * a.hidden * w
