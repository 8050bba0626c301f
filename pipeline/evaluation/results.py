"""Reads eval/results.json and words its verdict, in one place for all readers: schema, losslessness, headline.

Takes the file, or the dict in it; gives the dict, or text. It needs neither torch nor pandas.

`best` is the judged figure, the only one to quote as a headline:

    exit_layer, controller, temperature      the fastest of the methods at the first of evaluate.temperatures
    speedup                                  tokens per second over autoregressive decoding
    speedup_ci95                             95 % interval that holds simultaneously for all methods compared, so it
                                             accounts for selecting the fastest; null if conversations were too few
    acceptance_length(_ci95)                 of that method; the interval does not account for the selection
    methods, conversations, prompts          how many methods were compared, and on how many conversations and prompts

Every method's figures in `heads` have two intervals: `speedup_ci95` is valid for a method named beforehand,
`speedup_joint_ci95` also for a method selected because of its figures.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..inference.controllers import branches
from .intervals import FEWEST

SCHEMA = 3
"""In schema 2, `best` had the fastest method's own interval, over prompts instead of conversations."""
ANEW = "evaluate anew, with --redo evaluate"


def read(path: Path) -> dict[str, Any]:
    """The results of an evaluation. Raises UserError if the file holds none, or has another schema."""
    try:
        results = json.loads(path.read_text())
        schema, found = results.get("schema"), bool(results["heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        schema, found = None, False
    if not found:
        raise UserError(f"{path}: holds no results of an exit head; {ANEW}")
    if schema != SCHEMA:
        raise UserError(f"{path} is of schema {schema}, this version knows schema {SCHEMA}: {ANEW}")
    return results


def is_lossless(results: dict[str, Any]) -> bool:
    """Whether every losslessness test that was made passed."""
    return all(proof["passed"] for proof in results["lossless"].values() if proof is not None)


def headline(best: dict[str, Any]) -> str:
    """The judged speedup with its interval, or with the reason why there is none."""
    return f"speedup {best['speedup']:.2f} ({span(best)})"


def span(best: dict[str, Any]) -> str:
    """The judged interval, or the reason why there is none."""
    if best["speedup_ci95"] is None:
        return f"not judged: {too_few(best)}"
    low, high = best["speedup_ci95"]
    return f"95 % interval {low:.2f}-{high:.2f}"


def too_few(best: dict[str, Any]) -> str:
    count = best["conversations"]
    return f"{count} conversation{' is' if count == 1 else 's are'} too few, {FEWEST} are needed"


def basis(best: dict[str, Any]) -> str:
    """From how many methods the judged figure was selected, and on what it was measured."""
    prompts, conversations = best["prompts"], best["conversations"]
    where = f"{prompts} prompt{'s' if prompts != 1 else ''}"
    if prompts != conversations:
        where += f" of {conversations} conversation{'s' if conversations != 1 else ''}"
    if best["methods"] == 1:
        return f"the only method, measured on {where}"
    return f"the fastest of {best['methods']} methods on {where}" + (
        "; the interval holds for all of them at once" if best["speedup_ci95"] is not None else ""
    )


def of_sources(entry: dict[str, Any]) -> list[str]:
    """Of each controller that copied drafts: how often, and what came of it."""
    lines = []
    for name, c in entry["controllers"].items():
        for source, where in (("lookup", "the text"), ("memory", "earlier texts")):
            if copied := c.get("sources", {}).get(source):
                lines.append(
                    f"Exit layer {entry['exit_layer']}, {name}: {copied['rounds'] / c['rounds']:.0%} of the rounds "
                    f"copied their drafts from {where}, {copied['drafted'] / copied['rounds']:.1f} in each; "
                    f"{copied['accepted'] / copied['drafted']:.0%} of these were accepted."
                )
    return lines


def of_oracle(entry: dict[str, Any]) -> str:
    """What the best controller at all could reach with a head, and which share of it the fastest measured one did of
    those that draft with the head alone."""
    bound = entry.get("oracle_speedup")
    if bound is None:  # of an older version, or every text ended with its first token
        return ""
    own = {name: c for name, c in entry["controllers"].items() if "sources" not in c and not branches(name)}
    if not own:
        return ""
    name, fastest = max(own.items(), key=lambda item: item[1]["speedup"])
    return (
        f"Exit layer {entry['exit_layer']}: a controller that knew every outcome beforehand would reach a speedup of "
        f"{bound:.2f} by chains of its drafts at these costs; {name} reached {fastest['speedup'] / bound:.0%} of it."
    )
