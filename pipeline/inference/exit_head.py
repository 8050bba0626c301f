"""An exit head: one decoder layer of the backbone's own class, whose input is the hidden state after layer N.

Reads and writes a folder of two files: config.json (N, what kind of layer it is, and the backbone that the head was
trained for) and model.safetensors (the layer's weights under the layer's own names, and `draft_ids` if the head has a
draft vocabulary). In a mixture of experts the layer may have a dense MLP in place of its experts (dense_mlp.py).
The backbone's final norm and LM head turn the layer's output into draft logits; with a draft vocabulary, only the rows
of the LM head of its W tokens do (law.py).
"""

import contextlib
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .dense_mlp import Block, block_of, with_dense_mlp
from .fingerprint import fingerprint
from .generic_configs import skeleton

SCHEMA = 3
READABLE = (1, 2, SCHEMA)
"""Heads of schema 1 have no draft vocabulary, those of schema 2 no kind: they are layers of the backbone's class."""
DRAFT_IDS = "draft_ids"
KINDS = ("layer", "dense")


@dataclass(frozen=True)
class HeadSpec:
    """What kind of layer an exit head is."""

    kind: str = "layer"
    """layer: an unchanged decoder layer of the backbone's class. dense: with a dense MLP in place of its experts."""
    width: int = 0
    """F of the dense MLP; 0 in a layer."""

    @classmethod
    def of(cls, kind: str, width: int, config: Any) -> "HeadSpec":
        """The spec of a head of this kind for the backbone of a config. Width 0 is that of the MLP that computes one
        token there. Raises ValueError for a dense head of a backbone that has no experts, or whose family is not in
        `dense_mlp.FAMILIES`."""
        return cls() if kind == "layer" else cls(kind, width or experts_of(config).width)

    def build(self, layer: Any, config: Any) -> Any:
        """The head's module, on the device of torch's context, with weights that mean nothing yet. layer: the class of
        the backbone's last layer.

        It keeps the last layer's layer_idx, by which configs look up the layer's type. It is in evaluation mode, as
        some families drop attention at random otherwise. Raises ValueError as `of` does.
        """
        made = layer(config, layer_idx=config.num_hidden_layers - 1).eval()
        return made if self.kind == "layer" else with_dense_mlp(made, config, self.width)


def experts_of(config: Any) -> Block:
    """Where the last layer of the backbone of a config has its experts. Raises ValueError as `block_of` does."""
    with torch.device("meta"):
        return block_of(LAYER.build(type(skeleton(config).model.layers[-1]), config), config)


LAYER = HeadSpec()
"""The kind of every head that says nothing else."""


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
    spec: HeadSpec = LAYER

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
            "head": asdict(self.spec),
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
            kind = _spec_of(config.get("head", {}), folder)
            return cls(config["exit_layer"], config["num_layers"], config["backbone"], weights, ids_W, kind)
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


def _spec_of(fields: Any, folder: Path) -> HeadSpec:
    """The spec that config.json holds; without one, that of a layer. Raises ValueError for another kind."""
    try:
        spec = HeadSpec(**fields)
    except TypeError:  # no object, or one with other fields
        spec = None
    fits = spec is not None and isinstance(spec.width, int) and (spec.width > 0) == (spec.kind == "dense")
    if spec is None or spec.kind not in KINDS or not fits:
        raise ValueError(
            f"{folder}/config.json: head={fields}: the kinds {' and '.join(KINDS)} are known here; install a newer "
            "version of exit-heads"
        )
    return spec


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
    the LM head.
    """
    last = model.model.layers[-1]
    layer = LAYER.build(type(last), model.config)
    layer.load_state_dict(last.state_dict())
    return layer.float()
