"""Checks that no evaluation prompt was trained on, by comparing with the responses that the heads learned from.

Takes the responses folder and the prompts to evaluate on. generate already leaves the evaluation prompts of its config
out; as the config may have changed since, the prompts are compared with those that were actually answered.
"""

from pathlib import Path

from ..errors import UserError
from ..prompts.prompt import Prompt, normal_form
from .documents import read_manifest
from .responses import rows_of

SHOWN = 3
"""Number of prompts that the message names."""


def check_not_trained_on(folder: Path, chosen: list[Prompt], section: str) -> None:
    """Raises UserError if a chosen prompt has the id, or the normal form of the first turn, of an answered one.

    `section`: where the chosen prompts come from (`prompts` or `evaluate.prompts`), for the message. Also raises
    UserError if the responses cannot be read.
    """
    ids, forms = _answered(folder)
    trained_on = [p for p in chosen if p.id in ids or normal_form(p.turns[0]) in forms]
    if not trained_on:
        return
    named = ", ".join(f"{p.id} ({p.turns[0][:40]!r})" for p in trained_on[:SHOWN])
    more = " ..." if len(trained_on) > SHOWN else ""
    raise UserError(
        f"{section}: the heads were trained on {len(trained_on)} of the {len(chosen)} prompts to be evaluated on, equal"
        f" or nearly equal: {named}{more}. Take them out or give other prompts (evaluate.prompts.path); or make the "
        "responses anew with this config (--redo generate, then distill), which leaves the prompts of evaluate out."
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
