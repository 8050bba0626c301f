"""Which sequences each process sees at which step: a pure function of step, seed and number of processes.

Takes the number of packed sequences, gives the indices of every batch. No state is kept, so that a resumed run, or
one with another number of processes, sees the same sequences.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import UserError


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
