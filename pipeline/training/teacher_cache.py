"""The cache of a teacher: what it says of every packed sequence, on disk (shards.py).

Takes the hidden states of a shard's sequences, gives those of any sequences, as large as the sequences that are asked
for and no larger. Knows nothing of how hidden states are made or what is done with them.

    cache/
      shard-00000.safetensors    tensors final and hidden.<N> [P, D], in the backbone's dtype, of its sequences' tokens
                                 laid end to end, without padding
      entries/  claims/  manifest.json    as in every folder of shards

Letters: B sequences of a batch, S packed sequences, T tokens of a sequence with its padding, P tokens without padding,
D hidden size.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import Config
from ..errors import UserError
from ..runs.shards import Shards
from .packing import Packed
from .teacher import TeacherStates

SCHEMA = 1
SHARD_BYTES = 256 * 2**20
"""About how large a shard becomes: what a kill costs, and what a process holds in memory, twice while it writes."""
REMEDY = "Give another run.name, or make it anew with `exit-heads cache --redo cache`."


def head_of(config: Config, backbone: dict[str, Any], hidden_size: int, sequences: Packed) -> dict[str, Any]:
    """What a manifest says of a cache before there is any of it. `backbone`: as the responses' manifest has it."""
    layers = sorted(config.distill.exit_layers)
    length = config.distill.sequence_length
    per_token = (len(layers) + 1) * hidden_size * getattr(torch, config.backbone.dtype).itemsize
    return {
        "backbone": backbone,
        "dtype": config.backbone.dtype,
        "hidden_size": hidden_size,
        "exit_layers": layers,
        "packing": {
            "sequence_length": length,
            "sequences": len(sequences),
            "tokens": int(sequences.lengths_S.sum()),
            "sha256": packing_sha256(sequences),
        },
        "bytes_per_token": per_token,
        "sequences_per_shard": max(1, SHARD_BYTES // (length * per_token)),
    }


def packing_sha256(sequences: Packed) -> str:
    """Of what the teacher reads. What is learned from may change: the hidden states stay the same."""
    digest = hashlib.sha256()
    for tensor in (sequences.ids_ST, sequences.positions_ST, sequences.lengths_S):
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


class TeacherCache(Shards):
    """One cache folder. Nothing is read or made before it is asked for."""

    stage, suffix, schema = "cache", "safetensors", SCHEMA

    def count(self, manifest: dict[str, Any]) -> int:
        return -(-manifest["packing"]["sequences"] // manifest["sequences_per_shard"])

    def facts(self, path: Path) -> dict[str, Any]:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("of") != self.of():
                    raise ValueError(f"{path}: of another cache")
                return {"tokens": file.get_slice("final").get_shape()[0]}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None

    def put(self, name: str, tensors: dict[str, Tensor], made: dict[str, Any], of: str) -> None:
        """Write a shard, put it in place unless another process has, enter what is there then. `of`: what `of()` was
        when the work began. Raises UserError if the cache has been begun anew since."""
        if of != self.of():
            raise UserError(f"{self.folder}: begun anew by another process since this one began: run it again.")
        whole = save(tensors, {"of": of})  # not save_file: its error for a full disk is none that says so
        self.place(name, lambda path: path.write_bytes(whole), made)

    def check_layers(self, exit_layers: list[int]) -> None:
        """Raises UserError unless the hidden states after these layers are kept, or being made."""
        manifest = self.manifest()
        if manifest and (missing := set(exit_layers) - set(manifest["exit_layers"])):
            raise UserError(
                f"distill.exit_layers={exit_layers}: {self.folder} is made of exit layers {manifest['exit_layers']}, "
                f"without {sorted(missing)}. {REMEDY}"
            )

    def check(self, config: Config, fingerprint: str, sequences: Packed) -> None:
        """Raises UserError unless what is kept, or being made, is what this backbone says of these sequences."""
        self.check_layers(config.distill.exit_layers)
        manifest = self.manifest()
        assert manifest is not None
        pairs = {
            "the backbone's fingerprint": (manifest["backbone"]["fingerprint"], fingerprint),
            "backbone.dtype": (manifest["dtype"], config.backbone.dtype),
            "the sha256 of the packed responses": (manifest["packing"]["sha256"], packing_sha256(sequences)),
        }
        if differ := [f"{what} was {was[:12]}, is {now[:12]}" for what, (was, now) in pairs.items() if was != now]:
            raise UserError(f"{self.folder} is of something else: {'; '.join(differ)}. {REMEDY}")

    def of(self) -> str:
        """Which cache a shard is of: a hash of all that the manifest says of it before there are shards."""
        manifest = self.manifest() or {}
        head = {key: value for key, value in manifest.items() if key not in ("complete", "shards")}
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def check_room(folder: Path, head: dict[str, Any]) -> str:
    """What the cache will take and what is free, in a line. Raises UserError if it does not fit on the disk."""
    tokens, per_token = head["packing"]["tokens"], head["bytes_per_token"]
    there = sum(path.stat().st_size for path in folder.glob("shard-*"))
    need, free = tokens * per_token - there, shutil.disk_usage(folder if folder.exists() else folder.parent).free
    line = (
        f"{tokens} tokens x {per_token} bytes ({1 + len(head['exit_layers'])} hidden states of {head['hidden_size']} "
        f"numbers, {head['dtype']}): {size(tokens * per_token)}"
    )
    if need > free:
        raise UserError(
            f"{folder}: {line}; {size(need)} are still to be written, {size(free)} are free. Take fewer "
            "distill.exit_layers or generate.num_prompts, another run.dir, or distill.teacher=online, which needs none."
        )
    return f"{line}, {size(there)} of it there; {size(free)} are free"


def size(count: float) -> str:
    """`3.2 GB`; powers of ten, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"


class CachedTeacher:
    """What the teacher says of any sequences, read when it is asked for. Memory does not grow with the cache."""

    def __init__(self, cache: TeacherCache, sequences: Packed, exit_layers: list[int]):
        manifest = cache.manifest()
        assert manifest is not None
        self.cache, self.names, self.exit_layers = cache, cache.names(), exit_layers
        self.length, self.per_shard = sequences.ids_ST.shape[1], manifest["sequences_per_shard"]
        self.width, self.dtype = manifest["hidden_size"], getattr(torch, manifest["dtype"])
        self.lengths_S = sequences.lengths_S.tolist()
        before_S = sequences.lengths_S.cumsum(0) - sequences.lengths_S
        first_S = torch.arange(len(sequences)) // self.per_shard * self.per_shard
        self.starts_S = (before_S - before_S[first_S]).tolist()
        """Row of each sequence's first token in its shard."""

    def check(self, rank: int, world_size: int) -> None:
        """Raises UserError if a shard of this process's share is not what was written: every byte of it is read."""
        if names := self.cache.damaged(self.names[rank::world_size]):
            raise UserError(
                f"{self.cache.folder}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}: not what was written "
                f"({len(names)} in all). Remove it and run `exit-heads cache` again: it makes anew what is missing."
            )

    def __call__(self, numbers: list[int], device: torch.device) -> TeacherStates:
        """Of the sequences of these numbers, the training set's first, then the validation set's."""
        shape = (len(numbers), self.length, self.width)
        names = ["final", *(f"hidden.{n}" for n in self.exit_layers)]
        # Padding is zeros: no real token looks there, but a zero weight times NaN would be NaN.
        found = {name: torch.zeros(shape, dtype=self.dtype) for name in names}
        for b, s in enumerate(numbers):
            start, length = self.starts_S[s], self.lengths_S[s]
            path = self.cache.folder / self.names[s // self.per_shard]
            # Mapped no longer than this: what was ever read through a mapping counts as this process's memory.
            with safe_open(path, framework="pt") as file:
                for name, state_BTD in found.items():
                    state_BTD[b, :length] = file.get_slice(name)[start : start + length]
        final_BTD, *hidden = (state_BTD.to(device) for state_BTD in found.values())
        return final_BTD, dict(zip(self.exit_layers, hidden, strict=True))
