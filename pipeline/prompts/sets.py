"""Which prompts distill and evaluate get, and in which order: the held-out share, mixtures, no leak.

Takes the config, gives lists of Prompts. Whatever evaluate may measure, distill never sees, not even in other
capitals or spaces.
"""

import hashlib
from collections.abc import Set
from dataclasses import replace

from ..config import Config, Prompts, Source
from ..errors import UserError
from .origins import origins, section_of
from .prompt import Prompt, Role, joined, normal_form
from .reading import read


def load_prompts(prompts: Prompts, role: Role, seed: int = 0, avoid: Set[str] = frozenset()) -> list[Prompt]:
    """The prompts of `role`, without duplicates, in an order that only their texts, the weights and the seed decide.

    The first k are therefore a random subset, each source's share of them is its weight's. Only pocket's evaluate
    file keeps its own order, which is a balanced mix already. A prompt whose first turn has its normal form in
    `avoid` is left out. Raises UserError for a source that cannot be read, or if nothing is left.
    """
    seen: set[bytes] = set()
    parts: list[tuple[float, list[Prompt]]] = []
    total = 0
    for origin in origins(prompts):
        found = read(origin, prompts, role, seen)
        total += len(found)
        if not origin.is_pocket:  # whose roles have files of their own
            found = [p for p in found if (_share(p) < prompts.held_out) == (role == "evaluate")]
        if not (origin.is_pocket and role == "evaluate"):
            found = _shuffled(found, seed)
        parts.append((origin.source.weight, found))
    chosen = _mixed(parts)
    section = section_of(prompts)
    if not chosen:
        raise UserError(
            f"{section}.held_out={prompts.held_out}: of {total} prompts none are left to {role}. "
            "Give more prompts, another share, or evaluate.prompts.path."
        )
    left = [p for p in chosen if normal_form(p.text) not in avoid] if avoid else chosen
    if len(left) < len(chosen):
        print(
            f"{section}: {len(chosen) - len(left)} of {len(chosen)} prompts begin as one of evaluate and are left to it"
        )
    if not left:
        raise UserError(
            f"{section}.path: every prompt is one of evaluate.prompts too. Give other prompts to one of them."
        )
    return left


def training_prompts(config: Config) -> list[Prompt]:
    """What distill learns from: nothing that evaluate would measure, wherever that comes from."""
    avoid: set[str] = set()
    by_hash = not has_own_prompts(config) and not any(o.is_pocket for o in origins(config.prompts))
    if not by_hash:
        avoid = {normal_form(p.text) for p in evaluation_prompts(config)}
    return load_prompts(config.prompts, "distill", config.seed, avoid)


def evaluation_prompts(config: Config) -> list[Prompt]:
    """All prompts of evaluate.prompts if it names some, in their own order; else the held-out share of prompts."""
    settings = evaluation_settings(config)
    if not has_own_prompts(config):
        return load_prompts(settings, "evaluate", config.seed)
    learnt = {_place(o.source) for o in origins(config.prompts) if not o.is_pocket}
    seen: set[bytes] = set()
    parts = []
    for origin in origins(settings):
        if _place(origin.source) in learnt:
            raise UserError(
                f"{origin.label}: prompts names it too, so the heads have learnt from it. "
                "Leave it out to evaluate on the held-out share of prompts."
            )
        parts.append((origin.source.weight, read(origin, settings, "evaluate", seen)))
    return _mixed(parts)


def has_own_prompts(config: Config) -> bool:
    """Whether evaluate.prompts names a set of its own; else evaluate takes the held-out share of prompts."""
    return bool(config.evaluate.prompts.mixture) or config.evaluate.prompts.path is not None


def holds_out(config: Config) -> bool:
    """Whether the config leaves any prompts to evaluate; how many there are, only reading them shows."""
    return has_own_prompts(config) or config.prompts.held_out > 0 or any(o.is_pocket for o in origins(config.prompts))


def evaluation_settings(config: Config) -> Prompts:
    """The section that decides source, chat template and lengths of evaluation_prompts.

    evaluate.prompts.too_long=drop holds for the held-out share too: no other stage has to be made anew for it.
    """
    if has_own_prompts(config):
        return config.evaluate.prompts
    drops = "drop" in (config.prompts.too_long, config.evaluate.prompts.too_long)
    return replace(config.prompts, too_long="drop" if drops else "error")


def _place(source: Source) -> tuple[str | None, str | None, str | None, str]:
    return source.path, source.name, source.revision, source.split


def _share(prompt: Prompt) -> float:
    """A number in [0, 1) of the first turn's normal form alone: prompts that begin alike go to one side.

    Salted: `distill.held_out` and the order must not depend on it.
    """
    return int.from_bytes(hashlib.sha256(b"held out:" + normal_form(prompt.text).encode()).digest()[:8]) / 2**64


def _shuffled(found: list[Prompt], seed: int) -> list[Prompt]:
    return sorted(found, key=lambda p: hashlib.sha256(f"order {seed}:{joined(p.turns)}".encode()).digest())


def _mixed(parts: list[tuple[float, list[Prompt]]]) -> list[Prompt]:
    """All prompts of the (weight, prompts), each part in its order, every beginning with the shares of the weights.

    A part that runs out leaves its place to the others.
    """
    placed = [
        ((rank + 0.5) / weight, part, prompt)
        for part, (weight, found) in enumerate(parts)
        for rank, prompt in enumerate(found)
    ]
    return [prompt for _, _, prompt in sorted(placed, key=lambda entry: entry[:2])]
