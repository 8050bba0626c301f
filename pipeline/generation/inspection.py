"""Inspects responses without changing them: progress, integrity, content.

Takes a run folder that generate has written to, or is writing to; gives lines to print, and the figures of the report.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ..backbones.load import load_tokenizer
from ..errors import UserError
from ..runs.files import sha256_of
from ..runs.folder import RunDir
from .documents import Document, read_documents, read_manifest
from .responses import COUNTS, SCHEMA, Responses, rows_of

RECENT = 20
"""Number of finished shards from which the rate is computed."""


def status(run: RunDir) -> Iterator[str]:
    """Lines on progress, the processes at work, their rate and the time left. Raises UserError without responses."""
    responses = _responses(run)
    names = responses.names()
    entries = [e for e in map(responses.entry, names) if e is not None]
    manifest = responses.manifest()
    assert manifest is not None
    asked, total = manifest["asked"], _total(entries)
    state = "complete" if manifest["complete"] else "not complete"
    yield (
        f"{responses.folder}: {state}: {len(entries)} of {len(names)} shards, {total['prompts']} of {asked['prompts']} "
        f"prompts, {total['rows']} responses, {total['tokens']} tokens"
    )
    holders = responses.claims.holders(look_only=True)
    for name, holder in holders.items():
        gone = ": left behind, the next process takes it over" if holder.is_gone else ""
        yield f"  {name}: {holder.host}, process {holder.pid}, for {_duration(holder.since)}{gone}"
    alive = {(h.host, h.pid) for h in holders.values() if not h.is_gone}
    if manifest["complete"]:
        return
    if not alive:
        yield "  nobody is working on it: run `exit-heads generate` with the same config, it goes on"
        return
    recent = sorted((e for e in entries if e["made"]), key=lambda e: e["made"]["finished"])[-RECENT:]
    if not recent:
        yield f"  {len(alive)} at work, no shard is finished yet"
        return
    sums = _total(recent)
    seconds = sum(e["made"]["seconds"] for e in recent) / len(alive)
    left = asked["prompts"] - total["prompts"]
    yield (
        f"  {len(alive)} at work, {sums['tokens'] / seconds:.0f} tokens/s together; "
        f"about {_duration(left * seconds / max(1, sums['prompts']))} left"
    )


def verify(run: RunDir) -> str:
    """Hash every shard and count every turn; returns one line. Raises UserError that names damaged shards."""
    responses = _responses(run)
    manifest = responses.manifest()
    assert manifest is not None
    responses.check_asked()
    wrong = []
    seen: Counter[str] = Counter()
    entries = []
    for index, name in enumerate(responses.names()):
        entry = responses.entry(name)
        path = responses.folder / name
        if entry is None:
            continue
        entries.append(entry)
        if not path.is_file():
            wrong.append(f"{name} (missing)")
        elif sha256_of(path) != entry["sha256"]:
            wrong.append(f"{name} (changed)")
        else:
            ids = [row["id"] for row in rows_of(path, ["id"])]
            seen.update(ids)
            asked = {json.loads(prompt)["id"] for prompt, _ in responses.asked(index)}
            counts = entry["counts"]
            whole = counts["rows"] + counts["empty"] + counts["unanswered"] == counts["turns"]
            if not whole or len(asked) != counts["prompts"] or {i.partition(".")[0] for i in ids} - asked:
                wrong.append(f"{name} (rows that were not asked for, or too few)")
    wrong += [f"{id} (twice)" for id, count in seen.items() if count > 1]
    if wrong:
        names = [w.partition(" ")[0] for w in wrong if w.startswith("shard-")]
        remedy = f"Remove {' '.join(names)} and run" if names else "Run"
        raise UserError(
            f"{responses.folder}: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}: not what was written "
            f"({len(wrong)} in all). {remedy} `exit-heads generate` again: it makes anew what is missing."
        )
    total = _total(entries)
    part = "" if manifest["complete"] else f" of {manifest['asked']['shards']}, the others are not made yet"
    return (
        f"{responses.folder}: {len(entries)} shards{part}: every sha256 is as entered; {total['turns']} turns of "
        f"{total['prompts']} prompts: {total['rows']} answered, {total['empty']} empty, {total['unanswered']} not "
        f"reached; no id twice"
    )


def show(run: RunDir, count: int, console: Console | None = None) -> None:
    """Print the first `count` documents as distill reads them, with the learned tokens highlighted."""
    console = console or Console(highlight=False)
    settings = run.config.distill
    folder = run / "responses"
    documents, _ = read_documents(folder, read_manifest(folder), settings.truncated, settings.repeated_share)
    tokenizer = load_tokenizer(run.config.backbone)
    console.print(
        "[bold green]learned from[/] \\[\\[between brackets]], [dim]context[/]; special tokens as they are; "
        f"{len(documents)} documents" + (", context learned from too" if settings.learn_from == "all" else "")
    )
    for document in documents[:count]:
        console.rule(document.id, align="left")
        console.print(marked(document, tokenizer))


def marked(document: Document, tokenizer: Any) -> Text:
    """The document's text, with the tokens to learn from as [[text]]."""
    text, end = Text(), 0
    for start, stop in document.spans:
        text.append(tokenizer.decode(document.tokens[end:start]), "dim")
        text.append(f"[[{tokenizer.decode(document.tokens[start:stop])}]]", "bold green")
        end = stop
    text.append(tokenizer.decode(document.tokens[end:]), "dim")
    return text


def figures(run: RunDir) -> dict[str, Any] | None:
    """The report's figures on the responses; None if they are incomplete, missing or of an older schema."""
    responses = Responses(run / "responses")
    manifest = responses.manifest()
    if manifest is None or manifest["schema"] != SCHEMA or not manifest["complete"]:
        return None
    if not all(map(responses.has, responses.names())):
        return None
    prompts: list[int] = []
    answers: list[int] = []
    texts: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    temperatures: Counter[float] = Counter()
    for name in responses.names():
        for row in rows_of(responses.folder / name, ["prompt_ids", "response_ids", "source", "temperature"]):
            prompts.append(len(row["prompt_ids"]))
            answers.append(len(row["response_ids"]))
            texts[hash(tuple(row["response_ids"]))] += 1
            sources[row["source"]] += 1
            temperatures[row["temperature"]] += 1
    made = [e["made"] for e in map(responses.entry, responses.names()) if e and e["made"]]
    seconds = sum(m["seconds"] for m in made)
    return {
        **{name: manifest["responses"][name] for name in COUNTS},
        "engine": manifest["sampling"]["engine"],
        "reproducible": manifest["sampling"]["reproducible"],
        "duplicates": sum(count - 1 for count in texts.values()),
        "tokens_per_second": round(manifest["responses"]["tokens"] / seconds, 1) if seconds else None,
        "workers": len({m["worker"] for m in made}),
        "sources": dict(sources),
        "temperatures": {f"{t:g}": n for t, n in sorted(temperatures.items())},
        "prompt_lengths": _histogram(prompts),
        "response_lengths": _histogram(answers),
    }


def _histogram(lengths: list[int]) -> dict[str, list[float]]:
    counts, edges = np.histogram(lengths, bins=min(30, max(lengths) - min(lengths) + 1))
    return {"counts": counts.tolist(), "edges": [round(float(e), 2) for e in edges]}


def _responses(run: RunDir) -> Responses:
    responses = Responses(run / "responses")
    if responses.manifest() is None:
        raise UserError(
            f"run.name={run.config.run.name}: {run.path} holds no responses yet: run `exit-heads generate`."
        )
    return responses


def _total(entries: list[dict[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for entry in entries:
        total.update(entry["counts"])
    return total


def _duration(seconds: float) -> str:
    """`12 s`, `3 min`, `5 h 20 min`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
