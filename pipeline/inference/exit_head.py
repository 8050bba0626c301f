"""An exit head: one decoder layer of the backbone's own class, fed the hidden state after layer N.

Takes and gives a folder of two files, config.json (N, and which backbone it belongs to) and
model.safetensors (the layer's weights under the layer's own names). The backbone's final norm and LM head
turn the layer's output into draft logits. Knows nothing of decoding or training.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SCHEMA = 1
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class ExitHead:
    """Weights and identity of one head."""

    exit_layer: int
    """N: the head reads the hidden state after the backbone's first N decoder layers."""
    num_layers: int
    """L: decoder layers of the backbone."""
    backbone: dict[str, Any]
    """name, revision, fingerprint and model_type of the backbone it was trained for."""
    weights: dict[str, Tensor]
    """Name in the decoder layer (`self_attn.q_proj.weight`, ...) -> tensor."""

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors into an existing or new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: w.detach().to("cpu").contiguous() for name, w in sorted(self.weights.items())}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "model_type": "exit_head",
            "schema": SCHEMA,
            "exit_layer": self.exit_layer,
            "num_layers": self.num_layers,
            "backbone": self.backbone,
            "sha256": _sha256(folder / "model.safetensors"),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ExitHead":
        """Raises ValueError if the folder holds no exit head of a schema this code knows, or not the weights saved."""
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            found = _sha256(Path(folder) / "model.safetensors")
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: no exit head here: {error}") from None
        if config.get("model_type") != "exit_head" or config.get("schema") != SCHEMA:
            raise ValueError(
                f"{folder}: model_type={config.get('model_type')}, schema={config.get('schema')}: "
                f"not an exit head of schema {SCHEMA}"
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
        return cls(config["exit_layer"], config["num_layers"], config["backbone"], weights)

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


def check_family(model_type: str) -> None:
    """Raises ValueError for architectures whose layers this code does not know."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type}: not supported; these are: {', '.join(FAMILIES)}")


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Raises ValueError unless 1 <= N < L."""
    if not 1 <= exit_layer < num_layers:
        raise ValueError(
            f"exit layer N={exit_layer}: must be from 1 to {num_layers - 1}, the backbone has L={num_layers} layers"
        )


def new_exit_layer(model: nn.Module) -> nn.Module:
    """An unmodified decoder layer of the backbone's class, a copy of its last layer in float32.

    Starting from the last layer is the largest single gain of all choices in training: it already speaks to
    the final norm and the LM head. Its layer_idx is that layer's, as Qwen configs look their layer type up by it.
    """
    last = model.model.layers[-1]
    layer = type(last)(model.config, layer_idx=model.config.num_hidden_layers - 1)
    layer.load_state_dict(last.state_dict())
    return layer.float()


def fingerprint(model: nn.Module) -> str:
    """`fingerprint_of` a model in memory."""
    return fingerprint_of(model.config, model.get_parameter)


def fingerprint_of(config: Any, weight: Callable[[str], Any]) -> str:
    """sha256 of the architecture, the vocabulary size and a fixed sample of the weights, cast to bfloat16.

    The cast makes a checkpoint and its float32 copy the same backbone; fine-tuning makes it another one. `weight` gives
    a tensor by its name, or what has `shape` and rows of one: a slice of a file that was not read.
    """
    fields = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    digest = hashlib.sha256(json.dumps([getattr(config, f, None) for f in fields]).encode())
    samples = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1):
        samples += [f"model.layers.{i}.self_attn.q_proj.weight", f"model.layers.{i}.mlp.down_proj.weight"]
    for name in samples:
        tensor = weight(name)
        count = tensor.shape[0]
        if len(tensor.shape) == 1:
            rows = tensor[0:count]
        else:
            rows = torch.cat([tensor[i : i + 1] for i in range(0, count, max(1, count // 8))[:8]])
        digest.update(rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
