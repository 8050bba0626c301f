"""The prompt sets of distill and evaluate: held-out share, mixtures, order, and no overlap between the two.

Takes the config; gives lists of Prompts. No prompt that evaluate may use is given to distill, not even one that differs
only in case or white space.
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
    """The prompts of `role`, without duplicates, in an order that depends on their texts, the weights and the seed.

    So the first k are a random subset, with shares of the sources in proportion to their weights. Only pocket's
    evaluate file keeps its own order, which is balanced already. Prompts whose first turn has its normal form in
    `avoid` are left out. Raises UserError for a source that cannot be read, or if no prompt is left.
    """
    seen: set[bytes] = set()
    parts: list[tuple[float, list[Prompt]]] = []
    total = 0
    for origin in origins(prompts):
        found = read(origin, prompts, role, seen)
        total += len(found)
        if not origin.is_pocket:  # pocket has a file for each role
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
    """The prompts for distill, without any that evaluate uses, whatever their source. Errors as in `load_prompts`."""
    avoid: set[str] = set()
    by_hash = not has_own_prompts(config) and not any(o.is_pocket for o in origins(config.prompts))
    if not by_hash:
        avoid = {normal_form(p.text) for p in evaluation_prompts(config)}
    return load_prompts(config.prompts, "distill", config.seed, avoid)


def evaluation_prompts(config: Config) -> list[Prompt]:
    """All prompts of evaluate.prompts, in their own order, if it names a source; else the held-out share of prompts.

    Raises UserError for a source that cannot be read, and for one that prompts names too.
    """
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
    """Whether evaluate.prompts names a source of its own; otherwise evaluate uses the held-out share of prompts."""
    return bool(config.evaluate.prompts.mixture) or config.evaluate.prompts.path is not None


def holds_out(config: Config) -> bool:
    """Whether the config leaves prompts to evaluate on. It reads no source, so there may turn out to be none."""
    return has_own_prompts(config) or config.prompts.held_out > 0 or any(o.is_pocket for o in origins(config.prompts))


def evaluation_settings(config: Config) -> Prompts:
    """The section with source, chat template and length limits of `evaluation_prompts`.

    evaluate.prompts.too_long=drop applies to the held-out share too, so that no other stage has to be rerun for it.
    """
    if has_own_prompts(config):
        return config.evaluate.prompts
    drops = "drop" in (config.prompts.too_long, config.evaluate.prompts.too_long)
    return replace(config.prompts, too_long="drop" if drops else "error")


def _place(source: Source) -> tuple[str | None, str | None, str | None, str]:
    return source.path, source.name, source.revision, source.split


def _share(prompt: Prompt) -> float:
    """A number in [0, 1) from a hash of the first turn's normal form: prompts with the same first turn are not split.

    The salt makes it independent of distill.held_out and of the order.
    """
    return int.from_bytes(hashlib.sha256(b"held out:" + normal_form(prompt.text).encode()).digest()[:8]) / 2**64


def _shuffled(found: list[Prompt], seed: int) -> list[Prompt]:
    return sorted(found, key=lambda p: hashlib.sha256(f"order {seed}:{joined(p.turns)}".encode()).digest())


def _mixed(parts: list[tuple[float, list[Prompt]]]) -> list[Prompt]:
    """Interleaves parts (weight, prompts), so that every prefix has the parts in proportion to their weights.

    Each part keeps its order. After the end of a part the others continue.
    """
    placed = [
        ((rank + 0.5) / weight, part, prompt)
        for part, (weight, found) in enumerate(parts)
        for rank, prompt in enumerate(found)
    ]
    return [prompt for _, _, prompt in sorted(placed, key=lambda entry: entry[:2])]
