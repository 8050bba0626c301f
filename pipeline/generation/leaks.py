"""Checks that no evaluation prompt was trained on, by comparing with the responses that the heads learned from.

Takes the responses folder, or the hashes of its prompts that a published head brings, and the prompts to evaluate on.
generate already leaves the evaluation prompts of its config out; as the config may have changed since, the prompts are
compared with those that were actually answered.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..prompts.prompt import Prompt, normal_form
from .documents import read_manifest
from .responses import rows_of

SHOWN = 3
"""Number of prompts that the message names."""
PUBLISHED = "trained_on.json"
"""The file of a published head with the hashes of the prompts that it learned from."""


def check_not_trained_on(folder: Path, chosen: list[Prompt], section: str) -> None:
    """Raises UserError if a chosen prompt has the id, or the normal form of the first turn, of an answered one.

    `section`: where the chosen prompts come from (`prompts` or `evaluate.prompts`), for the message. Also raises
    UserError if the responses cannot be read.
    """
    ids, forms = _answered(folder)
    remedy = (
        "Take them out or give other prompts (evaluate.prompts.path); or make the responses anew with this config "
        "(--redo generate, then distill), which leaves the prompts of evaluate out."
    )
    _refuse(chosen, lambda p: p.id in ids or normal_form(p.turns[0]) in forms, section, remedy)


def check_not_published_as_trained_on(head: Path, chosen: list[Prompt], section: str) -> bool:
    """The same for a published head, by hash: False if its folder does not say what it was trained on. Raises
    UserError for a damaged list too."""
    try:
        hashes = set(json.loads((head / PUBLISHED).read_text()))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{head / PUBLISHED}: not the hashes of prompts that a published head has ({error})") from None
    remedy = "Take them out or give other prompts (evaluate.prompts.path)."
    _refuse(chosen, lambda p: _hash(normal_form(p.turns[0])) in hashes, section, remedy)
    return True


def hashes_of(folder: Path) -> list[str]:
    """The hashes of all prompts with an answer, sorted. Raises UserError if the responses cannot be read."""
    return sorted(map(_hash, _answered(folder)[1]))


def _hash(form: str) -> str:
    """16 hex digits of the sha256 of a normal form."""
    return hashlib.sha256(form.encode()).hexdigest()[:16]


def _refuse(chosen: list[Prompt], is_known: Callable[[Prompt], bool], section: str, remedy: str) -> None:
    trained_on = [p for p in chosen if is_known(p)]
    if not trained_on:
        return
    named = ", ".join(f"{p.id} ({p.turns[0][:40]!r})" for p in trained_on[:SHOWN])
    more = " ..." if len(trained_on) > SHOWN else ""
    raise UserError(
        f"{section}: the heads were trained on {len(trained_on)} of the {len(chosen)} prompts to be evaluated on, equal"
        f" or nearly equal: {named}{more}. {remedy}"
    )


def _answered(folder: Path) -> tuple[set[str], set[str]]:
    """(ids, normal forms of the first turns) of all prompts with an answer."""
    manifest = read_manifest(folder)
    ids: set[str] = set()
    forms: set[str] = set()
    for shard in manifest["shards"]:
        for row in rows_of(folder / shard["file"], ["id", "prompt"]):
            id_, _, later_turn = row["id"].partition(".")
            ids.add(id_)
            if not later_turn:
                forms.add(normal_form(row["prompt"]))
    return ids, forms
