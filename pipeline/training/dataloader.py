"""The batches of a run: which packed sequences each process takes at which step.

They are a pure function of step, seed and number of processes, and no state is kept: a resumed run, also one with
another number of processes, trains on the same sequences at the same steps.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import UserError


class StepBatches(Sampler[list[int]]):
    """The indices of this rank's sequences at the steps start_step .. total_steps - 1.

    With G = sequences_per_step, step k takes the places [k G, (k+1) G) of endless seeded shuffles of all sequences,
    laid end to end; rank r takes the r-th of world_size equal parts of them.
    Raises UserError if world_size does not divide sequences_per_step.
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
        return self.total_steps  # not the remaining ones: Lightning counts the batches of the whole run

    def __iter__(self) -> Iterator[list[int]]:
        share = self.sequences_per_step // self.world_size
        for step in range(self.start_step, self.total_steps):
            yield self.of_all_ranks(step)[self.rank * share : (self.rank + 1) * share]

    def of_all_ranks(self, step: int) -> list[int]:
        """The sequences of a step over all ranks, known to every rank without communication."""
        first = step * self.sequences_per_step
        return [self._at(place) for place in range(first, first + self.sequences_per_step)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, self.num_sequences)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.num_sequences)
        return int(self._order[within])


def validation_batches(num_sequences: int, size: int, rank: int, world_size: int) -> list[list[int]]:
    """Every sequence once, in order, in batches of `size`, dealt to the ranks in turn.

    All ranks get the same number of batches, filled up with -1: a forward pass of a sharded model is collective.
    """
    batches = -(-num_sequences // (size * world_size))
    places = [(b * world_size + rank) * size for b in range(batches)]
    return [[i if i < num_sequences else -1 for i in range(p, p + size)] for p in places]


def passes(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The batch in parts of `size` sequences; the last part may be smaller."""
    for start in range(0, len(batch["ids_BT"]), size):
        yield {name: value_B[start : start + size] for name, value_B in batch.items()}
