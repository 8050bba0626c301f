"""One measured text of each task, token by token: drafted and accepted, drafted and rejected, or the backbone's own.

Takes the measurements, a method and a tokenizer; gives the block "drafts" that rendering.py draws in colours. Nothing
is decoded again: what was drafted in each round stands in the measurements.
"""

from typing import Any, NamedTuple

from .measuring import Measured
from .rendering import Block

ACCEPTED, REJECTED, OWN = "accepted", "rejected", "own"
NOTE = (
    "Green: drafts that the backbone accepted. Struck out: drafts that it rejected. Plain: the backbone's own tokens, "
    "one in every round. Point at a token to see its round."
)


TREE = (
    "One of its rounds whose drafts branched: each draft stands behind the one that it follows. All of them were "
    "verified in one pass."
)


def blocks(texts: list[dict[str, Any]]) -> list[Block]:
    """The section of the report for what `shown` gives. It stands in the report alone, as results.json is published and
    prompts may be private."""
    page: list[Block] = [("h2", "Drafts in the text"), ("p", NOTE)] if texts else []
    for text in texts:
        words = " ".join(text["prompt"].split())
        prompt = words if len(words) <= 160 else f"... {words[-157:]}"
        page += [("h3", f"{text['task']}: {prompt}" if text["task"] else prompt), ("drafts", text)]
        if text.get("tree"):
            page += [("p", TREE), ("pre", text["tree"])]
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
        drafts = [drafts_of(r) for r in rounds.itertuples()]
        text = {"task": row.task, "prompt": tokenizer.decode(ids)}
        text["pieces"] = pieces(list(row.tokens), drafts, tokenizer)
        starts = [row.tokens[at] for at in (rounds.tokens.cumsum() - rounds.tokens)]
        branched = [(r, pending) for r, pending in zip(rounds.itertuples(), starts, strict=True) if len(r.parents)]
        if branched:
            # the most telling one: a long path, and not of first candidates alone
            made, pending = max(branched, key=lambda one: (one[0].accepted, sum(one[0].path)))
            text["tree"] = picture(made, pending, tokenizer)
        found.append(text)
    return found


def picture(round: Any, pending: int, tokenizer: Any) -> str:
    """The tree of drafts of one round, a line for each. round: a row of the table of rounds. pending: the id of the
    token that they follow."""

    def word(token: int) -> str:
        return repr(tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def below(row: int, indent: str) -> list[str]:
        children = [i for i, parent in enumerate(round.parents, 1) if parent == row]
        lines = []
        for child in children:
            corner, line = ("└─ ", "   ") if child == children[-1] else ("├─ ", "│  ")
            mark = "  accepted" if child in round.path else ""
            lines += [f"{indent}{corner}{word(round.drafts[child - 1])}{mark}", *below(child, indent + line)]
        return lines

    return "\n".join([f"{word(pending)}  pending", *below(0, "")])


class Drafts(NamedTuple):
    """What was drafted in one round."""

    accepted: list[int]
    """Ids of the accepted drafts."""
    rejected: list[list[int]]
    """The candidates of the first place where none was right; in a chain, then each draft behind it."""
    drafted: int
    committed: int
    """Number of tokens committed."""
    branched: bool = False


def _place(i: int, made: Drafts) -> str:
    return f"level {i + 1} of a tree of {made.drafted}" if made.branched else f"draft {i + 1} of {made.drafted}"


def drafts_of(round: Any) -> Drafts:
    """round: a row of the table of rounds. Where drafts branch, only candidates for the first place where none was
    right are among the rejected ones: the others continue texts that are not this one."""
    drafts = list(round.drafts)
    if not len(round.parents):
        left = [[token] for token in drafts[round.accepted :]]
        return Drafts(drafts[: round.accepted], left, len(drafts), round.tokens)
    end = round.path[-1] if len(round.path) else 0
    candidates = [token for token, parent in zip(drafts, round.parents, strict=True) if parent == end]
    accepted = [drafts[row - 1] for row in round.path]
    return Drafts(accepted, [candidates] if candidates else [], len(drafts), round.tokens, branched=True)


def pieces(tokens: list[int], rounds: list[Drafts], tokenizer: Any) -> list[list[str]]:
    """The pieces of one text. tokens: all of its ids, the first of which the prefill gave."""

    def text(before: int | None, token: int) -> str:
        """Of a token behind another: some decoders drop the space at the beginning of what they are given."""
        if before is None:
            return tokenizer.decode([token], clean_up_tokenization_spaces=False)
        both, alone = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in ([before, token], [before]))
        return both[len(alone) :]

    found, at = [[text(None, tokens[0]), OWN, "from the prefill"]], 1
    for number, made in enumerate(rounds, 1):
        accepted, new = len(made.accepted), tokens[at : at + made.committed]
        for i, token in enumerate(new):
            last = behind = tokens[at + i - 1]
            for j, candidates in enumerate(made.rejected if i == accepted else []):
                why = "behind a rejected one" if j else "rejected"
                for draft in candidates:
                    place = "a candidate" if made.branched else _place(accepted + j, made)
                    found.append([text(behind, draft), REJECTED, f"round {number}: {place}, {why}"])
                behind = candidates[0]
            if i < accepted:
                found.append([text(last, token), ACCEPTED, f"round {number}: {_place(i, made)}, accepted"])
            else:
                says = f"{accepted} of {made.drafted} drafts accepted" if made.drafted else "nothing was drafted"
                found.append([text(last, token), OWN, f"round {number}: the bonus token; {says}"])
        at += made.committed
    return found
