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

from .. import pocket
from ..config import Backbone
from ..errors import UserError
from ..inference.exit_head import check_exit_layer, check_family, fingerprint_of

BUILT_IN = {"pocket": pocket.BACKBONE}


def device_of(name: str) -> torch.device:
    """`auto` is a GPU when there is one. Raises UserError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"machine.device={name}: no CUDA device is visible here; use machine.device=cpu")
    return torch.device(name)


def rounds_by(device: torch.device) -> dict[str, Any]:
    """What decides how sums are rounded here, and so the last bits of a result, or a near tie between tokens."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


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


def load_config(backbone: Backbone, local: bool = False) -> Any:
    """The checkpoint's config, with `local` only if it is on this machine; refuses families that the engine does not
    know."""
    with _explained(backbone):
        config = AutoConfig.from_pretrained(
            source_of(backbone),
            revision=backbone.revision,
            trust_remote_code=backbone.trust_remote_code,
            local_files_only=local,
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
    """A file of the checkpoint, from its folder or the Hub; None if it has none of that name.

    Raises UserError if the checkpoint cannot be reached."""
    with _explained(backbone):
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
            with _explained(backbone):
                self.files = json.loads(Path(index).read_text())["weight_map"]

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        if self.single is None:
            return iter(self.files)
        with _explained(self.backbone), safe_open(self.single, framework="pt") as file:
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
        with _explained(self.backbone), safe_open(path, framework="pt") as file:
            return Rows(file.get_slice(tensor))

    def _find(self, file: str) -> str | None:
        path = file_of(self.backbone, file)
        return str(path) if path else None

    def _error(self, text: str) -> UserError:
        return UserError(f"backbone.name_or_path={self.backbone.name_or_path}: {text}")


def fingerprint_of_files(backbone: Backbone, files: WeightFiles | None = None) -> str:
    """The backbone's fingerprint from a few rows of its safetensors files, without loading it."""
    config, files = load_config(backbone), files or WeightFiles(backbone)
    with _explained(backbone):
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


def check_exit_layers(exit_layers: list[int], num_layers: int) -> None:
    """Raises UserError unless every N is from 1 to L - 1."""
    for n in exit_layers:
        try:
            check_exit_layer(n, num_layers)
        except ValueError as error:
            raise UserError(f"distill.exit_layers={exit_layers}: {error}") from None
