"""Locates a checkpoint, and reads and checks its config before any weights are loaded.

Takes the `backbone` section of the config; gives a transformers config that the engine supports, or raises UserError
with one sentence on the fault and its remedy.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from ..config import Backbone
from ..errors import UserError, reason
from ..inference.families import check_config
from ..inference.text_part import text_config
from ..pocket.paths import BUILT_IN
from .damaged import AGAIN, damage_in
from .gguf_files import checkpoint_of, gguf_of

QUANTISED_BY = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json by which AutoGPTQ, AutoAWQ and ModelOpt mark quantised weights."""


def source_of(backbone: Backbone) -> str:
    """The checkpoint's folder or Hub id, as from_pretrained takes it; of a GGUF, the folder that it is dequantised to.

    Raises UserError for a GGUF that cannot be used.
    """
    if (file := gguf_of(backbone)) is not None:
        return str(checkpoint_of(backbone, file))
    return str(BUILT_IN.get(backbone.name_or_path, backbone.name_or_path))


@contextlib.contextmanager
def explained(backbone: Backbone) -> Iterator[None]:
    """Turns every exception that a library raises over the checkpoint's files into a UserError of one sentence.

    Libraries raise exceptions of many types there (SafetensorError, KeyError, ZeroDivisionError, a bare Exception from
    tokenizers), so the block must contain calls of libraries only. Out-of-memory errors pass unchanged.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = f"backbone.name_or_path={backbone.name_or_path}"
        folder = _folder(backbone)
        damage = damage_in(folder) if folder else None
        if folder and damage is None and gguf_of(backbone) is not None and not (folder / "config.json").is_file():
            damage = "config.json: is missing"
        if damage:
            raise UserError(f"{where}: {with_remedy(backbone, damage)}") from None
        hint = ""
        if "gguf" in backbone.name_or_path.lower() and backbone.gguf_file is None:
            hint = "; if GGUF files lie there, name one, as backbone.gguf_file=NAME.gguf"
        raise UserError(f"{where}: cannot be loaded: {reason(error)}{hint}") from None


def with_remedy(backbone: Backbone, damage: str) -> str:
    """The sentence on a damaged file of the checkpoint. One that was made of a GGUF need not be fetched again."""
    if gguf_of(backbone) is None:
        return damage
    what = damage.partition(f": {AGAIN}")[0]
    return f"the checkpoint that was made of it is damaged: {what}. Remove {source_of(backbone)}; it is made again"


def whole_config(backbone: Backbone, local: bool = False) -> Any:
    """The checkpoint's config as transformers reads it; `local` looks only on this machine. Raises UserError if it
    cannot be read."""
    with explained(backbone):
        return AutoConfig.from_pretrained(
            source_of(backbone),
            revision=backbone.revision,
            trust_remote_code=backbone.trust_remote_code,
            local_files_only=local,
        )


def load_config(backbone: Backbone, local: bool = False) -> Any:
    """The checkpoint's config, of one that reads images too that of its text part; `local` looks only on this machine.

    Raises UserError if it cannot be read, and for a feature that the engine does not compute exactly (families.py).
    """
    config = whole_config(backbone, local)
    custom = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    config = text_config(config)
    try:
        check_config(config)
    except ValueError as error:
        raise UserError(f"backbone.name_or_path={backbone.name_or_path}: {error}") from None
    if custom and backbone.trust_remote_code:
        raise UserError(
            f"backbone.trust_remote_code=true: {backbone.name_or_path} brings a model class of its own ({custom}), and "
            "its layers are not known here; set it to false to take transformers' own, or give another backbone"
        )
    folder = Path(source_of(backbone))
    for name in QUANTISED_BY:
        if (folder / name).is_file():
            raise UserError(
                f"backbone.name_or_path={backbone.name_or_path}: its {name} says that the weights are quantised, which "
                "is not supported; give the unquantised checkpoint that this one was made from"
            )
    return config


def _folder(backbone: Backbone) -> Path | None:
    """The folder of the checkpoint's files on this machine; None if they are not here."""
    folder = Path(source_of(backbone))
    if folder.is_dir():
        return folder
    with contextlib.suppress(Exception):
        where = {"revision": backbone.revision, "local_files_only": True}
        found = cached_file(source_of(backbone), "config.json", _raise_exceptions_for_missing_entries=False, **where)
        return Path(found).parent if found else None
    return None
