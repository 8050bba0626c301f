"""The config of a run, and how it is loaded. Its sections are dataclasses (config_sections.py).

Defaults come from the dataclasses; one YAML file wins over them, key=value words win over the file. `load` takes the
file's path and the words, gives a checked Config, and raises UserError that names a mistyped key or value and says
what would be right. config_words.py converts texts to types, config_paths.py expands ~, config_rules.py checks values.
"""

import copy
import difflib
import functools
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config_paths, config_rules, config_words
from .config_paths import keys_of
from .config_sections import (
    Backbone,
    Chat,
    Distill,
    Evaluate,
    EvaluatePrompts,
    Generate,
    Machine,
    Plan,
    Prompts,
    Publish,
    Run,
    Source,
    Wandb,
    option,
)
from .errors import UserError

__all__ = [
    "Backbone", "Chat", "Config", "Distill", "Evaluate", "EvaluatePrompts", "Generate", "Machine", "Plan", "Prompts",
    "Publish", "Run", "Source", "Wandb", "load", "to_dict",
]  # fmt: skip


@dataclass
class Config:
    seed: int = option(0, "seed of every random choice in the run")
    run: Run = field(default_factory=Run)
    machine: Machine = field(default_factory=Machine)
    backbone: Backbone = field(default_factory=Backbone)
    prompts: Prompts = field(default_factory=Prompts)
    generate: Generate = field(default_factory=Generate)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    publish: Publish = field(default_factory=Publish)
    chat: Chat = field(default_factory=Chat)
    plan: Plan = field(default_factory=Plan)
    wandb: Wandb = field(default_factory=Wandb)


def load(path: str | Path | None, words: list[str], instead: dict[str, Any] | None = None) -> Config:
    """The Config of `--config path word ...`. Raises UserError for anything that is not right in it.

    `instead` holds defaults, by section and key, that take the place of the dataclasses' own.
    """
    trees = [("defaults", instead or {})]
    if path is not None:
        file = Path(config_paths.expanded(str(path), "--config"))
        trees.append((f"--config {file}", config_words.read_file(file, Config)))
    trees += [(word, config_words.read_word(word, Config)) for word in words]
    merged = copy.deepcopy(_defaults())
    for where, tree in trees:
        config_words.refuse_outside(tree, where)
        _merge_into(merged, tree, where)
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${a.reference} to nothing
        given = words if path is None else ["--config", str(path), *words]
        raise UserError(f"{' '.join(given)}: key {error.full_key}: {str(error).splitlines()[0]}") from None
    config_paths.expand(config)
    config_rules.check(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as they go to YAML, JSON and checkpoints."""
    return asdict(config() if isinstance(config, type) else config)


@functools.cache
def _defaults() -> Any:
    """The dataclasses as omegaconf's tree: to build it takes several times as long as to copy it."""
    return OmegaConf.structured(Config())


def _merge_into(base: Any, new: Any, where: str) -> None:
    try:
        base.merge_with(new)  # in place: OmegaConf.merge copies all of `base`, for every word
    except (OmegaConfBaseException, TypeError) as error:
        known = [f.name for f in fields(Config)] + keys_of(Config)
        key = getattr(error, "full_key", None) or where.partition("=")[0]
        if getattr(error, "object_type", None) is Source:  # omegaconf forgets which list a source stands in
            key = ("evaluate." if where.startswith("evaluate.") else "") + f"prompts.mixture[].{key}"
        close = [] if key.rstrip("[]0123456789") in known else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {close[0]}?" if close else "See exit-heads VERB --help."
        first = str(getattr(error, "msg", None) or error).splitlines()[0].partition(" Did you mean")[0].rstrip(".")
        if "is not a ListConfig" in first:
            first = "a list is needed, in brackets"
        raise UserError(f"{where}: key {key}: {first}. {remedy}") from None
