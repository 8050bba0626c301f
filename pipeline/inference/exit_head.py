"""An exit head: one decoder layer of the backbone's own class, whose input is the hidden state after layer N.

Reads and writes a folder of two files: config.json (N, and the backbone that the head was trained for) and
model.safetensors (the layer's weights under the layer's own names, and `draft_ids` if the head has a draft vocabulary).
The backbone's final norm and LM head turn the layer's output into draft logits; with a draft vocabulary, only the rows
of the LM head of its W tokens do (law.py).
"""

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .fingerprint import fingerprint

SCHEMA = 2
READABLE = (1, SCHEMA)
"""Heads of schema 1 have no draft vocabulary."""
DRAFT_IDS = "draft_ids"


@dataclass
class ExitHead:
    """One exit head: its weights, and the backbone and layer that it belongs to."""

    exit_layer: int
    """N: the head reads the hidden state after the backbone's first N decoder layers."""
    num_layers: int
    """L: the number of the backbone's decoder layers."""
    backbone: dict[str, Any]
    """name, revision, fingerprint and model_type of the backbone that the head was trained for; gguf if it was one."""
    weights: dict[str, Tensor]
    """Name in the decoder layer (`self_attn.q_proj.weight`, ...) -> tensor."""
    draft_ids_W: Tensor | None = None
    """Ids of the tokens that the head can draft, ascending, int64; None: every token."""

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into an existing or new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: w.detach().to("cpu").contiguous() for name, w in sorted(self.weights.items())}
        if self.draft_ids_W is not None:
            tensors[DRAFT_IDS] = self.draft_ids_W.to("cpu", torch.int32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "model_type": "exit_head",
            "schema": SCHEMA,
            "exit_layer": self.exit_layer,
            "num_layers": self.num_layers,
            "backbone": self.backbone,
            "draft_vocabulary": 0 if self.draft_ids_W is None else len(self.draft_ids_W),
            "sha256": _sha256(folder / "model.safetensors"),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with contextlib.suppress(OSError):  # safetensors writes files that only their owner can read
            shutil.copymode(folder / "config.json", folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "ExitHead":
        """Read a head from a folder. Raises ValueError if it holds no exit head of a known schema, or if the weights
        are not those that were saved."""
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            found = _sha256(Path(folder) / "model.safetensors")
        except (OSError, ValueError) as error:  # ValueError: not JSON, or not even text
            raise ValueError(f"{folder}: no exit head here: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{folder}: no exit head here: config.json holds no object")
        if config.get("model_type") != "exit_head" or config.get("schema") not in READABLE:
            raise ValueError(
                f"{folder}: model_type={config.get('model_type')}, schema={config.get('schema')}: "
                f"not an exit head of schema {' or '.join(map(str, READABLE))}"
            )
        if found != config.get("sha256", found):
            raise ValueError(
                f"{folder}/model.safetensors: its sha256 is {found[:12]}, config.json says {config['sha256'][:12]}: "
                "changed or cut short since it was saved; get it anew"
            )
        try:
            with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder}: model.safetensors cannot be read: {error}") from None
        ids_W = weights.pop(DRAFT_IDS, None)
        if (0 if ids_W is None else ids_W.numel()) != config.get("draft_vocabulary", 0):
            raise ValueError(
                f"{folder}: config.json says draft_vocabulary={config.get('draft_vocabulary', 0)}, model.safetensors "
                f"holds {0 if ids_W is None else ids_W.numel()} ids: get the head anew"
            )
        ids_W = None if ids_W is None else ids_W.long()
        try:
            return cls(config["exit_layer"], config["num_layers"], config["backbone"], weights, ids_W)
        except KeyError as error:
            raise ValueError(f"{folder}/config.json: {error} is missing: get the head anew") from None

    def check_fits(self, model: nn.Module) -> None:
        """Raises ValueError unless `model` is the backbone this head was trained for."""
        found = fingerprint(model)
        if found != self.backbone["fingerprint"]:
            raise ValueError(
                f"this exit head belongs to {self.backbone['name']} (fingerprint {self.backbone['fingerprint'][:12]}), "
                f"the backbone given has fingerprint {found[:12]}: load the backbone it was trained for"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Raises ValueError unless 1 <= N < L."""
    if not 1 <= exit_layer < num_layers:
        raise ValueError(
            f"exit layer N={exit_layer}: must be from 1 to {num_layers - 1}, the backbone has L={num_layers} layers"
        )


def persistent_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of a decoder layer that is stored with it. They are not trained, so an exit head has those of the
    last layer, and does not store them."""
    state = layer.state_dict()
    return {name: state[name] for name, _ in layer.named_buffers() if name in state}


def new_exit_layer(model: nn.Module) -> nn.Module:
    """A copy of the backbone's last decoder layer in float32, from which training of a head starts.

    Of all choices in training, starting from the last layer gains the most: its output already fits the final norm and
    the LM head. It keeps the last layer's layer_idx, by which Qwen configs look up the layer's type.
    """
    last = model.model.layers[-1]
    layer = type(last)(model.config, layer_idx=model.config.num_hidden_layers - 1)
    layer.load_state_dict(last.state_dict())
    return layer.float()
