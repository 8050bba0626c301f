"""Whether a head belongs to the served model: its fingerprint, from a few rows of the model's safetensors files.

Takes a folder or Hub id and a transformers config; gives 64 hex digits, those that `exit-heads` recorded in the head's
config.json. Files and not the loaded weights are read, as vLLM packs, shards and casts these.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from .support import Refused

FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAMPLED = 8
"""Rows of each matrix that are hashed, evenly spread."""


def fingerprint(model: str, config: Any, revision: str | None = None, cache: str | None = None) -> str:
    """sha256 of the architecture and of a sample of the weights in bfloat16. Raises Refused without safetensors
    files."""
    files = TensorFiles(model, revision, cache)
    digest = hashlib.sha256(json.dumps([getattr(config, field, None) for field in FIELDS]).encode())
    for name in _samples(config.num_hidden_layers):
        rows = files.sample(name, tied=bool(getattr(config, "tie_word_embeddings", False)))
        digest.update(rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _samples(num_layers: int) -> Iterator[str]:
    yield from (EMBEDDING, "model.norm.weight", LM_HEAD)
    for i in (0, num_layers // 2, num_layers - 1):
        yield from (f"model.layers.{i}.self_attn.q_proj.weight", f"model.layers.{i}.mlp.down_proj.weight")


def check_fits(head: Any, model: str, config: Any, revision: str | None = None, cache: str | None = None) -> None:
    """Raises Refused unless the served model is the backbone that the head was trained for. head: its config."""
    found, wanted = fingerprint(model, config, revision, cache), head.backbone["fingerprint"]
    if found != wanted:
        raise Refused(
            f"this exit head belongs to {head.backbone['name']} (fingerprint {wanted[:12]}), the served model {model} "
            f"has fingerprint {found[:12]}: serve the model that it was trained for, or a head that was trained for it"
        )


def check_weights(head: Any, model: str, revision: str | None = None, cache: str | None = None) -> None:
    """Raises Refused if the head's weights are not those that its config.json names. head: its config."""
    path = file_of(model, "model.safetensors", revision, cache)
    if path is None:
        raise Refused(f"{model}: no model.safetensors in it: fetch the head again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != getattr(head, "sha256", found):
        raise Refused(
            f"{path}: its sha256 is {found[:12]}, config.json says {head.sha256[:12]}: changed or cut short since it "
            "was published; fetch the head again"
        )


def file_of(model: str, name: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Path of a file of a folder or Hub id; None if it has none of that name."""
    where = {"revision": revision, "cache_dir": cache, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(model, name, **where)
    return Path(found) if found else None


class TensorFiles:
    """The safetensors files of a checkpoint, of which rows are read."""

    def __init__(self, model: str, revision: str | None, cache: str | None):
        self.where = model, revision, cache
        self.files: dict[str, str] = {}
        if file_of(model, "model.safetensors", revision, cache) is None:
            index = file_of(model, "model.safetensors.index.json", revision, cache)
            if index is None:
                raise Refused(
                    f"{model}: no safetensors files, by which a head could recognise it: serve such a checkpoint"
                )
            self.files = json.loads(index.read_text())["weight_map"]

    def sample(self, name: str, tied: bool) -> torch.Tensor:
        """Rows of a matrix, or a whole vector. tied: the LM head may stand under the embedding's name, or it under
        that."""
        other = {LM_HEAD: EMBEDDING, EMBEDDING: LM_HEAD}.get(name) if tied else None
        for stored in filter(None, (name, other)):
            model, revision, cache = self.where
            path = file_of(model, self.files.get(stored, "model.safetensors"), revision, cache)
            if path is None:
                continue
            with safe_open(path, framework="pt") as file:
                if stored not in file.keys():  # noqa: SIM118
                    continue
                rows = file.get_slice(stored)
                count = rows.get_shape()[0]
                if len(rows.get_shape()) == 1:
                    return rows[0:count]
                return torch.cat([rows[i : i + 1] for i in range(0, count, max(1, count // SAMPLED))[:SAMPLED]])
        raise Refused(
            f"{self.where[0]}: no tensor {name} in its safetensors files: not a model that a head was trained for"
        )
