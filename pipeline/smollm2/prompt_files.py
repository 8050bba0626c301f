"""Writes the prompt files of the project: word problems from templates, and open chats from prompts/chats.txt.

`rows(role)` gives the rows of prompts/train.jsonl or prompts/evaluate.jsonl, `write_all` writes both. Word problems and
chats take turns, and the chats' tasks among themselves, so that the first rows of a file are a balanced set.
"""

import json
import re
from itertools import chain, zip_longest
from pathlib import Path

from ..runs.files import atomic_write
from .word_problems import Row, problems

PROMPTS = Path(__file__).parent / "prompts"
CHATS = PROMPTS / "chats.txt"
"""Written by hand: blocks between blank lines. A line `== role: task ==` says what the blocks after it are for."""
PROBLEMS = {"train": 400, "evaluate": 100}
"""Number of word problems in the file of each role."""


def path_of(role: str) -> Path:
    return PROMPTS / f"{role}.jsonl"


def rows(role: str) -> list[Row]:
    """All rows of a role, train or evaluate."""
    by_task: dict[str, list[Row]] = {}
    for row in chats(role):
        by_task.setdefault(row["task"], []).append(row)
    return _in_turn(problems(role, PROBLEMS[role]), _in_turn(*by_task.values()))


def chats(role: str) -> list[Row]:
    """The open chat prompts of a role, in the order of chats.txt."""
    found, here, task = [], "", ""
    for block in CHATS.read_text().strip().split("\n\n"):
        if heading := re.fullmatch(r"== (\w+): ([\w ]+) ==", block):
            here, task = heading.groups()
        elif here == role:
            found.append({"prompt": block, "task": task})
    return found


def write_all() -> list[Path]:
    """Write the files of both roles; gives their paths."""
    return [write(path_of(role), rows(role)) for role in PROBLEMS]


def write(path: Path, written: list[Row]) -> Path:
    """Write rows as a .jsonl file; gives its path. Raises UserError if nothing can be written there."""
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in written))
    return path


def _in_turn(*parts: list[Row]) -> list[Row]:
    """One row of each part, then the next of each, until all are used up."""
    return [row for row in chain.from_iterable(zip_longest(*parts)) if row is not None]
