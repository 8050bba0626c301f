"""A checkpoint's safetensors files: which file holds which tensor, and the fingerprint of the weights in them.

Takes the `backbone` section of the config; gives files, tensors and the fingerprint without loading the model.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from ..config import Backbone
from ..errors import UserError
from ..inference.fingerprint import fingerprint_of
from ..inference.text_part import stored_names
from .damaged import what_is_wrong
from .experts import JoinedExperts, stored_experts, stored_name
from .source import explained, load_config, source_of, with_remedy

DTYPES = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes of unquantised weights."""
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096
"""Vocabulary rows that are compared at once, to bound memory."""


def file_of(backbone: Backbone, name: str) -> Path | None:
    """Path of a file of the checkpoint, from its folder or the Hub; None if the checkpoint has no file of that name.

    Raises UserError if the checkpoint cannot be reached."""
    with explained(backbone):
        where = {"revision": backbone.revision, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(source_of(backbone), name, **where)
    return Path(found) if found else None


class WeightFiles:
    """The safetensors files of a checkpoint that from_pretrained would read, and the tensors in each.

    Files of a Hub id are fetched on first use; locks in the Hub's cache let one process of a node do it.
    Raises UserError for a checkpoint without safetensors files, a missing file, a tensor that the index does not know.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.files: dict[str, str] = {}
        """Tensor -> file, from the index; empty if one file holds all tensors, as such a checkpoint has no index."""
        self.paths: dict[str, str] = {}
        """File -> path, for the files used so far."""
        self.single = self._find("model.safetensors")
        if self.single is None:
            index = self._find("model.safetensors.index.json")
            if index is None:
                raise self._error(
                    "it has no safetensors files, and others are not read; transformers converts it once: "
                    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
                )
            with explained(backbone):
                self.files = dict(json.loads(Path(index).read_text())["weight_map"])

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self.names)

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor -> the file that should hold it, for all tensors in the files' order."""
        if self.single is None:
            return self.files
        with explained(self.backbone), safe_open(self.single, framework="pt") as file:
            return dict.fromkeys(file.keys(), Path(self.single).name)

    def tensor_of(self, parameter: str, config: Any) -> str:
        """The name of the tensor that fills a parameter.

        As in from_pretrained, an LM head that is in the files is used whatever `config.tie_word_embeddings` says. A
        tied tensor that is stored once may have either of its two names.
        """
        other = {LM_HEAD: EMBEDDING, EMBEDDING: LM_HEAD}.get(parameter)
        own, others = self._stored_name(parameter), self._stored_name(other) if other else None
        tied = others is not None and config.tie_word_embeddings and own not in self.names and others in self.names
        return others if tied and others is not None else own

    def _stored_name(self, parameter: str) -> str:
        """The tensor of a parameter, or the parameter's own name if the files have none for it."""
        candidates = [parameter, stored_name(parameter, self.names), *stored_names(parameter)]
        return next((name for name in candidates if name in self.names), parameter)

    def ties_embeddings(self, config: Any) -> bool:
        """Whether LM head and embedding are one tensor, by config and files together; where the config says so and the
        files hold two, they are read and compared, as from_pretrained does."""
        if not config.tie_word_embeddings or not {LM_HEAD, EMBEDDING} <= self.names.keys():
            return config.tie_word_embeddings
        head, embedding = self.rows(LM_HEAD), self.rows(EMBEDDING)
        return head.shape == embedding.shape and all(
            torch.equal(head[at : at + ROWS], embedding[at : at + ROWS]) for at in range(0, head.shape[0], ROWS)
        )

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError unless every one of these tensors is in its file, unquantised and of the shape given. Only
        headers are read; files of a Hub id are fetched."""
        shapes = self._stored(shapes)
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in shapes:
            by_file[self.path(name)].append(name)
        for path, names in by_file.items():
            with explained(self.backbone), safe_open(path, framework="pt") as file:
                present = set(file.keys())
                found = {n: file.get_slice(n) for n in names if n in present}
                kinds = {n: (s.get_dtype(), list(s.get_shape())) for n, s in found.items()}
            where = Path(path).name
            for name in names:
                if name not in kinds:
                    raise self._error(f"{where}: no tensor {name} in it: {self._instead(name, present)}")
                dtype, shape = kinds[name]
                if dtype not in DTYPES:
                    raise self._error(
                        f"{where}: {name} is {dtype}: give a checkpoint that is not quantised, in one of "
                        f"{', '.join(DTYPES)}"
                    )
                if shape != list(shapes[name]):
                    raise self._error(
                        f"{where}: {name} is {shape}, by config.json it should be {list(shapes[name])}: give the "
                        "config and the weights of one model"
                    )

    def _stored(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """The same with the tensors of each expert in place of those that join experts."""
        found: dict[str, Sequence[int]] = {}
        for name, shape in shapes.items():
            experts = stored_experts(name, self.names)
            if experts and len(experts) != shape[0]:
                raise self._error(f"it has {len(experts)} experts for {name}, by config.json it should be {shape[0]}")
            for parts in experts:
                found |= {part: [shape[1] // len(parts), shape[2]] for part in parts}
            if not experts:
                found[name] = shape
        return found

    def path(self, tensor: str) -> str:
        """Path of the file that should hold `tensor`."""
        if self.single is not None:
            return self.single
        if tensor not in self.files:
            raise self._error(f"the index of its files has no tensor {tensor}: {self._instead(tensor, self.files)}")
        file = self.files[tensor]
        if file not in self.paths:
            found = self._find(file)
            if found is None:
                raise self._error(f"{file} is missing, where its index has {tensor}: fetch it again")
            self.paths[file] = found
        return self.paths[file]

    def rows(self, tensor: str) -> "Rows | JoinedExperts":
        """A lazy view of a tensor: its shape and dtype, and rows read on demand from the file, which stays mapped."""
        if experts := stored_experts(tensor, self.names):
            return JoinedExperts(experts, self._opened_once())
        path = self.path(tensor)
        with explained(self.backbone), safe_open(path, framework="pt") as file:
            present = set(file.keys())
            if tensor in present:
                return Rows(file.get_slice(tensor))
        raise self._error(f"{Path(path).name}: no tensor {tensor} in it: {self._instead(tensor, present)}")

    def _opened_once(self) -> Callable[[str], "Rows"]:
        """A function that gives a tensor's rows and keeps the files that it opened: the hundreds of tensors of a
        layer's experts lie in few files, and to open one reads the header of all."""
        opened: dict[str, Any] = {}

        def rows(tensor: str) -> Rows:
            path = self.path(tensor)
            with explained(self.backbone):
                if path not in opened:
                    opened[path] = safe_open(path, framework="pt")
                return Rows(opened[path].get_slice(tensor))

        return rows

    def _find(self, file: str) -> str | None:
        """Path of a file; None if the checkpoint has no such file. Raises UserError for a damaged file."""
        path = file_of(self.backbone, file)
        if path is None:
            return None
        if wrong := what_is_wrong(path):
            raise self._error(with_remedy(self.backbone, wrong))
        return str(path)

    def _instead(self, tensor: str, names: Any) -> str:
        """The remedy for a missing tensor; names beside it that share its beginning show that it is quantised."""
        part = tensor.rpartition(".")[0] + "."
        others = sorted(name for name in names if name.startswith(part) and not name.endswith(".bias"))
        held = f"it has {others[0]} instead, as quantised checkpoints have; " if others else ""
        return f"{held}give a complete, unquantised checkpoint"

    def _error(self, text: str) -> UserError:
        return UserError(f"backbone.name_or_path={self.backbone.name_or_path}: {text}")


def check_weights(backbone: Backbone) -> WeightFiles:
    """The checkpoint's files, after a check of their headers. Raises UserError for missing, damaged or quantised ones.

    from_pretrained would only warn and initialise missing tensors at random.
    """
    config, files = load_config(backbone), WeightFiles(backbone)
    with explained(backbone), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files.check({files.tensor_of(name, config): weight.shape for name, weight in model.named_parameters()})
    files.check({files.tensor_of(LM_HEAD, config): model.get_output_embeddings().weight.shape})
    return files


def fingerprint_of_files(backbone: Backbone, files: WeightFiles | None = None) -> str:
    """The backbone's fingerprint from a few rows of its safetensors files, without loading it."""
    config, files = load_config(backbone), files or WeightFiles(backbone)
    found = files
    return fingerprint_of(config, lambda name: found.rows(found.tensor_of(name, config)))


class Rows:
    """A tensor that stays in its file: shape, dtype, and rows on demand."""

    def __init__(self, inside: Any):
        self.inside, self.shape = inside, tuple(inside.get_shape())
        self.dtype = inside[0:0].dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.inside[rows]
