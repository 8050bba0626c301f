"""Load the backbone and its tokenizer that a config names, as one module that every stage can use.

Takes the `backbone` and `machine` sections, gives transformers objects; anything wrong with the name is a
UserError. Knows nothing of what the stages do with them.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from . import pocket
from .config import Backbone
from .errors import UserError
from .inference.exit_head import check_exit_layer, check_family, fingerprint_of

BUILT_IN = {"pocket": pocket.BACKBONE}


def device_of(name: str) -> torch.device:
    """`auto` is a GPU when there is one. Raises UserError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"machine.device={name}: no CUDA device is visible here; use machine.device=cpu")
    return torch.device(name)


def source_of(backbone: Backbone) -> str:
    """What from_pretrained takes: a folder or a Hub id."""
    return str(BUILT_IN.get(backbone.name_or_path, backbone.name_or_path))


def public_name(backbone: Backbone) -> str:
    """The name that may be published: of a local folder only its last part."""
    path = Path(backbone.name_or_path)
    return path.resolve().name if path.is_dir() else backbone.name_or_path


@contextlib.contextmanager
def _explained(backbone: Backbone):
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"backbone.name_or_path={backbone.name_or_path}: cannot be loaded: {first}") from None


def load_config(backbone: Backbone) -> Any:
    """The checkpoint's config; refuses families that the engine does not know."""
    with _explained(backbone):
        config = AutoConfig.from_pretrained(
            source_of(backbone), revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
        )
        check_family(config.model_type)
    return config


def load_tokenizer(backbone: Backbone) -> Any:
    with _explained(backbone):
        return AutoTokenizer.from_pretrained(
            source_of(backbone), revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
        )


def load_model(backbone: Backbone, device: torch.device, device_map: str | None = None) -> Any:
    """The frozen backbone in `backbone.dtype`, in eval mode, on one device or laid over all by accelerate's map."""
    load_config(backbone)
    transformers_logging.disable_progress_bar()
    with _explained(backbone):
        model = AutoModelForCausalLM.from_pretrained(
            source_of(backbone),
            revision=backbone.revision,
            trust_remote_code=backbone.trust_remote_code,
            dtype=getattr(torch, backbone.dtype),
            device_map=device_map,
        )
    model = model.requires_grad_(False).eval()
    return model if device_map else model.to(device)


def load_ends(backbone: Backbone) -> list[int]:
    """`ends_of` a checkpoint that is not loaded."""
    config = load_config(backbone)
    try:
        generation = GenerationConfig.from_pretrained(source_of(backbone), revision=backbone.revision)
    except OSError:  # most checkpoints have one
        generation = None
    return ends_of(generation, config)


def ends_of(*sources: Any) -> list[int]:
    """The ids that end an answer: eos_token_id of the first that has one (a model's generation config, then its config
    or tokenizer). None of them having one means that every answer has full length."""
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def file_of(backbone: Backbone, name: str) -> Path | None:
    """A file of the checkpoint, from its folder or the Hub; None if it has none of that name."""
    where = {"revision": backbone.revision, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(source_of(backbone), name, **where)
    return Path(found) if found else None


class WeightFiles:
    """The tensors of a checkpoint in its safetensors files, by name; none is read before it is asked for."""

    def __init__(self, backbone: Backbone):
        self._backbone = backbone
        self._opened: dict[str, Any] = {}
        index = file_of(backbone, "model.safetensors.index.json")
        self._files = json.loads(index.read_text())["weight_map"] if index else {}
        if not index:
            self._files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def rows(self, name: str) -> "_Rows":
        """What `fingerprint_of` takes: the tensor's shape, and its rows when they are asked for."""
        return _Rows(self._open(self._files[name]).get_slice(name))

    def read(self, name: str) -> torch.Tensor:
        return self._open(self._files[name]).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.rows(name)[0:0].dtype

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = cached_file(source_of(self._backbone), file, revision=self._backbone.revision)
            self._opened[file] = safe_open(path, framework="pt")
        return self._opened[file]


def open_weights(backbone: Backbone) -> WeightFiles:
    """Raises UserError for a checkpoint without safetensors files."""
    with _explained(backbone):
        return WeightFiles(backbone)


def fingerprint_of_files(backbone: Backbone) -> str:
    """The backbone's fingerprint from a few rows of its safetensors files, without loading it."""
    config, files = load_config(backbone), open_weights(backbone)

    def weight(name: str) -> _Rows:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        return files.rows("model.embed_tokens.weight" if tied else name)

    with _explained(backbone):
        return fingerprint_of(config, weight)


class _Rows:
    """Rows of a tensor that stays in its file."""

    def __init__(self, inside: Any):
        self.inside, self.shape = inside, tuple(inside.get_shape())

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.inside[rows]


def check_exit_layers(exit_layers: list[int], num_layers: int) -> None:
    """Raises UserError unless every N is from 1 to L - 1."""
    for n in exit_layers:
        try:
            check_exit_layer(n, num_layers)
        except ValueError as error:
            raise UserError(f"distill.exit_layers={exit_layers}: {error}") from None
