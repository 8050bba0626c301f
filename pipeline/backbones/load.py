"""Loads the frozen backbone and its tokenizer, for every stage that uses them unsharded.

Takes the `backbone` section and a device; gives transformers objects. A checkpoint that cannot be used raises
UserError, before any weights are loaded if the files' headers show the fault.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..config import Backbone, Distill, Machine
from ..errors import UserError
from ..inference.exit_head import HeadSpec, check_exit_layer, experts_of
from ..inference.families import family_of
from ..inference.text_part import KEY_MAPPING, has_text_part
from ..runs.anonymous import anonymous
from .gguf_files import public_name_of_gguf
from .source import explained, load_config, source_of, whole_config
from .weight_files import check_weights

SNAPSHOT = re.compile(r"models--(?P<repository>[^/]+)/snapshots/[^/]+")
"""The last parts of a snapshot's path in the Hub's cache, where `org/name` is written models--org--name."""


def device_of(name: str) -> torch.device:
    """The device of machine.device; `auto` is a GPU if there is one. Raises UserError for a GPU without CUDA."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"machine.device={name}: no CUDA device is visible here; use machine.device=cpu")
    return torch.device(name)


def rounds_by(device: torch.device) -> dict[str, Any]:
    """Device, threads and torch version: they determine floating-point rounding, which can decide near ties."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def engine_options(machine: Machine, device: torch.device) -> dict[str, Any]:
    """What the `machine` section says of a SplitBackbone: its options fixed_shapes and pack."""
    return {"fixed_shapes": machine.cuda_graphs and device.type == "cuda", "pack": machine.pack == "auto"}


def public_name(backbone: Backbone) -> str:
    """The backbone's name without private parts: a Hub id as it is, the last part of a local folder or URL.

    A snapshot in the Hub's cache has the name of its repository; a GGUF on this machine has the file's name.
    """
    if name := public_name_of_gguf(backbone):
        return name
    path = Path(backbone.name_or_path)
    if not path.is_dir():
        return anonymous(backbone.name_or_path, "name_or_path")
    for folder in (path.absolute(), path.resolve()):
        if snapshot := SNAPSHOT.fullmatch("/".join(folder.parts[-3:])):
            return snapshot["repository"].replace("--", "/", 1)
    return path.resolve().name


def load_tokenizer(backbone: Backbone) -> Any:
    with explained(backbone):
        return AutoTokenizer.from_pretrained(
            source_of(backbone), revision=backbone.revision, trust_remote_code=backbone.trust_remote_code
        )


def load_model(backbone: Backbone, device: torch.device, device_map: str | None = None) -> Any:
    """The frozen backbone in `backbone.dtype`, in eval mode, on `device` or distributed by accelerate's `device_map`.
    Of a model that reads images too only the text part is loaded.

    Raises UserError for a config or layers that are not supported and for weights that are damaged, incomplete or
    quantised.
    """
    check_weights(backbone)
    text = (
        {"config": load_config(backbone), "key_mapping": KEY_MAPPING} if has_text_part(whole_config(backbone)) else {}
    )
    transformers_logging.disable_progress_bar()
    with explained(backbone):
        model = AutoModelForCausalLM.from_pretrained(
            source_of(backbone),
            revision=backbone.revision,
            trust_remote_code=backbone.trust_remote_code,
            dtype=getattr(torch, backbone.dtype),
            device_map=device_map,
            **text,
        )
    model = model.requires_grad_(False).eval()
    model = model if device_map else model.to(device)
    family = family_of(model.config)
    if not family.is_fast:  # before hours of work, as only the layers themselves tell
        try:
            family.check(model)
        except ValueError as error:
            raise UserError(f"backbone.name_or_path={backbone.name_or_path}: {error}") from None
    return model


def head_spec(distill: Distill, config: Any) -> HeadSpec:
    """What distill.head says of the exit heads of a backbone with this config, its width worked out.

    Raises UserError for dense heads of a backbone that is no mixture of experts, or of a family of which they are not
    known, and for ones that are wider than all experts of a layer, from which they start."""
    try:
        spec = HeadSpec.of(distill.head, distill.dense_width, config)
    except ValueError as error:
        raise UserError(f"distill.head={distill.head}: {error}. Set distill.head=layer") from None
    if spec.kind == "dense" and spec.width > (widest := experts_of(config).widest):
        raise UserError(
            f"distill.dense_width={spec.width}: all experts of a layer together, from which the MLP starts, are "
            f"{widest} wide; give at most that"
        )
    return spec


def check_exit_layers(exit_layers: list[int], num_layers: int) -> None:
    """Raises UserError unless every exit layer N is from 1 to L - 1 (`num_layers` is L)."""
    for n in exit_layers:
        try:
            check_exit_layer(n, num_layers)
        except ValueError as error:
            raise UserError(f"distill.exit_layers={exit_layers}: {error}") from None
