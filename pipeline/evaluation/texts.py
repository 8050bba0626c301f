"""One measured text of each task, token by token: drafted and accepted, drafted and rejected, or the backbone's own.

Takes the measurements, a method and a tokenizer; gives the block "drafts" that rendering.py draws in colours. Nothing
is decoded again: what was drafted in each round stands in the measurements.
"""

from typing import Any

from .measuring import Measured
from .rendering import Block

ACCEPTED, REJECTED, OWN = "accepted", "rejected", "own"
NOTE = (
    "Green: drafts that the backbone accepted. Struck out: drafts that it rejected. Plain: the backbone's own tokens, "
    "one in every round. Point at a token to see its round."
)


def blocks(texts: list[dict[str, Any]]) -> list[Block]:
    """The section of the report for what `shown` gives. It stands in the report alone, as results.json is published and
    prompts may be private."""
    page: list[Block] = [("h2", "Drafts in the text"), ("p", NOTE)] if texts else []
    for text in texts:
        words = " ".join(text["prompt"].split())
        prompt = words if len(words) <= 160 else f"... {words[-157:]}"
        page += [("h3", f"{text['task']}: {prompt}" if text["task"] else prompt), ("drafts", text)]
    return page


def shown(measured: Measured, best: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """The first text of each task that the method `best` of results.json wrote: task, the end of its prompt, and
    `pieces`, each [text, ACCEPTED | REJECTED | OWN, what happened]."""
    key = {name: best[name] for name in ("exit_layer", "controller", "temperature")}
    texts = measured.generations
    for name, value in key.items():
        texts = texts[texts[name] == value]
    found = []
    for row in texts.drop_duplicates("task").itertuples():
        rounds = measured.rounds
        for name, value in {**key, "prompt": row.prompt, "repeat": row.repeat}.items():
            rounds = rounds[rounds[name] == value]
        (ids,) = measured.prompts[measured.prompts.prompt == row.prompt].ids
        drafts = list(zip(rounds.drafts, rounds.accepted, rounds.tokens, strict=True))
        found.append(
            {"task": row.task, "prompt": tokenizer.decode(ids), "pieces": pieces(list(row.tokens), drafts, tokenizer)}
        )
    return found


def pieces(tokens: list[int], rounds: list[tuple[list[int], int, int]], tokenizer: Any) -> list[list[str]]:
    """The pieces of one text. tokens: all of its ids, the first of which the prefill gave; rounds: the drafted ids, how
    many of them were accepted, and how many tokens the round committed."""

    def text(before: int | None, token: int) -> str:
        """Of a token behind another: some decoders drop the space at the beginning of what they are given."""
        if before is None:
            return tokenizer.decode([token], clean_up_tokenization_spaces=False)
        both, alone = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in ([before, token], [before]))
        return both[len(alone) :]

    found, at = [[text(None, tokens[0]), OWN, "from the prefill"]], 1
    for number, (drafts, accepted, committed) in enumerate(rounds, 1):
        drafts, new = list(drafts), tokens[at : at + committed]
        for i, token in enumerate(new):
            last = tokens[at + i - 1]
            rejected = drafts[accepted:] if i == accepted else []
            for j, draft in enumerate(rejected, accepted + 1):
                why = "rejected" if j == accepted + 1 else "behind a rejected one"
                behind = last if j == accepted + 1 else drafts[j - 2]
                found.append([text(behind, draft), REJECTED, f"round {number}: draft {j} of {len(drafts)}, {why}"])
            if i < accepted:
                found.append([text(last, token), ACCEPTED, f"round {number}: draft {i + 1} of {len(drafts)}, accepted"])
            else:
                says = "nothing was drafted" if not drafts else f"{accepted} of {len(drafts)} drafts accepted"
                found.append([text(last, token), OWN, f"round {number}: the bonus token; {says}"])
        at += committed
    return found
