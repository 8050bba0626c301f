"""Which values of the config are right: one rule a key, and the rules between keys.

Takes a whole Config, raises UserError with the key, its value and the remedy for the first that is wrong.
"""

import math
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from .errors import UserError

PROMPT_FILES = (".jsonl", ".json", ".parquet", ".txt")
"""What ends in one of these is a file of prompts, also where it looks like an id."""


def _one_of(*choices: str) -> tuple[Any, str]:
    return (lambda value: value in choices), " or ".join(choices)


def _prompt_rules(section: str) -> dict[str, tuple[Any, str]]:
    return {
        f"{section}.bad_rows": _one_of("stop", "skip"),
        f"{section}.min_tokens": _NOT_NEGATIVE,
        f"{section}.max_tokens": _NOT_NEGATIVE,
        f"{section}.too_long": _one_of("error", "drop"),
        f"{section}.chat_template": (
            (lambda name: name in ("none", "tokenizer") or name.endswith(".jinja")),
            "write none for plain text, tokenizer for the chat template that it brings, or the path of a .jinja file",
        ),
    }


_POSITIVE = (lambda value: value >= 1), "at least 1"


_NOT_NEGATIVE = (lambda value: value >= 0), "0 or above"


_SHARE = (lambda value: 0 <= value < 1), "a share from 0 to below 1"


_NUCLEUS = (lambda value: 0 < value <= 1), "above 0, at most 1"


_ABOVE_ZERO = (lambda value: 0 < value < math.inf), "a number above 0"


def _are_temperatures(value: list[float]) -> bool:
    return len(value) > 0 and all(0 <= t < math.inf for t in value)


def _are_tokens(value: list[Any]) -> bool:
    return all(bool(v) if isinstance(v, str) else isinstance(v, int) and not isinstance(v, bool) for v in value)


def _differ(value: list[Any]) -> bool:
    return len(set(value)) == len(value)


def is_repo_id(name: str) -> bool:
    """Is this how repos on the Hub are named, organisation or user first?"""
    part = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    forbidden = "--" in name or ".." in name or name.endswith(".git")
    return re.fullmatch(f"{part}/{part}", name, re.ASCII) is not None and not forbidden


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in url and parts.port != 0
    except ValueError:  # brackets, or a port above 65535
        return False


def _is_inside(name: str) -> bool:
    """Is this a file's name, or a path that leads down from a folder?"""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


_TEMPERATURES = _are_temperatures, "a list, each 0 (greedy) or above"


# Key -> (is the value right?, what would be). What needs the backbone (N < L, the context) is checked by the stages.
_RULES: dict[str, tuple[Any, str]] = {
    "run.name": ((lambda name: bool(name) and "/" not in name and name[0] != "."), "a plain folder name is needed"),
    "run.dir": (bool, "a folder is needed, such as runs"),
    "seed": _NOT_NEGATIVE,
    "machine.device": ((lambda d: d in ("auto", "cpu") or d.startswith("cuda")), "auto, cpu or cuda"),
    "machine.device_map": (
        (lambda name: name in (None, "auto", "balanced", "sequential")),
        "null, auto, balanced or sequential",
    ),
    "machine.pack": _one_of("auto", "off"),
    "machine.threads": _NOT_NEGATIVE,
    "machine.nodes": _POSITIVE,
    "machine.processes_per_node": _POSITIVE,
    "backbone.dtype": _one_of("float32", "bfloat16"),
    "backbone.gguf_file": (
        (lambda name: name is None or (name.lower().endswith(".gguf") and _is_inside(name))),
        "the name of a .gguf file in backbone.name_or_path, or null",
    ),
    "backbone.gguf_dir": (bool, "a folder is needed, such as runs/backbones"),
    "backbone.end_tokens": (_are_tokens, "a list of token texts or ids, such as ['<|im_end|>']"),
    "prompts.held_out": _SHARE,
    **_prompt_rules("prompts"),
    **_prompt_rules("evaluate.prompts"),
    "generate.engine": _one_of("padded", "continuous", "speculative", "server", "original"),
    "generate.num_prompts": _NOT_NEGATIVE,
    "generate.max_new_tokens": _POSITIVE,
    "generate.temperatures": _TEMPERATURES,
    "generate.top_p": _NUCLEUS,
    "generate.batch_size": _POSITIVE,
    "generate.shard_size": _POSITIVE,
    "machine.servers": (
        (lambda urls: _differ(urls) and all(map(_is_server, urls))),
        "different URLs such as http://node1:8000/v1 are needed; a key belongs into OPENAI_API_KEY",
    ),
    "machine.server_api": _one_of("auto", "completions", "chat"),
    "machine.server_timeout": _ABOVE_ZERO,
    "distill.exit_layers": (
        (lambda ns: not ns or (min(ns) >= 1 and _differ(ns))),
        "auto, or one or more different exit layers, each N >= 1, such as [2]",
    ),
    "machine.shard_degree": _NOT_NEGATIVE,
    "machine.timeout": _ABOVE_ZERO,
    "distill.teacher": _one_of("online", "cached"),
    "distill.init": _one_of("last", "layer", "random"),
    "distill.head": _one_of("layer", "dense"),
    "distill.dense_width": _NOT_NEGATIVE,
    "distill.sequences_per_pass": _NOT_NEGATIVE,
    "distill.patience": _NOT_NEGATIVE,
    "distill.draft_vocabulary": (
        (lambda text: text == "auto" or (re.fullmatch(r"\d+", text, re.ASCII) and int(text) != 1)),
        "auto, 0 (all tokens) or a number of tokens from 2 on",
    ),
    "distill.learn_from": _one_of("responses", "all"),
    "distill.truncated": _one_of("drop", "keep"),
    "distill.repeated_share": ((lambda value: 0 <= value <= 1), "a share from 0 to 1; 1 keeps every answer"),
    "distill.max_steps": _POSITIVE,
    "distill.sequence_length": _POSITIVE,
    "distill.sequences_per_step": _POSITIVE,
    "distill.learning_rate": _ABOVE_ZERO,
    "distill.warmup_steps": _NOT_NEGATIVE,
    "distill.weight_decay": _NOT_NEGATIVE,
    "distill.clip_norm": _ABOVE_ZERO,
    "distill.temperature": _ABOVE_ZERO,
    "distill.loss_chunk": _POSITIVE,
    "distill.held_out": ((lambda value: 0 < value < 1), "a share between 0 and 1"),
    "distill.validate_every": _POSITIVE,
    "distill.checkpoint_every": _POSITIVE,
    "evaluate.num_prompts": _NOT_NEGATIVE,
    "evaluate.max_new_tokens": ((lambda n: n >= 2), "at least 2: the first token follows the prompt, none drafts it"),
    "evaluate.temperatures": (
        (lambda value: _are_temperatures(value) and _differ(value)),
        "a list of different temperatures, each 0 (greedy) or above",
    ),
    "evaluate.top_k": _NOT_NEGATIVE,
    "evaluate.top_p": _NUCLEUS,
    "evaluate.controllers": (
        (lambda names: len(names) > 0 and _differ(names)),
        "one or more different controllers, such as [fixed:3]",
    ),
    "evaluate.repeats": _POSITIVE,
    "evaluate.batch_sizes": (
        (lambda sizes: all(n >= 1 for n in sizes) and sizes == sorted(set(sizes))),
        "different numbers of texts from 1 on, ascending, such as [1, 4, 16]; [] for none",
    ),
    "evaluate.threads": _NOT_NEGATIVE,
    "plan.mfu": ((lambda value: 0 < value <= 1), "a share above 0, at most 1"),
    "plan.node_bandwidth": ((lambda value: value is None or 0 < value < math.inf), "null or a number above 0"),
    "plan.acceptance": ((lambda rates: all(0 <= a <= 1 for a in rates)), "a list of shares from 0 to 1"),
    "publish.repo_id": (
        (lambda name: name is None or is_repo_id(name)),
        "org/name is needed: letters, digits, - _ and . in both",
    ),
    "publish.target": _one_of("folder", "hub"),
    "publish.licence": (
        (lambda name: name is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) is not None),
        "as the Hub names it, such as apache-2.0 (https://huggingface.co/docs/hub/repositories-licenses), or other",
    ),
    "publish.exit_layer": ((lambda n: n is None or n >= 1), "an exit layer N >= 1, or null for the best"),
    "chat.temperature": ((lambda value: 0 <= value < math.inf), "0 (greedy) or above"),
    "chat.top_k": _NOT_NEGATIVE,
    "chat.top_p": _NUCLEUS,
    "chat.max_new_tokens": _POSITIVE,
    "wandb.mode": _one_of("auto", "online", "offline", "disabled"),
}


def check(config: Any) -> None:
    for key, (right, remedy) in _RULES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if not right(value):
            raise UserError(f"{key}={value}: {remedy}")
    if config.publish.target == "folder" and config.publish.public:
        raise UserError(
            "publish.public=true (--public): publish.target=folder pushes nothing that could be public; give "
            "publish.target=hub too"
        )
    if config.publish.target == "hub" and config.publish.repo_id is None:
        raise UserError("publish.target=hub: publish.repo_id=null; name the repo, as publish.repo_id=org/name")
    if not config.distill.exit_layers and config.distill.teacher != "cached":
        raise UserError(
            f"distill.exit_layers=auto: distill.teacher={config.distill.teacher}; give distill.teacher=cached, as the "
            "pilot trains on the cache, or name the exit layers, such as distill.exit_layers=[2]"
        )
    if config.distill.dense_width and config.distill.head != "dense":
        raise UserError(
            f"distill.dense_width={config.distill.dense_width}: distill.head={config.distill.head} is as wide as the "
            "backbone's layers; give distill.head=dense too, or take the width out"
        )
    _check_prompts("prompts", config.prompts)
    _check_prompts("evaluate.prompts", config.evaluate.prompts)


def _check_prompts(section: str, prompts: Any) -> None:
    if 0 < prompts.max_tokens < prompts.min_tokens:
        raise UserError(f"{section}.max_tokens={prompts.max_tokens}: below min_tokens={prompts.min_tokens}")
    default = type(prompts)()
    for name in ("path", "name", "revision", "split", "column", "licence"):
        value = getattr(prompts, name)
        if prompts.mixture and value != getattr(default, name):
            raise UserError(
                f"{section}.{name}={value}: {section}.mixture is there too. Give each source its own {name} in the "
                f"mixture and take this one out (its default is {getattr(default, name) or 'null'})."
            )
    for i, source in enumerate(prompts.mixture):
        if not source.path:
            raise UserError(f"{section}.mixture[{i}].path=null: every source needs a path, as {{path: a.jsonl}}")
        if not 0 < source.weight < math.inf:
            raise UserError(f"{section}.mixture[{i}].weight={source.weight}: a number above 0")
