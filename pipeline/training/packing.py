"""Packs responses into sequences of one length, and marks the tokens that heads are trained on.

`read_packed` takes a folder of responses and gives a training set and a validation set. A sequence holds whole
documents (a document is a response with its prompt, or several turns of one conversation that continue each other) and
padding at its end. The token ids are those that the backbone generated: no text is tokenized again.

Letters: S packed sequences, B sequences of one batch, T tokens of a sequence.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import Distill
from ..generation.documents import Document, read_documents, read_manifest, split, usable


class Packed(Dataset):
    """Packed sequences; see `pack`. An item is the batch of a list of sequences."""

    def __init__(self, ids_ST: Tensor, positions_ST: Tensor, mask_ST: Tensor, lengths_S: Tensor, first: int = 0):
        self.ids_ST = ids_ST
        self.positions_ST = positions_ST
        """Position in the document. It restarts at 0 with each one: attention finds the boundaries by that."""
        self.mask_ST = mask_ST
        """True at the rows: positions whose next-token distribution the heads are trained on."""
        self.lengths_S = lengths_S
        """Number of tokens that are not padding."""
        self.rows_S = mask_ST.sum(1)
        """Number of rows."""
        self.first = first
        """Number of the first of these sequences, counted over the training set and then the validation set."""

    def __len__(self) -> int:
        return len(self.ids_ST)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the sequences `indices`. An index of -1 gives a sequence without rows, as a filler."""
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
    """Best-fit-decreasing packing of documents, none longer than `sequence_length`: a pure function of their order.

    Rows are the positions before the tokens of each document's spans (its responses). With `prompts_too` they are the
    positions before every token except a document's first. Padding is a document of its own without rows and with
    positions from 0, so that no real token attends to it.
    """
    sequences: list[list[Document]] = []
    by_room: dict[int, list[int]] = {}  # number of free tokens -> the sequences that have exactly so many
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
    """(manifest, training set, validation set, counts of used and left-out responses) of a folder of responses.

    Raises UserError for responses that cannot be read, and if none of them can be used.
    """
    manifest, learned, held_out, counts = read_sides(folder, distill)
    train = pack(learned, distill.sequence_length, prompts_too=distill.learn_from == "all")
    # validation is always on responses: that is what will be drafted
    validation = pack(held_out, distill.sequence_length)
    validation.first = len(train)
    return manifest, train, validation, counts


def read_sides(folder: Path, distill: Distill) -> tuple[dict[str, Any], list[Document], list[Document], dict[str, int]]:
    """(manifest, documents to learn from, held-out documents, counts of used and left-out responses) of a folder of
    responses. Raises UserError for responses that cannot be read, and if none of them can be used."""
    manifest = read_manifest(folder)
    documents, counts = read_documents(folder, manifest, distill.truncated, distill.repeated_share)
    kept = usable(documents, distill.sequence_length)
    responses = sum(len(document.spans) for document in kept)
    too_long = sum(len(document.spans) for document in documents) - responses
    found = {**counts, "too_long": too_long, "learned": responses, "documents": len(kept)}
    return manifest, *split(kept, distill.held_out), found


def joined(train: Packed, validation: Packed) -> Packed:
    """All sequences in the order of their numbers: the training set's and then the validation set's."""
    names = ("ids_ST", "positions_ST", "mask_ST", "lengths_S")
    return Packed(**{name: torch.cat([getattr(train, name), getattr(validation, name)]) for name in names})
