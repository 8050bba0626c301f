"""The names of a config's keys, and the paths in it: a ~ at the beginning of a path becomes the home folder.

Takes a Config (or any dataclass of dataclasses whose fields say `is_path` in their metadata) and changes it in place.
Raises UserError for the home folder of a user that does not exist.
"""

import os
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from .errors import UserError


def expand(section: Any, prefix: str = "") -> None:
    """Expand the paths of a dataclass, of those inside it, and of those in its lists."""
    for f in fields(section):
        value, key = getattr(section, f.name), prefix + f.name
        if is_dataclass(value):
            expand(value, f"{key}.")
        elif entries_of(f.type):
            for i, entry in enumerate(value):
                expand(entry, f"{key}[{i}].")
        elif value is not None and f.metadata.get("is_path"):
            setattr(section, f.name, expanded(value, key))


def expanded(path: str, key: str) -> str:
    """`~/data` and `~user/data` with the home folder in place of the ~, as a shell writes them; others as they are.

    A shell expands a ~ only where a word begins with it, and so not in key=~/data, and nothing does in a YAML file.
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(f"{key}={path}: {user} is no user's home folder here. Write ./{path} for what is called so")
    return found


def entries_of(kind: Any) -> list[type]:
    """The dataclass that a field's type is a list of, in a list; [] for every other type."""
    return [entry for entry in get_args(kind) if is_dataclass(entry)]  # type: ignore[misc]


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """Every key of a dataclass of dataclasses, as a user writes it; `prompts.mixture[].path` for those in a list."""
    names = []
    for f in fields(kind):
        if is_dataclass(f.type):
            names += keys_of(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            names.append(prefix + f.name)
        for entry in entries_of(f.type):
            names += keys_of(entry, f"{prefix}{f.name}[].")
    return names
