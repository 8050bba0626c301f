"""A checkpoint's safetensors files: which file holds which tensor, and the fingerprint of the weights in them.

Takes the `backbone` section of the config, gives files, tensors and the fingerprint without loading the model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from ..config import Backbone
from ..errors import UserError
from ..inference.fingerprint import fingerprint_of
from .load import explained, load_config, source_of


def file_of(backbone: Backbone, name: str) -> Path | None:
    """A file of the checkpoint, from its folder or the Hub; None if it has none of that name.

    Raises UserError if the checkpoint cannot be reached."""
    with explained(backbone):
        where = {"revision": backbone.revision, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(source_of(backbone), name, **where)
    return Path(found) if found else None


class WeightFiles:
    """Which safetensors file of a checkpoint holds which tensor: those that from_pretrained would read, and no others.

    Files of a Hub id are fetched when first asked for; the locks of its cache let one process of a node do it.
    Raises UserError for a checkpoint without safetensors files, a missing file, a tensor that the index does not know.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.files: dict[str, str] = {}
        """Tensor -> file, by the index; empty where all are in one file, which has none."""
        self.paths: dict[str, str] = {}
        """File -> path, of those asked for."""
        self.single = self._find("model.safetensors")
        if self.single is None:
            index = self._find("model.safetensors.index.json")
            if index is None:
                raise self._error(
                    "it has no safetensors files, and others are not read; transformers converts it once: "
                    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
                )
            with explained(backbone):
                self.files = json.loads(Path(index).read_text())["weight_map"]

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        if self.single is None:
            return iter(self.files)
        with explained(self.backbone), safe_open(self.single, framework="pt") as file:
            return iter(file.keys())

    def path(self, tensor: str) -> str:
        """Of the file that should hold `tensor`."""
        if self.single is not None:
            return self.single
        if tensor not in self.files:
            raise self._error(f"the index of its files has no tensor {tensor}: give a complete, unquantised checkpoint")
        file = self.files[tensor]
        if file not in self.paths:
            found = self._find(file)
            if found is None:
                raise self._error(f"{file} is missing, where its index has {tensor}: fetch it again")
            self.paths[file] = found
        return self.paths[file]

    def rows(self, tensor: str) -> "Rows":
        """Its shape and dtype, and rows of it when they are asked for. The file stays mapped as long as this lives."""
        path = self.path(tensor)
        with explained(self.backbone), safe_open(path, framework="pt") as file:
            return Rows(file.get_slice(tensor))

    def _find(self, file: str) -> str | None:
        path = file_of(self.backbone, file)
        return str(path) if path else None

    def _error(self, text: str) -> UserError:
        return UserError(f"backbone.name_or_path={self.backbone.name_or_path}: {text}")


def fingerprint_of_files(backbone: Backbone, files: WeightFiles | None = None) -> str:
    """The backbone's fingerprint from a few rows of its safetensors files, without loading it."""
    config, files = load_config(backbone), files or WeightFiles(backbone)
    with explained(backbone):
        return fingerprint_of(config, lambda name: files.rows(tensor_name(name, config)))


def tensor_name(parameter: str, config: Any) -> str:
    """A parameter's name in the checkpoint: tied embeddings are there once."""
    tied = parameter == "lm_head.weight" and config.tie_word_embeddings
    return "model.embed_tokens.weight" if tied else parameter


class Rows:
    """Rows of a tensor that stays in its file."""

    def __init__(self, inside: Any):
        self.inside, self.shape = inside, tuple(inside.get_shape())
        self.dtype = inside[0:0].dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.inside[rows]
