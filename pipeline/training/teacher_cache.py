"""The teacher's hidden states of every packed sequence, cached on disk in shards (runs/shards.py).

`TeacherCache` writes and checks the shards, which the stage `cache` fills. `CachedTeacher` reads the hidden states of
any sequences during training; its memory is that of the sequences requested.

    cache/
      shard-00000.safetensors    tensors final and hidden.<N> [P, D], in the backbone's dtype, of its sequences' tokens
                                 laid end to end, without padding
      entries/  claims/  manifest.json    see runs/shards.py

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
"""Approximate size of a shard: the work that a kill loses, and half the memory that a process needs to write it."""
REMEDY = "Give another run.name, or make the cache again with `exit-heads cache --redo cache`."


def head_of(config: Config, backbone: dict[str, Any], hidden_size: int, sequences: Packed) -> dict[str, Any]:
    """The manifest's entries that identify a cache, known before it has shards. `backbone` is the entry of that name in
    the responses' manifest."""
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
    """SHA-256 of the teacher's input. The mask of rows is no part of it: the hidden states do not depend on it."""
    digest = hashlib.sha256()
    for tensor in (sequences.ids_ST, sequences.positions_ST, sequences.lengths_S):
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


class TeacherCache(Shards):
    """One cache folder. The constructor neither reads nor creates anything."""

    stage, suffix, schema = "cache", "safetensors", SCHEMA

    def count(self, manifest: dict[str, Any]) -> int:
        return -(-manifest["packing"]["sequences"] // manifest["sequences_per_shard"])

    def facts(self, path: Path) -> dict[str, Any]:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("of") != self.of():
                    raise ValueError(f"{path}: belongs to another cache")
                return {"tokens": file.get_slice("final").get_shape()[0]}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None

    def put(self, name: str, tensors: dict[str, Tensor], made: dict[str, Any], of: str) -> None:
        """Write a shard unless another process has written it, and register it.

        `of` is the value of `of()` when the work began. Raises UserError if the cache was restarted since.
        """
        if of != self.of():
            raise UserError(
                f"{self.folder}: another process has restarted this cache meanwhile; run the command again."
            )
        whole = save(tensors, {"of": of})  # not save_file, whose error hides that the disk is full
        self.place(name, lambda path: path.write_bytes(whole), made)

    def check_layers(self, exit_layers: list[int]) -> None:
        """Raises UserError unless the cache is made for these exit layers, complete or not."""
        manifest = self.manifest()
        if manifest and (missing := set(exit_layers) - set(manifest["exit_layers"])):
            raise UserError(
                f"distill.exit_layers={exit_layers}: {self.folder} holds the exit layers {manifest['exit_layers']}, "
                f"not {sorted(missing)}. {REMEDY}"
            )

    def check(self, config: Config, fingerprint: str, sequences: Packed) -> None:
        """Raises UserError unless the cache, complete or not, is of this backbone, dtype and packing."""
        self.check_layers(config.distill.exit_layers)
        manifest = self.manifest()
        assert manifest is not None
        pairs = {
            "the backbone's fingerprint": (manifest["backbone"]["fingerprint"], fingerprint),
            "backbone.dtype": (manifest["dtype"], config.backbone.dtype),
            "the sha256 of the packed responses": (manifest["packing"]["sha256"], packing_sha256(sequences)),
        }
        if differ := [f"{what} was {was[:12]}, is {now[:12]}" for what, (was, now) in pairs.items() if was != now]:
            raise UserError(f"{self.folder} was made from other inputs: {'; '.join(differ)}. {REMEDY}")

    def of(self) -> str:
        """The identity of the cache, written into every shard: a hash of the manifest's entries of `head_of`."""
        manifest = self.manifest() or {}
        head = {key: value for key, value in manifest.items() if key not in ("complete", "shards")}
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def check_room(folder: Path, head: dict[str, Any]) -> str:
    """One line on the size of the cache and the free disk space. Raises UserError if it does not fit on the disk."""
    tokens, per_token = head["packing"]["tokens"], head["bytes_per_token"]
    there = sum(path.stat().st_size for path in folder.glob("shard-*"))
    need, free = tokens * per_token - there, shutil.disk_usage(folder if folder.exists() else folder.parent).free
    line = (
        f"{tokens} tokens x {per_token} bytes ({1 + len(head['exit_layers'])} hidden states of {head['hidden_size']} "
        f"numbers, {head['dtype']}): {size(tokens * per_token)}"
    )
    if need > free:
        raise UserError(
            f"{folder}: {line}; {size(need)} are still to be written, {size(free)} are free. Give fewer "
            "distill.exit_layers or generate.num_prompts, another run.dir, or distill.teacher=online, which needs none."
        )
    return f"{line}, {size(there)} of it written; {size(free)} are free"


def size(count: float) -> str:
    """`3.2 GB`; powers of ten, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"


class CachedTeacher:
    """Reads the teacher's hidden states of any sequences. Memory does not grow with the size of the cache."""

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
        """Index of each sequence's first token in its shard."""

    def check(self, rank: int, world_size: int) -> None:
        """Raises UserError for damaged shards among this process's share, every byte of which is read."""
        if names := self.cache.damaged(self.names[rank::world_size]):
            raise UserError(
                f"{self.cache.folder}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}: damaged ({len(names)} "
                "shards in all). Remove them and run `exit-heads cache` again: it makes missing shards again."
            )

    def __call__(self, numbers: list[int], device: torch.device) -> TeacherStates:
        """The states of the sequences `numbers`, counted over the training set and then the validation set; zeros at
        padding. final_BTD and the hidden states have the backbone's dtype."""
        shape = (len(numbers), self.length, self.width)
        names = ["final", *(f"hidden.{n}" for n in self.exit_layers)]
        # Padding is set to 0, not left uninitialised: no real token attends to it, but 0 times NaN would be NaN.
        found = {name: torch.zeros(shape, dtype=self.dtype) for name in names}
        for b, s in enumerate(numbers):
            start, length = self.starts_S[s], self.lengths_S[s]
            path = self.cache.folder / self.names[s // self.per_shard]
            # The file is mapped only here: pages read through a mapping count as this process's memory until it ends.
            with safe_open(path, framework="pt") as file:
                for name, state_BTD in found.items():
                    state_BTD[b, :length] = file.get_slice(name)[start : start + length]
        final_BTD, *hidden = (state_BTD.to(device) for state_BTD in found.values())
        return final_BTD, dict(zip(self.exit_layers, hidden, strict=True))
