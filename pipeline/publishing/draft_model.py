"""Exports an exit head as a separate draft model: layers 1..N, exit layer, final norm and LM head as a plain causal LM.

Takes an exit head and its backbone, as files or in memory; gives a checkpoint folder that engines load as a draft
model, or a transformers model that shares the backbone's weights. An engine needs no support for exit heads, but holds
a second copy of the embedding and of N layers, with their own keys and values.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ..backbones.source import load_config, whole_config
from ..backbones.weight_files import WeightFiles, file_of
from ..config import Backbone
from ..errors import UserError
from ..evaluation.rivals import assisted
from ..inference.exit_head import ExitHead, persistent_buffers
from ..inference.generic_configs import is_mixture
from ..inference.text_part import has_text_part
from .head_folder import ends_of_texts, write_json

SHARD = 4 * 2**30
"""Maximum size of a safetensors file in bytes, and so of the weights in memory at once."""

TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "vocab.txt", "tokenizer.model", "chat_template.jinja")  # fmt: skip
FOLDERS_OF_SAVER = ("name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys of tokenizer_config.json in which older versions of transformers wrote local paths."""


# ---- in memory


def in_memory(model: nn.Module, head: ExitHead) -> nn.Module:
    """The draft model on the device of the LM head. Weights that are there already are shared with `model`.

    Raises ValueError for a mixture of experts, of whose config it is not known how to make it shorter, and for a head
    that is not a layer of it.
    """
    last = model.model.layers[-1]
    _check_kind(head, model.config)
    if is_mixture(last.parameters()):
        raise ValueError(f"model_type={model.config.model_type}: a mixture of experts makes no draft model")
    n, lm_head = head.exit_layer, model.lm_head.weight
    config = copy.deepcopy(model.config)
    config.update(_cut(config, n))
    with torch.device("meta"):
        draft = type(model)(config)
    state = model.state_dict()
    weights = {name: w for name, w in state.items() if _is_kept(name, n)}
    weights |= {f"model.layers.{n}.{name}": w.to(lm_head.dtype) for name, w in head.weights.items()}
    weights |= {f"model.layers.{n}.{name}": buffer for name, buffer in persistent_buffers(last).items()}
    draft.load_state_dict(weights, assign=True)
    for name, buffer in model.named_buffers():  # some are not in the state dict: the scale of Gemma's embedding
        if name not in state and _is_kept(name, n):
            module, _, own = name.rpartition(".")
            draft.get_submodule(module)._buffers[own] = buffer
    draft.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # nor are its tables
    return draft.to(lm_head.device).requires_grad_(False).eval()


# ---- as a folder


def export(folder: Path, backbone: Backbone, head: ExitHead, num_drafts: int) -> None:
    """Write the checkpoint into a new folder, in the dtype of the backbone's files; only needed parts of them are read.

    num_drafts: the number of drafts a round that transformers will use by default. Raises UserError for a backbone that
    cannot be read, and for a mixture of experts, whose files no other engine would read as cut here, or whose head is
    not one of its layers, and for a model that reads images too.
    """
    config = load_config(backbone)
    try:
        _check_kind(head, config)
    except ValueError as error:
        raise UserError(f"{error}; publish it as a head (without --as draft)") from None
    if is_mixture(head.weights.values()):
        raise UserError(
            f"model_type={config.model_type}: a head of a mixture of experts is not exported as a draft model; publish "
            "it as a head (without --as draft)"
        )
    if has_text_part(whole_config(backbone)):
        raise UserError(
            f"backbone.name_or_path={backbone.name_or_path}: it reads images too, and no files of its text part "
            "alone are written; publish the head itself (without --as draft)"
        )
    folder.mkdir(parents=True)
    files = WeightFiles(backbone)
    _write_weights(folder, files, head)
    dtype = str(files.rows("model.embed_tokens.weight").dtype).removeprefix("torch.")
    fields = _json_of(backbone, "config.json") | _cut(config, head.exit_layer) | _rope(config.rope_parameters)
    fields |= {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": files.ties_embeddings(config)}
    fields.pop("_name_or_path", None)  # may be a local path of whoever saved the checkpoint
    write_json(folder / "config.json", fields)
    settings = _json_of(backbone, "generation_config.json") or GenerationConfig.from_model_config(config).to_diff_dict()
    settings |= ends_of_texts(backbone)
    write_json(folder / "generation_config.json", settings | assisted(num_drafts))
    if tokenizer := _json_of(backbone, "tokenizer_config.json"):
        told = {key: value for key, value in tokenizer.items() if key not in FOLDERS_OF_SAVER}
        write_json(folder / "tokenizer_config.json", told)
    for name in TOKENIZER_FILES:  # copied unchanged, as other engines may need older formats than transformers writes
        if path := file_of(backbone, name):
            shutil.copyfile(path, folder / name)


def _check_kind(head: ExitHead, config: Any) -> None:
    """Raises ValueError for a head that no config of the backbone's family describes."""
    if head.spec.kind != "layer":
        raise ValueError(
            f"distill.head={head.spec.kind}: such a head is not a layer of a {config.model_type}, so with it the lower "
            "layers make no checkpoint of that family, and no draft model"
        )


def _cut(config: Any, n: int) -> dict[str, Any]:
    """Config fields that change when layer N+1, the last, is the exit layer: their number, and lists with an entry for
    each, such as layer_types, in which the exit layer has that of layer L."""
    layers = config.num_hidden_layers
    lists = {key: value for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == layers}
    return {"num_hidden_layers": n + 1} | {key: [*value[:n], value[-1]] for key, value in lists.items()}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters under transformers 5's name and the older ones. Without these, engines that read only the older
    names would use their default theta. Parameters of their own for each type of layers have no older form."""
    if "rope_theta" not in parameters:
        return {"rope_parameters": parameters}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }


def _is_kept(name: str, n: int) -> bool:
    """Whether a tensor of the backbone is also part of the draft model."""
    if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store these tables, which are computed today
        return False
    return not name.startswith("model.layers.") or int(name.split(".")[2]) < n


def _write_weights(folder: Path, files: WeightFiles, head: ExitHead) -> None:
    """Write safetensors files of at most SHARD bytes, one in memory at a time, and their index for transformers."""
    new = {f"model.layers.{head.exit_layer}.{name}": name for name in head.weights}

    def read(name: str) -> Tensor:
        if name not in new:
            return files.rows(name)[:]
        return head.weights[new[name]].to(files.rows(f"model.layers.0.{new[name]}").dtype).contiguous()

    def bytes_of(name: str) -> int:
        like = files.rows(f"model.layers.0.{new[name]}" if name in new else name)
        return torch.Size(like.shape).numel() * like.dtype.itemsize

    names = [name for name in files if _is_kept(name, head.exit_layer)] + list(new)
    shards = _shards(names, bytes_of)
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: read(name) for name in shard}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes files that only their owner can read
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(bytes_of, names))}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(names: Iterable[str], bytes_of: Callable[[str], int]) -> list[list[str]]:
    """The names in order, split into parts of at most SHARD bytes; a larger tensor has a part of its own."""
    shards: list[list[str]] = []
    room = 0
    for name in names:
        if not shards or bytes_of(name) > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= bytes_of(name)
    return shards


def _json_of(backbone: Backbone, name: str) -> dict[str, Any]:
    """The contents of a JSON file of the backbone; {} if it has none of that name."""
    path = file_of(backbone, name)
    return json.loads(path.read_text()) if path else {}
