"""Responses as packed batches: which tokens a step sees, and which of them it learns from.

Takes the responses folder, gives fixed-length sequences of whole documents (a conversation, as far as its turns
continue each other) and the sequences of every step as a pure function of step, seed and world size. What is learned
from are the very ids that were drawn: no text is tokenized anew. Knows nothing of models, templates, devices or losses.

Letters: S packed sequences, B sequences of one batch, T tokens of a sequence.
"""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..config import Distill
from ..errors import UserError
from ..evaluation.metrics import repeated_share
from ..runs.files import sha256_of


@dataclass(frozen=True)
class Document:
    """A prompt with the backbone's answer; of a conversation, all turns that continue each other token by token."""

    id: str
    """Of its first turn: `<conversation>`, or `<conversation>.2` ... where a later turn had to begin anew."""
    tokens: list[int]
    spans: list[tuple[int, int]]
    """First and one past the last token of every answer that is learned from, its end token included."""

    @property
    def conversation(self) -> str:
        return self.id.partition(".")[0]


def read_manifest(folder: Path) -> dict[str, Any]:
    """responses/manifest.json. Raises UserError if the responses are not all there."""
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
    """The documents of the shards that the manifest lists, in their order, and how many answers came to what.

    A turn whose prompt begins with all tokens of the document before it, of the same conversation, is joined to that
    document; where the chat template writes the past in another way than it was drawn, it begins one of its own.
    An answer is context but not learned from if it was cut off (unless `truncated` is keep) or if more than the share
    `most_repeated` of its 8-grams occurred in it before. Counted: answers, truncated, repeating, joined, alone.
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
            "themselves. Raise generate.max_new_tokens, or set distill.truncated=keep or distill.repeated_share=1."
        )
    return kept, counts


def _rows(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, list[int], list[int], str]]:
    """(id, prompt_ids, response_ids, finish_reason) of every turn, one shard after the other."""
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            what = "is not what the manifest says" if path.is_file() else "is missing"
            raise UserError(f"{path} {what}: make the responses anew with `exit-heads generate --redo generate`.")
        names = ["id", "prompt_ids", "response_ids", "finish_reason"]
        columns = pq.read_table(path, columns=names).to_pydict()
        yield from zip(*(columns[name] for name in names), strict=True)


def split(documents: Sequence[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """(train, validation) by a hash of the conversation: it stays on its side, as a whole, whatever else is in the set.

    Validation gets the share `held_out` of the hash range, at least one conversation; so does training.
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
    """The documents cut to `sequence_length`, without those that have no response token left to learn from.

    Each ends with its last token that is learned from: what comes after it would teach nothing.
    Raises UserError if none is left.
    """
    kept = []
    for d in documents:
        # From 1: nothing stands before the first token that could predict it.
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


class Packed(Dataset):
    """Sequences of whole documents, end to end, padded at the end; see `pack`."""

    def __init__(self, ids_ST: Tensor, positions_ST: Tensor, mask_ST: Tensor, lengths_S: Tensor, first: int = 0):
        self.ids_ST = ids_ST
        self.positions_ST = positions_ST
        """Place in the document: restarts at 0 with each one, which is how attention knows the boundaries."""
        self.mask_ST = mask_ST
        """True at the positions whose next-token distribution is learned."""
        self.lengths_S = lengths_S
        """Tokens that are not padding."""
        self.rows_S = mask_ST.sum(1)
        """Positions that are learned."""
        self.first = first
        """Number of the first sequence among all that are packed, the training set's and then the validation set's."""

    def __len__(self) -> int:
        return len(self.ids_ST)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these sequences. An index of -1 is a sequence that counts for nothing."""
        chosen_B = torch.tensor(list(indices), dtype=torch.long)
        real_B = chosen_B >= 0
        chosen_B = chosen_B.clamp(min=0)
        return {
            "ids_BT": self.ids_ST[chosen_B].long(),
            "positions_BT": self.positions_ST[chosen_B].long(),
            "mask_BT": self.mask_ST[chosen_B] & real_B[:, None],
            "sequences_B": chosen_B + self.first,
        }


def pack(documents: Sequence[Document], sequence_length: int, *, prompts_too: bool = False) -> Packed:
    """Best-fit-decreasing packing of documents no longer than `sequence_length`: a pure function of their order.

    Learned are the positions before the tokens of every span, or, with `prompts_too`, before every token but a
    document's first: a turn's prompt holds the answers to the turns before, those that are not learned from too.
    Padding is a document of its own (positions from 0, nothing to learn), so that no real token attends to it.
    """
    sequences: list[list[Document]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> sequences that have exactly so many
    rooms: list[int] = []  # its keys, sorted
    for document in sorted(documents, key=lambda d: -len(d.tokens)):
        at = bisect.bisect_left(rooms, len(document.tokens))
        if at < len(rooms):
            room = rooms[at]
            which = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, which = sequence_length, len(sequences)
            sequences.append([])
        sequences[which].append(document)
        left = room - len(document.tokens)
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(which)

    ids_ST = np.zeros((len(sequences), sequence_length), np.int32)
    positions_ST = np.zeros((len(sequences), sequence_length), np.int32)
    mask_ST = np.zeros((len(sequences), sequence_length), bool)
    lengths_S = np.zeros(len(sequences), np.int64)
    for s, members in enumerate(sequences):
        start = 0
        for document in members:
            end = start + len(document.tokens)
            ids_ST[s, start:end] = document.tokens
            positions_ST[s, start:end] = np.arange(end - start)
            for first, last in [(1, end - start)] if prompts_too else document.spans:
                mask_ST[s, start + first - 1 : start + last - 1] = True  # a token is predicted one place before it
            start = end
        positions_ST[s, start:] = np.arange(sequence_length - start)
        lengths_S[s] = start
    return Packed(*map(torch.from_numpy, (ids_ST, positions_ST, mask_ST, lengths_S)))


def read_packed(folder: Path, distill: Distill) -> tuple[dict[str, Any], Packed, Packed, dict[str, int]]:
    """(manifest, packed training set, packed validation set, what became of how many responses) of a responses folder.

    Raises UserError for responses that cannot be read, and if nothing in them can be learned from.
    """
    manifest = read_manifest(folder)
    documents, counts = read_documents(folder, manifest, distill.truncated, distill.repeated_share)
    kept = usable(documents, distill.sequence_length)
    sides = split(kept, distill.held_out)
    train = pack(sides[0], distill.sequence_length, prompts_too=distill.learn_from == "all")
    # validation is always on responses: that is what will be drafted
    validation = pack(sides[1], distill.sequence_length)
    validation.first = len(train)
    learned = sum(len(document.spans) for document in kept)
    too_long = sum(len(document.spans) for document in documents) - learned
    found = {**counts, "too_long": too_long, "learned": learned, "documents": len(kept)}
    return manifest, train, validation, found


def joined(train: Packed, validation: Packed) -> Packed:
    """All sequences under their numbers: the training set's and then the validation set's."""
    names = ("ids_ST", "positions_ST", "mask_ST", "lengths_S")
    return Packed(**{name: torch.cat([getattr(train, name), getattr(validation, name)]) for name in names})


class StepBatches(Sampler[list[int]]):
    """This rank's sequences of steps start_step .. total_steps - 1.

    Step k takes places [k G, (k+1) G) of endless seeded shuffles of the sequences, laid end to end; rank r takes
    the r-th part of them. No state is kept, so a resumed run, or one with another world size, sees the same.
    """

    def __init__(
        self,
        num_sequences: int,
        sequences_per_step: int,
        total_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ):
        if sequences_per_step % world_size:
            raise UserError(
                f"distill.sequences_per_step={sequences_per_step}: must be a multiple of the {world_size} processes"
            )
        self.num_sequences, self.sequences_per_step, self.total_steps = num_sequences, sequences_per_step, total_steps
        self.seed, self.rank, self.world_size, self.start_step = seed, rank, world_size, start_step

    def __len__(self) -> int:
        return self.total_steps  # of the whole run: Lightning counts the batches from its beginning

    def __iter__(self) -> Iterator[list[int]]:
        share = self.sequences_per_step // self.world_size
        for step in range(self.start_step, self.total_steps):
            yield self.of_all_ranks(step)[self.rank * share : (self.rank + 1) * share]

    def of_all_ranks(self, step: int) -> list[int]:
        """The sequences of a step over all processes: any of them can count its rows without asking the others."""
        first = step * self.sequences_per_step
        return [self._at(place) for place in range(first, first + self.sequences_per_step)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, self.num_sequences)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.num_sequences)
        return int(self._order[within])


def validation_batches(num_sequences: int, size: int, rank: int, world_size: int) -> list[list[int]]:
    """Every sequence once, in order, in batches of `size` over all ranks. Each rank gets as many, filled up with -1,
    because every forward pass of a sharded model is a meeting of all ranks."""
    batches = -(-num_sequences // (size * world_size))
    places = [(b * world_size + rank) * size for b in range(batches)]
    return [[i if i < num_sequences else -1 for i in range(p, p + size)] for p in places]


def passes(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The batch in parts of `size` sequences; the last has what is left. Ranks with equal batches get as many."""
    for start in range(0, len(batch["ids_BT"]), size):
        yield {name: value_B[start : start + size] for name, value_B in batch.items()}
