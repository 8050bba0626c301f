"""Documents: the responses as training data, with the token ids that were sampled.

Takes the responses folder; gives Documents (a conversation, as far as its turns continue each other) split into
training and validation. No text is tokenized again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import UserError
from ..runs.files import sha256_of
from .repetition import repeated_share


@dataclass(frozen=True)
class Document:
    """A prompt with the backbone's answer; several turns of a conversation if their tokens continue each other."""

    id: str
    """Id of its first turn: `<conversation>`, or `<conversation>.2` ... if a later turn begins this document."""
    tokens: list[int]
    spans: list[tuple[int, int]]
    """[start, stop) of the tokens of every answer to learn from, including its end token."""

    @property
    def conversation(self) -> str:
        return self.id.partition(".")[0]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of responses/manifest.json. Raises UserError if the responses are incomplete or missing."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Make it with `exit-heads generate`.") from None
    if not manifest.get("complete"):
        raise UserError(f"{path}: the responses are not complete: run `exit-heads generate` again, it goes on.")
    return manifest


def read_documents(
    folder: Path, manifest: dict[str, Any], truncated: str, most_repeated: float
) -> tuple[list[Document], Counter[str]]:
    """The documents of the shards that the manifest lists, in their order, and counts of the answers.

    A turn whose prompt begins with all tokens of the previous document of the same conversation is joined to that
    document; if the chat template renders the past differently from what was sampled, the turn begins a new document.
    An answer is context but not learned from if it was cut off (unless `truncated` is keep) or if more than the share
    `most_repeated` of its 8-grams occurred in it before. The counts are answers, truncated, repeating, joined, alone.
    Raises UserError for a missing or changed shard and if there is nothing to learn from.
    """
    counts = Counter(dict.fromkeys(("answers", "truncated", "repeating", "joined", "alone"), 0))
    documents: list[Document] = []
    for id_, prompt, response, finish_reason in _rows(folder, manifest):
        counts["answers"] += 1
        new = Document(id_, [*prompt, *response], [(len(prompt), len(prompt) + len(response))])
        if truncated == "drop" and finish_reason == "length":
            counts["truncated"] += 1
            new.spans.clear()
        elif repeated_share(response) > most_repeated:
            counts["repeating"] += 1
            new.spans.clear()
        last = documents[-1] if documents else None
        if last is None or last.conversation != new.conversation:
            documents.append(new)
        elif prompt[: len(last.tokens)] == last.tokens:
            counts["joined"] += 1
            documents[-1] = Document(last.id, new.tokens, [*last.spans, *new.spans])
        else:
            counts["alone"] += 1
            documents.append(new)
    if not documents:
        raise UserError(f"{folder}: no responses: raise generate.num_prompts and run `exit-heads generate`.")
    kept = [d for d in documents if d.spans]
    if not kept:
        raise UserError(
            f"distill.truncated={truncated}, distill.repeated_share={most_repeated}: nothing to learn from: of "
            f"{counts['answers']} responses {counts['truncated']} are truncated and {counts['repeating']} repeat "
            "themselves. Raise generate.max_new_tokens (or add to backbone.end_tokens what should have ended them), "
            "or set distill.truncated=keep or distill.repeated_share=1."
        )
    return kept, counts


def _rows(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, list[int], list[int], str]]:
    """(id, prompt_ids, response_ids, finish_reason) of every turn, shard by shard."""
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            what = "is not what the manifest says" if path.is_file() else "is missing"
            raise UserError(f"{path} {what}: make the responses anew with `exit-heads generate --redo generate`.")
        names = ["id", "prompt_ids", "response_ids", "finish_reason"]
        columns = pq.read_table(path, columns=names).to_pydict()
        yield from zip(*(columns[name] for name in names), strict=True)


def read_temperatures(folder: Path, manifest: dict[str, Any]) -> dict[str, float]:
    """Id of a turn -> the temperature at which it was answered."""
    found: dict[str, float] = {}
    for shard in manifest["shards"]:
        columns = pq.read_table(folder / shard["file"], columns=["id", "temperature"]).to_pydict()
        found |= dict(zip(columns["id"], columns["temperature"], strict=True))
    return found


def split(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """(train, validation), split by a hash of the conversation's id: each conversation always goes to the same side.

    Validation gets the share `held_out` of the hash range. Both sides get at least one conversation.
    Raises UserError for fewer than two conversations.
    """
    names = dict.fromkeys(d.conversation for d in documents)
    if len(names) < 2:
        raise UserError(
            f"{len(names)} usable conversation: at least 2 are needed, one to train and one to validate: "
            "raise generate.num_prompts."
        )
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    count = min(max(1, sum(p < held_out for p in places.values())), len(names) - 1)
    validation = set(sorted(names, key=places.__getitem__)[:count])
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[document.conversation in validation].append(document)
    return sides


def usable(documents: Sequence[Document], sequence_length: int) -> list[Document]:
    """The documents cut to `sequence_length` tokens, without those that have no token left to learn from.

    Each document also ends at its last token that is learned from, as later tokens have no effect.
    Raises UserError if no document is left.
    """
    kept = []
    for d in documents:
        # From 1, because no position predicts the first token.
        cut = [(max(1, start), min(end, sequence_length)) for start, end in d.spans]
        spans = [(start, end) for start, end in cut if start < end]
        if spans:
            kept.append(Document(d.id, d.tokens[: spans[-1][1]], spans))
    if not kept:
        shortest = min(d.spans[0][0] for d in documents)
        raise UserError(
            f"distill.sequence_length={sequence_length}: no response token fits, the shortest of {len(documents)} "
            f"prompts has {shortest} tokens: give a longer sequence_length"
        )
    return kept
